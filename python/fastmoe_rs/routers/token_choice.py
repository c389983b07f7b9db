"""Routers whose tokens pick K experts in other ways than the plain one, each of them a function of `routing`.

Legend: T tokens, H hidden size, E experts, K experts per token, S shared experts.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from .. import _check, routing
from ..routing.hashed import look_up
from ..routing.sinkhorn import default_score
from .base import WEIGHING, Router, RouterOutput, linear, only, uniform_


class NoisyTopKRouter(Router):
    """Noisy top-k gating (Shazeer et al., arXiv:1701.06538); see `routing.noisy_top_k_route`.

    Its output has the `load` for `losses.load_loss`.

    Args:
        hidden_size, num_experts, top_k: H, E, K.
        noise_epsilon: the least standard deviation of the noise.
        options: jitter, logit_noise, bias, device, dtype, as for `Router`.

    Parameters: besides `weight`, `noise_weight` [E, H], W_noise in the paper, zeros at first.
    """

    def __init__(
        self, hidden_size: int, num_experts: int, top_k: int, *, noise_epsilon: float = 1e-2, **options: Any
    ) -> None:
        only(options)
        super().__init__(hidden_size, num_experts, top_k, order="topk_score", **options)
        self.noise_epsilon = noise_epsilon
        self.noise_weight = nn.Parameter(torch.zeros_like(self.weight))

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.zeros_(self.noise_weight)

    def choose(self, logits_TE: Tensor, x_TH: Tensor) -> RouterOutput:
        ids, weights, scores, load = routing.noisy_top_k_route(
            logits_TE,
            linear(x_TH, self.noise_weight),
            self.top_k,
            training=self.training,
            noise_epsilon=self.noise_epsilon,
            seed=self.seed,
        )
        return RouterOutput(ids, weights, scores, logits_TE, load=load)


class SinkhornRouter(Router):
    """In training it chooses by a balanced assignment (arXiv:2202.01169); see `routing.sinkhorn_route`.

    Args:
        hidden_size, num_experts, top_k: H, E, K.
        iterations: see `routing.sinkhorn`.
        options: as for `Router`, without selection_bias and groups; the score is "sigmoid" for K = 1 and else
            "softmax", as in Megatron.
    """

    def __init__(
        self, hidden_size: int, num_experts: int, top_k: int, *, iterations: int = 30, **options: Any
    ) -> None:
        only(options, *WEIGHING, "expert_scale")
        options.setdefault("score", default_score(top_k))
        super().__init__(hidden_size, num_experts, top_k, **options)
        self.iterations = iterations

    def choose(self, logits_TE: Tensor, x_TH: Tensor) -> RouterOutput:
        if not self.training:
            return super().choose(logits_TE, x_TH)
        ids = routing.sinkhorn_route(logits_TE, self.top_k, iterations=self.iterations).ids
        return self.chosen(logits_TE, x_TH, ids)


class HashRouter(Router):
    """Tokens go where their place in the vocabulary sends them (arXiv:2106.04426), weighed by the logits.

    Call the layer with `token_ids=`, integers of T elements.

    Args:
        hidden_size, num_experts, top_k: H, E, K.
        vocab_size: V.
        table_seed: decides the table, see `routing.hash_table`.
        options: as for `Router`, without selection_bias and groups.

    Buffers: besides Router's, `table` int64 [V, K].
    """

    table: Tensor

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        *,
        vocab_size: int,
        table_seed: int = 0,
        **options: Any,
    ) -> None:
        only(options, *WEIGHING, "expert_scale")
        super().__init__(hidden_size, num_experts, top_k, **options)
        _check.positive(vocab_size=vocab_size)
        self.table_seed = table_seed
        device = self.weight.device
        self.register_buffer("table", torch.empty(vocab_size, top_k, dtype=torch.int64, device=device))
        self._fill_table()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self._fill_table()

    def _fill_table(self) -> None:
        vocab_size, top_k = self.table.shape
        experts = self.weight.shape[0]
        self.table.copy_(routing.hash_table(vocab_size, experts, top_k, seed=self.table_seed))

    def choose(  # type: ignore[override]
        self, logits_TE: Tensor, x_TH: Tensor, *, token_ids: Tensor
    ) -> RouterOutput:
        return self.chosen(logits_TE, x_TH, look_up(self.table, token_ids, len(logits_TE)))


class SparseMixerRouter(Router):
    """SparseMixer-v2, the router of Phi-3.5-MoE (GRIN, arXiv:2409.12136); see `routing.sparsemixer_route`.

    Args:
        hidden_size, num_experts, top_k: H, E, K.
        nearness: how near the largest logit an expert must be to be picked.
        options: jitter, logit_noise, bias, device, dtype, as for `Router`.
    """

    def __init__(
        self, hidden_size: int, num_experts: int, top_k: int, *, nearness: float = 0.01, **options: Any
    ) -> None:
        only(options)
        super().__init__(hidden_size, num_experts, top_k, **options)
        self.nearness = nearness

    def choose(self, logits_TE: Tensor, x_TH: Tensor, *, ids_TK: Tensor | None = None) -> RouterOutput:
        picked = routing.sparsemixer_route(
            logits_TE,
            self.top_k,
            nearness=self.nearness,
            training=self.training,
            seed=self.seed,
            ids_TK=ids_TK,
        )
        return RouterOutput(*picked, logits_TE)

    def chosen(self, logits_TE: Tensor, x_TH: Tensor, ids_TK: Tensor) -> RouterOutput:
        return self.choose(logits_TE, x_TH, ids_TK=ids_TK)


class SharedRouter(Router):
    """Picks by sigmoid score, and weighs S shared experts together with the picked ones (Inkling).

    See `routing.route_with_shared`. `nn.MoE` divides the hidden units of its shared expert among the S.

    Args:
        hidden_size, num_experts, top_k: H, E, K.
        num_shared: S.
        scale: sum of all weights of a token.
        options: selection_bias, jitter, logit_noise, bias, device, dtype, as for `Router`.

    Parameters: besides `weight`, `shared_weight` [S, H], which gives the logits of the shared experts.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        *,
        num_shared: int = 1,
        scale: float = 1.0,
        **options: Any,
    ) -> None:
        only(options, "selection_bias")
        super().__init__(hidden_size, num_experts, top_k, score="sigmoid", scale=scale, **options)
        _check.positive(num_shared=num_shared)
        self.shared_weight = nn.Parameter(self.weight.new_empty(num_shared, hidden_size))
        uniform_(self.shared_weight)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        uniform_(self.shared_weight)

    def choose(self, logits_TE: Tensor, x_TH: Tensor, *, ids_TK: Tensor | None = None) -> RouterOutput:
        ids, weights, scores, shared_weights = routing.route_with_shared(
            torch.cat([logits_TE, linear(x_TH, self.shared_weight)], dim=1),
            len(self.shared_weight),
            self.top_k,
            scale=self.options["scale"],
            bias=self.selection_bias,
            ids_TK=ids_TK,
        )
        return RouterOutput(ids, weights, scores, logits_TE, shared_weights=shared_weights)

    def chosen(self, logits_TE: Tensor, x_TH: Tensor, ids_TK: Tensor) -> RouterOutput:
        return self.choose(logits_TE, x_TH, ids_TK=ids_TK)


class ProductKeyRouter(Router):
    """The K best of N * N experts by sums of N row and N column logits; see `routing.product_key_route`.

    Args:
        hidden_size, num_experts, top_k: H, E = N * N, K.
        options: score, renormalize, renormalize_eps, scale, softcap, jitter, logit_noise (of the 2N logits),
            bias, device, dtype, as for `Router`.

    Parameters: `weight` [2N, H] and, with a bias, `bias` [2N]: rows, then columns.
    """

    def __init__(self, hidden_size: int, num_experts: int, top_k: int, **options: Any) -> None:
        keys = math.isqrt(max(num_experts, 0))
        if keys * keys != num_experts:
            _check.wanted("num_experts", num_experts, "a square number")
        _check.top_k(top_k, num_experts)
        only(options, *(name for name in WEIGHING if name != "order"))
        super().__init__(hidden_size, 2 * keys, 1, order="topk_score", **options)
        self.top_k = top_k

    def choose(self, logits_T2N: Tensor, x_TH: Tensor) -> RouterOutput:
        rows_TN, columns_TN = logits_T2N.chunk(2, dim=1)
        ids = routing.product_key_route(rows_TN, columns_TN, self.top_k).ids
        return self.chosen(logits_T2N, x_TH, ids)

    def chosen(self, logits_T2N: Tensor, x_TH: Tensor, ids_TK: Tensor) -> RouterOutput:
        rows_TN, columns_TN = logits_T2N.chunk(2, dim=1)
        logits_TE = (rows_TN[:, :, None] + columns_TN[:, None, :]).flatten(1)
        return super().chosen(logits_TE, x_TH, ids_TK)

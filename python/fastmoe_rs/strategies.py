"""Routers that choose experts in other ways than the plain one, each of them a function of `routing`.

Legend: T tokens, H hidden size, E experts, K experts per token, S shared experts, C capacity of an expert.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from . import _check, routing
from .functional import Routing
from .routers import Router, RouterOutput, linear, uniform_
from .routing.capacity import QUEUES, gshard_choice
from .routing.token_rounding import ROUNDINGS


class CapacityRouter(Router):
    """`Router` whose experts refuse routes beyond a capacity; with K = 1 that of Switch Transformers.

    Args:
        hidden_size, num_experts, top_k: H, E, K.
        capacity_factor: an expert takes at most ceil(capacity_factor * K * tokens / E) routes of a group.
        queue, group_size: who comes first, and tokens of a group; see `routing.drop_over_capacity`.
        options: as for `Router`.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        *,
        capacity_factor: float,
        queue: str = "token",
        group_size: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(hidden_size, num_experts, top_k, **options)
        _check.one_of("queue", queue, QUEUES)
        _check.positive(group_size=1 if group_size is None else group_size)
        self.capacity_factor, self.queue, self.group_size = _factor(capacity_factor), queue, group_size

    def choose(self, logits_TE: Tensor, x_TH: Tensor) -> RouterOutput:
        output = super().choose(logits_TE, x_TH)
        return self.seated(output, output.ids)

    def seated(self, output: RouterOutput, wanted_TK: Tensor) -> RouterOutput:
        """The output with seats for those of the routes wanted that experts have room for."""
        tokens, experts = output.scores.shape
        tokens = self.group_size or tokens
        seats = routing.drop_over_capacity(
            wanted_TK,
            experts,
            math.ceil(self.capacity_factor * self.top_k * tokens / experts),
            queue=self.queue,
            weights=output.scores.gather(1, output.ids),
            group_size=self.group_size,
        )
        return output._replace(seats=seats)


class GShardRouter(CapacityRouter):
    """Top-2 with capacity and a second choice that may be left to chance (GShard, arXiv:2006.16668).

    Args:
        hidden_size, num_experts: H, E.
        second: see `routing.gshard_route`. A second choice that chance takes away counts as dropped.
        options: as for `CapacityRouter`; `renormalize` (before dropping) is on by default.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        *,
        capacity_factor: float = 1.0,
        second: str = "random",
        queue: str = "choice",
        renormalize: bool = True,
        **options: Any,
    ) -> None:
        _check.one_of("second", second, ("all", "random", "sampling"))
        options |= {"capacity_factor": capacity_factor, "queue": queue, "renormalize": renormalize}
        super().__init__(hidden_size, num_experts, 2, **options)
        self.second = second

    def choose(self, logits_TE: Tensor, x_TH: Tensor) -> RouterOutput:
        ids, wanted, weights, scores = gshard_choice(
            logits_TE,
            second=self.second,
            renormalize=self.options["renormalize"],
            training=self.training,
            seed=self.seed,
        )
        return self.seated(RouterOutput(ids, weights, scores, logits_TE), wanted)


class NoisyTopKRouter(Router):
    """Noisy top-k gating (Shazeer et al., arXiv:1701.06538); see `routing.noisy_top_k_route`.

    Its output has the `load` for `losses.load_loss`.

    Args:
        hidden_size, num_experts, top_k: H, E, K.
        noise_epsilon: the least standard deviation of the noise.
        options: jitter, bias, device, dtype, as for `Router`.

    Parameters: besides `weight`, `noise_weight` [E, H], W_noise in the paper, zeros at first.
    """

    def __init__(
        self, hidden_size: int, num_experts: int, top_k: int, *, noise_epsilon: float = 1e-2, **options: Any
    ) -> None:
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


class ExpertChoiceRouter(Router):
    """Every expert takes the C tokens that it scores best (arXiv:2202.09368); ids are [T, E].

    Args:
        hidden_size, num_experts: H, E.
        capacity_factor: experts that a token has on average; C = ceil(capacity_factor * T / E).
        options: score, jitter, bias, device, dtype, as for `Router`.
    """

    def __init__(
        self, hidden_size: int, num_experts: int, *, capacity_factor: float = 2.0, **options: Any
    ) -> None:
        super().__init__(hidden_size, num_experts, 1, **options)
        self.capacity_factor = _factor(capacity_factor)

    def capacity(self, tokens: int) -> int:
        """C."""
        return min(math.ceil(self.capacity_factor * tokens / self.weight.shape[0]), tokens)

    def rows(self, tokens: int) -> int:
        """All routes that there are, of the T * E that ids have room for."""
        return self.weight.shape[0] * self.capacity(tokens)

    def choose(self, logits_TE: Tensor, x_TH: Tensor) -> RouterOutput:
        score = self.options.get("score", "softmax")
        picked = routing.expert_choice_route(logits_TE, self.capacity(len(logits_TE)), score=score)
        return RouterOutput(*picked, logits_TE)


class SinkhornRouter(Router):
    """In training it chooses by a balanced assignment (arXiv:2202.01169); see `routing.sinkhorn_route`.

    Args:
        hidden_size, num_experts, top_k: H, E, K.
        iterations: see `routing.sinkhorn`.
        options: as for `Router`; the score is "sigmoid" for K = 1 and else "softmax", as in Megatron.
    """

    def __init__(
        self, hidden_size: int, num_experts: int, top_k: int, *, iterations: int = 30, **options: Any
    ) -> None:
        options.setdefault("score", "sigmoid" if top_k == 1 else "softmax")
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
        options: as for `Router`.

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
        if token_ids.numel() != len(logits_TE):
            wanted = f"{len(logits_TE)} elements, one per token"
            _check.wanted("token_ids", f"shape {tuple(token_ids.shape)}", wanted)
        return self.chosen(logits_TE, x_TH, self.table[token_ids.reshape(-1)])


class SparseMixerRouter(Router):
    """SparseMixer-v2, the router of Phi-3.5-MoE (GRIN, arXiv:2409.12136); see `routing.sparsemixer_route`.

    Args:
        hidden_size, num_experts, top_k: H, E, K.
        nearness: how near the largest logit an expert must be to be picked, `jitter` there.
        options: jitter (of the input), bias, device, dtype, as for `Router`.
    """

    def __init__(
        self, hidden_size: int, num_experts: int, top_k: int, *, nearness: float = 0.01, **options: Any
    ) -> None:
        super().__init__(hidden_size, num_experts, top_k, **options)
        self.nearness = nearness

    def choose(self, logits_TE: Tensor, x_TH: Tensor, *, ids_TK: Tensor | None = None) -> RouterOutput:
        picked = routing.sparsemixer_route(
            logits_TE,
            self.top_k,
            jitter=self.nearness,
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
        options: jitter, bias, selection_bias, device, dtype, as for `Router`.

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


class TokenRoundingRouter(Router):
    """In training, every expert gets whole tiles of tokens (SonicMoE, arXiv:2512.14080).

    See `routing.round_tokens`. Every route weighs what its expert scores, one that rounding added too:
    renormalized or scaled weights depend on which routes those are, and a replay cannot tell.

    Args:
        hidden_size, num_experts, top_k: H, E, K.
        tile, rounding: see `routing.round_tokens`.
        options: as for `Router`, without order, renormalize, scale and expert_scale.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        *,
        tile: int = 64,
        rounding: str = "nearest",
        **options: Any,
    ) -> None:
        _refuse(options, "order", "renormalize", "renormalize_eps", "scale", "expert_scale")
        super().__init__(hidden_size, num_experts, top_k, **options)
        _check.positive(tile=tile)
        _check.one_of("rounding", rounding, ROUNDINGS)
        self.tile, self.rounding = tile, rounding

    def rows(self, tokens: int) -> int:
        """The most routes that rounding leaves, of the T * E that ids have room for."""
        return tokens * self.top_k + self.tile * self.weight.shape[0]

    def choose(self, logits_TE: Tensor, x_TH: Tensor) -> RouterOutput:
        output = super().choose(logits_TE, x_TH)
        if not self.training:
            return output
        picked = Routing(output.ids, output.weights, output.scores)
        return RouterOutput(*routing.round_tokens(picked, self.tile, rounding=self.rounding), logits_TE)


class ProductKeyRouter(Router):
    """The K best of N * N experts by sums of N row and N column logits; see `routing.product_key_route`.

    Args:
        hidden_size, num_experts, top_k: H, E = N * N, K.
        options: score, renormalize, scale, softcap, jitter, bias, device, dtype, as for `Router`.

    Parameters: `weight` [2N, H] and, with a bias, `bias` [2N]: rows, then columns.
    """

    def __init__(self, hidden_size: int, num_experts: int, top_k: int, **options: Any) -> None:
        keys = math.isqrt(max(num_experts, 0))
        if keys * keys != num_experts:
            _check.wanted("num_experts", num_experts, "a square number")
        if not 1 <= top_k <= num_experts:
            _check.wanted("top_k", top_k, f"1 to {num_experts}")
        _refuse(options, "order", "n_group", "topk_group", "selection_bias", "expert_scale", "logit_noise")
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


def _refuse(options: dict[str, Any], *names: str) -> None:
    for name in names:
        if name in options:
            _check.wanted(name, repr(options[name]), "no such option of this router")


def _factor(capacity_factor: float) -> float:
    _check.more_than_0("capacity_factor", capacity_factor)
    return capacity_factor

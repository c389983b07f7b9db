"""Routers that limit or set how many tokens an expert gets, each of them a function of `routing`.

Legend: T tokens, H hidden size, E experts, K experts per token, C capacity of an expert.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from .. import _check, routing
from ..functional import Routing
from ..routing.capacity import QUEUES, SECONDS, gshard_choice
from ..routing.token_rounding import ROUNDINGS
from .base import GROUPS, Router, RouterOutput, only


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
        _check.more_than_0("capacity_factor", capacity_factor)
        _check.one_of("queue", queue, QUEUES)
        _check.positive(group_size=1 if group_size is None else group_size)
        self.capacity_factor, self.queue, self.group_size = capacity_factor, queue, group_size

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
        capacity_factor, queue, group_size: see `CapacityRouter`.
        renormalize: divide the two weights by their sum, before dropping.
        options: jitter, logit_noise, bias, device, dtype, as for `Router`.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        *,
        capacity_factor: float = 1.0,
        second: str = "random",
        queue: str = "choice",
        group_size: int | None = None,
        renormalize: bool = True,
        **options: Any,
    ) -> None:
        _check.one_of("second", second, SECONDS)
        only(options)
        super().__init__(
            hidden_size,
            num_experts,
            2,
            capacity_factor=capacity_factor,
            queue=queue,
            group_size=group_size,
            renormalize=renormalize,
            **options,
        )
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


class ExpertChoiceRouter(Router):
    """Every expert takes the C tokens that it scores best (arXiv:2202.09368); ids are [T, E].

    Args:
        hidden_size, num_experts: H, E.
        capacity_factor: experts that a token has on average; C = ceil(capacity_factor * T / E).
        options: score, jitter, logit_noise, bias, device, dtype, as for `Router`.
    """

    def __init__(
        self, hidden_size: int, num_experts: int, *, capacity_factor: float = 2.0, **options: Any
    ) -> None:
        only(options, "score")
        super().__init__(hidden_size, num_experts, 1, **options)
        _check.more_than_0("capacity_factor", capacity_factor)
        self.capacity_factor = capacity_factor

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
        only(options, "score", "softcap", "selection_bias", *GROUPS)
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

"""The Mixture-of-Experts layer as modules.

Legend: T tokens, H hidden size, I intermediate size, E experts, K experts per token, C capacity of an expert.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import _check, functional, telemetry
from .plan import RoutingPlan
from .reference import GATED, UNGATED

__all__ = ["Experts", "MoE", "Router", "RouterOutput", "RoutingStats", "SharedExpert"]


class RouterOutput(NamedTuple):
    """`ids` int64 [T, K]; `weights` [T, K] and `scores` [T, E] in float32 or float64; the `logits` [T, E]."""

    ids: Tensor
    weights: Tensor
    scores: Tensor
    logits: Tensor


class Router(nn.Module):
    """A linear layer that scores E experts for every token and picks K.

    Args:
        hidden_size: H.
        num_experts: E.
        top_k: K.
        score, order, renormalize, scale: see `functional.route`.
        jitter: in training, the input is multiplied by noise from [1 - jitter, 1 + jitter] (Switch
            Transformers, arXiv:2101.03961, section 2.2).
        bias: add a learned bias [E] to the logits, as gpt-oss does.
        selection_bias: keep a buffer `selection_bias` [E] in float32, zeros at first, added for the choice of
            experts only. It has no gradient; whoever balances the load by it (arXiv:2408.15664) writes to it.
    """

    selection_bias: Tensor | None

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        *,
        score: str = "softmax",
        order: str = "score_topk",
        renormalize: bool = False,
        scale: float = 1.0,
        jitter: float = 0.0,
        bias: bool = False,
        selection_bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check.positive(hidden_size=hidden_size, num_experts=num_experts)
        functional._check_routing(top_k, num_experts, score, order)
        if not 0 <= jitter < 1:
            _check.wanted("jitter", jitter, "at least 0 and less than 1")
        self.top_k = top_k
        self.score, self.order, self.renormalize, self.scale = score, order, renormalize, scale
        self.jitter = jitter
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(num_experts, device=device, dtype=dtype)) if bias else None
        self.register_buffer(
            "selection_bias",
            torch.empty(num_experts, device=device, dtype=torch.float32) if selection_bias else None,
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weight as `nn.Linear` does; biases are 0."""
        _uniform_(self.weight)
        for bias in (self.bias, self.selection_bias):
            if bias is not None:
                nn.init.zeros_(bias)

    def forward(self, x_TH: Tensor, ids_TK: Tensor | None = None) -> RouterOutput:
        """Route x [T, H]; with `ids_TK`, weigh these experts instead of choosing."""
        _check.like("x", x_TH, "the weight", self.weight, dtype=False)
        if self.jitter and self.training:
            x_TH = x_TH * torch.empty_like(x_TH).uniform_(1 - self.jitter, 1 + self.jitter)
        logits = F.linear(x_TH, self.weight, self.bias)
        options: dict[str, Any] = {
            "score": self.score,
            "order": self.order,
            "renormalize": self.renormalize,
            "scale": self.scale,
        }
        if ids_TK is None:
            routing = functional.route(logits, self.top_k, **options, bias=self.selection_bias)
            return RouterOutput(*routing, logits)
        scores = functional.route(logits, self.top_k, **options).scores
        return RouterOutput(ids_TK, functional.route_weights(logits, ids_TK, **options), scores, logits)

    def extra_repr(self) -> str:
        experts, hidden = self.weight.shape
        return (
            f"{hidden}, {experts}, top_k={self.top_k}, score={self.score!r}, order={self.order!r}, "
            f"renormalize={self.renormalize}, scale={self.scale}, jitter={self.jitter}, "
            f"bias={self.bias is not None}, selection_bias={self.selection_bias is not None}"
        )


class Experts(nn.Module):
    """E gated MLPs: the weights that `functional.moe_mlp` takes.

    Args:
        hidden_size: H.
        intermediate_size: I.
        num_experts: E.
        activation: see `functional.moe_mlp`.
        bias: give both products of every expert a bias.

    Parameters: w1 [E, 2I, H] ([E, I, H] when the activation has no gate), w2 [E, H, I]; with a bias b1
    [E, 2I] and b2 [E, H].
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        *,
        activation: str = "swiglu",
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check.positive(hidden_size=hidden_size, intermediate_size=intermediate_size, num_experts=num_experts)
        width = _width(activation, intermediate_size)
        self.activation = activation

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(num_experts, *shape, device=device, dtype=dtype))

        self.w1 = parameter(width, hidden_size)
        self.w2 = parameter(hidden_size, intermediate_size)
        self.b1 = parameter(width) if bias else None
        self.b2 = parameter(hidden_size) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights of every expert as `nn.Linear` does; biases are 0."""
        _uniform_(self.w1)
        _uniform_(self.w2)
        for bias in (self.b1, self.b2):
            if bias is not None:
                nn.init.zeros_(bias)

    def forward(
        self, x_TH: Tensor, ids_TK: Tensor | None, weights_TK: Tensor, plan: RoutingPlan | None = None
    ) -> Tensor:
        """[T, H]; see `functional.moe_mlp`."""
        return functional.moe_mlp(
            x_TH,
            ids_TK,
            weights_TK,
            self.w1,
            self.w2,
            b1=self.b1,
            b2=self.b2,
            activation=self.activation,
            plan=plan,
        )

    def extra_repr(self) -> str:
        experts, hidden, intermediate = self.w2.shape
        return (
            f"{hidden}, {intermediate}, {experts}, activation={self.activation!r}, bias={self.b1 is not None}"
        )


class SharedExpert(nn.Module):
    """The dense MLP that every token goes through, with the activation and layout of an expert."""

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        *,
        activation: str = "swiglu",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check.positive(hidden_size=hidden_size, intermediate_size=intermediate_size)
        self.activation = activation
        width = _width(activation, intermediate_size)
        self.w1 = nn.Parameter(torch.empty(width, hidden_size, device=device, dtype=dtype))
        self.w2 = nn.Parameter(torch.empty(hidden_size, intermediate_size, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights as `nn.Linear` does."""
        _uniform_(self.w1)
        _uniform_(self.w2)

    def forward(self, x_TH: Tensor) -> Tensor:
        """[T, H] to [T, H]."""
        return F.linear(functional.activate(F.linear(x_TH, self.w1), self.activation), self.w2)

    def extra_repr(self) -> str:
        hidden, intermediate = self.w2.shape
        return f"{hidden}, {intermediate}, activation={self.activation!r}"


@dataclass(frozen=True)
class RoutingStats:
    """How one forward of a `MoE` routed its tokens, as tensors on its device, computed when asked for.

    Attributes:
        router: what the router gave; `router.logits` and `router.ids` are what the auxiliary losses take.
        plan: the plan that the experts followed.
    """

    router: RouterOutput
    plan: RoutingPlan

    @property
    def counts(self) -> Tensor:
        """int32 [E], routes that every expert served."""
        return self.plan.counts

    @property
    def load(self) -> Tensor:
        """float32 [E], the share of the routes that asked for an expert, dropped ones included; sums to 1."""
        ids = self.plan.ids.reshape(-1).long()
        routes = torch.zeros(self.plan.num_experts, device=ids.device)
        return telemetry.load(routes.scatter_add(0, ids, torch.ones_like(ids, dtype=routes.dtype)))

    @property
    def dropped(self) -> Tensor:
        """float32 scalar, the share of the routes that the capacity dropped."""
        return (self.plan.inverse < 0).sum() / max(self.plan.inverse.numel(), 1)

    @property
    def entropy(self) -> Tensor:
        """float32 scalar, see `telemetry.load_entropy`."""
        return telemetry.load_entropy(self.load)

    @property
    def max_vio(self) -> Tensor:
        """float32 scalar, see `telemetry.max_vio`."""
        return telemetry.max_vio(self.load)


class MoE(nn.Module):
    """A Mixture-of-Experts layer: router, experts and, if wanted, a shared expert that is always added.

    Args:
        hidden_size: H.
        intermediate_size: I, of every expert.
        num_experts: E.
        top_k: K.
        activation: see `functional.moe_mlp`.
        score, order, renormalize, scale: see `functional.route`.
        shared_intermediate_size: the intermediate size of the shared expert; None for no shared expert.
        jitter: see `Router`.
        capacity_factor: an expert takes at most ceil(capacity_factor * T * K / E) rows, the first ones; the
            others add nothing. None drops nothing.
        bias: give the experts biases.
        selection_bias: see `Router`.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        top_k: int,
        *,
        activation: str = "swiglu",
        score: str = "softmax",
        order: str = "score_topk",
        renormalize: bool = False,
        scale: float = 1.0,
        shared_intermediate_size: int | None = None,
        jitter: float = 0.0,
        capacity_factor: float | None = None,
        bias: bool = False,
        selection_bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if capacity_factor is not None and capacity_factor <= 0:
            _check.wanted("capacity_factor", capacity_factor, "None or more than 0")
        self.capacity_factor = capacity_factor
        self.router = Router(
            hidden_size,
            num_experts,
            top_k,
            score=score,
            order=order,
            renormalize=renormalize,
            scale=scale,
            jitter=jitter,
            selection_bias=selection_bias,
            device=device,
            dtype=dtype,
        )
        self.experts = Experts(
            hidden_size,
            intermediate_size,
            num_experts,
            activation=activation,
            bias=bias,
            device=device,
            dtype=dtype,
        )
        self.shared = None
        if shared_intermediate_size is not None:
            self.shared = SharedExpert(
                hidden_size, shared_intermediate_size, activation=activation, device=device, dtype=dtype
            )
        self.counters: telemetry.Counters | None = None

    def forward(
        self, x: Tensor, *, plan: RoutingPlan | None = None, return_stats: bool = False
    ) -> Tensor | tuple[Tensor, RoutingStats]:
        """[..., H] to [..., H].

        Args:
            x: [..., H]; the leading dimensions together are T.
            plan: follow this plan, recorded in an earlier forward of T tokens, instead of choosing experts.
                Routing weights come from the live logits.
            return_stats: return (output, `RoutingStats`).
        """
        x_TH = x.reshape(-1, x.shape[-1])
        router = self.router(x_TH, None if plan is None else plan.ids)
        if plan is None:
            plan = RoutingPlan.from_ids(
                router.ids, self.experts.w2.shape[0], capacity=self._capacity(router.ids.numel())
            )
        if self.counters is not None:
            self.counters.add(router.ids, router.logits, plan.inverse < 0)
        y_TH = self.experts(x_TH, router.ids, router.weights, plan=plan)
        if self.shared is not None:
            y_TH = y_TH + self.shared(x_TH)
        y = y_TH.reshape(x.shape)
        return (y, RoutingStats(router, plan)) if return_stats else y

    def stats(self) -> telemetry.Stats:
        """How the layer routed since it is watched, or since the last reset; see `fastmoe_rs.watch`.

        Raises:
            RuntimeError: nobody watches it.
        """
        if self.counters is None:
            raise RuntimeError("stats: nothing was counted, call fastmoe_rs.watch(model) before the forward")
        return self.counters.stats()

    def _capacity(self, routes: int) -> int | None:
        if self.capacity_factor is None:
            return None
        return math.ceil(self.capacity_factor * routes / self.experts.w2.shape[0])

    def extra_repr(self) -> str:
        return "" if self.capacity_factor is None else f"capacity_factor={self.capacity_factor}"


def _width(activation: str, intermediate_size: int) -> int:
    _check.one_of("activation", activation, GATED + UNGATED)
    return 2 * intermediate_size if activation in GATED else intermediate_size


def _uniform_(weight: Tensor) -> None:
    """Between -1 and 1 over the square root of the inputs, the default of `nn.Linear`."""
    bound = weight.shape[-1] ** -0.5
    nn.init.uniform_(weight, -bound, bound)

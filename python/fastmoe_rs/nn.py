"""The Mixture-of-Experts layer as a module, and what its forwards tell; all other modules are here too.

A size or option that makes no sense is a ValueError, one of another type, or of an unknown name, a TypeError,
when the module is made; forwards raise as the functions of `functional` do. `device` and `dtype` are those of
the parameters, drawn as `nn.Linear` draws its own.

Legend: T tokens, H hidden size, I intermediate size, E experts, K experts per token, C capacity of an expert.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import _check, telemetry
from .experts import Experts, SharedExpert
from .load import Load
from .plan import RoutingPlan
from .routers import (
    CapacityRouter,
    ExpertChoiceRouter,
    GShardRouter,
    HashRouter,
    NoisyTopKRouter,
    ProductKeyRouter,
    Router,
    RouterOutput,
    SharedRouter,
    SinkhornRouter,
    SparseMixerRouter,
    TokenRoundingRouter,
)
from .routing import identity_weight

__all__ = [
    "CapacityRouter",
    "ExpertChoiceRouter",
    "Experts",
    "GShardRouter",
    "HashRouter",
    "MoE",
    "NoisyTopKRouter",
    "ProductKeyRouter",
    "Router",
    "RouterOutput",
    "RoutingStats",
    "SharedExpert",
    "SharedRouter",
    "SinkhornRouter",
    "SparseMixerRouter",
    "TokenRoundingRouter",
    "collect_stats",
]


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
    def routes(self) -> Tensor:
        """int64 [E], routes that asked for an expert, dropped ones included."""
        return Load.of(self.router.ids, self.plan.num_experts).routes[0]

    @property
    def load(self) -> Tensor:
        """float32 [E], the share of those routes; sums to 1."""
        return telemetry.load(self.routes)

    @property
    def dropped(self) -> Tensor:
        """float32 scalar, the share of those routes that the capacity dropped."""
        return _dropped(self.router.ids, self.plan).sum() / self.routes.sum().clamp(min=1)

    @property
    def load_entropy(self) -> Tensor:
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
        top_k: K; None with a router of your own.
        router: a module as described in `routers`; None makes a `Router` of the `routing` options.
        activation: see `functional.moe_mlp`.
        shared_intermediate_size: the intermediate size of the shared expert; None for no shared expert.
        shared_gate: multiply the shared expert's output by the sigmoid of a learned map of x (Qwen2-MoE).
        identity_experts: Z experts more, with ids from E on, whose output is their input (LongCat-Flash,
            arXiv:2509.01322); a router of your own has E + Z experts. Ids from E on are else experts that
            add nothing.
        capacity_factor: an expert takes at most ceil(capacity_factor * T * K / E) rows, the first ones; the
            others add nothing. None drops nothing.
        bias: give the experts biases.
        routing: score, order, renormalize, scale, jitter, selection_bias and so on, see `Router`.

    Warns:
        UserWarning: the weight of the one expert of a token is always 1 (K = 1 with `renormalize`, or with a
            softmax of the picked logits), so that the output has no gradient in the router.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        top_k: int | None = None,
        *,
        router: nn.Module | None = None,
        activation: str = "swiglu",
        shared_intermediate_size: int | None = None,
        shared_gate: bool = False,
        identity_experts: int = 0,
        capacity_factor: float | None = None,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **routing: Any,
    ) -> None:
        super().__init__()
        _check.positive(num_experts=num_experts)
        if capacity_factor is not None:
            _check.more_than_0("capacity_factor", capacity_factor)
        _check.whole("identity_experts", identity_experts)
        if identity_experts < 0:
            _check.wanted("identity_experts", identity_experts, "at least 0")
        if shared_gate and shared_intermediate_size is None:
            _check.wanted("shared_gate", True, "False without a shared_intermediate_size")
        self.hidden_size, self.num_experts, self.identity_experts = hidden_size, num_experts, identity_experts
        self.capacity_factor = capacity_factor
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        if router is None:
            if top_k is None:
                _check.wanted("top_k", None, "K, or a router")
            router = Router(hidden_size, num_experts + identity_experts, top_k, **routing, **made)
        elif top_k is not None or routing:
            given = sorted(routing) if top_k is None else ["top_k", *sorted(routing)]
            _check.wanted("router", f"a router and {', '.join(given)}", "one or the other")
        _check.module("router", router)
        _warn_of_constant_weights(router)
        self.router = router
        self.experts = Experts(
            hidden_size, intermediate_size, num_experts, activation=activation, bias=bias, **made
        )
        self.shared = self.shared_gate = None
        if shared_intermediate_size is not None:
            self.shared = SharedExpert(hidden_size, shared_intermediate_size, activation=activation, **made)
        if shared_gate:
            self.shared_gate = nn.Linear(hidden_size, 1, bias=False, **made)
        self.counters: telemetry.Counters | None = None
        self.kept: list[RoutingStats] | None = None  # within a block of `collect_stats`, its list

    def forward(
        self, x: Tensor, *, plan: RoutingPlan | None = None, return_stats: bool = False, **inputs: Any
    ) -> Tensor | tuple[Tensor, RoutingStats]:
        """[..., H] to [..., H].

        Args:
            x: [..., H]; the leading dimensions together are T.
            plan: follow this plan, recorded in an earlier forward of T tokens, instead of choosing experts.
                Routing weights come from the live logits.
            return_stats: return (output, `RoutingStats`).
            inputs: what the router wants besides x, such as the `token_ids` of a `HashRouter`.

        Raises:
            ValueError, TypeError: x is no tensor [..., H], or as `functional.moe_mlp` says.
        """
        self._check_input(x)
        x_TH = x if x.ndim == 2 else x.reshape(-1, x.shape[-1])
        if plan is not None:
            _check_followed(plan, len(x_TH))
        given = () if plan is None else (plan.ids,)
        router = RouterOutput.of(self.router(x_TH, *given, **inputs))
        if plan is None:
            plan = self._plan(router)
        if self.counters is not None:
            self.counters.add(router.ids, router.logits, _dropped(router.ids, plan))
        if self.kept is not None and not telemetry.recomputing():
            self._warn_without_graph(router)
            self.kept.append(RoutingStats(router, plan))
        y_TH = self.experts(x_TH, router.ids, router.weights, plan=plan)
        if self.identity_experts:
            weight_T = identity_weight(router.ids, router.weights, self.num_experts)
            y_TH = y_TH + (weight_T[:, None] * x_TH).to(y_TH.dtype)
        if self.shared is not None:
            weights_TS = router.shared_weights
            if self.shared_gate is not None:
                weights_TS = self.shared_gate(x_TH).sigmoid()
            y_TH = y_TH + self.shared(x_TH, weights_TS)
        # No view for autograd: one that is changed in place loses the hooks of FSDP2.
        y = y_TH if x.ndim == 2 else torch.ops.aten._unsafe_view(y_TH, x.shape)
        return (y, RoutingStats(router, plan)) if return_stats else y

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles are not watched, and nobody collects from them."""
        return {**self.__dict__, "counters": None, "kept": None}

    def stats(self) -> telemetry.Stats:
        """How the layer routed since it is watched, or since the last reset; see `fastmoe_rs.watch`.

        Raises:
            RuntimeError: nobody watches it.
        """
        if self.counters is None:
            raise RuntimeError("stats: nothing was counted, call fastmoe_rs.watch(model) before the forward")
        return self.counters.stats()

    def _check_input(self, x: Tensor) -> None:
        if not isinstance(x, Tensor) or x.layout is not torch.strided:
            given = f"layout {x.layout}" if isinstance(x, Tensor) else type(x).__name__
            _check.wanted("x", given, "a strided torch tensor [..., H]", TypeError)
        if x.ndim == 0 or x.shape[-1] != self.hidden_size:
            _check.wanted("x", f"shape {tuple(x.shape)}", f"[..., H] with H = {self.hidden_size}")

    def _warn_without_graph(self, router: RouterOutput) -> None:
        learns = self.router.training and any(p.requires_grad for p in self.router.parameters())
        if learns and not router.logits.requires_grad and not torch.compiler.is_compiling():
            warnings.warn(
                "collect_stats: a router ran without a graph, so losses of its logits have no "
                "gradient (torch.no_grad, or checkpointing with use_reentrant=True)",
                RuntimeWarning,
                stacklevel=2,
            )

    def _plan(self, router: RouterOutput) -> RoutingPlan:
        experts = self.num_experts
        capacity = getattr(self.experts, "capacity", None)  # of `ExpertParallel`
        if self.capacity_factor is not None:
            even = math.ceil(self.capacity_factor * router.ids.numel() / experts)
            capacity = even if capacity is None else min(even, capacity)
        seats = router.ids if router.seats is None else router.seats
        plan = RoutingPlan.from_ids(seats, experts, capacity=capacity, out_of_range="drop")
        rows: Any = getattr(self.router, "rows", None)
        if rows is not None:
            plan = plan.trimmed(rows(len(seats)))
        if router.seats is None:
            return plan
        # What tokens asked for is what a replay weighs; the plan drops again what it dropped.
        return dataclasses.replace(plan, ids=router.ids)

    def extra_repr(self) -> str:
        return "" if self.capacity_factor is None else f"capacity_factor={self.capacity_factor}"


def moe_layers(model: nn.Module) -> dict[str, MoE]:
    """The `MoE` layers of a model by module name.

    Raises:
        TypeError: `model` is no module.
    """
    _check.module("model", model)
    return {name: module for name, module in model.named_modules() if isinstance(module, MoE)}


@contextmanager
def collect_stats(model: nn.Module) -> Iterator[list[RoutingStats]]:
    """Within the block, keep the `RoutingStats` of every forward of a `MoE` in `model`, in their order.

        with collect_stats(model) as routed:
            output = model(tokens)
        loss = task_loss(output) + 0.01 * load_balancing_loss([stats.router.logits for stats in routed], K)

    Nothing outside the block and the model is touched. Forwards that activation checkpointing repeats in the
    backward are not kept again. Reentrant checkpointing runs the first forward without a graph, so that no
    loss of what is kept has a gradient: pass use_reentrant=False.

    Under `torch.compile` the block may be around the compiled model or within what is compiled; a forward is
    compiled for the length that the list has when it begins. Checkpointed layers cannot be compiled within a
    block: torch refuses what would reach out of them. Of blocks within one another the innermost keeps.

    Raises:
        TypeError: `model` is no module.
        ValueError: it has no MoE layer.

    Warns:
        RuntimeWarning: in training, a router that learns ran without a graph.
    """
    layers = list(moe_layers(model).values())
    if not layers:
        _check.wanted("model", type(model).__name__, "a module with nn.MoE layers")
    routed: list[RoutingStats] = []
    before = [moe.kept for moe in layers]
    for moe in layers:
        moe.kept = routed
    try:
        yield routed
    finally:
        for moe, kept in zip(layers, before, strict=True):
            moe.kept = kept


def _warn_of_constant_weights(router: nn.Module) -> None:
    if not isinstance(router, Router) or router.top_k != 1:
        return
    options = {"score": "softmax", "order": "score_topk", "renormalize": False} | router.options
    if options["renormalize"] or (options["order"], options["score"]) == ("topk_score", "softmax"):
        warnings.warn(
            "MoE: with top_k=1 these options make every routing weight 1, so that the output has no gradient "
            "in the router; use order='score_topk' without renormalize",
            stacklevel=3,
        )


def _check_followed(plan: RoutingPlan, tokens: int) -> None:
    if not isinstance(plan, RoutingPlan):
        _check.wanted("plan", type(plan).__name__, "a RoutingPlan", TypeError)
    if plan.tokens != tokens:
        _check.wanted("plan", f"one of {plan.tokens} tokens", f"one of the {tokens} tokens of x")


def _dropped(ids_TK: Tensor, plan: RoutingPlan) -> Tensor:
    """bool [T, K], routes that asked for an expert and were not served."""
    return (plan.inverse < 0) & (ids_TK >= 0) & (ids_TK < plan.num_experts)

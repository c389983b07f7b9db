"""Expert parallelism: every rank holds a share of the experts, and rows travel to the experts that they chose.

Each rank has tokens of its own, as in data parallelism; their number may differ and be 0. A forward sorts the
routed rows by expert, which is by rank too, sends each to the rank of its expert, and weighs and sums what comes
back at home; the backward sends gradients the other ways. Rows that a plan drops are not sent. Four exchanges
(`all_to_all_single`) a layer and training step, one more of counts, and two more where a checkpointed layer is
recomputed.

- Every rank of the group takes part in every forward and backward, in the same order, also without tokens. An
  exception on one rank leaves the others waiting until the timeout of their group, as with any collective.
- The host has to know how many rows come: on a GPU every forward waits for the device once, unless there is a
  `capacity`, with which rows travel in buffers of fixed size.
- Every expert computes the rows that it would get in one process from the tokens of all ranks one after the other,
  in the same order. Outputs and gradients are the same bits from run to run, and for every number of ranks but
  one: a row is rounded to its dtype for the way home, which one process, whose kernel also sums over K, does not.
- `torch.compile` leaves the layer's experts out, with a graph break; fullgraph=True raises.

Legend: T tokens, H hidden size, I intermediate size, E experts, K experts per token, R rows that a rank computes.
"""

from __future__ import annotations

import copy
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from . import _check, functional
from ._distributed import Exchange, agree, place
from .experts import Experts
from .functional import _autocast, _check_plan, _check_weights
from .kernels import wide
from .nn import moe_layers
from .plan import RoutingPlan

__all__ = ["ExpertParallel", "clip_grad_norm_", "full_state_dict", "shard_experts"]

_WEIGHTS = ("w1", "w2", "b1", "b2")


class ExpertParallel(Experts):
    """This rank's share of `nn.Experts`, to stand in their place.

    Neighbours stay together: rank 0 holds the first experts, and the first E modulo (number of ranks) ranks one
    more than the others. A rank without experts sends its rows as the others do.

    Args:
        experts: the same `nn.Experts` on every rank of the group. The share is a copy, on their device and in
            their dtype. May be on the "meta" device.
        group: the torch.distributed process group; None is the default one.
        capacity: most rows that an expert takes of one rank in a forward, the first ones; the others are dropped,
            and `nn.MoE` counts them as dropped. So many are sent to every expert in any case, empty ones too, so
            that no forward waits for a GPU. None drops nothing.
        gradients: "mean", the gradients of the weights are those of the mean of the ranks' losses, which
            DistributedDataParallel and FSDP2 make of all other gradients; or "sum", those of the sum. Gradients
            of tokens and routing weights are those of the sum, as they are for any layer of one rank.

    Parameters: as `nn.Experts`, with the experts of this rank only.

    Raises:
        RuntimeError: torch.distributed is not initialized.
        ValueError: the group is without this rank, or the ranks are given different experts or options.
        TypeError: wrong types. All ranks of the group raise alike.
    """

    def __init__(
        self,
        experts: Experts,
        group: dist.ProcessGroup | None = None,
        *,
        capacity: int | None = None,
        gradients: str = "mean",
    ) -> None:
        nn.Module.__init__(self)
        rank, ranks = place(group)
        agree("experts", f"{_described(experts)}, capacity={capacity!r}, gradients={gradients!r}", group)
        if type(experts) is not Experts:
            _check.wanted("experts", type(experts).__name__, "nn.Experts, with all experts", TypeError)
        if capacity is not None:
            _check.whole("capacity", capacity, least=1)
        _check.one_of("gradients", gradients, ("mean", "sum"))
        self.group, self.capacity, self.gradients = group, capacity, gradients
        self.activation, self.num_experts = experts.activation, len(experts.w1)
        self.rank, self.shares = rank, _shares(self.num_experts, ranks)
        for name in _WEIGHTS:
            weight = getattr(experts, name)
            if weight is not None:
                weight = nn.Parameter(self._mine(weight.detach()), requires_grad=weight.requires_grad)
            self.register_parameter(name, weight)
        self.train(experts.training)

    @torch.compiler.disable
    def forward(
        self, x_TH: Tensor, ids_TK: Tensor | None, weights_TK: Tensor, plan: RoutingPlan | None = None
    ) -> Tensor:
        """[T, H]; see `functional.moe_mlp`. All ranks of the group call it together.

        Raises:
            ValueError, TypeError: as `functional.moe_mlp`, and for a dtype of x that is not that of the weights.
        """
        if plan is None:
            plan = RoutingPlan.from_ids(ids_TK, self.num_experts)
        x_TH = self._checked(x_TH, weights_TK, plan)
        if self.capacity is not None:
            plan = self._padded(plan, self.capacity)
        if len(self.shares) == 1:
            return super().forward(x_TH, None, weights_TK, plan)
        sent, received, ids_R1 = self._traffic(plan)
        if self.capacity is None:
            plan = plan.trimmed(sum(sent))
        x_RH = Exchange.apply(functional.permute(x_TH, plan), sent, received, self.group)
        y_RH = Exchange.apply(self._computed(x_RH, ids_R1), received, sent, self.group)
        return functional.unpermute(y_RH, plan, weights_TK)

    def _checked(self, x_TH: Tensor, weights_TK: Tensor, plan: RoutingPlan) -> Tensor:
        """x in the dtype in which it travels. What is wrong is told before others wait for this rank."""
        _check.floating("x", x_TH, "[T, H]")
        x_TH, w1_0 = _autocast(x_TH, self.w1[:0])
        _check_plan("x", x_TH, plan)
        _check.shape("x", x_TH, "[T, H]", (plan.tokens, self.w2.shape[1]))
        _check.like("x", x_TH, "w1", w1_0)
        if plan.num_experts != self.num_experts:
            what = f"one for the {self.num_experts} of all ranks"
            _check.wanted("plan", f"a plan for {plan.num_experts} experts", what)
        _check_weights(weights_TK, "x", x_TH, plan)
        return x_TH

    def _padded(self, plan: RoutingPlan, capacity: int) -> RoutingPlan:
        """The plan with exactly so many sorted rows for every expert."""
        seats_TK = plan.ids.masked_fill(plan.inverse < 0, -1)
        return RoutingPlan.from_ids(
            seats_TK, self.num_experts, capacity=capacity, pad=True, out_of_range="drop"
        )

    def _traffic(self, plan: RoutingPlan) -> tuple[list[int], list[int], Tensor]:
        """How many rows go to and come from every rank, and the expert of this rank that each one is for."""
        ranks, mine = len(self.shares), self.shares[self.rank]
        counts_E = plan.counts if self.capacity is not None else plan.offsets.diff()
        came_NE = counts_E.new_empty(ranks, mine)
        dist.all_to_all_single(came_NE.view(-1), counts_E, [mine] * ranks, self.shares, group=self.group)
        experts_E = torch.arange(mine, device=counts_E.device)
        if self.capacity is not None:
            used_NEC = torch.arange(self.capacity, device=counts_E.device) < came_NE[:, :, None]
            ids_NEC = experts_E[:, None].where(used_NEC, -1)
            return (
                [self.capacity * share for share in self.shares],
                [self.capacity * mine] * ranks,
                ids_NEC.view(-1, 1),
            )
        told = torch.cat([counts_E, came_NE.view(-1)]).tolist()
        sent = _sums(told, self.shares)
        received = _sums(told[self.num_experts :], [mine] * ranks)
        ids_R = experts_E.repeat(ranks).repeat_interleave(came_NE.view(-1), output_size=sum(received))
        return sent, received, ids_R[:, None]

    def _computed(self, x_RH: Tensor, ids_R1: Tensor) -> Tensor:
        """The outputs of this rank's experts, row for row."""
        if not self.shares[self.rank]:
            # No row comes. Adding nothing to nothing keeps the graph as it is on the ranks with experts: a
            # backward that exchanges on some ranks only would wait forever.
            return x_RH + sum(weight.sum() for weight in self.parameters())
        weights = [self._averaging(getattr(self, name)) for name in _WEIGHTS]
        return functional.moe_mlp(
            x_RH,
            None,
            x_RH.new_ones(ids_R1.shape, dtype=wide(x_RH.dtype)),
            weights[0],
            weights[1],
            b1=weights[2],
            b2=weights[3],
            activation=self.activation,
            plan=RoutingPlan.from_ids(ids_R1, self.shares[self.rank], out_of_range="drop"),
        )

    def _averaging(self, weight: Tensor | None) -> Tensor | None:
        """The weight, with its gradient divided by the number of ranks if that is wanted."""
        if (
            weight is None
            or self.gradients == "sum"
            or not (torch.is_grad_enabled() and weight.requires_grad)
        ):
            return weight
        ranks = len(self.shares)
        view = weight.view_as(weight)  # copies of a module lose the hooks of its parameters
        view.register_hook(lambda grad: grad / ranks)
        return view

    def _mine(self, weight: Tensor) -> Tensor:
        """A copy of this rank's share of a weight of all experts."""
        first = sum(self.shares[: self.rank])
        return weight[first : first + self.shares[self.rank]].clone()

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Weights of all experts, as `nn.Experts` saves them, are loaded too: this rank's share of them."""
        for name in _WEIGHTS:
            weight = state_dict.get(prefix + name)
            if isinstance(weight, Tensor) and weight.ndim and len(weight) == self.num_experts:
                state_dict[prefix + name] = self._mine(weight)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> ExpertParallel:
        """A copy talks to the same ranks."""
        memo[id(self.group)] = self.group
        memo[id(self)] = copied = type(self).__new__(type(self))
        copied.__dict__ = copy.deepcopy(self.__dict__, memo)
        return copied

    def extra_repr(self) -> str:
        mine, ranks = self.shares[self.rank], len(self.shares)
        return f"{super().extra_repr()}, {mine} of {self.num_experts} experts, rank {self.rank} of {ranks}"


def shard_experts(
    model: nn.Module,
    group: dist.ProcessGroup | None = None,
    *,
    capacity: int | None = None,
    gradients: str = "mean",
) -> nn.Module:
    """Keep this rank's share of the experts of every `nn.MoE` in a model, in place.

    Call it on the module that is wrapped in DistributedDataParallel afterwards, which then leaves the experts
    alone, and before making an optimizer. Layers that share their experts still do.

    Args:
        model: the same model on every rank of the group.
        group: see `ExpertParallel`.
        capacity: see `ExpertParallel`.
        gradients: see `ExpertParallel`.

    Returns:
        The model.

    Raises:
        RuntimeError: torch.distributed is not initialized.
        ValueError: as `ExpertParallel`, and where the model has no `nn.MoE`, or other ones on another rank.
        TypeError: `model` is no module, or a layer has other experts than `nn.Experts`.
    """
    place(group)
    layers = moe_layers(model) if isinstance(model, nn.Module) else {}
    experts = {name: moe.experts for name, moe in layers.items()}
    agree("model", f"layers {[(name, _described(module)) for name, module in experts.items()]}", group)
    _check.module("model", model)
    if not layers:
        _check.wanted("model", type(model).__name__, "a module with nn.MoE layers")
    for name, module in experts.items():
        if type(module) is not Experts:
            _check.wanted(
                "model", f"{type(module).__name__} in {name or 'it'}", "layers with nn.Experts", TypeError
            )
    del experts, module  # one full copy after the other is given up
    for moe in layers.values():
        whole = moe.experts
        if type(whole) is not Experts:
            continue  # shared with a layer before
        share = ExpertParallel(whole, group, capacity=capacity, gradients=gradients)
        for other in layers.values():
            if other.experts is whole:
                other.experts = share
    ignored = {*getattr(model, "_ddp_params_and_buffers_to_ignore", ())}
    ignored |= {
        f"{path}.{name}" for path, share in _parallel(model).items() for name, _ in share.named_parameters()
    }
    # Not public, but what DistributedDataParallel reads in every release, and documented there.
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ignored)
    return model


def full_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The state dict that the model would have if its experts were not shared out; all ranks call it together.

    `load_state_dict` takes it, on every rank, for the model with its experts shared out over any number of ranks
    and for the one without. `model.state_dict()` has the experts of one rank only.

    Args:
        model: a model after `shard_experts`, or within DistributedDataParallel.

    Returns:
        The state dict on rank 0 of each layer's group; without the experts on the others.
    """
    state = model.state_dict()
    for path, share in _parallel(model).items():
        for name, weight in share.named_parameters():
            key = f"{path}.{name}" if path else name
            mine = state[key].flatten(1)
            sizes = share.shares if share.rank == 0 else [0] * len(share.shares)
            whole = mine.new_empty(sum(sizes), mine.shape[1])
            to_rank_0 = [len(mine), *[0] * (len(sizes) - 1)]
            dist.all_to_all_single(whole, mine, sizes, to_rank_0, group=share.group)
            if share.rank == 0:
                state[key] = whole.unflatten(1, weight.shape[1:])
            else:
                del state[key]
    return state


def clip_grad_norm_(model: nn.Module, max_norm: float, group: dist.ProcessGroup | None = None) -> Tensor:
    """`torch.nn.utils.clip_grad_norm_` with the experts of all ranks in the norm; all ranks call it together.

    torch's own would scale by another norm on every rank, and the copies of a router would drift apart.

    Args:
        model: a model after `shard_experts`, or within DistributedDataParallel.
        max_norm: the gradients are scaled down to this 2-norm where theirs is larger.
        group: the one of its experts.

    Returns:
        The norm before, a scalar.
    """
    sharded = {weight for share in _parallel(model).values() for weight in share.parameters()}
    parameters = [weight for weight in model.parameters() if weight.grad is not None]
    mine, common = (
        get_total_norm([w.grad for w in parameters if (w in sharded) is local]).to(
            next(model.parameters()).device
        )
        for local in (True, False)
    )
    squares = mine.square()
    dist.all_reduce(squares, group=group)
    norm = (squares + common.square()).sqrt()
    clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


def _parallel(model: nn.Module) -> dict[str, ExpertParallel]:
    _check.module("model", model)
    return {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, ExpertParallel)
    }


def _shares(experts: int, ranks: int) -> list[int]:
    """How many experts every rank holds."""
    return [experts // ranks + (rank < experts % ranks) for rank in range(ranks)]


def _sums(numbers: list[int], lengths: list[int]) -> list[int]:
    """The sums of neighbours, so many at a time."""
    return [
        sum(numbers[end - length : end]) for length, end in zip(lengths, accumulate(lengths), strict=True)
    ]


def _described(experts: object) -> str:
    if not isinstance(experts, Experts):
        return type(experts).__name__
    learns = [name for name in _WEIGHTS if getattr(getattr(experts, name), "requires_grad", False)]
    return f"{type(experts).__name__}({experts.extra_repr()}, {experts.w1.dtype}, requires_grad={learns})"

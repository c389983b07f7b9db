"""The experts of one rank: rows are sent to the experts that they chose, and those that come are computed.

Legend: T tokens, H hidden size, I intermediate size, E experts, K experts per token, N ranks, C capacity,
R rows that a rank computes.
"""

from __future__ import annotations

import copy
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from . import _check, functional
from ._distributed import Exchange, agree, place
from .experts import Experts
from .functional import _autocast, _check_plan, _check_weights
from .kernels import wide
from .plan import RoutingPlan

WEIGHTS = ("w1", "w2", "b1", "b2")


class ExpertParallel(Experts):
    """This rank's share of `nn.Experts`, to stand in their place.

    Neighbours stay together: rank 0 holds the first experts, and the first E modulo N ranks one more than the
    others. With more ranks than experts, the last ones hold none and take part all the same.

    Args:
        experts: the same `nn.Experts` on every rank of the group, on any device, also "meta". The share is a
            copy.
        group: a torch.distributed process group; None is the default one. A copy of the module keeps it; a
            module with a group of its own cannot be pickled.
        capacity: C, the most rows that an expert takes from each rank in a forward, the first ones; the
            others are dropped, and `nn.MoE` counts them. C rows are sent for every expert, used or not, and
            only the used ones are computed. None drops nothing.
        gradients: what the gradients of the weights are made of: the "mean" of the losses of all ranks, as
            DistributedDataParallel and FSDP2 make those of all other parameters, or their "sum".

    Parameters: those of `nn.Experts`, [E, ...] cut to this rank's experts. `load_state_dict` takes both.

    Raises:
        RuntimeError: torch.distributed is not initialized.
        ValueError: the group is without this rank; its ranks are given different experts or options.
        TypeError: wrong types, or experts of another class.
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
        agree("experts", f"{described(experts)}, capacity={capacity!r}, gradients={gradients!r}", group)
        if type(experts) is not Experts:
            _check.wanted("experts", type(experts).__name__, "nn.Experts, with all experts", TypeError)
        if capacity is not None:
            _check.whole("capacity", capacity, least=1)
        _check.one_of("gradients", gradients, ("mean", "sum"))
        self.group, self.capacity, self.gradients = group, capacity, gradients
        self.activation, self.num_experts = experts.activation, len(experts.w1)
        self.rank, self.shares = rank, _shares(self.num_experts, ranks)
        for name in WEIGHTS:
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
            ValueError, TypeError: as `functional.moe_mlp`, before anything is sent.
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
        """x in the dtype in which it travels."""
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
        w1, w2, b1, b2 = (self._averaging(getattr(self, name)) for name in WEIGHTS)
        return functional.moe_mlp(
            x_RH,
            None,
            x_RH.new_ones(ids_R1.shape, dtype=wide(x_RH.dtype)),
            w1,
            w2,
            b1=b1,
            b2=b2,
            activation=self.activation,
            plan=RoutingPlan.from_ids(ids_R1, self.shares[self.rank], out_of_range="drop"),
        )

    def _averaging(self, weight: Any) -> Any:
        """The weight, with its gradient divided by the number of ranks where that is wanted."""
        learns = torch.is_grad_enabled() and weight is not None and weight.requires_grad
        if self.gradients == "sum" or not learns:
            return weight
        ranks = len(self.shares)
        view = weight.view_as(weight)  # a hook of the parameter itself would be lost in copies
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
        for name in WEIGHTS:
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


def described(experts: object) -> str:
    """What has to be the same on every rank."""
    if type(experts) is not Experts:
        return type(experts).__name__
    learns = [name for name in WEIGHTS if getattr(getattr(experts, name), "requires_grad", False)]
    return f"{type(experts).__name__}({experts.extra_repr()}, {experts.w1.dtype}, requires_grad={learns})"


def _shares(experts: int, ranks: int) -> list[int]:
    """How many experts every rank holds."""
    return [experts // ranks + (rank < experts % ranks) for rank in range(ranks)]


def _sums(numbers: list[int], lengths: list[int]) -> list[int]:
    """The sums of neighbours, so many at a time."""
    return [
        sum(numbers[end - length : end]) for length, end in zip(lengths, accumulate(lengths), strict=True)
    ]

"""What the ranks of a torch.distributed process group tell and send each other."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from . import _check


def all_reduced(values: Tensor, group: Any) -> Tensor:
    """The sum over the ranks of a group; True is the default one, None is no group."""
    if group is None:
        return values
    values = values.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(values, group=_of_torch(group))
    return values


def ranks(group: Any) -> int:
    """How many ranks `all_reduced` sums over."""
    return 1 if group is None else dist.get_world_size(_of_torch(group))


def _of_torch(group: Any) -> Any:
    if not (dist.is_available() and dist.is_initialized()):
        _check.wanted("group", group, "None, as torch.distributed is not initialized")
    return None if group is True else group


def place(group: Any) -> tuple[int, int]:
    """This rank's number in a group, and how many there are; None is the default group."""
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError("group: torch.distributed is not initialized, call init_process_group first")
    outside: Any = dist.GroupMember.NON_GROUP_MEMBER
    if not (group is None or group is outside or isinstance(group, dist.ProcessGroup)):
        what = "None or a torch.distributed.ProcessGroup (mesh.get_group() of a DeviceMesh)"
        _check.wanted("group", type(group).__name__, what, TypeError)
    if dist.get_rank(group) < 0:
        _check.wanted("group", "a process group without this rank", "one that it is in")
    return dist.get_rank(group), dist.get_world_size(group)


def agree(name: str, given: str, group: Any) -> None:
    """Raise on all ranks where they are given different things, as their collectives would not meet."""
    told: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(told, given, group=group)
    for rank, other in enumerate(told):
        if other != told[0]:
            _check.wanted(name, f"{told[0]} on rank 0, {other} on rank {rank}", "the same on every rank")


class Exchange(torch.autograd.Function):
    """Send the first rows to rank 0, the next to rank 1, and so on; gradients come back the same way.

    Called with rows [R, H], how many of them go to every rank, how many rows come from every rank, and the
    group; gives the rows that come, by rank.
    """

    @staticmethod
    def forward(ctx: Any, rows_RH: Tensor, sent: list[int], received: list[int], group: Any) -> Tensor:
        ctx.back = received, sent, group
        came_RH = rows_RH.new_empty(sum(received), rows_RH.shape[1])
        dist.all_to_all_single(came_RH, rows_RH.contiguous(), received, sent, group=group)
        return came_RH

    @staticmethod
    def backward(ctx: Any, grad_RH: Tensor) -> tuple[Any, ...]:
        return Exchange.apply(grad_RH, *ctx.back), None, None, None

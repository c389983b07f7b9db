"""Sums over the ranks of a torch.distributed process group."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def all_reduced(values: Tensor, group: Any) -> Tensor:
    """The sum over a process group; True for the default one, None for no group."""
    if group is None:
        return values
    import torch.distributed as dist

    values = values.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(values, group=None if group is True else group)
    return values


def ranks(group: Any) -> int:
    """How many ranks `all_reduced` sums over."""
    if group is None:
        return 1
    import torch.distributed as dist

    return dist.get_world_size(None if group is True else group)

"""Sums over the ranks of a torch.distributed process group: True is the default one, None is no group."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from . import _check


def all_reduced(values: Tensor, group: Any) -> Tensor:
    """The sum over the ranks of a group."""
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

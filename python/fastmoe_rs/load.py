"""How often experts are asked for, counted where the ids are: what balancing losses and telemetry start from.

Legend: T tokens, E experts, K experts per token, G groups of neighbouring tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import _check
from ._distributed import all_reduced


@dataclass(frozen=True)
class Load:
    """How often experts were asked for: the f of a balancing loss. Loads of several batches can be added.

    Attributes:
        routes: int64 [G, E], routes to every expert.
        tokens: int64 [G], tokens that count.
    """

    routes: Tensor
    tokens: Tensor

    @staticmethod
    def of(
        ids_TK: Tensor,
        num_experts: int,
        *,
        mask: Tensor | None = None,
        group_size: int | None = None,
        group: Any = None,
    ) -> Load:
        """Count the routes.

        Args:
            ids_TK: int64 or int32 [T, K]; an id outside [0, E) is no route.
            num_experts: E.
            mask: any shape of T elements, 0 for padding tokens.
            group_size: tokens are divided into groups of so many neighbours; None for one group, G = 1.
            group: a torch.distributed process group whose tokens are counted together; True for the default
                one, None for none.

        Raises:
            ValueError, TypeError: an argument is none of these.
        """
        bins_TK = bins(ids_TK, num_experts)
        counts_T = counted(ids_TK, mask)
        groups, size = _check.groups("group_size", group_size, len(ids_TK))
        width = num_experts + 1
        starts_G11 = width * torch.arange(groups, device=ids_TK.device)[:, None, None]
        bins_R = (bins_TK.reshape(groups, size, ids_TK.shape[1]) + starts_G11).reshape(-1)
        once_R = counts_T[:, None].expand(ids_TK.shape).reshape(-1)
        routes = once_R.new_zeros(groups * width).scatter_add_(0, bins_R, once_R)
        return Load(
            all_reduced(routes.view(groups, width)[:, :num_experts], group),
            all_reduced(counts_T.view(groups, size).sum(1), group),
        )

    def __add__(self, other: Load) -> Load:
        return Load(self.routes + other.routes, self.tokens + other.tokens)

    def frequency(self, dtype: torch.dtype) -> Tensor:
        """[G, E] routes per token."""
        return self.routes.to(dtype) / self.tokens[:, None].clamp(min=1)


def bins(ids_TK: Tensor, num_experts: int) -> Tensor:
    """int64 [T, K]: the ids, and E, one bin more, for those that are no expert of [0, E)."""
    _check.integers("ids", ids_TK, "[T, K]")
    _check.positive(num_experts=num_experts)
    return torch.where((ids_TK < 0) | (ids_TK > num_experts), num_experts, ids_TK).long()


def counted(rows: Tensor, mask: Tensor | None) -> Tensor:
    """int64 [T], beside the rows [T, ...] of tokens: 1 for those that count, where the mask is not 0."""
    if mask is None:
        return torch.ones(len(rows), dtype=torch.int64, device=rows.device)
    _check.torch_tensor("mask", mask, "of one element per token")
    if mask.numel() != len(rows):
        _check.wanted("mask", f"shape {tuple(mask.shape)}", f"{len(rows)} elements, one per token")
    return (mask.reshape(-1) != 0).to(rows.device, torch.int64)

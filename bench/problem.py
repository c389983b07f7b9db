"""Tensors of a cell: weights that all paths share, and several inputs to take in turn."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from cells import Cell, Shape
from torch import Tensor
from torch.nn import Parameter

DECODE_TOKENS = 8  # up to here a call is bound by reading weights


@dataclass(frozen=True)
class Inputs:
    """One batch: x [T,H], ids int64 [T,K], routing weights fp32 [T,K], gradient of the output [T,H]."""

    x: Tensor
    ids: Tensor
    weights: Tensor
    grad_out: Tensor


@dataclass(frozen=True)
class Problem:
    """Shared parameters w1 [E,2I,H], w2 [E,H,I] and the batches that rotate through the paths.

    A path that runs right after another takes another batch, so that with few tokens it does not
    find in the caches the experts which its predecessor has just read.
    """

    cell: Cell
    w1: Parameter
    w2: Parameter
    batches: tuple[Inputs, ...]

    def batch(self, turn: int) -> Inputs:
        return self.batches[turn % len(self.batches)]

    def active_weight_bytes(self) -> float:
        """Bytes of the experts that a call reads, mean over the batches."""
        experts = sum(len(batch.ids.unique()) for batch in self.batches) / len(self.batches)
        return experts * self.cell.shape.expert_parameters * self.cell.element_bytes


@lru_cache(maxsize=1)
def parameters(shape: Shape, dtype: str) -> tuple[Parameter, Parameter]:
    """Random weights with outputs of order one; those of the previous shape and dtype are dropped."""
    torch.manual_seed(0)
    sizes = ((2 * shape.intermediate, shape.hidden), (shape.hidden, shape.intermediate))
    made = []
    for rows, columns in sizes:
        weights = torch.empty(shape.experts, rows, columns, dtype=getattr(torch, dtype))
        for expert in weights:
            expert.copy_(torch.randn(rows, columns) / columns**0.5)
        made.append(Parameter(weights))
    return made[0], made[1]


def expert_ids(shape: Shape, tokens: int, batches: int) -> list[Tensor]:
    """Distinct random experts for each token; batches of one token share no expert while they last."""
    if tokens == 1:
        sets = torch.randperm(shape.experts).split(shape.top_k)
        return [ids[None] for ids in sets if len(ids) == shape.top_k][:batches]
    return [torch.rand(tokens, shape.experts).topk(shape.top_k).indices for _ in range(batches)]


def problem(cell: Cell) -> Problem:
    """The cell's problem; every call gives the same numbers."""
    w1, w2 = parameters(cell.shape, cell.dtype)
    torch.manual_seed(1 + cell.tokens)
    dtype, size = w1.dtype, (cell.tokens, cell.shape.hidden)
    batches = []
    for ids in expert_ids(cell.shape, cell.tokens, 8 if cell.tokens <= DECODE_TOKENS else 2):
        x = torch.randn(size).to(dtype).requires_grad_(cell.train)
        weights = torch.rand(ids.shape).softmax(-1).requires_grad_(cell.train)
        batches.append(Inputs(x, ids, weights, torch.randn(size).to(dtype)))
    return Problem(cell, w1, w2, tuple(batches))

"""What a step must give, in float64: some tokens' rows, and the gradients of one expert's weights."""

from __future__ import annotations

import torch
from problems import Batch, Problem
from torch import Tensor

TOKENS, EXPERT = 4, 0


def checked_tokens(problem: Problem) -> Tensor:
    tokens = problem.cell.tokens
    return torch.linspace(0, tokens - 1, min(TOKENS, tokens), device=problem.w1.device).long()


def exact(problem: Problem, batch: Batch) -> dict[str, Tensor]:
    """Rows of `out` and, in training, of gradients of `x` and `weights`, and EXPERT's of `w1` and `w2`."""
    rows = [_token(problem, batch, token) for token in checked_tokens(problem).tolist()]
    names = ("out", "x", "weights") if problem.cell.train else ("out",)
    found = {name: torch.stack(parts) for name, *parts in zip(names, *rows, strict=True)}
    return found | (_expert(problem, batch) if problem.cell.train else {})


def _wide(tensor: Tensor) -> Tensor:
    return tensor.detach().double()


def _mlp(problem: Problem, x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    hidden = x @ w1.mT
    if not problem.cell.shape.gated:
        return hidden.relu() @ w2.mT
    gate, up = hidden.chunk(2, dim=-1)
    return (torch.nn.functional.silu(gate) * up) @ w2.mT


def _token(problem: Problem, batch: Batch, token: int) -> tuple[Tensor, ...]:
    x, weights = (_wide(tensor[token]).requires_grad_() for tensor in (batch.x, batch.weights))
    experts = batch.ids[token].tolist()
    outs = [_mlp(problem, x, _wide(problem.w1[e]), _wide(problem.w2[e])) for e in experts]
    out = weights @ torch.stack(outs)
    if not problem.cell.train:
        return (out.detach(),)
    return out.detach(), *torch.autograd.grad(out, (x, weights), _wide(batch.grad_out[token]))


def _expert(problem: Problem, batch: Batch) -> dict[str, Tensor]:
    tokens, slots = (batch.ids == EXPERT).nonzero(as_tuple=True)
    w1, w2 = (_wide(weight[EXPERT]).requires_grad_() for weight in (problem.w1, problem.w2))
    out = _mlp(problem, _wide(batch.x[tokens]), w1, w2)
    direction = _wide(batch.grad_out[tokens]) * _wide(batch.weights[tokens, slots, None])
    return dict(zip(("w1", "w2"), torch.autograd.grad(out, (w1, w2), direction), strict=True))

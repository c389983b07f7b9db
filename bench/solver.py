"""The paths of a cell as things that can be stepped: ours and the peers, in one protocol."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from baselines import PEERS, Call, Peer
from cells import OURS, OURS_FRESH, Cell
from problem import Inputs, Problem
from torch import Tensor

import fastmoe_rs
from fastmoe_rs import _native

# Largest relative error of a row against the longest row, between two correct paths.
BOUNDS = {"float32": 1e-4, "bfloat16": 4e-2, "float16": 6e-3}
COMPARED_EXPERTS = 8


def nothing() -> None:
    pass


@dataclass
class Solver:
    """A path bound to a problem. `before` runs untimed, `after` belongs to the step."""

    name: str
    call: Call
    problem: Problem
    # Steps before a timed one, so that ours finds the gradient memory of its last one in the pool, as
    # training does. The first leaves what experts without tokens have of it as the system gave it.
    warm: int = 0
    before: Callable[[], None] = nothing
    after: Callable[[], None] = nothing

    def forward(self, batch: Inputs) -> Tensor:
        return self.call(batch.x, batch.ids, batch.weights)

    def step(self, batch: Inputs) -> None:
        """One forward, or one forward and backward that ends with gradients set to None."""
        if self.problem.cell.train:
            self.forward(batch).backward(batch.grad_out)
            self.release()
            self.after()
        else:
            with torch.no_grad():
                self.forward(batch)

    def release(self) -> None:
        self.problem.w1.grad = self.problem.w2.grad = None
        for batch in self.problem.batches:
            batch.x.grad = batch.weights.grad = None

    def timed(self, turn: int) -> float:
        """Seconds of one step on the batch of this turn."""
        self.before()
        for _ in range(self.warm):
            self.step(self.problem.batch(turn + 1))
        batch = self.problem.batch(turn)
        start = time.perf_counter()
        self.step(batch)
        return time.perf_counter() - start

    def answer(self) -> tuple[dict[str, Tensor], float]:
        """Output and gradients on the first batch (of w1 and w2 for some experts), and the seconds taken."""
        batch = self.problem.batch(0)
        start = time.perf_counter()
        with torch.set_grad_enabled(self.problem.cell.train):
            out = self.forward(batch)
        if self.problem.cell.train:
            out.backward(batch.grad_out)
        seconds = time.perf_counter() - start
        tensors = {"out": out.detach()}
        if self.problem.cell.train:
            w1, w2 = self.problem.w1, self.problem.w2
            some = torch.linspace(0, len(w1) - 1, min(COMPARED_EXPERTS, len(w1))).long()
            tensors |= {
                "x": batch.x.grad,
                "weights": batch.weights.grad,
                "w1": w1.grad[some],
                "w2": w2.grad[some],
            }
            self.release()
        return tensors, seconds


def ours(problem: Problem) -> list[Solver]:
    """moe_mlp: in training once with gradient memory reused from step to step, and once with fresh memory."""

    def call(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return fastmoe_rs.functional.moe_mlp(x, ids, weights, problem.w1, problem.w2)

    if not problem.cell.train:
        return [Solver(OURS, call, problem)]
    empty = _native.empty_cache
    return [
        Solver(OURS, call, problem, warm=2),
        Solver(OURS_FRESH, call, problem, before=empty, after=empty),
    ]


def peer(path: Peer, problem: Problem) -> Solver:
    return Solver(path.name, path.make(problem.w1, problem.w2), problem)


def applicable(cell: Cell) -> tuple[list[Peer], dict[str, str]]:
    """Peers that can solve a cell, and the reasons of those that cannot."""
    reasons = {path.name: reason for path in PEERS if (reason := path.why_not(cell))}
    return [path for path in PEERS if path.name not in reasons], reasons


def row_error(got: Tensor, want: Tensor) -> float:
    """Largest distance between two rows (last axis), relative to the longest row wanted."""
    got, want = got.float(), want.float()
    longest = want.norm(dim=-1).max().clamp_min(1e-30)
    return ((got - want).norm(dim=-1).max() / longest).item()

"""One cell: check every path's answer, then time those that agree by turns, eager and as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter

import torch
from clock import Clock, Run, interleaved, state
from peers import OURS, PATHS, Path, Unavailable
from problems import Batch, Problem
from torch import Tensor
from truth import EXPERT, checked_tokens, exact

# Largest error of a row, relative to the longest row: bfloat16 operands, sums in float32.
BOUND = 3e-2
# Of others against us. Some add up the gradient of the routing weights in bfloat16, in no order.
PEER_BOUNDS = {"weights": 0.2}
Tell = Callable[[str], None]  # what is about to run


class DeviceLost(Exception):
    """An error after which nothing runs on the device in this process."""


class Runner:
    """A path on a problem: eager steps and, on a GPU, one graph of a step for each batch."""

    def __init__(self, path: Path, problem: Problem) -> None:
        self.path, self.problem = path, problem
        self.call, self.parameters = path.make(problem)
        self.graph: torch.cuda.CUDAGraph | None = None

    def answer(self) -> dict[str, Tensor]:
        """Output and gradients of the first batch; those of w1 and w2 for one expert."""
        out, grads = self.step(self.problem.batches[0])
        found = {"out": out.detach()}
        if grads:
            found |= {"x": grads[0], "weights": grads[1]}
            if self.parameters[0] is self.problem.w1:
                found |= {"w1": grads[2][EXPERT].clone(), "w2": grads[3][EXPERT].clone()}
        return found

    def step(self, batch: Batch) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The output, and in training all gradients."""
        if not self.problem.cell.train:
            with torch.no_grad():
                return self.call(batch), ()
        out = self.call(batch)
        return out, torch.autograd.grad(out, (batch.x, batch.weights, *self.parameters), batch.grad_out)

    def eager(self, turn: int) -> None:
        self.step(self.problem.batches[turn % len(self.problem.batches)])

    def capture(self, pool: tuple[int, int]) -> None:
        """Graphs in one pool overwrite each other's results, which nobody reads.

        A step that waits is refused beforehand: a capture that fails leaves torch's allocator in disorder.
        """
        torch.cuda.set_sync_debug_mode("error")
        try:
            self.eager(0)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            for batch in self.problem.batches:
                self.step(batch)
        self.graph = graph

    def replay(self, turn: int) -> None:
        self.graph.replay()

    def peak_bytes(self) -> int:
        """Most memory that one step takes beyond inputs and weights."""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        self.eager(0)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before


def failure(error: Exception) -> dict:
    return {"status": "failed", "reason": f"{type(error).__name__}: {error}".splitlines()[0][:300]}


def row_error(got: Tensor, want: Tensor) -> float:
    """Largest distance of two rows (last axis), relative to the longest row wanted."""
    got, want = got.double(), want.double()
    longest = want.norm(dim=-1).max().clamp_min(1e-30)
    return ((got - want).norm(dim=-1).max() / longest).item()


def check_ours(problem: Problem, got: dict[str, Tensor]) -> dict[str, float]:
    """Errors of our answer against float64; raises where one is too large."""
    tokens, want = checked_tokens(problem), exact(problem, problem.batches[0])
    ours = {name: tensor if name in ("w1", "w2") else tensor[tokens] for name, tensor in got.items()}
    errors = {name: row_error(ours[name], want[name]) for name in want}
    for name, error in errors.items():
        if not error <= BOUND:
            raise ArithmeticError(
                f"{OURS} is wrong on {problem.cell.name}: error {error:.2e} of {name}, at most {BOUND}"
            )
    return errors


def agreeing(problem: Problem, paths: dict[str, dict], given_up: dict[str, dict], tell: Tell) -> list[Runner]:
    """The paths that give our answer; what became of all goes into `paths`.

    With `first_s`, the seconds until a path had launched its first answer: compiling and tuning.
    """
    runners: list[Runner] = []
    wanted: dict[str, Tensor] = {}
    for path in PATHS:
        if path.name in given_up:
            paths[path.name] = given_up[path.name]
            continue
        tell(path.name)
        begin = perf_counter()
        try:
            runner = Runner(path, problem)
            got = runner.answer()
        except Unavailable as reason:
            paths[path.name] = {"status": "skipped", "reason": str(reason)}
            continue
        except Exception as error:
            if path.name == OURS:
                raise
            paths[path.name] = failure(error)
            recover(error)
            continue
        first = {"first_s": perf_counter() - begin}
        if path.name == OURS:
            wanted = got
            paths[OURS] = {"status": "ok", "errors": check_ours(problem, got)} | first
            runners.append(runner)
            continue
        errors = {key: row_error(got[key], wanted[key]) for key in got}
        right = all(error <= PEER_BOUNDS.get(name, 2 * BOUND) for name, error in errors.items())
        paths[path.name] = {"status": "ok" if right else "wrong", "errors": errors} | first
        if right:
            runners.append(runner)
    return runners


def recover(error: Exception) -> None:
    """Goes on after a failure; raises DeviceLost where nothing can run any more."""
    if torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except RuntimeError:
            raise DeviceLost(failure(error)["reason"]) from error


def captured(
    runners: list[Runner], paths: dict[str, dict], given_up: dict[str, dict], tell: Tell
) -> dict[str, Run]:
    """Replays of the paths that can be captured."""
    runs: dict[str, Run] = {}
    torch.cuda.empty_cache()
    pool = torch.cuda.graph_pool_handle()
    for runner in runners:
        name = runner.path.name
        if graph_of(name) in given_up:
            paths[name]["graph"] = given_up[graph_of(name)]
            continue
        tell(graph_of(name))
        try:
            runner.capture(pool)
            runs[name] = runner.replay
        except Exception as error:
            paths[name]["graph"] = failure(error)
            recover(error)
    return runs


def graph_of(name: str) -> str:
    """What `tell` says of a capture, and what is given up where it broke the device."""
    return f"graph of {name}"


def measure(
    problem: Problem,
    clock: Clock,
    ceilings: dict[str, float],
    seconds: float,
    given_up: dict[str, dict],
    tell: Tell,
) -> dict:
    """The record of a cell: every path with its status, errors, times, useful TFLOP/s and peak memory.

    Paths in `given_up` are not run and have what is there; `tell` hears what is about to run. `took` has the
    seconds of the parts of the cell.
    """
    cell = problem.cell
    paths: dict[str, dict] = {}
    marks = [perf_counter()]
    runners = agreeing(problem, paths, given_up, tell)
    marks.append(perf_counter())
    tell("timing")
    times = {"eager": interleaved(clock, {runner.path.name: runner.eager for runner in runners}, seconds / 2)}
    marks.append(perf_counter())
    if clock.cuda:
        for runner in runners:
            paths[runner.path.name]["peak_bytes"] = runner.peak_bytes()
        runs = captured(runners, paths, given_up, tell)
        tell("timing of graphs")
        times["graph"] = interleaved(clock, runs, seconds / 2, steps=len(problem.batches))
    marks.append(perf_counter())
    for kind, found in times.items():
        for name, taken in found.items():
            paths[name][kind] = taken | {"tflops": cell.flops / taken["median_s"] / 1e12}
    return {
        "kind": "cell",
        "name": cell.name,
        "shape": cell.shape.name,
        "tokens": cell.tokens,
        "mode": cell.mode,
        "routing": "skewed" if cell.skewed else "balanced",
        "floor_s": cell.layer.floor(ceilings["flops_per_s"], ceilings["bytes_per_s"], cell.train),
        "batches": len(problem.batches),
        "took": {part: marks[i + 1] - marks[i] for i, part in enumerate(("answers", "eager", "graph"))},
        "state": state(str(problem.w1.device)),
        "paths": paths,
    }

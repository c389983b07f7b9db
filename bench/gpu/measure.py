"""One cell: check every path's answer, then time those that agree by turns, eager and as a CUDA graph."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise

import torch
from peers import OURS, PATHS, Path, Unavailable
from problems import Batch, Problem, exact_rows
from torch import Tensor

# Largest error of a row, relative to the longest row: bfloat16 operands, sums in float32.
BOUND = 3e-2
WARM_UP, LEAST_TURNS, MOST_TURNS = 3, 5, 60
CHECKED_TOKENS = 4


class Clock:
    """Times work on a device: by events on a GPU, by the host's clock elsewhere."""

    def __init__(self, device: str) -> None:
        self.cuda = device.startswith("cuda")

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def seconds(self, runs: list[Callable[[], object]]) -> list[float]:
        """Of each run, one after the other."""
        if not self.cuda:
            return [self._on_host(run) for run in runs]
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(len(runs) + 1)]
        marks[0].record()
        for run, mark in zip(runs, marks[1:], strict=True):
            run()
            mark.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) / 1e3 for start, end in pairwise(marks)]

    def _on_host(self, run: Callable[[], object]) -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start


class Runner:
    """A path on a problem: eager steps and, on a GPU, one captured graph for each batch."""

    def __init__(self, path: Path, problem: Problem) -> None:
        self.path, self.problem = path, problem
        self.call, self.parameters = path.make(problem)
        self.graphs: list[torch.cuda.CUDAGraph] = []

    def answer(self) -> dict[str, Tensor]:
        """Output and gradients of the first batch; those of w1 and w2 for the first expert."""
        out, grads = self.step(self.problem.batches[0])
        found = {"out": out.detach()}
        if grads:
            found |= {"x": grads[0], "weights": grads[1]}
            if self.parameters[0] is self.problem.w1:
                found |= {"w1": grads[2][0].clone(), "w2": grads[3][0].clone()}
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
        """Graphs in one pool overwrite each other's results, which nobody reads."""
        for batch in self.problem.batches:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                self.step(batch)
            self.graphs.append(graph)

    def replay(self, turn: int) -> None:
        self.graphs[turn % len(self.graphs)].replay()

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


def check_ours(problem: Problem, out: Tensor) -> float:
    """Error of our output against some tokens in float64; raises where it is too large."""
    tokens = torch.linspace(0, len(out) - 1, min(CHECKED_TOKENS, len(out))).long().tolist()
    exact = exact_rows(problem, problem.batches[0], tokens)
    error = max(row_error(out[token][None], want[None]) for token, want in exact)
    if not error <= BOUND:
        raise ArithmeticError(f"{OURS} is wrong on {problem.cell.name}: error {error:.2e}, at most {BOUND}")
    return error


def agreeing(problem: Problem, paths: dict[str, dict]) -> list[Runner]:
    """The paths that give our answer; what became of all goes into `paths`."""
    runners: list[Runner] = []
    wanted: dict[str, Tensor] = {}
    for path in PATHS:
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
            continue
        if path.name == OURS:
            wanted = got
            paths[OURS] = {"status": "ok", "errors": {"float64": check_ours(problem, got["out"])}}
            runners.append(runner)
            continue
        errors = {key: row_error(got[key], wanted[key]) for key in got}
        right = all(error <= 2 * BOUND for error in errors.values())
        paths[path.name] = {"status": "ok" if right else "wrong", "errors": errors}
        if right:
            runners.append(runner)
    return runners


def interleaved(clock: Clock, runs: dict[str, Callable[[int], object]], seconds: float) -> dict[str, dict]:
    """Medians of each, all of them once a turn."""
    for turn in range(WARM_UP):
        for run in runs.values():
            run(turn)
    clock.wait()
    samples: dict[str, list[float]] = {name: [] for name in runs}
    end = time.perf_counter() + seconds
    for turn in range(MOST_TURNS):
        steps = [partial(run, turn) for run in runs.values()]
        for name, sample in zip(runs, clock.seconds(steps), strict=True):
            samples[name].append(sample)
        if turn + 1 >= LEAST_TURNS and time.perf_counter() > end:
            break
    return {name: summary(taken) for name, taken in samples.items()}


def summary(samples: list[float]) -> dict:
    return {
        "median_s": statistics.median(samples),
        "min_s": min(samples),
        "max_s": max(samples),
        "samples": len(samples),
    }


def measure(problem: Problem, clock: Clock, ceilings: dict[str, float], seconds: float) -> dict:
    """The record of a cell: every path with its status, errors, times, useful TFLOP/s and peak memory."""
    cell = problem.cell
    paths: dict[str, dict] = {}
    runners = agreeing(problem, paths)
    eager = interleaved(clock, {runner.path.name: runner.eager for runner in runners}, seconds / 2)
    graphs: dict[str, dict] = {}
    if clock.cuda:
        for runner in runners:
            paths[runner.path.name]["peak_bytes"] = runner.peak_bytes()
        captured: dict[str, Callable[[int], object]] = {}
        torch.cuda.empty_cache()
        pool = torch.cuda.graph_pool_handle()
        for runner in runners:
            try:
                runner.capture(pool)
                captured[runner.path.name] = runner.replay
            except Exception as error:
                torch.cuda.synchronize()
                paths[runner.path.name]["graph"] = failure(error)
        graphs = interleaved(clock, captured, seconds / 2) if captured else {}
    for kind, found in (("eager", eager), ("graph", graphs)):
        for name, times in found.items():
            tflops = cell.flops / times["median_s"] / 1e12
            paths[name][kind] = times | {"tflops": tflops}
    floor = cell.layer.floor(ceilings["flops_per_s"], ceilings["bytes_per_s"], cell.train)
    return {
        "kind": "cell",
        "name": cell.name,
        "shape": cell.shape.name,
        "tokens": cell.tokens,
        "mode": cell.mode,
        "routing": "skewed" if cell.skewed else "balanced",
        "floor_s": floor,
        "batches": len(problem.batches),
        "paths": paths,
    }

"""One cell of the layer: check every path's answer, time those that agree, measure their memory.

With few tokens a call cannot take less time than its weights take to be read. Reading takes turns with the
paths then, for on a shared machine what memory gives changes within seconds.
"""

from __future__ import annotations

import ctypes
import statistics
import time
from pathlib import Path

from baselines import Peer
from cells import OURS, OURS_FRESH, Cell
from machine import READ_BYTES, GemmRates, available_bytes, peak_of, read_seconds
from problem import DECODE_TOKENS, problem
from solver import BOUNDS, Solver, applicable, ours, peer, row_error
from timing import interleave, significant, summary
from torch import Tensor

from fastmoe_rs import _native

MEMORY_TOKENS = 512
READS = "reads"
OWN = frozenset({OURS, OURS_FRESH})


def skipped(reason: str) -> dict:
    return {"status": "skipped", "reason": reason}


def why_too_costly(path: Peer, cell: Cell, limit_s: float, gemm: dict[str, GemmRates]) -> str | None:
    needed, free = path.extra_bytes(cell), 0.8 * available_bytes()
    if needed > free:
        return f"needs about {needed / 2**30:.0f} GiB, {free / 2**30:.0f} GiB can be had"
    predicted = path.seconds(cell, gemm)
    if predicted > limit_s:
        return f"predicted {predicted:.0f} s a call, limit {limit_s:.0f} s"
    return None


def answers(solvers: list[Solver], paths: dict[str, dict]) -> tuple[dict[str, float], dict[str, dict]]:
    """Seconds of the first call and row errors of every solver; those that fail or disagree go to `paths`.

    The first solver that works, ours, is what the others are compared with.
    """
    first_s: dict[str, float] = {}
    errors: dict[str, dict] = {}
    reference: dict[str, Tensor] | None = None
    for solver in solvers:
        try:
            got, seconds = solver.answer()
        except (RuntimeError, NotImplementedError, ValueError, TypeError) as error:
            paths[solver.name] = {"status": "failed", "reason": f"{type(error).__name__}: {error}"[:200]}
            solver.release()
            continue
        reference = reference or got
        found = {key: row_error(got[key], want) for key, want in reference.items()}
        wrong = {key: error for key, error in found.items() if not error <= BOUNDS[solver.problem.cell.dtype]}
        if wrong:
            paths[solver.name] = {"status": "wrong", "reason": f"differs by {wrong}", "errors": found}
            continue
        first_s[solver.name], errors[solver.name] = seconds, found
    return first_s, errors


def memory_status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def peak_bytes(solver: Solver) -> int | None:
    """Most resident memory that two steps add; None where the system does not count it."""
    try:
        _native.empty_cache()
        ctypes.CDLL(None).malloc_trim(0)
        before = memory_status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):
        return None
    for turn in range(2):
        solver.step(solver.problem.batch(turn))
    return memory_status("VmHWM") - before


def best_peer(paths: dict[str, dict]) -> str | None:
    peers = {
        name: path["median_s"] for name, path in paths.items() if path["status"] == "ok" and name not in OWN
    }
    return min(peers, key=peers.__getitem__, default=None)


def measure(
    cell: Cell, ceilings: dict, isa: str, gemm: dict[str, GemmRates], *, limit_s: float, seconds: float
) -> dict:
    """The record of a cell. A path slower than `limit_s` a call is left out, with its reason."""
    start = time.perf_counter()
    task = problem(cell)
    peers, reasons = applicable(cell)
    paths = {name: skipped(reason) for name, reason in reasons.items()}
    solvers = ours(task)
    for path in peers:
        if reason := why_too_costly(path, cell, limit_s, gemm):
            paths[path.name] = skipped(reason)
        else:
            solvers.append(peer(path, task))
    first_s, errors = answers(solvers, paths)
    timed = {solver.name: solver for solver in solvers if solver.name in first_s}
    timers = {name: solver.timed for name, solver in timed.items()}
    if not cell.train and cell.tokens <= DECODE_TOKENS:
        timers[READS] = read_seconds
    samples = interleave(timers, first_s, always=OWN | {READS}, deadline=start + seconds)
    read_rate = READ_BYTES / statistics.median(samples.pop(READS)) if READS in samples else None
    for name, taken in samples.items():
        paths[name] = summary(taken) | {
            "errors": {key: significant(error, 2) for key, error in errors[name].items()},
            "gflops": significant(cell.flops / summary(taken)["median_s"] / 1e9),
        }
    if cell.train and cell.tokens == MEMORY_TOKENS:
        for name, solver in timed.items():
            paths[name]["peak_bytes"] = peak_bytes(solver)
    return {
        "name": cell.name,
        "mode": cell.mode,
        "dtype": cell.dtype,
        "shape": cell.shape.name,
        "tokens": cell.tokens,
        "paths": paths,
        **verdict(cell, paths, ceilings, isa, read_rate and task.active_weight_bytes() / read_rate),
    }


def verdict(cell: Cell, paths: dict[str, dict], ceilings: dict, isa: str, read_s: float | None) -> dict:
    """Ratios of the best peer's time to ours, and our shares of the machine's ceilings.

    `read_s` is how long reading the weights takes, where that was measured.
    """
    best = best_peer(paths)
    found: dict = {"best_peer": best, "ratios": {}}
    for name in sorted(OWN & paths.keys()):
        if paths[name]["status"] == "ok" and best:
            found["ratios"][name] = significant(paths[best]["median_s"] / paths[name]["median_s"])
    if paths[OURS]["status"] == "ok":
        peak, source = peak_of(ceilings, isa, cell.dtype)
        median = paths[OURS]["median_s"]
        found["peak"] = {"share": significant(cell.flops / median / 1e9 / peak), "of": source}
        if read_s:
            found["read_share"] = significant(read_s / median)
    return found

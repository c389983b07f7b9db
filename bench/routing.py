"""Routing alone, and what one call costs when there is almost nothing to compute."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from baselines import PEERS
from baselines.torch_paths import sort_by_expert
from cells import OURS, OURS_FRESH, Cell, RoutingCell, Shape
from problem import problem
from solver import ours, peer
from timing import interleave, significant, summary
from torch import Tensor

from fastmoe_rs import RoutingPlan
from fastmoe_rs.functional import route

TINY = Shape("tiny", 16, 16, 4, 2)
BATCH = 20  # calls timed together where one takes microseconds


def record(
    name: str, work: str, timers: dict[str, Callable[[], object]], seconds: float, calls: int = 1
) -> dict:
    """Interleaved medians of one call, ours first, and the ratio to the best peer."""

    def timer(run: Callable[[], object]) -> Callable[[int], float]:
        def timed(_turn: int) -> float:
            start = time.perf_counter()
            for _ in range(calls):
                run()
            return (time.perf_counter() - start) / calls

        return timed

    turns = {path: timer(run) for path, run in timers.items()}
    first_s = {path: timed(0) for path, timed in turns.items()}
    samples = interleave(turns, first_s, always=frozenset({OURS}), deadline=time.perf_counter() + seconds)
    paths = {path: summary(taken) for path, taken in samples.items()}
    best = min((path for path in paths if path != OURS), key=lambda path: paths[path]["median_s"])
    ratio = significant(paths[best]["median_s"] / paths[OURS]["median_s"])
    return {"name": name, "work": work, "paths": paths, "best_peer": best, "ratios": {OURS: ratio}}


def torch_route(logits_TE: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    return torch.softmax(logits_TE, -1).topk(top_k)


def measure_routing(cell: RoutingCell, seconds: float) -> list[dict]:
    """Softmax with top-k beside torch's, and the sort by expert beside argsort with bincount."""
    torch.manual_seed(0)
    logits_TE = torch.randn(cell.tokens, cell.experts)
    with torch.no_grad():
        chosen = route(logits_TE, cell.top_k)
        weights_TK, _ = torch_route(logits_TE, cell.top_k)
        torch.testing.assert_close(chosen.weights, weights_TK)
        order_R, counts_E = sort_by_expert(chosen.ids, cell.experts)
        plan = RoutingPlan.from_ids(chosen.ids, cell.experts)
        assert torch.equal(torch.as_tensor(plan.counts).long(), counts_E)
        assert torch.equal(torch.as_tensor(plan.gather).long(), order_R // cell.top_k)
        return [
            record(
                cell.name,
                "softmax and top-k",
                {
                    OURS: lambda: route(logits_TE, cell.top_k),
                    "torch": lambda: torch_route(logits_TE, cell.top_k),
                },
                seconds / 2,
            ),
            record(
                cell.name,
                "sort by expert",
                {
                    OURS: lambda: RoutingPlan.from_ids(chosen.ids, cell.experts),
                    "torch": lambda: sort_by_expert(chosen.ids, cell.experts),
                },
                seconds / 2,
            ),
        ]


def measure_overhead(mode: str, seconds: float) -> dict:
    """Time of one call with one token and 16-wide experts, where only the way to the kernels counts."""
    task = problem(Cell(TINY, "float32", 1, mode))
    solvers = [*ours(task), *(peer(path, task) for path in PEERS if not path.why_not(task.cell))]
    batch = task.batch(0)
    return record(
        f"{mode}, 1 token, {TINY.hidden} wide",
        "one call",
        {
            solver.name: lambda solver=solver: solver.step(batch)
            for solver in solvers
            if solver.name != OURS_FRESH
        },
        seconds,
        calls=BATCH,
    )

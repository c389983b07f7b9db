"""The cells at a moderate size under pytest-benchmark: `pytest bench --benchmark-enable`.

Without timing they still check that every path gives our answer. Grouped by cell, so that
`--benchmark-compare` and the printed groups set ours beside the peers. run.py is the recorded benchmark; it
interleaves the paths, which pytest-benchmark cannot.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from baselines import PEERS
from baselines.torch_paths import sort_by_expert
from cells import MODERATE_SHAPES, OURS, OURS_FRESH, PASSES, Cell, grid
from problem import problem
from routing import torch_route
from solver import BOUNDS, Solver, ours, peer, row_error

from fastmoe_rs import RoutingPlan
from fastmoe_rs.functional import route

CELLS = list(grid(MODERATE_SHAPES, ("float32", "bfloat16"), (64,), PASSES))


def paths() -> Iterator[pytest.ParameterSet]:
    for cell in CELLS:
        own = (OURS, OURS_FRESH) if cell.train else (OURS,)
        for name in (*own, *(path.name for path in PEERS if not path.why_not(cell))):
            yield pytest.param(cell, name, id=f"{cell.name}-{name}")


def solver_of(cell: Cell, name: str) -> Solver:
    task = problem(cell)
    own = {solver.name: solver for solver in ours(task)}
    return own.get(name) or peer(next(path for path in PEERS if path.name == name), task)


@pytest.mark.parametrize(("cell", "name"), list(paths()))
def test_layer(benchmark, cell: Cell, name: str) -> None:
    solver = solver_of(cell, name)
    got, _ = solver.answer()
    want, _ = solver_of(cell, OURS).answer()
    for key, tensor in want.items():
        assert row_error(got[key], tensor) <= BOUNDS[cell.dtype], key
    turns = iter(range(1_000_000))

    def setup() -> tuple[tuple, dict]:
        solver.before()
        return (solver.problem.batch(next(turns)),), {}

    benchmark.group = cell.name
    benchmark.pedantic(solver.step, setup=setup, rounds=5, warmup_rounds=1)


@pytest.mark.parametrize("name", [OURS, "torch"])
def test_route(benchmark, name: str) -> None:
    torch.manual_seed(0)
    logits_TE = torch.randn(4096, 64)
    benchmark.group = "softmax and top-k 4096x64 k8"
    if name == OURS:
        weights_TK = benchmark(route, logits_TE, 8).weights
    else:
        weights_TK = benchmark(torch_route, logits_TE, 8)[0]
    torch.testing.assert_close(weights_TK.sum(-1), logits_TE.softmax(-1).topk(8).values.sum(-1))


@pytest.mark.parametrize("name", [OURS, "torch"])
def test_sort(benchmark, name: str) -> None:
    torch.manual_seed(0)
    ids_TK = torch.rand(4096, 64).topk(8).indices
    benchmark.group = "sort by expert 4096x64 k8"
    if name == OURS:
        counts_E = torch.as_tensor(benchmark(RoutingPlan.from_ids, ids_TK, 64).counts)
    else:
        counts_E = benchmark(sort_by_expert, ids_TK, 64)[1]
    assert counts_E.sum() == ids_TK.numel()

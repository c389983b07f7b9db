"""Time the layer against torch and transformers, and record the run.

    python bench/run.py                      the full matrix in about 25 minutes
    python bench/run.py --quick              the subset that guides tuning, about 4 minutes
    python bench/run.py --only float32-A     cells (mode-dtype-shape-Ttokens) and sections that contain a text
    python bench/run.py --isa avx2           as a machine without AVX-512, torch held to the same
    python bench/run.py --resume RECORD      the cells for which its time was too short

Every result is written to bench/results/ as soon as it is known, a page of tables and a chart at the end;
`python bench/report.py` puts the newest full run into the README.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import sys
import time
from pathlib import Path

import report
from cells import PASSES, ROUTING, SMOKE_ROUTING, Cell, matrix

RESULTS = Path(__file__).parent / "results"
# What holds torch's own kernels, oneDNN and MKL to an instruction set.
LIMITS = {
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    "avx512": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_VNNI", "MKL_ENABLE_INSTRUCTIONS": "AVX512"},
    "avx512_bf16": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16", "MKL_ENABLE_INSTRUCTIONS": "AVX512"},
}
OTHER_SECONDS = 4.0  # each routing cell and each overhead


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bench/run.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_const", const="quick", dest="matrix", help="about 4 minutes")
    size.add_argument(
        "--smoke", action="store_const", const="smoke", dest="matrix", help="seconds, tiny: a check"
    )
    parser.add_argument(
        "--only", default="", metavar="TEXT", help="cells and sections whose name contains this"
    )
    parser.add_argument("--budget-minutes", type=float, metavar="M", help="default 25, 4 with --quick")
    parser.add_argument(
        "--limit", type=float, default=8.0, metavar="S", help="leave out peers slower than S a call"
    )
    parser.add_argument("--threads", type=int, default=2, metavar="N", help="default 2")
    parser.add_argument("--isa", choices=LIMITS, help="hold ours and the peers to this instruction set")
    place = parser.add_mutually_exclusive_group()
    place.add_argument("--out", type=Path, help="result file (default: bench/results/DATE-CPU-ISA.json)")
    place.add_argument(
        "--resume", type=Path, metavar="RECORD", help="a result file of this machine and commit"
    )
    options = parser.parse_args(argv)
    options.matrix = options.matrix or "full"
    options.budget_minutes = options.budget_minutes or {"full": 25, "quick": 4, "smoke": 2}[options.matrix]
    return options


def default_name(machine: dict, matrix_name: str) -> str:
    cpu = re.sub(r"\(.*?\)|\b(CPU|Processor)\b|@.*", "", machine["cpu"])
    cpu = re.sub(r"[^a-z0-9]+", "-", cpu.lower()).strip("-")
    suffix = "" if matrix_name == "full" else f"-{matrix_name}"
    return f"{machine['date'][:10]}-{cpu}-{machine['isa']}{suffix}.json"


def text_of(run: dict) -> str:
    """JSON with one result a line."""

    def value_of(value: object) -> str:
        if isinstance(value, list) and value and isinstance(value[0], dict):
            return "[\n" + ",\n".join(json.dumps(item) for item in value) + "\n]"
        return json.dumps(value)

    return "{\n" + ",\n".join(f'"{key}": {value_of(value)}' for key, value in run.items()) + "\n}\n"


def write(run: dict, path: Path) -> None:
    """Replace the file as a whole, so that a run that is cut keeps what it has."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(text_of(run))
    partial.replace(path)


def line(result: dict) -> str:
    """What the terminal shows of a cell."""
    paths = sorted(
        (path["median_s"], name) for name, path in result["paths"].items() if path["status"] == "ok"
    )
    times = "  ".join(f"{name} {1e3 * seconds:.3g}" for seconds, name in paths)
    rest = [
        f"{name} {path['status']}"
        for name, path in result["paths"].items()
        if path["status"] in ("wrong", "failed")
    ]
    ratios = "/".join(f"{ratio:.2f}" for ratio in result["ratios"].values())
    return f"{result['name']:28} {ratios:>10}x  ms: {times}  {' '.join(rest)}"


def run_layer(run: dict, cells: list[Cell], options: argparse.Namespace, end: float, save) -> None:
    from layer import measure
    from machine import gemm_rates

    gemm = gemm_rates(64 if options.matrix == "smoke" else 1024)
    for index, cell in enumerate(cells):
        remaining = end - time.perf_counter()
        if remaining <= 0:
            reason = f"the budget of {options.budget_minutes:g} minutes was used up"
            run["left_out"] += [{"name": cell.name, "reason": reason} for cell in cells[index:]]
            save()
            return
        share = cell.effort / math.fsum(later.effort for later in cells[index:])
        result = measure(
            cell,
            run["ceilings"],
            run["machine"]["isa"],
            gemm,
            limit_s=min(options.limit, remaining),
            seconds=0 if options.matrix == "smoke" else remaining * share,
        )
        run["cells"].append(result)
        save()
        print(line(result), flush=True)


def resumed(path: Path, identity: dict) -> dict:
    """The record of a run that was cut off, to be gone on with."""
    run = json.loads(path.read_text())
    same = ("cpu", "isa", "threads", "versions", "commit")
    if other := [key for key in same if run["machine"][key] != identity[key]]:
        sys.exit(f"--resume {path}: made with another {', '.join(other)}")
    return run | {"left_out": []}


def main(argv: list[str] | None = None) -> int:
    """Run the matrix; exit status 1 when a path failed or gave a wrong answer."""
    options = arguments(argv)
    start = time.perf_counter()
    smoke = options.matrix == "smoke"
    cells = [cell for cell in matrix(options.matrix) if options.only in cell.name]
    routing = [
        cell for cell in (SMOKE_ROUTING if smoke else ROUTING) if options.only in f"routing {cell.name}"
    ]
    overhead = [mode for mode in PASSES if options.only in f"overhead {mode}"]
    if not (cells or routing or overhead):
        print(
            f"--only {options.only!r} matches nothing; cells are named like {matrix('full')[0].name}",
            file=sys.stderr,
        )
        return 2
    if options.isa:
        os.environ.update(LIMITS[options.isa], FASTMOE_CPU_ISA=options.isa)
    import machine
    import torch
    from routing import measure_overhead, measure_routing

    torch.set_num_threads(options.threads)
    identity = machine.identity(options.threads)
    if options.resume:
        run, path = resumed(options.resume, identity), options.resume
        routing, overhead = [], []
    else:
        run = {
            "format": 1,
            "command": sys.argv[1:] if argv is None else argv,
            "matrix": options.matrix,
            "machine": identity,
            "ceilings": machine.ceilings(options.threads, smoke=smoke),
            "cells": [],
            "routing": [],
            "overhead": [],
            "left_out": [],
            "seconds": 0,
        }
        path = options.out or RESULTS / default_name(identity, options.matrix)
    seconds_before = run["seconds"]
    done = {cell["name"] for cell in run["cells"]}
    missing = [cell for cell in cells if cell.name not in done]

    def save() -> None:
        run["seconds"] = round(seconds_before + time.perf_counter() - start, 1)
        write(run, path)

    seconds = 0 if smoke else OTHER_SECONDS
    for cell in routing:
        run["routing"] += measure_routing(cell, seconds)
    for mode in overhead:
        run["overhead"].append(measure_overhead(mode, seconds))
    for result in (*run["routing"], *run["overhead"]):
        print(line(result), flush=True)
    save()
    run_layer(run, missing, options, start + 60 * options.budget_minutes, save)
    measured = {cell["name"] for cell in run["cells"]} - done
    print(f"{len(measured)} of {len(missing)} cells in {run['seconds']:.0f} s: {path}")
    report.main([str(path)])
    statuses = [path["status"] for cell in run["cells"] for path in cell["paths"].values()]
    return int(any(status in ("failed", "wrong") for status in statuses))


if __name__ == "__main__":
    sys.exit(main())

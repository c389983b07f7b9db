"""Time the layer on a GPU beside other projects' and write down every result at once.

    python bench/gpu/run.py                       all cells, most telling ones first, for at most 540 seconds
    python bench/gpu/run.py --only Qwen3          cells such as "Qwen3-30B-A3B T4096 train"
    python bench/gpu/run.py --device cpu --quick  tiny layers, a check of this program on any machine

The record is bench/results/DATE-GPU.jsonl, one JSON object a line: the machine, the ceilings measured on it,
then routing and cells. Correctness comes first: a wrong answer of ours ends the run with exit status 1, and a
peer that differs is not timed. bench/gpu/report.py makes a page and a chart of the record.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

BENCH = Path(__file__).resolve().parents[1]
sys.path.append(str(BENCH))

import report  # noqa: E402
import torch  # noqa: E402 - the folder above is needed first
from machine import commit, cpu_model, version  # noqa: E402
from measure import Clock, failure, interleaved, measure  # noqa: E402
from problems import Problems, cells  # noqa: E402
from torch import Tensor  # noqa: E402

from fastmoe_rs import RoutingPlan, _native  # noqa: E402
from fastmoe_rs.functional import route  # noqa: E402

PACKAGES = ("fastmoe_rs", "torch", "triton", "transformers", "liger_kernel", "sonic-moe", "quack-kernels")
ROUTING = ((16384, 128, 8), (16384, 256, 8), (4096, 64, 8), (128, 128, 8))
QUICK_ROUTING = ((64, 8, 2),)
CELL_SECONDS = 6.0


class Record:
    """A file of JSON lines, each on the disk before the next thing begins."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        path.write_text("")

    def add(self, entry: dict) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(entry) + "\n")


def machine_of(device: str) -> dict:
    about = {
        "kind": "machine",
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "device": device,
        "gpu": None,
        "cpu": cpu_model(),
        "cuda": torch.version.cuda,
        "versions": {name: version(name) for name in PACKAGES},
    }
    if device.startswith("cuda"):
        properties = torch.cuda.get_device_properties(device)
        about |= {
            "gpu": properties.name,
            "capability": [properties.major, properties.minor],
            "multiprocessors": properties.multi_processor_count,
            "driver_cuda": list(_native.cuda_info()["version"]),
            "images": sorted(
                {image["arch"] for image in _native.images((properties.major, properties.minor))}
            ),
        }
    return about


def ceilings(clock: Clock, device: str, *, quick: bool) -> dict[str, float]:
    """What the device reaches: bytes a second of a copy, in and out; FLOP/s of a square bfloat16 product."""
    size = 256 if quick else 8192
    a, b = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    source = torch.randn((1 << 20) if quick else (1 << 30), device=device)
    target = torch.empty_like(source)
    runs: dict[str, Callable[[int], object]] = {
        "product": lambda turn: a @ b,
        "copy": lambda turn: target.copy_(source),
    }
    times = interleaved(clock, runs, 0.0 if quick else 1.0)
    return {
        "flops_per_s": 2 * size**3 / times["product"]["median_s"],
        "bytes_per_s": 2 * source.nbytes / times["copy"]["median_s"],
    }


def routing(clock: Clock, device: str, sizes: tuple[int, int, int], seconds: float) -> dict:
    """Top-k with the plan beside softmax, topk, argsort and counts of torch."""
    tokens, experts, top_k = sizes
    logits = torch.randn(tokens, experts, device=device)

    def ours(turn: int) -> Tensor:
        return RoutingPlan.from_ids(route(logits, top_k).ids, experts).gather

    def torchs(turn: int) -> Tensor:
        _, ids = logits.softmax(-1).topk(top_k)
        flat = ids.reshape(-1)
        torch.zeros(experts, dtype=torch.int64, device=device).scatter_add_(0, flat, torch.ones_like(flat))
        return flat.argsort(stable=True) // top_k

    with torch.no_grad():
        if not torch.equal(ours(0).long(), torchs(0)):
            raise ArithmeticError(f"the plan differs from torch's on {sizes}")
        times = interleaved(clock, {"fastmoe_rs": ours, "torch": torchs}, seconds)
    return {"kind": "routing", "tokens": tokens, "experts": experts, "top_k": top_k, "paths": times}


def line(result: dict) -> str:
    """What the terminal shows of a cell: milliseconds eager/graph, and the floor."""
    parts = []
    for name, path in result["paths"].items():
        times = [path[kind]["median_s"] for kind in ("eager", "graph") if "median_s" in path.get(kind, {})]
        parts.append(f"{name} {'/'.join(f'{1e3 * s:.4g}' for s in times) or path['status']}")
    return f"{result['name']:34} floor {1e3 * result['floor_s']:.4g} ms: {', '.join(parts)}"


def main(argv: list[str] | None = None) -> int:
    """Exit status 1 when an answer is wrong or there is no such device."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny layers")
    parser.add_argument("--only", default="", metavar="TEXT", help="cells whose name contains this")
    parser.add_argument("--budget-seconds", type=float, default=540, metavar="S", help="default 540")
    parser.add_argument("--out", type=Path, help="the record (default: bench/results/DATE-GPU.jsonl)")
    options = parser.parse_args(argv)
    end = time.perf_counter() + options.budget_seconds
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        print("bench/gpu: no CUDA device; --device cpu --quick checks the program", file=sys.stderr)
        return 1
    chosen = [cell for cell in cells(quick=options.quick) if options.only in cell.name]
    about = machine_of(options.device)
    name = re.sub(r"[^a-z0-9]+", "-", (about["gpu"] or "cpu").lower()).strip("-")
    record = Record(options.out or BENCH / "results" / f"{about['date'][:10]}-{name}.jsonl")
    record.add(about)
    clock = Clock(options.device)
    rates = ceilings(clock, options.device, quick=options.quick)
    record.add({"kind": "ceilings", **rates})
    seconds = 0.0 if options.quick else CELL_SECONDS
    problems = Problems(options.device)
    try:
        for sizes in QUICK_ROUTING if options.quick else ROUTING:
            record.add(routing(clock, options.device, sizes, seconds / 6))
        for index, cell in enumerate(chosen):
            if time.perf_counter() > end:
                for left in chosen[index:]:
                    record.add({"kind": "left out", "name": left.name, "reason": "the time was used up"})
                break
            try:
                result = measure(problems.of(cell), clock, rates, min(seconds, end - time.perf_counter()))
            except torch.OutOfMemoryError as error:
                record.add({"kind": "left out", "name": cell.name, **failure(error)})
                torch.cuda.empty_cache()
                continue
            record.add(result)
            print(line(result), flush=True)
    except ArithmeticError as error:
        record.add({"kind": "wrong", "reason": str(error)})
        print(error, file=sys.stderr)
        return 1
    report.main([str(record.path)])
    return 0


if __name__ == "__main__":
    sys.exit(main())

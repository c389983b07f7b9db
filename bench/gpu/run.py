"""Time the layer on a GPU beside other projects' and write down every result at once.

    python bench/gpu/run.py                       all cells, most telling ones first, for at most 540 seconds
    python bench/gpu/run.py --only Qwen3          cells such as "Qwen3-30B-A3B T4096 train"
    python bench/gpu/run.py --without liger       peers that compile for seconds in every cell are left out
    python bench/gpu/run.py --device cpu --quick  tiny layers, a check of this program on any machine

The record is bench/results/DATE-GPU.jsonl, one JSON object a line: the machine, the ceilings measured on it,
then routing and cells. Correctness comes first: a layer on which we are wrong is not timed and makes the exit
status 1, and a peer that differs is not timed. bench/gpu/report.py makes a page and a chart of the record,
also where the run was cut off.
"""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path
from time import time

BENCH = Path(__file__).resolve().parents[1]
sys.path.append(str(BENCH))

import report  # noqa: E402 - the folder above is needed first
import torch  # noqa: E402
from problems import PEERS, cells  # noqa: E402
from record import Record, default_path  # noqa: E402
from supervisor import results  # noqa: E402


def line(result: dict) -> str:
    """What the terminal shows of a result; of a cell: milliseconds eager/graph, floor, seconds it took."""
    if result["kind"] != "cell":
        return f"{result.get('name') or result['kind']}: {result.get('reason', 'ok')}"
    parts = []
    for name, path in result["paths"].items():
        times = [path[kind]["median_s"] for kind in ("eager", "graph") if "median_s" in path.get(kind, {})]
        parts.append(f"{name} {'/'.join(f'{1e3 * s:.4g}' for s in times) or path['status']}")
    took = result["took"]
    spent = f"{sum(took.values()):.1f} s, {took['answers']:.1f} of them until all had answered"
    return f"{result['name']:34} floor {1e3 * result['floor_s']:.4g} ms: {', '.join(parts)} ({spent})"


def main(argv: list[str] | None = None) -> int:
    """Exit status 1 when an answer is wrong or there is no such device."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny layers")
    parser.add_argument(
        "--only", action="append", metavar="TEXT", help="cells whose name contains this, or another one's"
    )
    parser.add_argument("--without", action="append", default=[], choices=PEERS, help="a peer to leave out")
    parser.add_argument("--budget-seconds", type=float, default=540, metavar="S", help="default 540")
    parser.add_argument("--out", type=Path, help="the record (default: bench/results/DATE-GPU.jsonl)")
    options = parser.parse_args(argv)
    end = time() + options.budget_seconds
    cuda = options.device.startswith("cuda")
    if cuda and not torch.cuda.is_available():
        print("bench/gpu: no CUDA device; --device cpu --quick checks the program", file=sys.stderr)
        return 1
    wanted = options.only or [""]
    chosen = [cell for cell in cells(quick=options.quick) if any(text in cell.name for text in wanted)]
    place = torch.cuda.get_device_name(options.device) if cuda else "cpu"
    record = Record(options.out or default_path(place))
    wrong = 0
    try:
        for result in results(options.device, chosen, end, quick=options.quick, without=options.without):
            record.add(result)
            print(line(result), flush=True)
            wrong += result["kind"] == "wrong"
    finally:
        report.main([str(record.path)])
    return int(wrong > 0)


def _stop(*_: object) -> None:
    sys.exit("bench/gpu: stopped")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _stop)  # so that the report is written
    sys.exit(main())

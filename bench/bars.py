"""What is asked of a run, by instruction set, and whether it was met. Needs neither torch nor fastmoe_rs.

A bar is a ratio (best peer's time over ours) or a share of a ceiling, as the geometric mean over its cells;
no cell may be below `floor`. `stretch` is what prototypes or the machine's limits say can be reached.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from cells import OURS, OURS_FRESH

UPCAST = "torch_sorted_up"


@dataclass(frozen=True)
class Bar:
    """One line of the table: the cells it is about, and the numbers asked for."""

    work: str
    mode: str  # "forward", "train", or the work of a routing cell
    dtype: str
    tokens: tuple[int, ...]
    bar: float
    stretch: float
    floor: float
    metric: str = (
        "ratio"  # "ratio", "peak" (share of the multiply peak) or "read" (share of the read ceiling)
    )
    path: str = OURS
    shapes: str = "ABC"
    peers: tuple[str, ...] = ()  # only these; empty: all
    without: tuple[str, ...] = ()


FP32, BF16, FP16 = "float32", "bfloat16", "float16"
FEW, MANY, WIDE = (8, 64), (512, 2048), (64, 512, 2048)

AVX2 = (
    Bar("fp32 forward, T 8-64", "forward", FP32, FEW, 1.5, 2.0, 1.0),
    Bar("fp32 forward, T 512-2048", "forward", FP32, MANY, 1.05, 1.2, 1.0),
    Bar("fp32 forward + backward, T 8-64", "train", FP32, FEW, 1.5, 3.0, 1.0),
    Bar("fp32 forward + backward, T 512-2048", "train", FP32, MANY, 1.2, 1.5, 1.0),
    Bar("bf16 forward against upcast, T ≥ 64", "forward", BF16, WIDE, 1.3, 1.6, 1.0, peers=(UPCAST,)),
    Bar("bf16 forward + backward, T ≥ 64", "train", BF16, WIDE, 10, 20, 1.0, without=(UPCAST,)),
    Bar("bf16 decode, T 1", "forward", BF16, (1,), 1.6, 1.9, 1.0),
    Bar("softmax and top-k", "softmax and top-k", "", (), 3, 6, 1.0),
    Bar("sort by expert", "sort by expert", "", (), 4, 8, 1.0),
    Bar("fp32 share of the FMA peak, T 2048", "forward", FP32, (2048,), 0.75, 0.9, 0.0, metric="peak"),
)
AVX512_BF16 = (
    Bar("fp32 forward, T 8-64", "forward", FP32, FEW, 2.5, 3.3, 2.0),
    Bar("fp32 forward, T 512-2048", "forward", FP32, MANY, 2.3, 2.9, 2.0),
    Bar("fp32 forward + backward, dW reused, T 64", "train", FP32, (64,), 4.0, 5.5, 2.2),
    Bar("fp32 forward + backward, dW reused, T 512-2048", "train", FP32, MANY, 2.5, 3.3, 2.2),
    Bar("fp32 forward + backward, dW fresh", "train", FP32, WIDE, 1.4, 1.8, 1.1, path=OURS_FRESH),
    Bar("bf16 forward, T 8-64", "forward", BF16, FEW, 1.6, 1.8, 1.1),
    Bar("bf16 forward, T 512-2048", "forward", BF16, MANY, 1.35, 1.6, 1.1),
    Bar("bf16 forward + backward, dW reused, T 64", "train", BF16, (64,), 3.0, 4.0, 1.5),
    Bar("bf16 forward + backward, dW reused, T 512-2048", "train", BF16, MANY, 1.8, 2.4, 1.5),
    Bar("bf16 forward + backward, dW fresh", "train", BF16, WIDE, 1.15, 1.35, 1.0, path=OURS_FRESH),
    Bar("fp16 forward, T 8", "forward", FP16, (8,), 1.7, 2.5, 1.5),
    Bar("fp16 forward, T 64", "forward", FP16, (64,), 3, 5, 1.5),
    Bar("fp16 forward, T 512", "forward", FP16, (512,), 6, 8, 1.5),
    *(
        Bar(f"{short} decode, T 1", "forward", dtype, (1,), bar, stretch, 1.0)
        for short, dtype, bar, stretch in (
            ("fp32", FP32, 1.8, 2.2),
            ("bf16", BF16, 2.0, 2.5),
            ("fp16", FP16, 1.2, 1.5),
        )
    ),
    *(
        Bar(
            f"{short} decode, share of the read ceiling",
            "forward",
            dtype,
            (1,),
            0.85,
            0.95,
            0.85,
            metric="read",
        )
        for short, dtype in (("fp32", FP32), ("bf16", BF16), ("fp16", FP16))
    ),
    *(
        Bar(
            f"{short} share of peak, T 2048",
            "forward",
            dtype,
            (2048,),
            0.78,
            0.88,
            0.78,
            metric="peak",
            shapes="AB",
        )
        for short, dtype in (("fp32", FP32), ("bf16", BF16))
    ),
)
BARS = {"avx2": AVX2, "avx512_bf16": AVX512_BF16}


@dataclass(frozen=True)
class Outcome:
    """Geometric mean and lowest of the cells measured (None where there is none), of how many wanted."""

    bar: Bar
    mean: float | None
    lowest: float | None
    measured: int
    wanted: int

    @property
    def met(self) -> bool | None:
        if self.mean is None or self.lowest is None:
            return None
        return self.mean >= self.bar.bar and self.lowest >= self.bar.floor


def ratio(
    result: dict, path: str = OURS, peers: Iterable[str] = (), without: Iterable[str] = ()
) -> float | None:
    """Time of the fastest of some peers over ours; None where one of both was not measured."""
    peers, without = set(peers), {OURS, OURS_FRESH, *without}
    medians = {name: found["median_s"] for name, found in result["paths"].items() if found["status"] == "ok"}
    rivals = [s for name, s in medians.items() if name not in without and (not peers or name in peers)]
    return min(rivals) / medians[path] if rivals and path in medians else None


def value(bar: Bar, cell: dict) -> float | None:
    if bar.metric == "peak":
        return cell.get("peak", {}).get("share")
    if bar.metric == "read":
        return cell.get("read_share")
    return ratio(cell, bar.path, bar.peers, bar.without)


def selected(bar: Bar, run: dict) -> Iterator[dict]:
    yield from (result for result in run["routing"] if result["work"] == bar.mode)
    for cell in run["cells"]:
        wanted = (cell["mode"], cell["dtype"]) == (bar.mode, bar.dtype)
        if wanted and cell["tokens"] in bar.tokens and cell["shape"] in bar.shapes:
            yield cell


def geometric_mean(values: Iterable[float]) -> float | None:
    logs = [math.log(found) for found in values]
    return math.exp(math.fsum(logs) / len(logs)) if logs else None


def outcome(bar: Bar, run: dict) -> Outcome:
    values = [found for result in selected(bar, run) if (found := value(bar, result)) is not None]
    wanted = len(bar.tokens) * len(bar.shapes) or 3
    return Outcome(bar, geometric_mean(values), min(values, default=None), len(values), wanted)


def outcomes(run: dict) -> list[Outcome]:
    """One for each bar of the run's instruction set; none where there are no bars."""
    return [outcome(bar, run) for bar in BARS.get(run["machine"]["isa"], ())]


def slower_cells(run: dict) -> list[tuple[str, float, str]]:
    """Name, ratio and best peer of every layer cell and routing size where a peer is faster than ours."""
    found = []
    for result in (*run["cells"], *run["routing"]):
        ours = ratio(result)
        if ours is not None and ours < 1:
            found.append(
                (" ".join(filter(None, (result.get("work"), result["name"]))), ours, result["best_peer"])
            )
    return found


def memory_rows(run: dict) -> Iterator[tuple[str, int, str, int]]:
    """Name of a cell, our peak bytes, the most frugal peer and its peak bytes."""
    for cell in run["cells"]:
        peaks = {name: path["peak_bytes"] for name, path in cell["paths"].items() if path.get("peak_bytes")}
        own = [peaks.pop(name) for name in (OURS, OURS_FRESH) if name in peaks]
        if own and peaks:
            best = min(peaks, key=peaks.__getitem__)
            yield cell["name"], max(own), best, peaks[best]

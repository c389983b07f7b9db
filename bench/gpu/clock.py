"""Times on a device: medians of runs that take turns, each with a cold level-2 cache."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

FLUSH_BYTES = 256 << 20  # more than any level-2 cache, and long enough to write for the host to get ahead
WARM_UP, LEAST_TURNS, MOST_TURNS = 3, 5, 60

Run = Callable[[int], object]  # takes the number of the turn


class Clock:
    """Times work by events on a GPU, by the host's clock elsewhere."""

    def __init__(self, device: str) -> None:
        self.cuda = device.startswith("cuda")
        self.other_data = torch.empty(FLUSH_BYTES if self.cuda else 0, dtype=torch.uint8, device=device)

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def seconds(self, run: Run, turn: int) -> tuple[float, float]:
        """Of the device, which was idle before, and of the host of a GPU until the call returned."""
        if not self.cuda:
            begin = time.perf_counter()
            run(turn)
            return time.perf_counter() - begin, 0.0
        self.other_data.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        begin = time.perf_counter()
        run(turn)
        host = time.perf_counter() - begin
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3, host


def interleaved(clock: Clock, runs: dict[str, Run], seconds: float, steps: int = 1) -> dict[str, dict]:
    """Times of a step of each run, which has `steps` of them; all run once a turn, another one first.

    Takes about `seconds`, or LEAST_TURNS where those take longer.
    """
    begin = time.perf_counter()
    for turn in range(WARM_UP):
        for run in runs.values():
            run(turn)
        clock.wait()
        if time.perf_counter() - begin > seconds / 4:
            break
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    names, end = list(runs), begin + seconds
    for turn in range(MOST_TURNS):
        first = turn % max(1, len(names))
        for name in names[first:] + names[:first]:
            samples[name].append(clock.seconds(runs[name], turn))
        if turn + 1 >= LEAST_TURNS and time.perf_counter() > end:
            break
    return {name: summary(taken, steps) for name, taken in samples.items()}


def summary(samples: list[tuple[float, float]], steps: int) -> dict:
    """Median and spread; `host_s` near the median says that the device was waiting for its host."""
    device, host = ([sample / steps for sample in column] for column in zip(*samples, strict=True))
    low, _, high = statistics.quantiles(device, n=4, method="inclusive")
    return {
        "median_s": statistics.median(device),
        "min_s": min(device),
        "max_s": max(device),
        "noise": (high - low) / statistics.median(device),
        "host_s": statistics.median(host),
        "samples": len(samples),
    }


def state(device: str) -> dict[str, int]:
    """Clock (MHz), temperature (degrees Celsius) and power (W) of a GPU, where they can be read."""
    try:
        return {
            "mhz": torch.cuda.clock_rate(device),
            "celsius": torch.cuda.temperature(device),
            "watts": torch.cuda.power_draw(device) // 1000,
        }
    except Exception:  # NVML and its Python package are not everywhere, nor are all its sensors
        return {}

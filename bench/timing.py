"""Interleaved timing: every path once a round, so that what disturbs one disturbs all."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence

LEAST_ROUNDS = 3
MOST_ROUNDS = 40
LONG_ROUND = 10.0  # seconds from which a round needs no other to be believed
CONTENDER = 1.5  # a peer this much slower than the best one is no longer timed
CALM = 0.25  # seconds below which a first call says little, as it includes warming up


def significant(value: float, digits: int = 4) -> float:
    return float(f"{value:.{digits}g}")


def summary(samples: Sequence[float]) -> dict:
    """Median, extremes and noise (interquartile range over median) of samples in seconds."""
    median = statistics.median(samples)
    low, _, high = (
        statistics.quantiles(samples, n=4, method="inclusive") if len(samples) > 1 else (median,) * 3
    )
    return {
        "status": "ok",
        "median_s": significant(median),
        "min_s": significant(min(samples)),
        "max_s": significant(max(samples)),
        "noise": significant((high - low) / median, 2),
        "samples_s": [significant(sample) for sample in samples],
    }


def interleave(
    timers: dict[str, Callable[[int], float]],
    first_s: dict[str, float],
    *,
    always: frozenset[str],
    deadline: float,
) -> dict[str, list[float]]:
    """Samples of each timer until the deadline (of time.perf_counter).

    `timers` take the turn, which chooses the batch. Those not in `always` stay only while they may still be
    the fastest of the rest; one that never runs keeps its first call as its single sample.
    """
    samples: dict[str, list[float]] = {name: [] for name in timers}
    rivals = [seconds for name, seconds in first_s.items() if name not in always]
    limit = max(2 * CONTENDER * min(rivals, default=0), CALM)
    live = [name for name in timers if name in always or first_s[name] <= limit]
    gc.collect()
    gc.disable()
    try:
        for turn in range(MOST_ROUNDS):
            start = time.perf_counter()
            for position, name in enumerate(live):
                samples[name].append(timers[name](turn + position))
            if turn + 1 >= LEAST_ROUNDS:
                best = min(
                    (statistics.median(samples[name]) for name in live if name not in always), default=0
                )
                live = [name for name in live if name in always or min(samples[name]) <= CONTENDER * best]
            now = time.perf_counter()
            if now > deadline and (turn + 1 >= LEAST_ROUNDS or now - start > LONG_ROUND):
                break
    finally:
        gc.enable()
    return {name: taken or [first_s[name]] for name, taken in samples.items()}

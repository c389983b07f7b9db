"""The benchmark's work in a process of its own, which is replaced when it dies or says nothing for long.

A peer may crash, hang, or leave the device in an error that only a new process gets rid of.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import signal
import sys
from collections.abc import Collection, Iterator
from time import time
from typing import Any

from problems import Cell

# Seconds after which a process is given up; peers compile for up to a minute, and a busy CPU pauses for long.
SILENCE = {"cuda": 120.0, "cpu": 1200.0}
MOST_PROCESSES = 20
GRACE = 20.0  # for the last cell, when the time is used up
PR_SET_PDEATHSIG = 1  # linux/prctl.h
OWN = ("start", "fastmoe_rs", "timing", "timing of graphs")  # not a peer's doing


def results(
    device: str, cells: list[Cell], end: float, *, quick: bool, without: Collection[str] = ()
) -> Iterator[dict]:
    """Machine, ceilings, routing and cells until `end` (of time.time), and what became of the rest.

    What a process did when it was lost is not done again: a peer in the rest of the run; otherwise a cell.
    Peers in `without` are not run at all.
    """
    given_up = {name: {"status": "skipped", "reason": "not asked for"} for name in without}
    rates: dict[str, float] | None = None
    left = cells
    for _ in range(MOST_PROCESSES):
        for entry in process(end, SILENCE[device.split(":")[0]], device, left, given_up, rates, end, quick):
            if entry["kind"] in ("now", "end"):
                continue
            if entry["kind"] == "ceilings":
                rates = {name: entry[name] for name in ("flops_per_s", "bytes_per_s")}
            if entry["kind"] == "lost" and entry["doing"] not in OWN:
                reason = f"{entry['reason']} (on {entry['name']})"
                given_up[entry["doing"]] = {"status": "failed", "reason": reason}
            else:
                left = [cell for cell in left if cell.name != entry.get("name")]
            yield entry
        if entry["kind"] == "end" or rates is None or time() > end:
            break
    reason = "the time was used up" if time() > end else "the device is not to be had"
    for cell in left:
        yield {"kind": "left out", "name": cell.name, "reason": reason}


def process(end: float, silence: float, *arguments: object) -> Iterator[dict]:
    """What a new process sends that works with these arguments; the last is of kind "end" or "lost"."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=work, args=(sender, *arguments), daemon=True)
    child.start()
    sender.close()
    entry: dict[str, Any] = {"kind": "now", "doing": "start", "name": ""}
    now = entry
    try:
        while entry["kind"] not in ("end", "lost"):
            patience = max(0.0, min(silence, end + GRACE - time()))
            if receiver.poll(patience):
                entry = receiver.recv()
                now = entry if entry["kind"] == "now" else now
            else:
                entry = {**now, "kind": "lost", "reason": f"said nothing for {patience:.0f} s"}
            yield entry
    except (EOFError, OSError):
        child.join()
        yield {**now, "kind": "lost", "reason": f"its process ended with status {child.exitcode}"}
    finally:
        child.kill()
        child.join()


def work(sender: Any, *arguments: object) -> None:
    """What the other process does, which ends with the one that started it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    import worker

    worker.work(sender.send, *arguments)

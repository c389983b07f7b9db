"""The process that runs on the device; bench/gpu/run.py starts another one where it is lost."""

from __future__ import annotations

import datetime
import traceback
from collections.abc import Callable
from time import perf_counter, time

import torch
from clock import Clock, Run, interleaved
from machine import commit, cpu_model, version
from measure import failure, measure
from problems import Cell, Problems
from torch import Tensor

import fastmoe_rs
from fastmoe_rs import RoutingPlan, _native
from fastmoe_rs.functional import route

PACKAGES = ("torch", "triton", "transformers", "liger_kernel", "scattermoe", "sonic-moe", "quack-kernels")
ROUTING = ((16384, 128, 8), (16384, 256, 8), (4096, 64, 8), (128, 128, 8))
QUICK_ROUTING = ((64, 8, 2),)
CELL_SECONDS = 1.2  # of timing, half of it eager, half graphs

Send = Callable[[dict], None]


def machine_of(device: str) -> dict:
    about = {
        "kind": "machine",
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "device": device,
        "gpu": None,
        "cpu": cpu_model(),
        "cuda": torch.version.cuda,
        "versions": {
            "fastmoe_rs": fastmoe_rs.__version__,
            **{name: version(name) for name in PACKAGES},
        },
    }
    if device.startswith("cuda"):
        properties = torch.cuda.get_device_properties(device)
        capability = properties.major, properties.minor
        about |= {
            "gpu": properties.name,
            "capability": capability,
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "driver_cuda": _native.cuda_info()["version"],
            "images": sorted({image["arch"] for image in _native.images(capability)}),
        }
    return about


def ceilings(clock: Clock, device: str, *, quick: bool) -> dict[str, float]:
    """What the device reaches: bytes a second of a copy, in and out; FLOP/s of a square bfloat16 product."""
    size = 256 if quick else 8192
    a, b = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    source = torch.randn((1 << 20) if quick else (1 << 30), device=device)
    target = torch.empty_like(source)
    runs: dict[str, Run] = {"product": lambda turn: a @ b, "copy": lambda turn: target.copy_(source)}
    times = interleaved(clock, runs, 0.0 if quick else 1.0)
    return {
        "flops_per_s": 2 * size**3 / times["product"]["median_s"],
        "bytes_per_s": 2 * source.nbytes / times["copy"]["median_s"],
    }


def routing(clock: Clock, device: str, sizes: tuple[int, int, int], seconds: float) -> dict:
    """Top-k with the plan beside softmax, topk, argsort and counts of torch."""
    tokens, experts, top_k = sizes
    # A token's logits are all different, also as probabilities: torch leaves the order of equal ones open.
    logits = torch.rand(tokens, experts, device=device).argsort(dim=-1).mul(8 / experts)

    def ours(turn: int) -> Tensor:
        return RoutingPlan.from_ids(route(logits, top_k).ids, experts).gather

    def torchs(turn: int) -> Tensor:
        _, ids = logits.softmax(-1).topk(top_k)
        flat = ids.reshape(-1)
        torch.zeros(experts, dtype=torch.int64, device=device).scatter_add_(0, flat, torch.ones_like(flat))
        return flat.argsort(stable=True) // top_k

    with torch.no_grad():
        if not torch.equal(ours(0).long(), torchs(0)):
            return {"kind": "wrong", "name": f"routing {sizes}", "reason": "the plan differs from torch's"}
        times = interleaved(clock, {"fastmoe_rs": ours, "torch": torchs}, seconds)
    return {"kind": "routing", "tokens": tokens, "experts": experts, "top_k": top_k, "paths": times}


def work(
    send: Send,
    device: str,
    cells: list[Cell],
    given_up: dict[str, dict],
    rates: dict[str, float] | None,
    end: float,
    quick: bool,
) -> None:
    """Measures the cells until `end` (of time.time), and sends records as soon as they are known.

    {"kind": "now", "doing": what, "name": cell} is sent before anything that may not come back, and at last
    {"kind": "end"}, or "lost" after an error. `rates` are the ceilings where they are known: then routing has
    been measured, too.
    """
    seconds = 0.0 if quick else CELL_SECONDS
    now = {"kind": "now", "doing": "start", "name": ""}

    def tell(doing: str) -> None:
        now["doing"] = doing
        send(now)

    try:
        tell("start")
        clock = Clock(device)
        if rates is None:
            send(machine_of(device))
            rates = ceilings(clock, device, quick=quick)
            send({"kind": "ceilings", **rates})
            for sizes in QUICK_ROUTING if quick else ROUTING:
                send(routing(clock, device, sizes, seconds / 6))
        problems = Problems(device)
        for cell in cells:
            if time() > end:
                break
            now["name"] = cell.name
            tell("start")
            allowed = min(seconds, max(0.0, end - time()))
            begin = perf_counter()
            try:
                problem = problems.of(cell)
                took = {"tensors": perf_counter() - begin}
                entry = measure(problem, clock, rates, allowed, given_up, tell)
                send(entry | {"took": took | entry["took"]})
            except ArithmeticError as error:
                send({"kind": "wrong", "name": cell.name, "reason": str(error)})
            except torch.OutOfMemoryError as error:
                send({"kind": "left out", "name": cell.name, **failure(error)})
            if clock.cuda:
                torch.cuda.empty_cache()
    except Exception as error:
        traceback.print_exc()
        send({**now, "kind": "lost", **failure(error)})
    else:
        send({"kind": "end"})

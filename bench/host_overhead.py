"""What a call of the CUDA path costs on the host, with launches that do nothing.

    make bench-host                            measures, and writes bench/results/*-host-overhead.json
    python bench/host_overhead.py --smoke      a check of this program, which writes nothing

A build with the emulator stands for a GPU: the same Python, native module and launch code, up to a driver
that returns at once. Not in these numbers: what libcuda takes for launches and tensor maps, and torch's CUDA
allocator, for which its CPU allocator stands.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE, KERNELS = ROOT / "target/host/python", ROOT / "target/emulator/plain/libkernels.so"
GOALS_US = {"forward": 25.0, "forward + backward": 60.0}
BATCHES, CALLS, WARM_UP = 500, 25, 500


def microseconds(call: Callable[[], object], batches: int, calls: int) -> dict[str, float]:
    """Median and least of the means of several batches of calls."""
    for _ in range(WARM_UP if batches > 10 else 1):
        call()
    means = []
    gc.collect()
    gc.disable()
    for _ in range(batches):
        start = time.perf_counter_ns()
        for _ in range(calls):
            call()
        means.append((time.perf_counter_ns() - start) / calls / 1e3)
    gc.enable()
    return {"median_us": round(statistics.median(means), 2), "min_us": round(min(means), 2)}


def calls() -> dict[str, Callable[[], object]]:
    """The measured calls. Sizes are small, so that torch's allocator only hands out what it keeps."""
    import torch

    import fastmoe_rs
    from fastmoe_rs.functional import moe_mlp
    from fastmoe_rs.nn import MoE

    tokens, hidden, intermediate, experts, top_k = 8, 16, 16, 8, 2
    torch.manual_seed(0)
    x = torch.randn(tokens, hidden).bfloat16()
    ids = torch.rand(tokens, experts).topk(top_k).indices
    weights = torch.rand(tokens, top_k)
    w1 = torch.randn(experts, 2 * intermediate, hidden).bfloat16()
    w2 = torch.randn(experts, hidden, intermediate).bfloat16()
    leaves = [tensor.clone().requires_grad_() for tensor in (x, weights, w1, w2)]
    grad_out = torch.ones_like(x)
    plan = fastmoe_rs.RoutingPlan.from_ids(ids, experts)

    def forward() -> object:
        with torch.no_grad():
            return moe_mlp(x, ids, weights, w1, w2)

    def forward_of_plan() -> object:
        with torch.no_grad():
            return moe_mlp(x, None, weights, w1, w2, plan=plan)

    def step() -> object:
        out = moe_mlp(leaves[0], ids, *leaves[1:])
        return torch.autograd.grad(out, leaves, grad_out)

    class Nothing(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weights, w1, w2):
            ctx.save_for_backward(x, weights, w1, w2)
            return torch.empty_like(x)

        @staticmethod
        def backward(ctx, grad):
            return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors)

    def nothing() -> object:
        return torch.autograd.grad(Nothing.apply(*leaves), leaves, grad_out)

    class SameTensors(torch.autograd.Function):
        """As many tensors saved and made as moe_mlp has: what Python alone cannot go below."""

        @staticmethod
        def forward(ctx, x, weights, w1, w2, b1, b2, ids, rest):
            plan = ids.new_empty(2 * experts + 1 + 2 * ids.numel(), dtype=torch.int32)
            hidden = x.new_empty(ids.numel(), w1.shape[1])
            ctx.save_for_backward(x, weights, w1, w2, b1, b2, plan, hidden)
            ctx.rest = rest
            return torch.empty_like(x)

        @staticmethod
        def backward(ctx, grad):
            x, weights, w1, w2, *_ = ctx.saved_tensors
            grads = (torch.empty_like(tensor) for tensor in (x, weights, w1, w2))
            return *grads, None, None, None, None

    def same_tensors() -> object:
        out = SameTensors.apply(*leaves, None, None, ids, ())
        return torch.autograd.grad(out, leaves, grad_out)

    layer = MoE(hidden, intermediate, experts, top_k, dtype=torch.bfloat16)
    parameters = [leaves[0], *layer.parameters()]

    def layer_forward() -> object:
        with torch.no_grad():
            return layer(x)

    def layer_step() -> object:
        return torch.autograd.grad(layer(leaves[0]), parameters, grad_out)

    return {
        "forward": forward,
        "forward + backward": step,
        "forward, plan given": forward_of_plan,
        "plan": lambda: fastmoe_rs.RoutingPlan.from_ids(ids, experts),
        "nn.MoE, forward": layer_forward,
        "nn.MoE, forward + backward": layer_step,
        "torch: empty autograd.Function, forward + backward": nothing,
        "torch: autograd.Function with the tensors of moe_mlp": same_tensors,
        "torch: empty_like": lambda: torch.empty_like(x),
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smoke", action="store_true", help="few calls, and no file")
    parser.add_argument(
        "--package", type=Path, default=PACKAGE, help="a folder with a build for the emulator"
    )
    parser.add_argument("--out", type=Path, help="result file")
    options = parser.parse_args(argv)
    if missing := [path for path in (options.package, KERNELS) if not path.exists()]:
        print(f"{missing[0]} is missing: make bench-host", file=sys.stderr)
        return 1
    os.environ.setdefault("FASTMOE_EMULATOR", str(KERNELS))
    os.environ |= {"FASTMOE_BACKEND": "emulator", "FASTMOE_EMULATOR_LAUNCH": "none"}
    sys.path.insert(0, str(options.package))
    import machine
    import run
    import torch

    torch.set_num_threads(1)
    sizes = (2, 5) if options.smoke else (BATCHES, CALLS)
    results = {name: microseconds(call, *sizes) for name, call in calls().items()}
    for name, result in results.items():
        goal = f"  goal {GOALS_US[name]:g}" if name in GOALS_US else ""
        print(f"{name:52} {result['median_us']:8.2f} us{goal}")
    if options.smoke:
        return 0
    identity = machine.identity(1)
    record = {"matrix": "host-overhead", "machine": identity, "goals_us": GOALS_US, "results": results}
    path = options.out or run.RESULTS / run.default_name(identity, "host-overhead")
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())

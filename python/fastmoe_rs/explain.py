"""What the expert MLP does on a GPU that need not be there: `doctor --explain T H I E K`.

Kernels, tiles and grids are those of the library's own launch code. The bytes are those of every tensor that
a kernel is given, once; weights count for the experts that tokens choose, when each token takes K of the E
experts at random. A kernel's time is the roofline's: no kernel can take less on such a GPU, and nothing here
was measured.

T tokens, H hidden size, I intermediate size, E experts, K experts per token, R = T*K routed rows.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, TypeAlias

from . import _native
from .gpus import Gpu

Math: TypeAlias = Literal["bf16", "f16", "tf32", "f32"]
ELEMENT_BYTES = {"bf16": 2, "f16": 2, "tf32": 4, "f32": 4}
WEIGHTS, WEIGHT_GRADS = ("w1", "w2"), ("grad_w1", "grad_w2")
TILE = re.compile(r"(?<=_)(\d+)x(\d+)(?=_)")  # in the name of a kernel
SLICE_BYTES = 64  # of a row of a tile in one stage of shared memory: cuda/tile/shape.cuh


@dataclass(frozen=True)
class Layer:
    """Sizes of an expert MLP, whether its activation has a gate, and what is multiplied."""

    tokens: int
    hidden: int
    intermediate: int
    experts: int
    top_k: int
    math: Math = "bf16"
    gated: bool = True

    @property
    def expert_parameters(self) -> int:
        return (3 if self.gated else 2) * self.hidden * self.intermediate

    @property
    def forward_flops(self) -> int:
        """Of the matrix products, 2 for a multiplication and its addition; the backward has twice as many."""
        return 2 * self.tokens * self.top_k * self.expert_parameters

    @property
    def active_experts(self) -> float:
        """The experts that get a token, on average over random choices."""
        return self.experts * (1 - (1 - self.top_k / self.experts) ** self.tokens)

    def least_bytes(self, train: bool) -> float:
        """What has to cross the memory bus: the weights of active experts, x, the output, and the activation
        out and in; in training the weights again and their gradients, x again, gradients of output and x."""
        weights = self.active_experts * self.expert_parameters
        rows = self.tokens * self.hidden
        elements = weights + 2 * rows + 2 * self.tokens * self.top_k * self.intermediate
        if train:
            elements += weights + self.experts * self.expert_parameters + 3 * rows
        return elements * ELEMENT_BYTES[self.math]

    def floor(self, flops_per_s: float, bytes_per_s: float, train: bool) -> float:
        """Seconds that no implementation gets below at these rates."""
        flops = self.forward_flops * (3 if train else 1)
        return max(flops / flops_per_s, self.least_bytes(train) / bytes_per_s)


@dataclass(frozen=True)
class Step:
    """A kernel's launch. `tile` is rows x columns of a grouped product; `image`, `threads` of a block,
    `registers` of a thread and `stages` in shared memory are None where this build has no image for it;
    `stages` also of warpgroups, whose results lie beside the slices."""

    kernel: str
    tile: str | None
    grid: int
    bytes: float
    flops: int
    roofline_us: float
    bound: str
    image: str | None = None
    threads: int | None = None
    registers: int | None = None
    stages: int | None = None


def explain(layer: Layer, gpu: Gpu) -> dict[str, Any]:
    """The launches of a forward in inference and of a forward with its backward, with their sums."""
    return {
        "layer": asdict(layer),
        "gpu": {**asdict(gpu), "flops": gpu.flops[layer.math]},
        "forward": _pass(layer, gpu, train=False),
        "forward_backward": _pass(layer, gpu, train=True),
    }


def _pass(layer: Layer, gpu: Gpu, *, train: bool) -> dict[str, Any]:
    launches = _launches(layer, train, gpu.capability, gpu.multiprocessors, gpu.shared_bytes)
    compiled = {
        kernel["name"]: (image["arch"], kernel)
        for image in _native.images(gpu.capability)
        for kernel in image["kernels"]
    }
    steps = [_step(launch, layer, gpu, compiled.get(launch["kernel"])) for launch in launches]
    return {
        "kernels": [asdict(step) for step in steps],
        "bytes": sum(step.bytes for step in steps),
        "flops": sum(step.flops for step in steps),
        "roofline_us": sum(step.roofline_us for step in steps),
        "floor_us": 1e6 * layer.floor(gpu.flops[layer.math], gpu.bytes_per_s, train=train),
    }


def largest_tile(device: Any) -> str:
    """Rows x columns of the tile that plenty of bfloat16 rows get on a device of `_native.cuda_info`."""
    sizes = device["capability"], device["multiprocessors"], device["shared_bytes"]
    launches = _launches(Layer(1 << 16, 4096, 4096, 8, 2), False, *sizes)
    return next(tile[0] for launch in launches if (tile := TILE.search(launch["kernel"])))


def _launches(
    layer: Layer, train: bool, capability: tuple[int, int], multiprocessors: int, shared_bytes: int
) -> Any:
    return _native.mlp_launches(
        layer.tokens,
        layer.hidden,
        layer.intermediate,
        layer.experts,
        layer.top_k,
        math=layer.math,
        gated=layer.gated,
        bias=False,
        train=train,
        capability=capability,
        multiprocessors=multiprocessors,
        shared_bytes=shared_bytes,
    )


def _step(launch: Any, layer: Layer, gpu: Gpu, compiled: tuple[str, Any] | None) -> Step:
    sizes = {name: size for name, size, _ in launch["memory"]}
    read = sum(sizes.get(name, 0) for name in WEIGHTS)
    moved = sum(sizes.values()) - read * (1 - layer.active_experts / layer.experts)
    # Each weight of an expert is a multiplication and an addition for each of its rows.
    matrices = read + sum(sizes.get(name, 0) for name in WEIGHT_GRADS)
    flops = 2 * layer.tokens * layer.top_k * matrices // (layer.experts * ELEMENT_BYTES[layer.math])
    seconds = {"FLOPs": flops / gpu.flops[layer.math], "bytes": moved / gpu.bytes_per_s}
    bound = max(seconds, key=seconds.__getitem__)
    tile = TILE.search(launch["kernel"])
    step = Step(
        launch["kernel"],
        tile[0] if tile else None,
        launch["blocks"],
        moved,
        flops,
        1e6 * seconds[bound],
        bound,
    )
    if compiled is None:
        return step
    image, kernel = compiled
    stages = None
    if tile and "_wgmma_" not in launch["kernel"]:
        stages = kernel["shared_bytes"] // (SLICE_BYTES * (int(tile[1]) + int(tile[2])))
    return replace(step, image=image, threads=kernel["threads"], registers=kernel["registers"], stages=stages)


def text(report: dict[str, Any]) -> str:
    """The report of `explain` as a page for the terminal."""
    layer, gpu = report["layer"], report["gpu"]
    major, minor = gpu["capability"]
    lines = [
        f"T {layer['tokens']}, H {layer['hidden']}, I {layer['intermediate']}, E {layer['experts']}, "
        f"K {layer['top_k']}, {layer['math']} on {gpu['name']} ({major}.{minor}): "
        f"{gpu['multiprocessors']} multiprocessors, {gpu['flops'] / 1e12:.4g} TFLOP/s, "
        f"{gpu['bytes_per_s'] / 1e12:.4g} TB/s",
        "times are bounds by the GPU's published rates, not measurements",
    ]
    for title, key in (("forward", "forward"), ("forward and backward, in training", "forward_backward")):
        found = report[key]
        rows = [_cells(kernel) for kernel in found["kernels"]]
        total = ["sum", *[""] * 6, *_amounts(found), ""]
        lines += ["", f"{title}:", *_table([HEAD, *rows, total])]
        lines.append(f"  the layer as a whole, fused at will, takes at least {found['floor_us']:.4g} us")
    if not any(kernel["image"] for kernel in report["forward"]["kernels"]):
        lines += ["", "this build has no image for such a GPU: threads, registers and stages are not known"]
    return "\n".join(lines)


HEAD = ["kernel", "image", "tile", "grid", "threads", "regs", "stages", "MB", "GFLOP", "us", "bound by"]


def _cells(kernel: dict[str, Any]) -> list[str]:
    shape = ("image", "tile", "grid", "threads", "registers", "stages")
    known = ["-" if kernel[name] is None else str(kernel[name]) for name in shape]
    return [kernel["kernel"], *known, *_amounts(kernel), kernel["bound"]]


def _amounts(found: dict[str, Any]) -> list[str]:
    return [f"{found['bytes'] / 1e6:.4g}", f"{found['flops'] / 1e9:.4g}", f"{found['roofline_us']:.4g}"]


def _table(rows: list[list[str]]) -> Iterable[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *others in rows:
        cells = [f"{cell:>{width}}" for cell, width in zip(others, widths[1:], strict=True)]
        yield f"  {first:<{widths[0]}}  " + "  ".join(cells)


def report(layer: Layer, gpu: Gpu, *, as_json: bool) -> str:
    """What `doctor --explain` prints."""
    found = explain(layer, gpu)
    return json.dumps(found, indent=2) if as_json else text(found)

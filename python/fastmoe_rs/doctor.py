"""What works on this machine: `python -m fastmoe_rs doctor`.

Every check gives a row: green when all is well, yellow for what is slower or less than it could be, red for
what is broken; yellow and red rows say what to do about it.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from . import __version__, _native

GREEN, YELLOW, RED = "green", "yellow", "red"
COLOR_CODES = {GREEN: 32, YELLOW: 33, RED: 31}
MIN_TORCH, MIN_TRANSFORMERS = (2, 6), (5,)
ISA_VARIABLE = "FASTMOE_CPU_ISA"
REPORT = "please report it with the output of `python -m fastmoe_rs doctor --json`"
NO_DRIVER = "no NVIDIA driver"  # in the message of the native module
OLDEST_GPU = (8, 0)
# Largest error of an output or gradient against the reference in float64, relative to its largest element.
TOLERANCES = {"float32": 1e-5, "bfloat16": 2e-2}


@dataclass(frozen=True)
class Row:
    """One line of the diagnosis; `remedy` is what to do unless the status is green."""

    name: str
    status: str
    value: str
    remedy: str = ""


def examine() -> list[Row]:
    """Run all checks; never raises."""
    checks: dict[str, Callable[[str], Row]] = {
        "version": check_version,
        "wheel": check_wheel,
        "torch": check_torch,
        "cpu features": check_features,
        "cpu kernels": check_kernels,
        "threads": check_threads,
        "dlpack table": check_dlpack,
        "transformers": check_transformers,
        "torch cuda": check_torch_cuda,
        "cuda driver": check_driver,
        "cuda kernels": check_images,
        **{f"gpu {index}": check_gpu for index in range(len(gpus()))},
        **{f"self-test {dtype}": check_results for dtype in TOLERANCES},
        **{f"self-test {dtype} on {gpu}": check_results for gpu in usable_gpus() for dtype in TOLERANCES},
    }
    return [guarded(check, name) for name, check in checks.items()]


def show(rows: list[Row], *, as_json: bool) -> int:
    """Print the rows; the exit status is 1 when one of them is red."""
    broken = any(row.status == RED for row in rows)
    if as_json:
        print(json.dumps({"ok": not broken, "rows": [asdict(row) for row in rows]}, indent=2))
        return int(broken)
    colored = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    width = max(len(row.name) for row in rows)
    for row in rows:
        status = f"{row.status:<6}"
        if colored:
            status = f"\033[{COLOR_CODES[row.status]}m{status}\033[0m"
        print(f"{status}  {row.name:<{width}}  {row.value}")
        if row.remedy:
            print(f"{'':<{width + 10}}-> {row.remedy}")
    return int(broken)


def guarded(check: Callable[[str], Row], name: str) -> Row:
    """The row of a check, yellow where the cause of a failure has a red row of its own."""
    try:
        return check(name)
    except Exception as error:
        if importlib.util.find_spec("torch") is None:
            return Row(name, YELLOW, "not checked", "see the row of torch")
        if ISA_VARIABLE in str(error):
            return Row(name, YELLOW, "not checked", "see the row of the cpu kernels")
        return Row(name, RED, f"{type(error).__name__}: {error}", REPORT)


def check_version(name: str) -> Row:
    value = f"fastmoe_rs {__version__}, Python {platform.python_version()}, {platform.platform()}"
    return Row(name, GREEN, value)


def check_wheel(name: str) -> Row:
    reinstall = "pip install --force-reinstall fastmoe_rs"
    try:
        distribution = importlib.metadata.distribution("fastmoe_rs")
    except importlib.metadata.PackageNotFoundError:
        return Row(name, YELLOW, "not installed, run from its source folder", reinstall)
    tags = [
        line[5:] for line in (distribution.read_text("WHEEL") or "").splitlines() if line.startswith("Tag: ")
    ]
    if distribution.version != __version__:
        return Row(name, RED, f"{distribution.version}, with a native module {__version__}", reinstall)
    return Row(name, GREEN, ", ".join(tags) or "no tag")


def check_torch(name: str) -> Row:
    wanted = ".".join(map(str, MIN_TORCH))
    if importlib.util.find_spec("torch") is None:
        return Row(name, RED, "not installed", f"pip install 'torch>={wanted}'")
    try:
        import torch
    except Exception as error:
        return Row(name, RED, f"does not import: {error}", f"reinstall it: pip install 'torch>={wanted}'")
    if release(torch.__version__) < MIN_TORCH:
        return Row(name, RED, f"{torch.__version__} is too old", f"pip install 'torch>={wanted}'")
    return Row(name, GREEN, torch.__version__)


def check_features(name: str) -> Row:
    info = _native.cpu_info()
    return Row(name, GREEN, f"{info['arch']}: {' '.join(info['features']) or 'nothing special'}")


def check_kernels(name: str) -> Row:
    try:
        info = _native.cpu_info()
    except ValueError as error:
        return Row(name, RED, str(error), f"unset {ISA_VARIABLE}, or set it to one that is available")
    value = f"{info['isa']} ({', '.join(f'{dtype} {kernel}' for dtype, kernel in info['kernels'].items())})"
    if ISA_VARIABLE in os.environ:
        return Row(name, YELLOW, f"{value}, forced", f"unset {ISA_VARIABLE} to get the fastest ones")
    if info["isa"] == "portable":
        return Row(name, YELLOW, value, "right but slow: there are no vector kernels for this processor")
    return Row(name, GREEN, value)


def check_threads(name: str) -> Row:
    import torch

    threads, cpus = torch.get_num_threads(), usable_cpus()
    value = f"{threads} on {cpus} processors, pool: {_native.cpu_info()['threads_pool']}"
    if threads > cpus:
        return Row(name, YELLOW, value, f"OMP_NUM_THREADS={cpus} or torch.set_num_threads({cpus})")
    return Row(name, GREEN, value)


def check_dlpack(name: str) -> Row:
    import torch

    if hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):
        return Row(name, GREEN, "there")
    return Row(name, YELLOW, "missing; tensors cross by data_ptr(), a little slower", "a newer torch has it")


def check_torch_cuda(name: str) -> Row:
    import torch

    devices = gpus()
    if torch.cuda.is_available():
        return Row(name, GREEN, f"CUDA {torch.version.cuda}, {amount(torch.cuda.device_count(), 'device')}")
    build = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
    if devices:
        remedy = "install a build of torch for CUDA, see https://pytorch.org"
        return Row(name, YELLOW, f"{build}, finds none of the GPUs", remedy)
    return Row(name, GREEN, build)


def check_driver(name: str) -> Row:
    try:
        info = _native.cuda_info()
    except RuntimeError as error:
        problem, _, remedy = str(error).partition("; ")
        if NO_DRIVER in problem:
            return Row(name, GREEN, "none; everything runs on the CPU")
        return Row(name, RED, problem, remedy or "update the NVIDIA driver to 580 or newer")
    # The name of the architecture, x86_64, stands before "Kernel Module" or after it.
    found = re.search(r"Kernel Module.*?\s(\d+\.[\d.]+)", read(Path("/proc/driver/nvidia/version")))
    version = f"{found[1]}, " if found else ""
    devices = amount(len(info["devices"]), "device")
    return Row(name, GREEN, f"{version}CUDA {info['version'][0]}.{info['version'][1]}, {devices}")


def check_images(name: str) -> Row:
    images = _native.images()
    if not images:
        missing = "none in this build"
        if gpus():
            return Row(name, RED, missing, "install the wheel, or build with nvcc: make toolchain develop")
        return Row(name, GREEN, missing)
    found = {image["arch"] for image in images}
    archs = ", ".join(sorted(found, key=lambda arch: (arch == "ptx", len(arch), arch)))
    kernels = amount(len({kernel["name"] for image in images for kernel in image["kernels"]}), "kernel")
    size = sum(image["bytes"] for image in images) / 1e6
    return Row(name, GREEN, f"{kernels} in {size:.1f} MB of images for {archs}")


def check_gpu(name: str) -> Row:
    """What a GPU gets, and why not more."""
    device = gpus()[int(name.rpartition(" ")[2])]
    major, minor = device["capability"]
    value = f"{device['name']}, {major}.{minor}, {device['multiprocessors']} multiprocessors"
    if (major, minor) < OLDEST_GPU:
        remedy = "use the CPU backend; the CUDA kernels need compute capability 8.0 (Ampere) or newer"
        return Row(name, YELLOW, f"{value}: no kernels for it", remedy)
    images = _native.images(device["capability"])
    if not images:
        remedy = f"install the wheel, or build with FASTMOE_CUDA_ARCHS=all (or ptx) for {major}.{minor}"
        return Row(name, RED, f"{value}: no image in this build runs on it", remedy)
    archs = sorted({image["arch"] for image in images})
    value += f"; image {', '.join(archs)}, {kernel_set(images, device)}"
    if "ptx" in archs:
        remedy = "the driver compiles it once, at the first call; a build for this GPU starts faster"
        return Row(name, YELLOW, value, remedy)
    return Row(name, GREEN, value)


def kernel_set(images: Sequence[Any], device: Any) -> str:
    """Which kernels multiply on a device, and what keeps it from newer instructions or larger tiles."""
    from .explain import largest_tile

    major, minor = device["capability"]
    own = [image["family"] for image in images if image["family"].startswith(f"sm{major}{minor}_")]
    products = f"kernels of its own ({', '.join(own)})" if own else "tensor-core kernels of Ampere"
    why = "" if own or major == 8 else f", as this build has none with the instructions of {major}.{minor}"
    tile = largest_tile(device)
    roomier = largest_tile({**device, "shared_bytes": 1 << 30})
    limit = f" (not {roomier}: a block has {device['shared_bytes'] >> 10} KB of shared memory)"
    return f"{products}{why}, tiles up to {tile}{limit if tile != roomier else ''}"


def amount(number: int, noun: str) -> str:
    return f"{number} {noun}" + "s" * (number != 1)


def gpus() -> Sequence[Any]:
    """The devices of the driver; none where there is no driver that works."""
    try:
        return _native.cuda_info()["devices"]
    except RuntimeError:
        return []


def usable_gpus() -> list[str]:
    """Those that torch and the kernels of this build can work on."""
    if not gpus() or importlib.util.find_spec("torch") is None:
        return []
    import torch

    devices = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    capability = torch.cuda.get_device_capability
    return [f"cuda:{index}" for index in devices if _native.images(capability(index))]


def read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def check_transformers(name: str) -> Row:
    install = "only for Hugging Face models: pip install 'fastmoe_rs[transformers]'"
    try:
        version = importlib.metadata.version("transformers")
    except importlib.metadata.PackageNotFoundError:
        return Row(name, YELLOW, "not installed", install)
    if release(version) < MIN_TRANSFORMERS:
        return Row(name, YELLOW, f"{version} has no exchangeable experts", install)
    return Row(name, GREEN, version)


def check_results(name: str) -> Row:
    """A small layer forward and backward, against the reference in float64 on the CPU."""
    import torch

    from . import functional, reference

    test, _, device = name.partition(" on ")
    dtype_name = test.rpartition(" ")[2]
    dtype, tolerance = getattr(torch, dtype_name), TOLERANCES[dtype_name]
    tokens, hidden, intermediate, experts, top_k = 96, 64, 80, 8, 2
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * shape[-1] ** -0.5

    x, w1, w2 = (
        tensor.to(dtype)
        for tensor in (
            draw(tokens, hidden),
            draw(experts, 2 * intermediate, hidden),
            draw(experts, hidden, intermediate),
        )
    )
    ids, weights, _ = reference.route(draw(tokens, experts), top_k)

    def run(mlp: Callable[..., torch.Tensor], wide: bool) -> list[torch.Tensor]:
        inputs = [tensor.double() if wide else tensor for tensor in (x, weights, w1, w2)]
        place = "cpu" if wide else device or "cpu"
        leaves = [tensor.detach().clone().to(place).requires_grad_() for tensor in inputs]
        out = mlp(leaves[0], ids.to(place), *leaves[1:])
        grads = torch.autograd.grad(out.double().square().sum(), leaves)
        return [result.detach().cpu() for result in (out, *grads)]

    results, truths = run(functional.moe_mlp, wide=False), run(reference.moe_mlp, wide=True)
    errors = [((a - b).abs().max() / b.abs().max()).item() for a, b in zip(results, truths, strict=True)]
    value = f"largest error {max(errors):.0e} of output and gradients, at most {tolerance:.0e} allowed"
    if max(errors) <= tolerance:
        return Row(name, GREEN, value)
    remedy = "keep the tensors on the CPU" if device else f"set {ISA_VARIABLE}=portable to get right results"
    return Row(name, RED, value, f"{remedy}, and {REPORT}")


def usable_cpus() -> int:
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def release(version: str) -> tuple[int, ...]:
    """The numbers at the start of a version: "2.15.0+cpu" is (2, 15)."""
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])

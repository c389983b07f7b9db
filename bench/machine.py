"""What the machine is and what it can do: identity, versions, and the ceilings that shares are taken of."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from cells import DTYPES

HERE = Path(__file__).parent
READ_BYTES = 256 << 20
ISA_VARIABLES = ("FASTMOE_CPU_ISA", "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")
# Multiply instructions of an instruction set by element type, and how many of their products make one of
# numbers; types without their own are widened to float32.
PEAK_INSTRUCTIONS = {
    "avx2": {"float32": {"avx2_fma": 1}},
    "avx512": {"float32": {"avx512_fma": 1}},
    "avx512_bf16": {"float32": {"avx512_fma": 1}, "bfloat16": {"avx512_bf16": 1, "avx512_fma": 1}},
    "amx": {
        "float32": {"avx512_fma": 1, "amx_bf16": 6},
        "float16": {"avx512_fma": 1, "amx_bf16": 4},
        "bfloat16": {"amx_bf16": 1},
    },
}


@dataclass(frozen=True)
class GemmRates:
    """GFLOP/s of torch's mm with 64 rows: x @ w.T (nt), g @ w (nn), g.T @ x (tn)."""

    nt: float
    nn: float
    tn: float


def best_of(run: Callable[[], object], seconds: float, least: int = 3) -> float:
    """Shortest of several calls, in seconds."""
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < least or time.perf_counter() < end:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def gemm_rates(size: int) -> dict[str, GemmRates]:
    """torch's rates for each element type on [64, size] x [size, size]."""
    rates = {}
    for dtype in DTYPES:
        x = torch.randn(64, size).to(getattr(torch, dtype))
        w = torch.randn(size, size).to(x.dtype)
        flops = 2 * x.numel() * size / 1e9
        products = (lambda x=x, w=w: x @ w.T, lambda x=x, w=w: x @ w, lambda x=x: x.T @ x)
        rates[dtype] = GemmRates(*(flops / best_of(run, 0.02, 2) for run in products))
    return rates


@lru_cache(maxsize=1)
def _beyond_the_caches() -> torch.Tensor:
    return torch.randn(1 << 20).repeat(READ_BYTES >> 22)


def read_seconds(_turn: int = 0) -> float:
    """How long torch's sum takes to read `READ_BYTES`."""
    data = _beyond_the_caches()
    start = time.perf_counter()
    data.sum()
    return time.perf_counter() - start


def gemm_peaks(size: int, seconds: float) -> dict[str, dict[str, float]]:
    """GFLOP/s of a square matrix product of torch, and of our grouped_mm on one hot group."""
    from fastmoe_rs import functional

    peaks = {}
    for dtype in DTYPES:
        x = torch.randn(size, size).to(getattr(torch, dtype))
        w = torch.randn(1, size, size).to(x.dtype)
        offsets = torch.tensor([0, size], dtype=torch.int32)
        flops = 2 * size**3 / 1e9
        with torch.no_grad():
            peaks[dtype] = {
                "torch_mm": flops / best_of(lambda x=x, w=w: x @ w[0].T, seconds),
                "fastmoe_grouped_mm": flops
                / best_of(lambda x=x, w=w, offsets=offsets: functional.grouped_mm(x, w, offsets), seconds),
            }
    return peaks


def instruction_peaks(threads: int) -> dict[str, float]:
    """GFLOP/s of back-to-back multiply instructions (peak.c); empty where there is no C compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or platform.machine() != "x86_64":
        return {}
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder, "peak")
        build = [compiler, "-O2", "-pthread", str(HERE / "peak.c"), "-o", str(program)]
        if subprocess.run(build, capture_output=True).returncode:
            return {}
        return json.loads(subprocess.run([program, str(threads)], capture_output=True, check=True).stdout)


def peak_of(ceilings: dict, isa: str, dtype: str) -> tuple[float, str]:
    """GFLOP/s that a kernel of this instruction set can reach in an element type, and where it comes from."""
    by_type = PEAK_INSTRUCTIONS.get(isa, {"float32": {}})
    rates = ceilings["instructions"]
    products = by_type.get(dtype, by_type["float32"])
    known = {name: rates[name] / count for name, count in products.items() if name in rates}
    source, rate = max((known or ceilings["gemm"][dtype]).items(), key=lambda item: item[1])
    return rate, source


def ceilings(threads: int, *, smoke: bool) -> dict:
    """Everything measured before the first cell."""
    seconds = 0 if smoke else 0.3
    return {
        "instructions": instruction_peaks(threads),
        "gemm": gemm_peaks(128 if smoke else 2048, seconds),
        "read_bytes_per_s": READ_BYTES / min(read_seconds() for _ in range(3 if smoke else 30)),
    }


def available_bytes() -> float:
    """Memory that can be had without swapping; infinity where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return float("inf")
    return next(float(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


def cpu_model() -> str:
    """The name that the processor gives itself, with the numbers that tell its generation."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    found = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    name = found.get("model name", platform.machine())
    return f"{name} (family {found['cpu family']} model {found['model']})" if "cpu family" in found else name


def commit() -> str:
    """FASTMOE_COMMIT where it is set; else that of the working tree, with "+" where it has changes."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=HERE, capture_output=True, text=True, check=True
        ).stdout

    if given := os.environ.get("FASTMOE_COMMIT"):
        return given
    try:
        return git("rev-parse", "--short=12", "HEAD").strip() + (
            "+" if git("status", "--porcelain", "-uno") else ""
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def identity(threads: int) -> dict:
    """Machine, instruction set, versions and commit of a run."""
    from fastmoe_rs import _native

    info = _native.cpu_info()
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "isa": info["isa"],
        "features": info["features"],
        "kernels": info["kernels"],
        "pool": info["threads_pool"],
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "limits": {name: os.environ[name] for name in sorted(ISA_VARIABLES) if name in os.environ},
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "load_at_start": os.getloadavg()[0],
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "transformers", "fastmoe_rs", "numpy")},
        "commit": commit(),
        "threads": threads,
    }

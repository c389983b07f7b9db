"""GPUs by the numbers that NVIDIA publishes, so that one need not be there to reckon with it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """`shared_bytes` that a block can have; `bytes_per_s` of the memory; `flops` a second of dense products
    by what is multiplied, with sums in float32: 16-bit numbers, tf32, float32 without tensor cores."""

    name: str
    capability: tuple[int, int]
    multiprocessors: int
    shared_bytes: int
    bytes_per_s: float
    flops: dict[str, float]


def _gpu(
    name: str,
    capability: tuple[int, int],
    multiprocessors: int,
    shared_kib: int,
    terabytes_per_s: float,
    teraflops: tuple[float, float, float],
) -> Gpu:
    half, tf32, f32 = (1e12 * rate for rate in teraflops)
    flops = {"bf16": half, "f16": half, "tf32": tf32, "f32": f32}
    return Gpu(name, capability, multiprocessors, shared_kib << 10, 1e12 * terabytes_per_s, flops)


GPUS = (
    _gpu("A100", (8, 0), 108, 163, 2.039, (312, 156, 19.5)),  # data sheet, SXM with 80 GB
    _gpu("RTX 3090", (8, 6), 82, 99, 0.936, (71, 35.6, 35.6)),  # GA102 whitepaper
    _gpu("RTX 4090", (8, 9), 128, 99, 1.008, (165.2, 82.6, 82.6)),  # Ada whitepaper
    _gpu("L40S", (8, 9), 142, 99, 0.864, (362, 183, 91.6)),  # data sheet
    _gpu("H100", (9, 0), 132, 227, 3.35, (989.4, 494.7, 66.9)),  # H100 whitepaper, SXM
    _gpu("H200", (9, 0), 132, 227, 4.8, (989.4, 494.7, 66.9)),  # data sheet, SXM
    _gpu("B200", (10, 0), 148, 227, 8.0, (2250, 1125, 75)),  # DGX and HGX B200 data sheets
    _gpu("RTX 5090", (12, 0), 170, 99, 1.792, (209.5, 104.8, 104.8)),  # RTX Blackwell whitepaper
)


def find(name: str) -> Gpu:
    """The GPU of that name, in any case of letters.

    Raises:
        KeyError: there is none; the message lists them.
    """
    for gpu in GPUS:
        if gpu.name.lower() == name.lower():
            return gpu
    raise KeyError(f"got {name!r}, wanted one of {', '.join(gpu.name for gpu in GPUS)}")

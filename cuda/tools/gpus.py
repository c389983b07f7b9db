"""What limits a kernel on a GPU: the hardware's numbers, the blocks that fit, the cycles of a loop."""

from __future__ import annotations

from dataclasses import dataclass

import sass
from fastmoe_rs.gpus import find
from images import Kernel

REGISTERS = 65536  # of a multiprocessor, handed out to warps in units of 256
RESERVED_SHARED_BYTES = 1024  # of each block
SCHEDULERS = 4  # of a multiprocessor; each issues an instruction a cycle
SHARED_BYTES_A_CYCLE = 128
MACS = 16 * 8 * 16  # of a product of a warp; one of tf32 has half as many and takes as long


@dataclass(frozen=True)
class Gpu:
    """A multiprocessor (CUDA C++ Programming Guide, "Compute Capabilities").

    `shared_bytes` are those of all its blocks. `macs` are 16-bit multiply-adds a cycle of mma.sync with sums
    in float32, of which tf32 has half as many. `l2_bytes` are a cycle's share of the level-2 cache's
    bandwidth. None is what no source tells.
    """

    name: str
    code: str
    shared_bytes: int
    threads: int
    blocks: int
    macs: float | None
    l2_bytes: float | None


def _gpu(name: str, code: str, *limits: int, macs: float | None, l2_bytes: float | None = None) -> Gpu:
    return Gpu(name, code, find(name).shared_bytes + RESERVED_SHARED_BYTES, *limits, macs, l2_bytes)


GPUS = (
    # 312 TFLOP/s on 108 multiprocessors at 1.41 GHz, 5120 bytes a cycle from L2: NVIDIA A100 whitepaper.
    _gpu("A100", "80", 2048, 32, macs=1024, l2_bytes=5120 / 108),
    # 362 TFLOP/s on 142 multiprocessors at 2.52 GHz: NVIDIA L40S data sheet.
    _gpu("L40S", "80", 1536, 24, macs=512),
    # mma.sync reaches 62.9% of 2048 a cycle: arXiv 2402.13499.
    _gpu("H100", "90a", 2048, 32, macs=0.629 * 2048),
    _gpu("B200", "100f", 2048, 32, macs=None),
    # 209.5 TFLOP/s on 170 multiprocessors at 2.41 GHz: NVIDIA RTX Blackwell whitepaper.
    _gpu("RTX 5090", "120f", 1536, 24, macs=256),
)


def blocks_per_multiprocessor(gpu: Gpu, kernel: Kernel) -> int:
    """The blocks that a multiprocessor holds at a time; 0 where its shared memory is too small."""
    warps = kernel.threads // 32
    registers_of_a_warp = -(-kernel.registers * 32 // 256) * 256
    return min(
        gpu.blocks,
        gpu.threads // kernel.threads,
        REGISTERS // registers_of_a_warp // warps,
        gpu.shared_bytes // (kernel.shared_bytes + RESERVED_SHARED_BYTES),
    )


@dataclass(frozen=True)
class Loop:
    """The main loop of a kernel, per matrix product of a warp."""

    others: float  # instructions beside the product
    shared_bytes: float
    l2_bytes: float  # at most: what no cache above level 2 holds

    def share_of_peak(self, gpu: Gpu) -> tuple[float, float]:
        """From products that overlap with no other instruction's issue to perfect overlap of all."""
        cycles = MACS / gpu.macs
        others = self.others / SCHEDULERS
        bounds = [cycles, (1 + self.others) / SCHEDULERS, self.shared_bytes / SHARED_BYTES_A_CYCLE]
        if gpu.l2_bytes:
            bounds.append(self.l2_bytes / gpu.l2_bytes)
        return cycles / max(cycles + others, *bounds), cycles / max(bounds)


def loop(kernel: Kernel) -> Loop | None:
    """None for kernels without matrix products by mma.sync."""
    code = kernel.main_loop
    products = [instruction for instruction in code if instruction.name == "HMMA"]
    if not products:
        return None
    count = len(products)

    def bytes_of(*names: str) -> float:
        return sum(sass.bytes_moved(instruction) for instruction in code if instruction.name in names) / count

    return Loop(
        others=(len(code) - count) / count,
        shared_bytes=bytes_of("LDSM", "LDS", "STS", "LDGSTS"),
        l2_bytes=bytes_of("LDG", "LDGSTS"),
    )

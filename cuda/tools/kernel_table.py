"""Writes docs/kernels.md from the compiled kernels: `make kernel-table`."""

from __future__ import annotations

import sys

import nvidia
from gpus import GPUS, blocks_per_multiprocessor, loop
from images import CODES, Kernel, kernels

PAGE = nvidia.ROOT / "docs" / "kernels.md"
INTRODUCTION = """\
# The CUDA kernels in numbers

Written by `make kernel-table` from the machine code of this checkout; no GPU took part. Names tell the family, what is
multiplied, the tile of a block and the layout of the operands ([cuda/README.md](../cuda/README.md)).
"""
LOOPS = """
## Main loops

The innermost loop with matrix products, as its machine code stands there. Everything counts, also what a branch may
skip: `others` are all instructions beside the products, per product of a warp; `issue` is the products' share of the
issue slots; bytes are those of a warp per product, `shared` both into and out of shared memory, `L2` what its copies
from global memory ask for. On sm_100 and sm_120 the compiler itself puts a NOP behind most products of this kind.

The last columns predict the share of the tensor cores' rate in the steady state. The higher number is the bound of a
perfect overlap: of products, instruction issue (4 a cycle), shared memory (128 bytes a cycle) and, on the A100, L2 (47
bytes a cycle and multiprocessor). The lower one overlaps no product with the issue of another instruction. Waits at
barriers and the ends of tiles come on top; only a run on the GPU tells.
"""


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---", *["--:"] * (len(head) - 1)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def resources(compiled: dict[str, dict[str, Kernel]]) -> str:
    """`compiled[code][name]` is a kernel."""
    rows = []
    for name in names(compiled):
        of = {code: compiled[code][name] for code in CODES if name in compiled[code]}
        any_ = next(iter(of.values()))
        registers = [str(of[code].registers) if code in of else "" for code in CODES]
        fits = [str(blocks_per_multiprocessor(gpu, of[gpu.code])) if gpu.code in of else "" for gpu in GPUS]
        rows.append([f"`{name}`", str(any_.threads), f"{any_.shared_bytes / 1024:g}", *registers, *fits])
    head = ["kernel", "threads", "shared KiB", *(f"regs {code}" for code in CODES), *(gpu.name for gpu in GPUS)]
    return (
        "\n## Resources\n\nRegisters of a thread by target, and blocks on a multiprocessor at a time; 0: its shared"
        " memory is too small, and another tile is taken.\n\n" + table(head, rows)
    )


def main_loops(compiled: dict[str, dict[str, Kernel]]) -> str:
    rows = []
    for name in names(compiled):
        loops = {code: loop(compiled[code][name]) for code in CODES if name in compiled[code]}
        first = loops.get("80")
        if first is None:
            continue
        others = [f"{found.others:.2f}" if (found := loops.get(code)) else "" for code in CODES]
        shares = []
        for gpu in GPUS:
            of, fits = loops.get(gpu.code), blocks_per_multiprocessor(gpu, compiled[gpu.code][name])
            low, high = of.share_of_peak(gpu) if of and fits and gpu.macs else (0, 0)
            shares.append(f"{low:.0%} - {high:.0%}" if high else "")
        rows.append(
            [f"`{name}`", *others, f"{1 / (1 + first.others):.0%}", f"{first.shared_bytes:.0f}", f"{first.l2_bytes:.0f}", *shares]
        )
    head = ["kernel", *(f"others {code}" for code in CODES), "issue", "shared", "L2", *(gpu.name for gpu in GPUS)]
    return LOOPS + "\n" + table(head, rows)


def names(compiled: dict[str, dict[str, Kernel]]) -> list[str]:
    return list(dict.fromkeys(name for of in compiled.values() for name in of))


def page() -> str:
    compiled = {code: {kernel.name: kernel for kernel in kernels(code)} for code in CODES}
    return INTRODUCTION + resources(compiled) + main_loops(compiled)


if __name__ == "__main__":
    if missing := [path for path in (nvidia.NVDISASM, nvidia.IMAGES) if not path.exists()]:
        sys.exit(f"{missing[0]} is missing: make toolchain kernels")
    PAGE.write_text(page())

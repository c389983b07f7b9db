"""Writes docs/kernels.md from the compiled kernels: `make kernel-table`."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import toolkit
from gpus import GPUS, blocks_per_multiprocessor, loop
from images import CODES, Kernel, kernels

PAGE = toolkit.ROOT / "docs" / "kernels.md"
INTRODUCTION = """\
# The CUDA kernels in numbers

Written by `make kernel-table` from the machine code of this checkout; no GPU took part. A name tells the
family, what is multiplied, the tile of a block and the layout of the operands
([entries.cuh](../cuda/tile/entries.cuh)). A float16 kernel is listed only where it differs from its bfloat16
twin.

## Resources

Registers of a thread by target, and blocks on a multiprocessor at a time; 0: its shared memory is too small,
and another tile is taken.

"""
LOOPS = """
## Main loops

The innermost loop with matrix products, as its machine code stands there. Everything counts, also what a
branch may skip: `others` are all instructions beside the products, per product of a warp, by target; `issue`
is the products' share of the issue slots; bytes are those of a warp per product, `shared` both into and out
of shared memory, `L2` what its copies from global memory ask for; these three are of sm_80. On sm_100 and
sm_120 the compiler itself puts a NOP behind most products of this kind.

The last columns predict the share of the tensor cores' rate in the steady state. The higher number is the
bound of a perfect overlap: of products, instruction issue (4 a cycle), shared memory (128 bytes a cycle)
and, on the A100, L2 (47 bytes a cycle and multiprocessor). The lower one overlaps no product with the issue
of another instruction. Waits at barriers and the ends of tiles come on top; only a run on the GPU tells.

Tiles of 128x256 and 128x128 have at most 1.25 other instructions per product of 16-bit numbers on sm_80.
Gradients of weights come near it since they are gathered along K: for every 16 bytes that a thread copies it
looks up a row and computes its address, where other kernels add a constant. A product of tf32 is half the
work for the same instructions, and its operands are rounded in registers; a tile of 32x128 uses each fragment
of its weights a fourth as often; the `any` kernels copy element by element.

"""
Compiled = dict[str, dict[str, Kernel]]  # kernels by target and name


def line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |\n"


def table(head: list[str], rows: dict[str, list[str]]) -> str:
    """`rows` are by kernel."""
    text = line(head) + line(["---", *["--:"] * (len(head) - 1)])
    for name, cells in rows.items():
        if "_f16" not in name or rows[name.replace("_f16", "_bf16")] != cells:
            text += line([f"`{name}`", *cells])
    return text


def by_name(compiled: Compiled) -> Iterator[tuple[str, dict[str, Kernel]]]:
    """A kernel's name, and what it is for each target that has it."""
    for name in dict.fromkeys(name for of_code in compiled.values() for name in of_code):
        yield name, {code: of_code[name] for code, of_code in compiled.items() if name in of_code}


def resources(compiled: Compiled) -> str:
    rows = {}
    for name, of in by_name(compiled):
        first = next(iter(of.values()))
        registers = [str(of[code].registers) if code in of else "" for code in CODES]
        blocks = [str(blocks_per_multiprocessor(gpu, of[gpu.code])) if gpu.code in of else "" for gpu in GPUS]
        rows[name] = [str(first.threads), f"{first.shared_bytes / 1024:.3g}", *registers, *blocks]
    registers = [f"regs {code}" for code in CODES]
    return table(["kernel", "threads", "shared KiB", *registers, *(gpu.name for gpu in GPUS)], rows)


def main_loops(compiled: Compiled) -> str:
    rows = {}
    for name, of in by_name(compiled):
        loops = {code: found for code, kernel in of.items() if (found := loop(kernel))}
        if not (first := loops.get("80")):
            continue
        others = [f"{loops[code].others:.2f}" if code in loops else "" for code in CODES]
        per_product = [f"{1 / (1 + first.others):.0%}", f"{first.shared_bytes:.0f}", f"{first.l2_bytes:.0f}"]
        shares = []
        for gpu in GPUS:
            runs = gpu.code in loops and gpu.macs and blocks_per_multiprocessor(gpu, of[gpu.code])
            low, high = loops[gpu.code].share_of_peak(gpu) if runs else (0, 0)
            shares.append(f"{low:.0%} - {high:.0%}" if runs else "")
        rows[name] = [*others, *per_product, *shares]
    others = [f"others {code}" for code in CODES]
    return table(["kernel", *others, "issue", "shared", "L2", *(gpu.name for gpu in GPUS)], rows)


def page() -> str:
    compiled = {code: {kernel.name: kernel for kernel in kernels(code)} for code in CODES}
    return INTRODUCTION + resources(compiled) + LOOPS + main_loops(compiled)


if __name__ == "__main__":
    if missing := [path for path in (toolkit.NVDISASM, toolkit.IMAGES) if not path.exists()]:
        sys.exit(f"{missing[0]} is missing: make toolchain kernels")
    PAGE.write_text(page())

"""The compiled kernels in target/kernels: launch shapes, resources, what matters of the machine code."""

from __future__ import annotations

import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache

import sass
import toolkit

CODES = ("80", "90a", "100f", "120f")


@dataclass(frozen=True)
class Kernel:
    """An entry point as compiled for sm_<code>; `local_bytes` are stack and spills of a thread."""

    name: str
    family: str
    code: str
    threads: int
    shared_bytes: int
    registers: int
    local_bytes: int
    opcodes: Counter[str]
    main_loop: list[sass.Instruction]


def families() -> list[str]:
    return sorted(path.stem for path in (toolkit.CUDA / "kernels").glob("*.cu"))


@cache
def kernels(code: str) -> list[Kernel]:
    """The kernels of all families that are compiled for sm_<code>, in the order of their sources."""
    with ThreadPoolExecutor() as pool:
        of_families = pool.map(lambda family: image(family, code), families())
        return [kernel for of_family in of_families for kernel in of_family]


def image(family: str, code: str) -> list[Kernel]:
    cubin = toolkit.IMAGES / f"{family}.{code}.cubin"
    if not cubin.exists():
        return []
    functions = sass.disassemble(cubin)
    ptx, log = (cubin.with_suffix(suffix).read_text() for suffix in (".ptx", ".log"))
    names = re.findall(r"\.entry (\w+)", ptx)
    return [kernel(name, family, code, ptx, log, functions[name]) for name in names]


def kernel(name: str, family: str, code: str, ptx: str, log: str, function: sass.Function) -> Kernel:
    # PTX_KERNEL keeps {threads, shared bytes} as bytes, without the zeros at their end.
    shape = re.search(rf"\b{name}_launch\[8\] = {{([^}}]*)}}", ptx)[1]
    launch = bytes(int(byte) for byte in shape.split(",")).ljust(8, b"\0")
    about = re.search(rf"Function properties for {name}\n(.*\n.*)", log)[1]
    count = {unit: int(number) for number, unit in re.findall(r"(\d+) (registers|bytes \w+ ?\w*)", about)}
    return Kernel(
        name,
        family,
        code,
        threads=int.from_bytes(launch[:4], "little"),
        shared_bytes=int.from_bytes(launch[4:], "little") + count.get("bytes smem", 0),
        registers=count["registers"],
        local_bytes=sum(count[f"bytes {kind}"] for kind in ("stack frame", "spill stores", "spill loads")),
        opcodes=Counter(instruction.opcode for instruction in function.code),
        main_loop=function.main_loop(),
    )

"""Machine code of NVIDIA GPUs (SASS) as nvdisasm prints it: functions, control flow, main loops."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

import toolkit

INSTRUCTION_BYTES = 16
MMA = re.compile(r"HMMA|IMMA|QMMA|HGMMA|UTCHMMA")
# What ends a thread, or leaves for a function that the disassembler does not follow.
ENDS = ("EXIT", "RET", "BRX", "JMX", "BPT")


@dataclass(frozen=True)
class Instruction:
    """`opcode` with its modifiers, "HMMA.16816.F32.BF16"; `predicate` is "" where there is none."""

    opcode: str
    operands: str
    predicate: str
    target: int | None  # index of the instruction that a branch goes to

    @property
    def name(self) -> str:
        return self.opcode.partition(".")[0]

    @property
    def conditional(self) -> bool:
        # Uniform branches have it among the operands, BRA.U !UP0, 0x190, or in the opcode, BRA.U.ANY.
        return bool(self.predicate) or "," in self.operands or self.opcode.endswith((".ANY", ".ALL"))

    def __str__(self) -> str:
        return " ".join(filter(None, (self.predicate, self.opcode, self.operands)))


@dataclass(frozen=True)
class Function:
    name: str
    code: list[Instruction]

    def main_loop(self) -> list[Instruction]:
        """The loop of the steady state: of the innermost loops with matrix products the one with the most, or
        the widest, of them. Empty where no loop has any."""
        loops = [loop for loop in self._loops() if any(is_mma(self.code[i]) for i in loop)]
        innermost = [loop for loop in loops if not any(inner < loop for inner in loops)]
        products = [sum(columns(self.code[i]) for i in loop if is_mma(self.code[i])) for loop in innermost]
        if not innermost:
            return []
        return [self.code[i] for i in sorted(innermost[products.index(max(products))])]

    def _successors(self, index: int) -> list[int]:
        instruction = self.code[index]
        following = [index + 1] if index + 1 < len(self.code) else []
        if instruction.name in ENDS:
            return following if instruction.conditional else []
        if instruction.target is None:
            return following
        return [instruction.target, *(following if instruction.conditional else [])]

    def _loops(self) -> list[frozenset[int]]:
        """The body of each backward branch: all from which it is reached without passing its target."""
        before: dict[int, list[int]] = {}
        for index in range(len(self.code)):
            for successor in self._successors(index):
                before.setdefault(successor, []).append(index)
        loops: dict[int, set[int]] = {}
        for latch, instruction in enumerate(self.code):
            head = instruction.target
            if head is None or head >= latch:
                continue
            body, open_ = loops.setdefault(head, {head}), [latch]
            while open_:
                if (index := open_.pop()) not in body:
                    body.add(index)
                    open_ += before.get(index, [])
        return [frozenset(body) for body in loops.values()]


def is_mma(instruction: Instruction) -> bool:
    return MMA.match(instruction.opcode) is not None


def columns(product: Instruction) -> int:
    """Of a product by a warpgroup, "HGMMA.64x256x16.F32"; those of other kernels are alike, and count 1."""
    shape = re.search(r"x(\d+)x", product.opcode)
    return int(shape[1]) if shape else 1


def bytes_moved(instruction: Instruction) -> int:
    """Bytes that the 32 lanes of a warp move from or to memory of any kind."""
    if instruction.name == "LDSM":  # matrices of 8 rows of 16 bytes
        return 128 * int(instruction.opcode.rpartition(".")[2])
    if instruction.name in ("LDS", "STS", "LDG", "STG", "LDGSTS") and instruction.predicate != "@!PT":
        bits = re.search(r"\.[US]?(8|16|64|128)\b", instruction.opcode)
        return 32 * (int(bits[1]) if bits else 32) // 8
    return 0


def disassemble(cubin: Path) -> dict[str, Function]:
    """The functions of a cubin by name."""
    _, functions = json.loads(toolkit.run(toolkit.NVDISASM, "-json", cubin))
    return {function["function-name"]: parse(function) for function in functions}


def parse(function: dict) -> Function:
    return Function(function["function-name"], [instruction(item) for item in function["sass-instructions"]])


def instruction(item: dict) -> Instruction:
    opcode, operands = item["opcode"], item.get("operands", "")
    address = re.search(r"0x([0-9a-f]+)$", operands) if opcode.startswith("BRA") else None
    target = int(address[1], 16) // INSTRUCTION_BYTES if address else None
    return Instruction(opcode, operands, item.get("predicate", ""), target)

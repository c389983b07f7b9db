"""What is measured: shapes, token counts, element types and passes. Needs neither torch nor fastmoe_rs.

T tokens, H hidden size, I intermediate size, E experts, K experts per token, R = T*K routed rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

# Our path as an ordinary training loop meets it, and with gradient memory returned to the system each step.
OURS, OURS_FRESH = "fastmoe", "fastmoe_fresh"
ELEMENT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
DTYPES = tuple(ELEMENT_BYTES)
PASSES = ("forward", "train")  # train: forward + backward, every gradient asked for
TOKENS = (1, 8, 64, 512, 2048)


@dataclass(frozen=True)
class Shape:
    """Sizes of one Mixture-of-Experts layer."""

    name: str
    hidden: int
    intermediate: int
    experts: int
    top_k: int

    @property
    def expert_parameters(self) -> int:
        return 3 * self.hidden * self.intermediate


SHAPES = (Shape("A", 2048, 1024, 64, 8), Shape("B", 1024, 3584, 8, 2), Shape("C", 2048, 768, 128, 8))
SMOKE_SHAPES = (Shape("S", 64, 64, 8, 2),)
# The experts of A, B and C at a size where a whole grid runs in minutes.
MODERATE_SHAPES = (Shape("a", 1024, 512, 16, 4), Shape("b", 512, 1792, 8, 2), Shape("c", 1024, 384, 32, 4))


@dataclass(frozen=True)
class Cell:
    """One problem that every path solves: a pass over T tokens of a shape in an element type."""

    shape: Shape
    dtype: str
    tokens: int
    mode: str

    @property
    def name(self) -> str:
        return f"{self.mode}-{self.dtype}-{self.shape.name}-T{self.tokens}"

    @property
    def rows(self) -> int:
        return self.tokens * self.shape.top_k

    @property
    def train(self) -> bool:
        return self.mode == "train"

    @property
    def flops(self) -> int:
        """Multiplications and additions of the GEMMs: 6*R*H*I forward, 12*R*H*I more in backward."""
        return (3 if self.train else 1) * 2 * self.rows * self.shape.expert_parameters

    @property
    def element_bytes(self) -> int:
        return ELEMENT_BYTES[self.dtype]

    @property
    def weight_bytes(self) -> int:
        """Bytes of all expert weights."""
        return self.shape.experts * self.shape.expert_parameters * self.element_bytes

    @property
    def active_experts(self) -> int:
        """Upper bound of the experts that receive a token."""
        return min(self.shape.experts, self.rows)

    @property
    def effort(self) -> float:
        """Share of a time budget that this cell deserves, in arbitrary units."""
        return (1 + self.tokens / 256) * (2.5 if self.train else 1)


@dataclass(frozen=True)
class RoutingCell:
    """Top-k of T tokens over E experts, and the sort of the chosen ids by expert."""

    tokens: int
    experts: int
    top_k: int

    @property
    def name(self) -> str:
        return f"{self.tokens}x{self.experts} k{self.top_k}"


ROUTING = (RoutingCell(4096, 64, 8), RoutingCell(16384, 256, 8), RoutingCell(65536, 128, 8))
SMOKE_ROUTING = (RoutingCell(64, 8, 2),)


def grid(
    shapes: Iterable[Shape], dtypes: Iterable[str], tokens: Iterable[int], modes: Iterable[str]
) -> Iterator[Cell]:
    """Cells ordered so that those which share weights are neighbours."""
    tokens, modes, shapes = tuple(tokens), tuple(modes), tuple(shapes)
    for dtype in dtypes:
        for shape in shapes:
            for mode in modes:
                for count in tokens:
                    yield Cell(shape, dtype, count, mode)


def matrix(name: str) -> list[Cell]:
    """The cells of a preset: "full", "quick" (guides tuning, minutes) or "smoke" (seconds)."""
    if name == "smoke":
        return list(grid(SMOKE_SHAPES, ("float32", "bfloat16"), (1, 8), PASSES))
    if name == "quick":
        dtypes = ("float32", "bfloat16")
        cells = [
            *grid(SHAPES, dtypes, (1, 8, 64, 512), ("forward",)),
            *grid(SHAPES, dtypes, (64, 512), ("train",)),
        ]
        return sorted(cells, key=lambda cell: (DTYPES.index(cell.dtype), cell.shape.name))
    return list(grid(SHAPES, DTYPES, TOKENS, PASSES))

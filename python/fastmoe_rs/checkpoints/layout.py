"""How checkpoints lay out the weights of experts, and the way from each layout to every other.

In between, the weights of one expert have the form of `functional.moe_mlp`: w1 [2I, H], gate rows and then up
rows, w2 [H, I], and where there are biases b1 [2I] and b2 [H].

Legend: H hidden size, I intermediate size, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._wanted import one_of

MATRICES, BIASES = ("w1", "w2"), ("b1", "b2")


class Spec(NamedTuple):
    """A tensor without its data; the dtype in whatever form its owner has it."""

    dtype: Any
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Layout:
    """Where w1, w2, b1 and b2 are, by tensor names below "experts.".

    A name with "{e}" is a tensor of one expert; w1 and b1 then have two, gate and up. Other tensors hold all
    experts, stacked in their first dimension.

    Attributes:
        w1, w2, b1, b2: the names.
        transposed: matrices are [H, 2I] and [I, H].
        interleaved: the rows of w1 and b1 alternate, gate 0, up 0, gate 1, up 1, ...
    """

    w1: tuple[str, ...]
    w2: tuple[str, ...]
    b1: tuple[str, ...]
    b2: tuple[str, ...]
    transposed: bool = False
    interleaved: bool = False

    @property
    def stacked(self) -> bool:
        return "{e}" not in self.w2[0]

    def names(self, part: str) -> tuple[str, ...]:
        names: tuple[str, ...] = getattr(self, part)
        return names

    def unify(self, part: str, pieces: Sequence[Tensor]) -> Tensor:
        """The common form of a part of an expert, from what this layout has for it."""
        weight = torch.cat([piece.T if self._turns(part) else piece for piece in pieces])
        return torch.cat([weight[0::2], weight[1::2]]) if self._alternates(part) else weight

    def divide(self, part: str, weight: Tensor) -> list[Tensor]:
        """What this layout has for a part of an expert, from the common form: undoes `unify`."""
        if self._alternates(part):
            weight = torch.stack(weight.chunk(2), dim=1).flatten(0, 1)
        pieces = weight.tensor_split(len(self.names(part)))
        return [piece.T if self._turns(part) else piece for piece in pieces]

    def shapes(self, part: str, hidden: int, intermediate: int) -> list[tuple[int, ...]]:
        """Of what `divide` gives."""
        common = {
            "w1": (2 * intermediate, hidden),
            "w2": (hidden, intermediate),
            "b1": (2 * intermediate,),
            "b2": (hidden,),
        }
        pieces = self.divide(part, torch.empty(common[part], device="meta"))
        return [tuple(piece.shape) for piece in pieces]

    def _turns(self, part: str) -> bool:
        return self.transposed and part in MATRICES

    def _alternates(self, part: str) -> bool:
        return self.interleaved and part in ("w1", "b1")


def _per_expert(gate: str, up: str, down: str) -> Layout:
    def names(kind: str, *projections: str) -> tuple[str, ...]:
        return tuple(f"{{e}}.{projection}.{kind}" for projection in projections)

    return Layout(
        names("weight", gate, up), names("weight", down), names("bias", gate, up), names("bias", down)
    )


def _fused(transposed: bool = False, interleaved: bool = False) -> Layout:
    names = ("gate_up_proj",), ("down_proj",), ("gate_up_proj_bias",), ("down_proj_bias",)
    return Layout(*names, transposed=transposed, interleaved=interleaved)


LAYOUTS = {
    "per-expert": _per_expert("gate_proj", "up_proj", "down_proj"),
    "mixtral": _per_expert("w1", "w3", "w2"),
    "fused": _fused(),
    "transposed": _fused(transposed=True),
    "interleaved": _fused(interleaved=True),
    "gpt-oss": _fused(transposed=True, interleaved=True),
    "fastmoe_rs": Layout(("w1",), ("w2",), ("b1",), ("b2",)),
}


def layout(name: str) -> Layout:
    """The layout of that name.

    Raises:
        ValueError: there is none.
    """
    one_of("layout", name, tuple(LAYOUTS))
    return LAYOUTS[name]


class Layer(NamedTuple):
    """The experts of one layer.

    Attributes:
        prefix: of their names, ends in "experts".
        experts, hidden, intermediate: E, H, I.
        dtypes: of w1, w2 and, if there are biases, b1 and b2.
    """

    prefix: str
    experts: int
    hidden: int
    intermediate: int
    dtypes: dict[str, Any]

    def tensors(self, layout: Layout, part: str) -> Iterator[tuple[str, int, int | None, Spec]]:
        """The tensors of a part in a layout: name, number of the piece, expert (None for a stack), spec."""
        shapes = layout.shapes(part, self.hidden, self.intermediate)
        for e in (None,) if layout.stacked else range(self.experts):
            for piece, (name, shape) in enumerate(zip(layout.names(part), shapes, strict=True)):
                stack = (self.experts,) if layout.stacked else ()
                spec = Spec(self.dtypes.get(part), (*stack, *shape))
                yield f"{self.prefix}.{name.format(e=e)}", piece, e, spec


class Converted(NamedTuple):
    """A tensor of the target layout; its data are the `pieces`, one after the other, made one at a time."""

    part: str
    name: str
    spec: Spec
    pieces: Callable[[], Iterator[Tensor]]


def converted(
    layer: Layer, source: Layout, target: Layout, read: Callable[[str, int | None], Tensor]
) -> Iterator[Converted]:
    """The tensors of a layer in the target layout; `read` gives a source tensor, or one expert of it."""

    def expert(part: str, e: int) -> list[Tensor]:
        names = [f"{layer.prefix}.{name.format(e=e)}" for name in source.names(part)]
        pieces = [read(name, e if source.stacked else None) for name in names]
        return target.divide(part, source.unify(part, pieces))

    for part in layer.dtypes:
        for name, piece, owner, spec in layer.tensors(target, part):

            def pieces(part: str = part, piece: int = piece, owner: int | None = owner) -> Iterator[Tensor]:
                for e in range(layer.experts) if owner is None else (owner,):
                    yield expert(part, e)[piece]

            yield Converted(part, name, spec, pieces)

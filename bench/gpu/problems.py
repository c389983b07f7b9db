"""What is measured on a GPU: layers of known models, token counts, passes, and their tensors.

T tokens, H hidden size, I intermediate size, E experts, K experts per token, R = T*K routed rows.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import Parameter

from fastmoe_rs.explain import Layer

L2_BYTES = 60 << 20
DECODE_TOKENS, TRAIN_TOKENS = (1, 8, 32, 128), (4096, 16384)


@dataclass(frozen=True)
class Shape:
    """The expert layer of a model; SwiGLU, or ReLU where it has no gate."""

    name: str
    hidden: int
    intermediate: int
    experts: int
    top_k: int
    gated: bool = True


# Those that say most come first: a run may be cut off.
SHAPES = (
    Shape("Qwen3-30B-A3B", 2048, 768, 128, 8),
    Shape("OLMoE", 2048, 1024, 64, 8),
    Shape("gpt-oss-120b", 2880, 2880, 128, 4),
    Shape("Mixtral-8x7B", 4096, 14336, 8, 2),
    Shape("Llama-4-Scout", 5120, 8192, 16, 1),
    Shape("Switch-Base-128", 768, 3072, 128, 1, gated=False),
    Shape("DeepSeek-V3", 7168, 2048, 256, 8),
    Shape("Mixtral-8x22B", 6144, 16384, 8, 2),
)
PEERS = ("torch_grouped", "transformers_grouped", "transformers_batched", "liger", "scattermoe", "sonicmoe")
QUICK_SHAPES = (Shape("tiny", 64, 48, 8, 2), Shape("tiny without gate", 64, 48, 8, 1, gated=False))


@dataclass(frozen=True)
class Cell:
    """One pass over T tokens: "forward", or "train" for forward and backward with every gradient."""

    shape: Shape
    tokens: int
    mode: str
    skewed: bool = False

    @property
    def name(self) -> str:
        return f"{self.shape.name} T{self.tokens} {self.mode}{' skewed' * self.skewed}"

    @property
    def train(self) -> bool:
        return self.mode == "train"

    @property
    def layer(self) -> Layer:
        shape = self.shape
        sizes = shape.hidden, shape.intermediate, shape.experts, shape.top_k
        return Layer(self.tokens, *sizes, gated=shape.gated)

    @property
    def flops(self) -> int:
        return self.layer.forward_flops * (3 if self.train else 1)


def cells(*, quick: bool) -> list[Cell]:
    """The most telling ones first."""
    if quick:
        found = [Cell(shape, 32, mode) for mode in ("forward", "train") for shape in QUICK_SHAPES]
        return [*found, Cell(QUICK_SHAPES[0], 1, "forward"), Cell(QUICK_SHAPES[0], 32, "train", skewed=True)]
    return list(
        dict.fromkeys(
            [
                *(Cell(shape, 4096, mode) for shape in SHAPES[:4] for mode in ("forward", "train")),
                *(Cell(shape, tokens, "forward") for shape in SHAPES[:3] for tokens in DECODE_TOKENS),
                *(Cell(shape, 4096, mode) for shape in SHAPES[4:] for mode in ("forward", "train")),
                *(Cell(shape, 16384, mode) for shape in SHAPES[:4] for mode in ("forward", "train")),
                *(Cell(shape, 4096, "train", skewed=True) for shape in SHAPES[:2]),
                *(Cell(shape, tokens, "forward") for shape in SHAPES for tokens in DECODE_TOKENS),
                *(Cell(shape, 16384, mode) for shape in SHAPES for mode in ("forward", "train")),
            ]
        )
    )


@dataclass
class Batch:
    """x [T, H], ids int64 and int32 [T, K], routing weights float32 [T, K], gradient of the output [T, H]."""

    x: Tensor
    ids: Tensor
    ids_int32: Tensor
    weights: Tensor
    grad_out: Tensor


@dataclass
class Problem:
    """Weights w1 [E, 2I, H] ([E, I, H] without a gate), w2 [E, H, I], and batches that take turns."""

    cell: Cell
    w1: Parameter
    w2: Parameter
    batches: list[Batch] = field(default_factory=list)


class Problems:
    """Problems of one device; the weights of a shape are kept until another shape comes."""

    def __init__(self, device: str) -> None:
        self.device = device
        self._kept: tuple[Shape, Parameter, Parameter] | None = None

    def _weights(self, shape: Shape) -> tuple[Parameter, Parameter]:
        if self._kept is None or self._kept[0] != shape:
            self._kept = None
            torch.manual_seed(0)
            width = shape.intermediate * (2 if shape.gated else 1)
            w1 = self._random(shape.experts, width, shape.hidden)
            w2 = self._random(shape.experts, shape.hidden, shape.intermediate)
            self._kept = shape, Parameter(w1), Parameter(w2)
        return self._kept[1:]

    def _random(self, *sizes: int) -> Tensor:
        return torch.randn(sizes, dtype=torch.bfloat16, device=self.device).mul_(sizes[-1] ** -0.5)

    def of(self, cell: Cell) -> Problem:
        w1, w2 = self._weights(cell.shape)
        torch.manual_seed(1)
        problem = Problem(cell, w1, w2)
        for _ in range(self._turns(cell)):
            ids = self._ids(cell)
            weights = torch.rand(ids.shape, device=self.device).softmax(-1).requires_grad_(cell.train)
            size = cell.tokens, cell.shape.hidden
            x = torch.randn(size, device=self.device).bfloat16().requires_grad_(cell.train)
            problem.batches.append(Batch(x, ids, ids.int(), weights, torch.randn_like(x)))
        return problem

    def _turns(self, cell: Cell) -> int:
        """Enough batches that the experts of one are no longer in the level-2 cache when its turn comes."""
        layer = cell.layer
        if cell.tokens > max(DECODE_TOKENS):
            return 2
        read = layer.active_experts * layer.expert_parameters * 2
        return min(16, 2 + int(2 * L2_BYTES / read))

    def _ids(self, cell: Cell) -> Tensor:
        """Distinct random experts of each token, all alike or a few of them much preferred."""
        shape = cell.shape
        scores = torch.rand(cell.tokens, shape.experts, device=self.device)
        if cell.skewed:
            rank = torch.randperm(shape.experts, device=self.device)
            scores = scores.log().neg().log().neg() - (1 + rank).log()  # Gumbel: Zipf's law of popularity
        return scores.topk(shape.top_k).indices

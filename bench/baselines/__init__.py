"""The peers: the same layer by plain torch and by transformers.

A path is a factory `make(w1, w2) -> call(x, ids, weights)` over shared parameters
w1 [E,2I,H] (gate rows, then up rows) and w2 [E,H,I]; `call` maps x [T,H], ids int64 [T,K] and
fp32 weights [T,K] to [T,H] in the dtype of x, differentiable in x, weights, w1 and w2.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from cells import Cell
from machine import GemmRates
from torch.nn import Parameter

from . import torch_paths, transformers_paths
from .torch_paths import Call


@dataclass(frozen=True)
class Peer:
    """One way to compute the layer, with what is known about its cost before running it."""

    name: str
    make: Callable[[Parameter, Parameter], Call]
    # Set where the path copies the weights of every routed row (bytes = R * expert).
    copies_weights: bool = False
    # Set where each active expert's gradient is a zero tensor of the full weight's size.
    full_gradient_per_expert: bool = False
    # Set where 16-bit weights are computed with in fp32.
    upcasts: bool = False

    def why_not(self, cell: Cell) -> str | None:
        """Reason why this path does not apply to a cell at all."""
        if self.upcasts and cell.dtype == "float32":
            return "same as torch_sorted in float32"
        if self.name.startswith("hf_") and not transformers_paths.AVAILABLE:
            return "transformers >= 5 is not installed"
        return None

    def seconds(self, cell: Cell, gemm: dict[str, GemmRates]) -> float:
        """Rough time of one call, good enough to leave out the hopeless."""
        shape, rates = cell.shape, gemm["float32" if self.upcasts else cell.dtype]
        forward = cell.rows * shape.expert_parameters * 2 / 1e9
        seconds = forward / rates.nt
        if cell.train:
            seconds += forward / rates.nn + forward / rates.tn
        if self.copies_weights:
            seconds += (
                (3 if cell.train else 1) * cell.rows * shape.expert_parameters * cell.element_bytes / 1e9
            )
        if self.full_gradient_per_expert and cell.train:
            seconds += cell.active_experts * cell.weight_bytes / 2e9
        return seconds

    def extra_bytes(self, cell: Cell) -> int:
        """Rough peak memory beside inputs and weights."""
        shape, size = cell.shape, cell.element_bytes
        rows = cell.rows * (4 * shape.intermediate + 2 * shape.hidden) * 4
        gradients = cell.weight_bytes if cell.train else 0
        if self.copies_weights:
            copies = cell.rows * shape.expert_parameters * size
            return rows + gradients + (2 * copies if cell.train else copies)
        if self.full_gradient_per_expert:
            return rows + 2 * gradients
        if self.upcasts:
            active = cell.active_experts if cell.train else 1
            return rows + gradients + 2 * active * shape.expert_parameters * 4
        return rows + gradients * 3 // 2


PEERS = (
    Peer("torch_grouped", torch_paths.grouped),
    Peer("torch_sorted", torch_paths.sorted_mm),
    Peer("torch_sorted_up", torch_paths.sorted_upcast, upcasts=True),
    Peer("torch_loop", torch_paths.loop),
    Peer("hf_eager", transformers_paths.maker("eager"), full_gradient_per_expert=True),
    Peer("hf_grouped", transformers_paths.maker("grouped_mm")),
    Peer("hf_batched", transformers_paths.maker("batched_mm"), copies_weights=True),
)

"""Hash routing: the place of a token in the vocabulary decides (Roller et al. 2021, arXiv:2106.04426)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _check
from ..functional import Routing
from .given import route_given
from .noise import uniform


def hash_table(
    vocab_size: int, num_experts: int, top_k: int, *, seed: int = 0, device: torch.device | str | None = None
) -> Tensor:
    """int64 [vocab_size, K]: for every token of the vocabulary K different experts, at random.

    Args:
        vocab_size: tokens of the vocabulary.
        num_experts: E.
        top_k: K, 1 to E.
        seed: decides the table, the same one on every device.
        device: where it is made.
    """
    _check.positive(vocab_size=vocab_size, num_experts=num_experts)
    _check.top_k(top_k, num_experts)
    shape = torch.empty(vocab_size, num_experts, device=device)
    return uniform(shape, seed=seed).argsort(dim=1, stable=True)[:, :top_k].contiguous()


def hash_route(logits_TE: Tensor, table_VK: Tensor, token_ids: Tensor, **options: Any) -> Routing:
    """Experts from a table, weights from the logits, as in the first layers of DeepSeek-V4.

    Args:
        logits_TE: [T, E].
        table_VK: integer [V, K], such as `hash_table` makes.
        token_ids: integers in [0, V), T elements in any shape.
        options: score, order, renormalize, scale and so on, as for `functional.route_weights`.

    Returns:
        ids int64 [T, K]; weights [T, K] and scores [T, E], differentiable in the logits.
    """
    return route_given(logits_TE, look_up(table_VK, token_ids, len(logits_TE)), **options)


def look_up(table_VK: Tensor, token_ids: Tensor, tokens: int) -> Tensor:
    """int64 [T, K], the rows of the table for token_ids of T elements."""
    _check.tensor("table", table_VK, "[V, K]")
    _check.torch_tensor("token_ids", token_ids, "of one element per token")
    if token_ids.numel() != tokens:
        wanted = f"{tokens} elements, one per token"
        _check.wanted("token_ids", f"shape {tuple(token_ids.shape)}", wanted)
    return table_VK[token_ids.reshape(-1)].long()

"""Hash routing: the place of a token in the vocabulary decides (Roller et al. 2021, arXiv:2106.04426)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _check, functional
from ..functional import Routing
from .noise import uniform


def hash_table(
    vocab_size: int, num_experts: int, top_k: int, *, seed: int = 0, device: torch.device | str | None = None
) -> Tensor:
    """int64 [vocab_size, K]: for every token of the vocabulary K different experts, at random."""
    _check.positive(vocab_size=vocab_size, num_experts=num_experts)
    if not 1 <= top_k <= num_experts:
        _check.wanted("top_k", top_k, f"1 to {num_experts}, the number of experts")
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
    _check.tensor("table", table_VK, "[V, K]")
    if token_ids.numel() != logits_TE.shape[0]:
        _check.wanted(
            "token_ids", f"shape {tuple(token_ids.shape)}", f"{logits_TE.shape[0]} elements, one per token"
        )
    ids = table_VK[token_ids.reshape(-1)].long()
    weights = functional.route_weights(logits_TE, ids, **options)
    of_all = {name: options[name] for name in ("score", "softcap") if name in options}
    return Routing(ids, weights, functional.route(logits_TE, 1, **of_all).scores)

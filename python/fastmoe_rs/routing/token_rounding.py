"""Token rounding (SonicMoE, arXiv:2512.14080): every expert gets a multiple of the tile size of tokens."""

from __future__ import annotations

import torch

from .. import _check
from ..functional import Routing
from ..reference import descending

ROUNDINGS = ("nearest", "up", "down")


def round_tokens(routing: Routing, tile: int, *, rounding: str = "nearest") -> Routing:
    """Drop an expert's routes of lowest score, or add the tokens of highest score among those it did not get.

    No expert's count moves by a whole tile, and no GEMM tile is partly filled. (Where an expert would need
    more tokens than there are, its count goes down.)

    Args:
        routing: the token choice to be rounded, from `functional.route`.
        tile: rows of a tile of the grouped GEMM.
        rounding: "nearest" multiple of the tile (a half goes up), "up" or "down".

    Returns:
        ids int64 [T, E], with e in column e where expert e computes the token, else -1; weights [T, E], those
        of the routing where the token chose the expert and the score where it was added; scores [T, E]. The
        plan is `RoutingPlan.from_ids(ids, E, out_of_range="drop").trimmed(T * K + E * tile)`.
    """
    _check.positive(tile=tile)
    _check.one_of("rounding", rounding, ROUNDINGS)
    ids_TK, weights_TK, scores = routing
    tokens, experts = scores.shape
    chosen = torch.zeros_like(scores, dtype=torch.bool).scatter(1, ids_TK, True)
    counts = chosen.sum(dim=0)
    extra = {"nearest": tile // 2, "up": tile - 1, "down": 0}[rounding]
    rounded = (counts + extra) // tile * tile
    rounded = rounded.where(rounded <= tokens, tokens // tile * tile)
    # Chosen tokens first, by score; then the others, by score.
    by_score = descending(scores.detach().T)
    order = by_score.gather(1, (~chosen.T).gather(1, by_score).int().argsort(dim=1, stable=True))
    places = torch.arange(tokens, device=order.device).expand_as(order)
    rank = torch.empty_like(order).scatter(1, order, places)
    kept = (rank < rounded[:, None]).T
    weights = scores.scatter(1, ids_TK, weights_TK.to(scores.dtype)).masked_fill(~kept, 0)
    ids = torch.arange(experts, device=scores.device).expand(scores.shape)
    return Routing(ids.where(kept, -1), weights, scores)

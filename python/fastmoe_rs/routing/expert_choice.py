"""Expert choice routing (Zhou et al. 2022, arXiv:2202.09368): every expert picks its tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _check, functional
from ..functional import Routing
from ..reference import descending


def expert_choice_route(logits_TE: Tensor, capacity: int, *, score: str = "softmax") -> Routing:
    """Every expert takes the C tokens that score highest with it; a token gets any number of experts.

    The load is even by construction. Which tokens an expert takes depends on all tokens of the batch, the
    later ones of a sequence included.

    Args:
        logits_TE: [T, E].
        capacity: C; the paper has C = capacity_factor * T / E. No more than T count.
        score: see `functional.route`.

    Returns:
        ids int64 [T, E], with e in column e where expert e took the token, else -1; weights [T, E], the
        scores of the routes taken and else 0; scores [T, E]. The plan, of E * min(C, T) rows, is
        `RoutingPlan.from_ids(ids, E, out_of_range="drop").trimmed(E * C)`.
    """
    _check.whole("capacity", capacity)
    if capacity < 0:
        _check.wanted("capacity", capacity, "at least 0")
    scores = functional.route(logits_TE, 1, score=score).scores
    best_EC = descending(scores.detach().T)[:, :capacity]
    taken = torch.zeros_like(scores.T, dtype=torch.bool).scatter(1, best_EC, True).T
    ids = torch.arange(scores.shape[1], device=scores.device).expand(scores.shape)
    return Routing(ids.where(taken, -1), scores.masked_fill(~taken, 0), scores)

"""SparseMixer-v2 (Liu et al. 2024, GRIN, arXiv:2409.12136), the router of Phi-3.5-MoE."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _check
from ..functional import Routing
from ..kernels import wide
from .noise import Seed, gumbel, uniform


def sparsemixer_route(
    logits_TE: Tensor,
    top_k: int,
    *,
    nearness: float = 0.01,
    training: bool = True,
    seed: Seed = None,
    ids_TK: Tensor | None = None,
) -> Routing:
    """K picks, one after the other, each weighed by a softmax over the experts that could have been picked.

    An expert can be picked when it was not before and its logit s is near the largest one m of those left:
    (m - s) / max(|s|, m) <= 2 * nearness. In training the pick is a sample from that softmax and not the
    largest. A sample that is not the largest has its weight multiplied by 0.3333 in three of four cases,
    Heun's third-order method of estimating the gradient; the gradient itself is that of the softmax alone.

    Args:
        logits_TE: [T, E].
        top_k: K, 1 to E.
        nearness: how near the largest is near enough, `jitter_eps` in GRIN.
        training: sample; False picks the largest.
        seed: see `noise`.
        ids_TK: weigh these picks, made before, as out of training.

    Returns:
        ids int64 [T, K]; weights [T, K], which do not sum to 1, and scores [T, E], the softmax of all logits.
    """
    _check.floating("logits", logits_TE, "[T, E]")
    if not nearness >= 0:
        _check.wanted("nearness", nearness, "at least 0")
    _check.top_k(top_k, logits_TE.shape[1])
    logits = logits_TE.to(wide(logits_TE.dtype))
    training = training and ids_TK is None
    taken = torch.zeros_like(logits, dtype=torch.bool)
    ids, weights = [], []
    for pick in range(top_k):
        with torch.no_grad():
            largest = logits.masked_fill(taken, -torch.inf).amax(dim=1, keepdim=True)
            far = (largest - logits) / logits.abs().clamp(min=largest) > 2 * nearness
        candidates = logits.masked_fill(taken | far, -torch.inf)
        probabilities = candidates.softmax(dim=1)
        best = candidates.argmax(dim=1, keepdim=True)
        drawn = best if ids_TK is None else ids_TK[:, pick : pick + 1].long()
        if training:
            noise = gumbel(logits, seed=seed, stream=2 * pick)
            drawn = (candidates.detach() + noise).argmax(dim=1, keepdim=True)
        weight = probabilities.gather(1, drawn)
        if training:
            coin = uniform(weight, seed=seed, stream=2 * pick + 1)
            factor = 0.3333 + 0.6667 * ((drawn == best) | (coin > 0.75))
            weight = weight + (weight * (factor - 1)).detach()
        ids.append(drawn)
        weights.append(weight)
        taken = taken.scatter(1, drawn, True)
    return Routing(torch.cat(ids, dim=1), torch.cat(weights, dim=1), logits.softmax(dim=1))

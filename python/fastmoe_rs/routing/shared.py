"""Shared experts that the router weighs together with the routed ones (Inkling)."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _check, functional
from ..kernels import wide


class SharedRouting(NamedTuple):
    """`ids` int64 [T, K], `weights` [T, K], `scores` [T, E]; `shared_weights` [T, S] of S shared experts."""

    ids: Tensor
    weights: Tensor
    scores: Tensor
    shared_weights: Tensor


def route_with_shared(
    logits_TE: Tensor,
    num_shared: int,
    top_k: int,
    *,
    scale: float = 1.0,
    bias: Tensor | None = None,
    ids_TK: Tensor | None = None,
) -> SharedRouting:
    """Pick K experts by sigmoid score (plus bias); the sigmoids of these and of the shared sum to `scale`.

    Args:
        logits_TE: [T, E + S]; the last S columns belong to the shared experts.
        num_shared: S, at least 1.
        top_k: K, 1 to E.
        scale: factor of all weights.
        bias: [E], added to the scores for the choice only.
        ids_TK: weigh these picks, made before.

    Returns:
        ids int64 [T, K]; weights [T, K], scores [T, E] and shared_weights [T, S], differentiable in the
        logits.
    """
    _check.floating("logits", logits_TE, "[T, E + S]")
    _check.positive(num_shared=num_shared)
    experts = logits_TE.shape[1] - num_shared
    if experts < 1:
        _check.wanted("num_shared", num_shared, f"less than the {logits_TE.shape[1]} columns of logits")
    logits = logits_TE.to(wide(logits_TE.dtype))
    routed, shared = logits.split([experts, num_shared], dim=1)
    ids, _, scores = functional.route(routed, top_k, score="sigmoid", bias=bias)
    ids = ids if ids_TK is None else ids_TK.long()
    # sigmoid / sum of sigmoids, without underflow
    weights = F.logsigmoid(torch.cat([routed.gather(1, ids), shared], dim=1)).softmax(dim=1) * scale
    return SharedRouting(ids, weights[:, :top_k], scores, weights[:, top_k:])

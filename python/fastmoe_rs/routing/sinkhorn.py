"""Sinkhorn routing: the choice of experts from a balanced assignment, the weights from the plain scores.

S-BASE (Clark et al. 2022, arXiv:2202.01169), as in Megatron-LM.
"""

from __future__ import annotations

from torch import Tensor

from .. import _check, functional
from ..functional import Routing
from ..kernels import wide


def sinkhorn(logits_TE: Tensor, iterations: int = 30) -> Tensor:
    """The matrix exp(logits) scaled by rows and columns so that they sum to 1/T and 1/E, without gradient.

    Args:
        logits_TE: [T, E].
        iterations: how often rows, then columns are scaled; a fixed number needs no look from the host.
    """
    _check.floating("logits", logits_TE, "[T, E]")
    _check.positive(iterations=iterations)
    plan = logits_TE.detach().to(wide(logits_TE.dtype))
    for _ in range(iterations):  # in logarithms, so that no exponential overflows
        plan = plan.log_softmax(dim=1)
        plan = plan.log_softmax(dim=0)
    return plan.exp() / plan.shape[1]


def sinkhorn_route(
    logits_TE: Tensor, top_k: int, *, training: bool = True, iterations: int = 30, score: str | None = None
) -> Routing:
    """In training the K largest of the Sinkhorn matrix, else the K largest logits.

    Args:
        logits_TE: [T, E].
        top_k: K, 1 to E.
        training: whether to balance the choice.
        iterations: see `sinkhorn`.
        score: what the weights are; None is "sigmoid" for K = 1 and else "softmax", as in Megatron.

    Returns:
        ids int64 [T, K]; weights [T, K] and scores [T, E], differentiable in the logits.
    """
    ids, weights, scores = functional.route(logits_TE, top_k, score=score or default_score(top_k))
    if training:
        ids = functional.route(sinkhorn(logits_TE, iterations).log(), top_k).ids
        weights = scores.gather(1, ids)
    return Routing(ids, weights, scores)


def default_score(top_k: int) -> str:
    """What Megatron scores by."""
    return "sigmoid" if top_k == 1 else "softmax"

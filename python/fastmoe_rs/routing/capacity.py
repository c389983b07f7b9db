"""Experts of limited capacity: which routes a full expert refuses, and GShard's router.

A refused route has the id -1; make the plan with `out_of_range="drop"`. `RoutingPlan.from_ids` itself has two
of the policies, drop="position" ("token" here) and drop="score".
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _check, functional
from ..functional import Routing
from ..plan import RoutingPlan
from ..reference import descending
from .noise import Seed, gumbel, uniform

QUEUES = ("token", "choice", "batch", "score")
SECONDS = ("all", "random", "sampling")


def drop_over_capacity(
    ids_TK: Tensor,
    num_experts: int,
    capacity: int,
    *,
    queue: str = "token",
    weights: Tensor | None = None,
    group_size: int | None = None,
) -> Tensor:
    """The ids with -1 for every route that finds its expert full.

    Args:
        ids_TK: int64 [T, K]; ids outside [0, E) take no room and become -1.
        num_experts: E.
        capacity: the most routes that an expert serves in a group.
        queue: who comes first. "token": the routes of the first token, then the second's (Switch
            Transformers). "choice": all first choices, then all second ones (GShard, arXiv:2006.16668,
            algorithm 1). "batch": as "choice", but tokens in falling order of their largest weight (V-MoE's
            batch prioritized routing, arXiv:2106.05974, section 4). "score": in falling order of weight.
        weights: [T, K], for "batch" and "score".
        group_size: tokens are divided into groups of so many neighbours (sequences, say), each with its own
            capacity; None for one group.
    """
    _check.one_of("queue", queue, QUEUES)
    _check.tensor("ids", ids_TK, "[T, K]")
    tokens, top_k = ids_TK.shape
    groups, size = _check.groups("group_size", group_size, tokens)
    if weights is not None:
        _check.shape("weights", weights, "[T, K]", (tokens, top_k))
    rows_TK = torch.arange(ids_TK.numel(), device=ids_TK.device).view(tokens, top_k)
    if queue == "token":
        rows = rows_TK
    elif queue == "choice":
        rows = rows_TK.T
    elif weights is None:
        _check.wanted("weights", None, f"weights [T, K], by which queue={queue!r} is ordered")
    elif queue == "batch":
        rows = rows_TK[descending(weights.detach().amax(dim=1)[None])[0]].T
    else:
        rows = descending(weights.detach().reshape(1, -1))[0]
    rows = rows.reshape(-1)
    group = torch.arange(tokens, device=ids_TK.device)[:, None] // max(size, 1)
    is_expert = (ids_TK >= 0) & (ids_TK < num_experts)
    seats = (group * num_experts + ids_TK).masked_fill(~is_expert, -1).reshape(-1)
    rooms = max(groups, 1) * num_experts
    plan = RoutingPlan.from_ids(seats[rows, None], rooms, capacity=capacity, out_of_range="drop")
    seated = torch.empty_like(is_expert.view(-1)).scatter(0, rows, plan.inverse[:, 0] >= 0)
    return ids_TK.masked_fill(~seated.view(tokens, top_k), -1)


def gshard_route(
    logits_TE: Tensor,
    capacity: int,
    *,
    second: str = "random",
    renormalize: str = "before",
    queue: str = "choice",
    group_size: int | None = None,
    training: bool = True,
    seed: Seed = None,
) -> Routing:
    """Top-2 softmax routing of experts with limited capacity (GShard, arXiv:2006.16668, algorithm 1).

    Args:
        logits_TE: [T, E], E at least 2.
        capacity: the most routes that an expert serves in a group; 2 * T / E in the paper.
        second: in training, "random" keeps the second expert with probability 2 * its weight (capped at 1);
            "sampling" picks it by logits plus Gumbel noise (fairseq's `moe_second_expert_policy`); "all"
            keeps the second largest. Out of training always the latter.
        renormalize: divide the two weights by their sum "before" or "after" routes are dropped, or "never".
        queue, group_size: see `drop_over_capacity`.
        training: False for no randomness.
        seed: see `noise`.

    Returns:
        ids int64 [T, 2], -1 where dropped; weights [T, 2], 0 where dropped; scores [T, E].
    """
    _check.one_of("renormalize", renormalize, ("before", "after", "never"))
    before = renormalize == "before"
    ids, wanted, weights, scores = gshard_choice(
        logits_TE, second=second, renormalize=before, training=training, seed=seed
    )
    seated = drop_over_capacity(
        wanted, scores.shape[1], capacity, queue=queue, weights=scores.gather(1, ids), group_size=group_size
    )
    weights = weights.masked_fill(seated < 0, 0)
    if renormalize == "after":
        weights = _renormalized(weights)
    return Routing(seated, weights, scores)


def gshard_choice(
    logits_TE: Tensor, *, second: str, renormalize: bool, training: bool, seed: Seed
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Two experts a token, the same with -1 for second ones given up, weights [T, 2], scores [T, E]."""
    _check.one_of("second", second, SECONDS)
    ids, _, scores = functional.route(logits_TE, 2)
    if training and second == "sampling":
        first = ids[:, :1]
        noisy = scores.detach().log() + gumbel(scores, seed=seed)
        ids = torch.cat([first, noisy.scatter(1, first, -torch.inf).argmax(dim=1, keepdim=True)], dim=1)
    weights = scores.gather(1, ids)
    if renormalize:
        weights = _renormalized(weights)
    if not training or second != "random":
        return ids, ids, weights, scores
    kept = 2 * weights[:, 1] > uniform(weights[:, 1], seed=seed)
    wanted = torch.stack([ids[:, 0], ids[:, 1].where(kept, -1)], dim=1)
    return ids, wanted, weights, scores


def _renormalized(weights: Tensor) -> Tensor:
    return weights / weights.sum(dim=1, keepdim=True).clamp(min=torch.finfo(weights.dtype).eps)

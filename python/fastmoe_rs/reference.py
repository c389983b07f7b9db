"""The Mixture-of-Experts layer in plain torch: the oracle of the tests, and a tutorial.

A router gives every token a score for every expert and picks the best K. A *plan* sorts the R = T*K (token,
expert) pairs by expert, so that each expert sees its rows side by side. Two grouped matrix products, one
group an expert, with an activation in between make the expert MLP. The results go back to their tokens as a
weighted sum.

    x_TH -> route -> plan -> permute -> grouped_mm -> activate -> grouped_mm -> unpermute -> y_TH

Everything here has the signature of its counterpart in `fastmoe_rs.functional`, works on any device, is
differentiable by ordinary autograd as often as you like, and runs in the dtype of its input, float64
included. It is slow on purpose, and checks nothing but ids, which raise ValueError out of range.

Legend: T tokens, H hidden size, I intermediate size, E experts, K experts per token, R = T*K routed rows,
C rows an expert may take (capacity), N output columns.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .plan import RoutingPlan

__all__ = [
    "Routing",
    "activate",
    "grouped_mm",
    "moe_mlp",
    "permute",
    "plan",
    "route",
    "route_weights",
    "unpermute",
]


class Routing(NamedTuple):
    """What a router decides: `ids` int64 [T, K], `weights` [T, K], and `scores` [T, E] of all experts."""

    ids: Tensor
    weights: Tensor
    scores: Tensor


def route(
    logits_TE: Tensor,
    top_k: int,
    *,
    score: str = "softmax",
    order: str = "score_topk",
    renormalize: bool = False,
    scale: float = 1.0,
    bias: Tensor | None = None,
    renormalize_eps: float = 1e-20,
    softcap: float | None = None,
    expert_scale: Tensor | None = None,
    n_group: int = 1,
    topk_group: int = 1,
    group_score: str = "top2",
    group_losers: str = "-inf",
) -> Routing:
    """Pick K experts for every token; see `fastmoe_rs.functional.route`."""
    logits = _soft_cap(logits_TE.to(torch.promote_types(logits_TE.dtype, torch.float32)), softcap)
    scores = scored(logits, score)
    key = logits  # scores grow with logits, and logits are not rounded
    if bias is not None or n_group > 1:
        key = scores if order == "score_topk" else logits
    if bias is not None:
        key = key + bias.to(logits.dtype)
    if n_group > 1:
        key = _limit_groups(key.detach(), n_group, topk_group, group_score, group_losers)
    ids = descending(key.detach())[:, :top_k]
    weights = route_weights(
        logits,
        ids,
        score=score,
        order=order,
        renormalize=renormalize,
        scale=scale,
        renormalize_eps=renormalize_eps,
        expert_scale=expert_scale,
    )
    return Routing(ids, weights, scores)


def route_weights(
    logits_TE: Tensor,
    ids_TK: Tensor,
    *,
    score: str = "softmax",
    order: str = "score_topk",
    renormalize: bool = False,
    scale: float = 1.0,
    renormalize_eps: float = 1e-20,
    softcap: float | None = None,
    expert_scale: Tensor | None = None,
) -> Tensor:
    """Weights [T, K] of experts that are already picked; see `fastmoe_rs.functional.route_weights`."""
    logits = _soft_cap(logits_TE.to(torch.promote_types(logits_TE.dtype, torch.float32)), softcap)
    unpicked = (ids_TK < 0) | (ids_TK >= logits.shape[1])
    ids = ids_TK.masked_fill(unpicked, 0)
    if order == "score_topk":
        weights = scored(logits, score).gather(1, ids)
    else:
        weights = scored(logits.gather(1, ids).masked_fill(unpicked, -torch.inf), score)
    weights = weights.masked_fill(unpicked, 0)
    if renormalize:
        weights = weights / (weights.sum(dim=1, keepdim=True) + renormalize_eps)
    weights = weights * scale
    return weights if expert_scale is None else weights * expert_scale.to(weights.dtype)[ids]


def _soft_cap(logits: Tensor, cap: float | None) -> Tensor:
    return logits if cap is None else (logits / cap).tanh() * cap


def scored(logits: Tensor, score: str) -> Tensor:
    if score == "softmax":
        return logits.softmax(dim=-1)
    if score == "sigmoid":
        return logits.sigmoid()
    softplus = F.softplus(logits, threshold=40.0)  # past it float64 cannot tell it from the identity
    return softplus.clamp(min=torch.finfo(logits.dtype).tiny).sqrt()


def _limit_groups(
    key_TE: Tensor, n_group: int, topk_group: int, group_score: str, group_losers: str
) -> Tensor:
    """The keys, with those of the experts outside of the best groups overwritten."""
    tokens, experts = key_TE.shape
    members = key_TE.reshape(tokens * n_group, experts // n_group)
    best = descending(members)[:, : 1 if group_score == "max" else 2]
    worth = members.gather(1, best).sum(dim=1).view(tokens, n_group)
    winners = descending(worth)[:, :topk_group]
    lost = torch.ones_like(worth, dtype=torch.bool).scatter(1, winners, False)
    lost = lost.repeat_interleave(experts // n_group, dim=1)
    return key_TE.masked_fill(lost, -torch.inf if group_losers == "-inf" else 0.0)


def descending(values_TE: Tensor) -> Tensor:
    """Column numbers of every row by value, largest first; ties by column number, NaN last."""
    number = values_TE.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    order = number.argsort(dim=1, descending=True, stable=True)
    is_nan = values_TE.isnan().gather(1, order)
    return order.gather(1, is_nan.int().argsort(dim=1, stable=True))


def plan(
    ids_TK: Tensor,
    num_experts: int,
    *,
    weights: Tensor | None = None,
    capacity: int | None = None,
    drop: str = "position",
    pad: bool = False,
    out_of_range: str = "error",
) -> RoutingPlan:
    """Sort the routed rows by expert; see `fastmoe_rs.RoutingPlan.from_ids`."""
    tokens, top_k = ids_TK.shape
    rows = tokens * top_k
    flat_ids = ids_TK.reshape(-1).long()
    in_range = (flat_ids >= 0) & (flat_ids < num_experts)
    if out_of_range == "error" and not in_range.all():
        raise ValueError(f"ids: got {flat_ids[~in_range][0]}, wanted 0 to {num_experts - 1}")
    expert = torch.where(in_range, flat_ids, num_experts)  # expert E takes what is dropped

    if capacity is not None:
        if drop == "position" or weights is None:
            queue = torch.arange(rows, device=ids_TK.device)
        else:
            queue = descending(weights.detach().reshape(1, -1))[0]
        queue = queue[expert[queue].argsort(stable=True)]
        start = torch.searchsorted(
            expert[queue].contiguous(), torch.arange(num_experts + 1, device=ids_TK.device)
        )
        place = torch.empty_like(queue)
        place[queue] = torch.arange(rows, device=ids_TK.device) - start[expert[queue]]
        expert = torch.where(place < capacity, expert, num_experts)

    kept_counts = torch.bincount(expert, minlength=num_experts + 1)[:num_experts]
    sorted_flat = expert.argsort(stable=True)[: int(kept_counts.sum())]
    first = F.pad(kept_counts.cumsum(0), (1, 0))
    slots = capacity if pad else None
    offsets = first if slots is None else torch.arange(num_experts + 1, device=ids_TK.device) * slots
    sorted_expert = expert[sorted_flat]
    row = torch.arange(len(sorted_flat), device=ids_TK.device) - first[sorted_expert] + offsets[sorted_expert]

    gather = torch.full((rows if slots is None else num_experts * slots,), -1, device=ids_TK.device)
    gather[row] = sorted_flat // top_k
    inverse = torch.full((rows,), -1, device=ids_TK.device)
    inverse[sorted_flat] = row
    sorted_weights = None
    if weights is not None:
        sorted_weights = weights.new_zeros(gather.shape)
        sorted_weights[row] = weights.detach().reshape(-1)[sorted_flat]
    return RoutingPlan(
        ids=ids_TK,
        counts=kept_counts.int(),
        offsets=offsets.int(),
        gather=gather.int(),
        inverse=inverse.int().view(tokens, top_k),
        weights=sorted_weights,
        num_experts=num_experts,
        capacity=capacity,
    )


def permute(x_TH: Tensor, plan: RoutingPlan) -> Tensor:
    """Rows of x in the order of the plan, zeros in unused rows; see `fastmoe_rs.functional.permute`."""
    return _with_zero_row(x_TH)[plan.gather]


def unpermute(y_RH: Tensor, plan: RoutingPlan, weights_TK: Tensor | None = None) -> Tensor:
    """Weighted sum of every token's rows, in at least float32; see `fastmoe_rs.functional.unpermute`."""
    rows_TKH = _with_zero_row(y_RH)[plan.inverse].to(torch.promote_types(y_RH.dtype, torch.float32))
    if weights_TK is not None:
        weights_TK = weights_TK.to(rows_TKH.dtype).masked_fill(plan.inverse < 0, 0)
        rows_TKH = rows_TKH * weights_TK[..., None]
    return rows_TKH.sum(dim=1).to(y_RH.dtype)


def _with_zero_row(x: Tensor) -> Tensor:
    """A row of zeros past the last, where index -1 points."""
    return F.pad(x, (0, 0, 0, 1))


def grouped_mm(x_RK: Tensor, w_ENK: Tensor, offsets_E1: Tensor, *, bias: Tensor | None = None) -> Tensor:
    """x @ w[e].T for the rows of every expert e; see `fastmoe_rs.functional.grouped_mm`."""
    counts = offsets_E1.diff().tolist()
    *groups, unused = x_RK.split([*counts, len(x_RK) - sum(counts)])
    products = [x @ w.T for x, w in zip(groups, w_ENK.unbind(), strict=True)]
    if bias is not None:
        products = [y + b for y, b in zip(products, bias.unbind(), strict=True)]
    return torch.cat([*products, x_RK.new_zeros(len(unused), w_ENK.shape[1])])


_UNGATED: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda h: F.relu(h).square(),
}
_GATES = {"swiglu": "silu", "geglu": "gelu", "geglu_tanh": "gelu_tanh", "reglu": "relu"}
GATED = (*_GATES, "swiglu_oai")
UNGATED = tuple(_UNGATED)


def activate(h: Tensor, activation: str, *, interleaved: bool = False) -> Tensor:
    """The nonlinearity between the two products: [..., 2I] -> [..., I] when gated, else [..., I] -> [..., I].

    A gated activation multiplies a gate by an up projection. They are the two halves of h, or, interleaved,
    its even and odd columns. "swiglu_oai" is that of gpt-oss (github.com/openai/gpt-oss, `swiglu` in
    gpt_oss/torch/model.py).
    """
    if activation in UNGATED:
        return _UNGATED[activation](h)
    gate, up = (h[..., 0::2], h[..., 1::2]) if interleaved else h.chunk(2, dim=-1)
    if activation == "swiglu_oai":
        gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
        return (up + 1) * gate * torch.sigmoid(1.702 * gate)
    return _UNGATED[_GATES[activation]](gate) * up


def moe_mlp(
    x_TH: Tensor,
    ids_TK: Tensor | None,
    weights_TK: Tensor,
    w1: Tensor,
    w2: Tensor,
    *,
    b1: Tensor | None = None,
    b2: Tensor | None = None,
    activation: str = "swiglu",
    transposed: bool = False,
    interleaved: bool = False,
    plan: RoutingPlan | None = None,
) -> Tensor:
    """The expert MLP of every token, summed by routing weight; see `fastmoe_rs.functional.moe_mlp`."""
    if transposed:
        w1, w2 = w1.transpose(1, 2), w2.transpose(1, 2)
    if plan is None:
        assert ids_TK is not None, "ids: needed where there is no plan"
        plan = _plan(ids_TK, len(w1))
    x_RH = permute(x_TH, plan)
    hidden = grouped_mm(x_RH, w1, plan.offsets, bias=b1)
    y_RH = grouped_mm(activate(hidden, activation, interleaved=interleaved), w2, plan.offsets, bias=b2)
    return unpermute(y_RH, plan, weights_TK)


_plan = plan  # `moe_mlp` has an argument of that name

"""Experts without weights: ids from E on, for which a plan with `out_of_range="drop"` has no rows.

A router over E + Z logits picks them like any other. A zero or skip expert (Zaya) adds nothing: the drop is
all there is to it. An identity expert (LongCat-Flash, arXiv:2509.01322) adds its weight times the input:

    plan = RoutingPlan.from_ids(ids, num_experts, out_of_range="drop")
    y = moe_mlp(x, None, weights, w1, w2, plan=plan) + identity_weight(ids, weights, num_experts)[:, None] * x
"""

from __future__ import annotations

from torch import Tensor


def identity_weight(ids_TK: Tensor, weights_TK: Tensor, num_experts: int) -> Tensor:
    """[T]: the weights of a token for experts from `num_experts` on, summed.

    Args:
        ids_TK: integer [T, K].
        weights_TK: [T, K] in any float dtype, which the result has too; differentiable.
        num_experts: E, the experts with weights.
    """
    return weights_TK.masked_fill(ids_TK < num_experts, 0).sum(dim=1)

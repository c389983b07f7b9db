"""Balance without an auxiliary loss: a selection bias that follows the load (Wang 2024, arXiv:2408.15664)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _check
from .._distributed import all_reduced


@torch.no_grad()
def update_selection_bias(bias_E: Tensor, routes_E: Tensor, *, rate: float = 1e-3, group: Any = None) -> None:
    """Raise the bias of experts with less than the mean load by `rate`, lower that of those with more.

    b_e += rate * sign(mean(routes) - routes_e), algorithm 1 of the paper, as in DeepSeek-V3
    (arXiv:2412.19437, section 2.1.2). Call it once an optimizer step, with the routes of all its
    micro-batches; nothing is counted in the forward, so no recomputation counts twice.

    Args:
        bias_E: [E], changed in place; such as an `nn.Router` has, whose method `balance` calls this.
        routes_E: [E], how many routes asked for every expert.
        rate: the step u.
        group: a torch.distributed process group over which the routes are summed first; True for the default
            one, None for none.
    """
    _check.shape("routes", routes_E, "[E]", tuple(bias_E.shape))
    routes = all_reduced(routes_E.to(device=bias_E.device, dtype=torch.float64), group)
    bias_E += (rate * torch.sign(routes.mean() - routes)).to(bias_E.dtype)

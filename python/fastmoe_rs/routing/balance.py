"""Balance without an auxiliary loss: a selection bias that follows the load (Wang 2024, arXiv:2408.15664)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._distributed import all_reduced


@torch.no_grad()
def update_selection_bias(bias_E: Tensor, counts_E: Tensor, *, rate: float = 1e-3, group: Any = None) -> None:
    """Raise the bias of experts with less than the mean load by `rate`, lower that of those with more.

    b_e += rate * sign(mean(counts) - counts_e), algorithm 1 of the paper, as in DeepSeek-V3
    (arXiv:2412.19437, section 2.1.2). Call it once an optimizer step, with the counts of all its
    micro-batches; nothing is counted in the forward, so no recomputation counts twice.

    Args:
        bias_E: [E], changed in place; such as an `nn.Router` has, whose method `balance` calls this.
        counts_E: [E], how many routes asked for every expert.
        rate: the step u.
        group: a torch.distributed process group over which the counts are summed first; True for the default
            one, None for none.
    """
    counts = all_reduced(counts_E.to(device=bias_E.device, dtype=torch.float64), group)
    bias_E += (rate * torch.sign(counts.mean() - counts)).to(bias_E.dtype)

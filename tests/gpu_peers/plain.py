"""A gated expert MLP of routed rows, with a loop over the experts."""

import torch
from torch.nn import functional as F


def mlp(x_RH, experts_R, gate_EIH, up_EIH, down_EHI):
    """Each row through its expert; rows [R, H]."""
    out = torch.zeros_like(x_RH)
    for expert in range(len(down_EHI)):
        rows = (experts_R == expert).nonzero().flatten()
        hidden = F.silu(x_RH[rows] @ gate_EIH[expert].mT) * (x_RH[rows] @ up_EIH[expert].mT)
        out = out.index_add(0, rows, hidden @ down_EHI[expert].mT)
    return out

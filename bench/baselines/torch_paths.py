"""The gated expert MLP in plain torch: grouped_mm, sorted slices with one mm an expert, and a loop."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn import functional as F

Call = Callable[[Tensor, Tensor, Tensor], Tensor]


def sort_by_expert(ids_TK: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """Flat routed rows in expert order, and the number of rows of each expert."""
    flat_R = ids_TK.reshape(-1)
    return flat_R.argsort(stable=True), torch.bincount(flat_R, minlength=experts)


def combine(x_TH: Tensor, y_RH: Tensor, tokens_R: Tensor, weights_R: Tensor) -> Tensor:
    weighted_RH = y_RH * weights_R.to(y_RH.dtype)[:, None]
    return torch.zeros_like(x_TH).index_add(0, tokens_R, weighted_RH.to(x_TH.dtype))


def swiglu(h_R2I: Tensor) -> Tensor:
    gate, up = h_R2I.chunk(2, dim=-1)
    return F.silu(gate) * up


def grouped(w1: Parameter, w2: Parameter) -> Call:
    """Gather, F.grouped_mm, SwiGLU, F.grouped_mm, weighted index_add."""

    def call(x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        order_R, counts_E = sort_by_expert(ids_TK, len(w1))
        tokens_R = order_R // ids_TK.shape[1]
        ends_E = counts_E.cumsum(0, dtype=torch.int32)
        h_R2I = F.grouped_mm(x_TH[tokens_R], w1.mT, offs=ends_E)
        y_RH = F.grouped_mm(swiglu(h_R2I), w2.mT, offs=ends_E)
        return combine(x_TH, y_RH, tokens_R, weights_TK.reshape(-1)[order_R])

    return call


def _sorted(w1: Parameter, w2: Parameter, compute: torch.dtype) -> Call:
    def call(x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        order_R, counts_E = sort_by_expert(ids_TK, len(w1))
        tokens_R = order_R // ids_TK.shape[1]
        # unbind, because the gradient of w1[e] is a zero tensor of the size of all experts.
        experts = zip(
            x_TH[tokens_R].to(compute).split(counts_E.tolist()), w1.unbind(0), w2.unbind(0), strict=True
        )
        y_RH = torch.cat(
            [
                F.linear(swiglu(F.linear(rows, w1_e.to(compute))), w2_e.to(compute))
                for rows, w1_e, w2_e in experts
                if len(rows)
            ]
        )
        return combine(x_TH, y_RH, tokens_R, weights_TK.reshape(-1)[order_R])

    return call


def sorted_mm(w1: Parameter, w2: Parameter) -> Call:
    """Rows sorted by expert, then one mm for each expert on its contiguous slice."""
    return _sorted(w1, w2, w1.dtype)


def sorted_upcast(w1: Parameter, w2: Parameter) -> Call:
    """The same, computed in fp32: faster where 16-bit products have no instruction."""
    return _sorted(w1, w2, torch.float32)


def loop(w1: Parameter, w2: Parameter) -> Call:
    """A Python loop over experts, each finding its tokens by a mask."""

    def call(x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        out_TH = torch.zeros_like(x_TH)
        for expert, (w1_e, w2_e) in enumerate(zip(w1.unbind(0), w2.unbind(0), strict=True)):
            tokens, slots = torch.where(ids_TK == expert)
            if len(tokens):
                y = F.linear(swiglu(F.linear(x_TH[tokens], w1_e)), w2_e)
                y = y * weights_TK[tokens, slots, None]
                out_TH = out_TH.index_add(0, tokens, y.to(out_TH.dtype))
        return out_TH

    return call

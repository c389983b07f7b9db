"""The native kernels as functions that allocate what they return.

Nothing here knows autograd or checks arguments: `ops` makes these differentiable, `functional` checks, and
the native module checks once more whatever memory safety needs. Tensors must be contiguous. A gradient that
is not needed is None. On fake and meta tensors, which only have shapes, the allocation is all that happens.

Legend: T tokens, H hidden size, I intermediate size, E experts, K experts per token, R routed rows.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import Parameter

from . import _native
from ._check import DTYPES
from .quantized_weight import numbers

_PLAIN = (Tensor, Parameter)
# An emulated GPU has torch's allocator, as a real one.
_POOLED = os.environ.get("FASTMOE_BACKEND") != "emulator"


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of routing weights and sums beside tensors of `dtype`."""
    return torch.float64 if dtype is torch.float64 else torch.float32


_NAMES: dict[torch.dtype, Any] = {dtype: str(dtype).removeprefix("torch.") for dtype in DTYPES}


def _has_memory(tensor: Tensor) -> bool:
    """Of any other subclass the native module reads the memory, or says that it cannot."""
    return (type(tensor) in _PLAIN or not isinstance(tensor, FakeTensor)) and not tensor.is_meta


def _run(name: str, first: Tensor, *args: Tensor | None, **options: object) -> None:
    """Launch a native kernel where its tensors are."""
    if _has_memory(first):
        getattr(_native, name)(first, *args, **options, threads=torch.get_num_threads())


def _is_pooled(like: Tensor) -> bool:
    """Whether what is large and comes every step is kept for the next: gradients of weights, what is saved.

    On the CPU torch gives freed memory back to the system.
    """
    return _POOLED and like.is_cpu and _has_memory(like)


def _plain(w: Tensor, scales: Tensor | None, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """A weight and its scales as the native kernels of the device of x take them."""
    if scales is None or _is_pooled(x) or not _has_memory(x):
        return w, scales
    return numbers(w, scales, x.dtype), None


def _recycled(like: Tensor, *shape: int, unwritten: bool = False) -> Tensor:
    if _is_pooled(like):
        return _native.empty(shape, _NAMES[like.dtype], unwritten=unwritten)
    return like.new_empty(*shape)


def _unwritten_like(like: Tensor) -> Tensor:
    """For the gradient of a weight, which the kernel is the first to write to."""
    return _native.empty_like(like, unwritten=True)


def route(
    logits: Tensor,
    bias: Tensor | None,
    expert_scale: Tensor | None,
    top_k: int,
    softcap: float | None,
    score: str,
    order: str,
    n_group: int,
    topk_group: int,
    group_score: str,
    group_losers: str,
    renormalize: bool,
    renormalize_eps: float,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    tokens, experts = logits.shape
    ids = logits.new_empty(tokens, top_k, dtype=torch.int64)
    weights = logits.new_empty(tokens, top_k, dtype=wide(logits.dtype))
    scores = logits.new_empty(tokens, experts, dtype=wide(logits.dtype))
    _run(
        "route",
        logits,
        bias,
        expert_scale,
        ids,
        weights,
        scores,
        softcap=softcap,
        score=score,
        order=order,
        n_group=n_group,
        topk_group=topk_group,
        group_score=group_score,
        group_losers=group_losers,
        renormalize=renormalize,
        renormalize_eps=renormalize_eps,
        scale=scale,
    )
    return weights, scores, ids


def route_backward(
    logits: Tensor,
    expert_scale: Tensor | None,
    ids: Tensor,
    scores: Tensor,
    grad_weights: Tensor | None,
    grad_scores: Tensor | None,
    softcap: float | None,
    score: str,
    order: str,
    renormalize: bool,
    renormalize_eps: float,
    scale: float,
    with_expert_scale: bool,
) -> tuple[Tensor, Tensor | None]:
    """The gradients of the logits and, if asked for, of expert_scale; a gradient that is None is zeros."""
    grad_logits = torch.empty_like(logits)
    grad_expert_scale = scores.new_empty(logits.shape[1]) if with_expert_scale else None
    _run(
        "route_backward",
        logits,
        expert_scale,
        ids,
        scores,
        grad_weights,
        grad_scores,
        grad_logits,
        grad_expert_scale,
        softcap=softcap,
        score=score,
        order=order,
        renormalize=renormalize,
        renormalize_eps=renormalize_eps,
        scale=scale,
    )
    return grad_logits, grad_expert_scale


def plan(
    ids: Tensor,
    weights: Tensor | None,
    num_experts: int,
    capacity: int | None,
    drop: str,
    pad: bool,
    out_of_range: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    rows = num_experts * capacity if pad and capacity is not None else ids.numel()
    counts = ids.new_empty(num_experts, dtype=torch.int32)
    offsets = ids.new_empty(num_experts + 1, dtype=torch.int32)
    gather = ids.new_empty(rows, dtype=torch.int32)
    inverse = torch.empty_like(ids, dtype=torch.int32)
    sorted_weights = None if weights is None else weights.new_empty(rows)
    _run(
        "plan",
        ids,
        weights,
        counts,
        offsets,
        gather,
        inverse,
        sorted_weights,
        num_experts=num_experts,
        capacity=capacity,
        drop=drop,
        pad=pad,
        out_of_range=out_of_range,
    )
    return counts, offsets, gather, inverse, sorted_weights


def mlp(
    x: Tensor,
    weights: Tensor,
    w1: Tensor,
    w2: Tensor,
    b1: Tensor | None,
    b2: Tensor | None,
    offsets: Tensor | None,
    gather: Tensor | None,
    inverse: Tensor | None,
    activation: str,
    transposed: bool,
    interleaved: bool,
    save_hidden: bool,
    w1_scales: Tensor | None = None,
    w2_scales: Tensor | None = None,
    ids: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The output [T, H] and, to be saved for the backward, the pre-activation [R, 2I].

    Where a weight comes with scales it is the uint8 codes of a quantized one.

    With `ids` their plan is made first, and what is saved is flat, with the plan behind the pre-activation.
    """
    out = torch.empty_like(x)
    hidden = None
    if save_hidden:
        width = w1.shape[2 if transposed else 1]
        if gather is not None:
            hidden = _recycled(x, gather.shape[0], width)
        else:  # the plan takes 2E + 1 + 2R numbers of 4 bytes, from a multiple of 4 bytes on
            hidden = _recycled(x, weights.numel() * (width + 4) + 4 * w1.shape[0] + 3)
    if w1_scales is not None or w2_scales is not None:
        (w1, w1_scales), (w2, w2_scales) = _plain(w1, w1_scales, x), _plain(w2, w2_scales, x)
    if _has_memory(x):
        _native.mlp_forward(
            x,
            w1,
            b1,
            w2,
            b2,
            weights,
            ids,
            offsets,
            gather,
            inverse,
            out,
            hidden,
            activation,
            transposed,
            interleaved,
            torch.get_num_threads(),
            w1_scales,
            w2_scales,
        )
    return out, hidden


def mlp_backward(
    grad_out: Tensor,
    x: Tensor,
    weights: Tensor,
    w1: Tensor,
    w2: Tensor,
    b1: Tensor | None,
    b2: Tensor | None,
    offsets: Tensor | None,
    gather: Tensor | None,
    inverse: Tensor | None,
    hidden: Tensor,
    activation: str,
    transposed: bool,
    interleaved: bool,
    needs: Sequence[bool],
    w1_scales: Tensor | None = None,
    w2_scales: Tensor | None = None,
    *,
    sums: Sequence[Tensor | None] = (None, None),
) -> tuple[Tensor | None, ...]:
    """The gradients of x, weights, w1, w2, b1 and b2, each where `needs` says so.

    Those of w1 and w2 are added to `sums` where these are given. Without a plan `hidden` has that of the ids.
    """
    x_need, weights_need, w1_need, w2_need, b1_need, b2_need = needs
    grad_x = torch.empty_like(x) if x_need else None
    grad_weights = torch.empty_like(weights) if weights_need else None
    sum_w1, sum_w2 = sums
    gradient_like = _unwritten_like if _is_pooled(x) else torch.empty_like
    grad_w1 = gradient_like(w1) if w1_need and sum_w1 is None else None
    grad_w2 = gradient_like(w2) if w2_need and sum_w2 is None else None
    grad_b1 = torch.empty_like(b1) if b1 is not None and b1_need else None
    grad_b2 = torch.empty_like(b2) if b2 is not None and b2_need else None
    if w1_scales is not None or w2_scales is not None:
        (w1, w1_scales), (w2, w2_scales) = _plain(w1, w1_scales, x), _plain(w2, w2_scales, x)
    if _has_memory(x):
        _native.mlp_backward(
            grad_out,
            x,
            w1,
            b1,
            w2,
            b2,
            weights,
            hidden,
            offsets,
            gather,
            inverse,
            grad_x,
            grad_weights,
            grad_w1 if sum_w1 is None else sum_w1,
            grad_b1,
            grad_w2 if sum_w2 is None else sum_w2,
            grad_b2,
            activation,
            transposed,
            interleaved,
            torch.get_num_threads(),
            sum_w1 is not None,
            sum_w2 is not None,
            w1_scales,
            w2_scales,
        )
    return grad_x, grad_weights, grad_w1, grad_w2, grad_b1, grad_b2


def grouped_mm(x: Tensor, w: Tensor, bias: Tensor | None, offsets: Tensor, transposed: bool) -> Tensor:
    out = x.new_empty(x.shape[0], w.shape[2 if transposed else 1])
    _run("grouped_mm", x, w, offsets, bias, out, transposed=transposed)
    return out


def weight_shape(y: Tensor, x: Tensor, offsets: Tensor, transposed: bool) -> tuple[int, int, int]:
    """The shape of the weight of y = grouped_mm(x, weight)."""
    experts, n, k = offsets.shape[0] - 1, y.shape[1], x.shape[1]
    return (experts, k, n) if transposed else (experts, n, k)


def grouped_mm_grad_weight(
    grad_out: Tensor,
    x: Tensor,
    offsets: Tensor,
    transposed: bool,
    with_bias: bool,
    *,
    sum_w: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The gradients of w, added to sum_w where that is given, and, if asked for, of the bias."""
    grad_w = sum_w
    if grad_w is None:
        grad_w = _recycled(x, *weight_shape(grad_out, x, offsets, transposed), unwritten=True)
    grad_bias = x.new_empty(offsets.shape[0] - 1, grad_out.shape[1]) if with_bias else None
    add_w = sum_w is not None
    _run(
        "grouped_mm_grad_weight", grad_out, x, offsets, grad_w, grad_bias, transposed=transposed, add_w=add_w
    )
    return grad_w, grad_bias


def permute(x: Tensor, gather: Tensor, inverse: Tensor) -> Tensor:
    out = x.new_empty(gather.shape[0], x.shape[1])
    _run("permute", x, gather, out)
    return out


def unpermute(y: Tensor, weights: Tensor | None, gather: Tensor, inverse: Tensor) -> Tensor:
    out = y.new_empty(inverse.shape[0], y.shape[1])
    _run("unpermute", y, inverse, weights, out)
    return out


def unpermute_backward(
    grad_out: Tensor, y: Tensor, weights: Tensor, gather: Tensor, inverse: Tensor, needs: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of y and weights, each where `needs` says so."""
    grad_y = torch.empty_like(y) if needs[0] else None
    grad_weights = torch.empty_like(weights) if needs[1] else None
    _run("unpermute_backward", grad_out, y, weights, gather, inverse, grad_y, grad_weights)
    return grad_y, grad_weights

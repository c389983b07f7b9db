"""The functions of the Mixture-of-Experts layer: route, moe_mlp, and the pieces that moe_mlp fuses.

Legend: T tokens, H hidden size, I intermediate size, E experts, K experts per token, R = T*K routed rows,
N output columns. Float tensors are float32, bfloat16, float16 or, on the CPU, float64; the tensors of a call
are all on the CPU, or all on one NVIDIA GPU (or on "meta", for shapes only). Sums run in float32, in float64
for float64. All functions are differentiable, repeatable to the bit, and work under torch.compile, autocast,
inference_mode and activation checkpointing; none waits for a GPU. Wrong arguments raise ValueError, wrong
types and dtypes TypeError; the message names the argument, what was given and what was wanted. A GPU that
cannot be used raises RuntimeError with the remedy, one without enough memory torch.OutOfMemoryError.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from . import _check, ops
from .kernels import wide
from .plan import RoutingPlan
from .quantized_weight import QuantizedWeight
from .reference import GATED, UNGATED, Routing, activate
from .reference import route_weights as _route_weights

__all__ = ["Routing", "activate", "grouped_mm", "moe_mlp", "permute", "route", "route_weights", "unpermute"]


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
    """Pick K experts for every token and weigh them.

    The experts of a token come highest key first, then by expert id, NaN last. The key is the logit, with
    which the score grows; with a bias or groups it is what the bias is added to, plus the bias. As in torch,
    one NaN logit makes a whole softmax NaN, and so the weights (and keys) made of it.

    Args:
        logits_TE: [T, E].
        top_k: K, 1 to E.
        score: "softmax" over the experts, "sigmoid" of each, or "sqrt_softplus", the square root of
            log(1 + exp(logit)) (DeepSeek-V4).
        order: "score_topk" scores all experts and picks the K best (Mixtral, DeepSeek-V3); "topk_score" picks
            the K best logits and scores them among themselves (gpt-oss, Granite).
        renormalize: divide the K weights of a token by their sum + renormalize_eps.
        scale: factor of the weights, applied after that.
        bias: [E], added for the choice only, never in the weights: to the scores ("score_topk", as the
            correction bias of DeepSeek-V3, arXiv:2412.19437 eq. 16) or to the logits ("topk_score"). It gets
            no gradient.
        renormalize_eps: at least 0; with 0 the weights of a sum of 0 are NaN.
        softcap: every logit is first replaced by softcap * tanh(logit / softcap) (Laguna). More than 0.
        expert_scale: [E], factor of the weights of each expert, applied last (Gemma 4).
        n_group: divide the experts into so many groups of neighbours and choose from the best ones only
            (DeepSeek-V2, arXiv:2405.04434 section 2.2.2; DeepSeek-V3). A divisor of E; 1 for no groups.
        topk_group: how many groups stay, by score, then by number; K experts must fit into them.
        group_score: the score of a group is the sum of its two largest keys, "top2" (DeepSeek-V3), or its
            largest, "max" (DeepSeek-V2).
        group_losers: the key of the experts in other groups, "-inf" (DeepSeek-V3) or "zero" (DeepSeek-V2,
            Mistral 4), which wins against the negative keys that a bias can make.

    Returns:
        ids int64 [T, K]; weights [T, K] and scores [T, E] in float32 (float64 for float64 logits). The scores
        are those of all (capped) logits. Weights and scores are differentiable in the logits and the weights
        in expert_scale, twice.
    """
    _check.floating("logits", logits_TE, "[T, E]")
    experts = logits_TE.shape[1]
    _check_routing(top_k, experts, score, order, renormalize_eps, softcap)
    _check_groups(top_k, experts, n_group, topk_group, group_score, group_losers)
    bias = _per_expert("bias", None if bias is None else bias.detach(), logits_TE)
    expert_scale = _per_expert("expert_scale", expert_scale, logits_TE)
    weights, scores, ids = ops.route(
        logits_TE.contiguous(),
        bias,
        expert_scale,
        top_k,
        None if softcap is None else float(softcap),
        score,
        order,
        n_group,
        topk_group,
        group_score,
        group_losers,
        renormalize,
        float(renormalize_eps),
        float(scale),
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
    """Routing weights of experts that were picked before, or by other means than the logits.

    Args:
        logits_TE: [T, E].
        ids_TK: int64 or int32 [T, K] expert ids. One outside [0, E) is no expert (a dropped route, say): its
            weight is 0, and it counts neither in a softmax of the picked nor in the renormalisation.
        score, order, renormalize, scale, renormalize_eps, softcap, expert_scale: as in `route`.

    Returns:
        float32 [T, K] (float64 for float64 logits), differentiable in the logits and expert_scale.
    """
    _check.floating("logits", logits_TE, "[T, E]")
    _check.tensor("ids", ids_TK, "[T, K]")
    _check_routing(1, logits_TE.shape[1], score, order, renormalize_eps, softcap)
    _check.shape("ids", ids_TK, "[T, K]", (logits_TE.shape[0], ids_TK.shape[1]))
    _check.like("ids", ids_TK, "logits", logits_TE, dtype=False)
    return _route_weights(
        logits_TE,
        ids_TK.long(),
        score=score,
        order=order,
        renormalize=renormalize,
        scale=scale,
        renormalize_eps=renormalize_eps,
        softcap=softcap,
        expert_scale=_per_expert("expert_scale", expert_scale, logits_TE),
    )


def _check_routing(
    top_k: int,
    experts: int,
    score: str,
    order: str,
    renormalize_eps: float = 0.0,
    softcap: float | None = None,
) -> None:
    _check.top_k(top_k, experts)
    _check.one_of("score", score, ("softmax", "sigmoid", "sqrt_softplus"))
    _check.one_of("order", order, ("score_topk", "topk_score"))
    if not 0 <= renormalize_eps < math.inf:
        _check.wanted("renormalize_eps", renormalize_eps, "a finite number of at least 0")
    if softcap is not None and not 0 < softcap < math.inf:
        _check.wanted("softcap", softcap, "None or a finite number of more than 0")


def _check_groups(
    top_k: int, experts: int, n_group: int, topk_group: int, group_score: str, group_losers: str
) -> None:
    _check.one_of("group_score", group_score, ("top2", "max"))
    _check.one_of("group_losers", group_losers, ("-inf", "zero"))
    if n_group < 1 or experts % n_group:
        _check.wanted("n_group", n_group, f"a divisor of {experts}, the number of experts")
    if not 1 <= topk_group <= n_group:
        _check.wanted("topk_group", topk_group, f"1 to {n_group}, the number of groups")
    if n_group > 1 and group_score == "top2" and experts // n_group < 2:
        _check.wanted("n_group", n_group, "groups of at least 2 experts for group_score='top2'")
    if top_k > topk_group * (experts // n_group):
        _check.wanted(
            "top_k", top_k, f"1 to {topk_group * (experts // n_group)}, the experts in topk_group groups"
        )


def _per_expert(name: str, values: Tensor | None, logits: Tensor) -> Tensor | None:
    """A checked tensor [E] in the dtype of the weights."""
    if values is None:
        return None
    _check.tensor(name, values, "[E]")
    _check.shape(name, values, "[E]", (logits.shape[1],))
    _check.like(name, values, "logits", logits, dtype=False)
    return values.to(wide(logits.dtype)).contiguous()


def moe_mlp(
    x_TH: Tensor,
    ids_TK: Tensor | None,
    weights_TK: Tensor,
    w1: Tensor | QuantizedWeight,
    w2: Tensor | QuantizedWeight,
    *,
    b1: Tensor | None = None,
    b2: Tensor | None = None,
    activation: str = "swiglu",
    transposed: bool = False,
    interleaved: bool = False,
    plan: RoutingPlan | None = None,
) -> Tensor:
    """The expert MLP, y[t] = sum over k of weights[t, k] * (w2[e] @ act(w1[e] @ x[t] + b1[e]) + b2[e]).

    There e = ids[t, k]. Saves for the backward only x and the pre-activation [R, 2I]. Computes only the
    gradients that are asked for; an expert without tokens gets a gradient of zeros. A second derivative
    raises RuntimeError. `backward()` adds the gradient of a w1 or w2 that is a leaf with a `main_grad` to
    that, and leaves its `grad` alone (see `fastmoe_rs.main_grads`).

    Args:
        x_TH: [T, H].
        ids_TK: int64 or int32 [T, K] expert ids in [0, E); may be None when `plan` is given.
        weights_TK: [T, K] in any float dtype; used in float32 (float64 beside a float64 x).
        w1: [E, 2I, H], gate rows then up rows; [E, I, H] when the activation has no gate. dtype of x, or a
            `fastmoe_rs.quantization.QuantizedWeight` of any format, as w2 then is too.
        w2: [E, H, I]. dtype of x, or a QuantizedWeight.
        b1: [E, 2I] ([E, I]) in the order of the rows of w1, or None.
        b2: [E, H], or None.
        activation: "swiglu", "geglu", "geglu_tanh", "reglu", "swiglu_oai" (gated), "silu", "gelu",
            "gelu_tanh", "relu", "relu2" (not gated); `activate` has the formulas.
        transposed: w1 is [E, H, 2I] ([E, H, I]) and w2 is [E, I, H]; quantized weights never are.
        interleaved: the rows of w1 alternate, gate 0, up 0, gate 1, up 1, ...
        plan: the plan to follow, for a capacity or a recorded routing; made from the ids when None. Rows that
            it drops add nothing.

    Returns:
        [T, H] in the dtype of x.
    """
    if torch._C._is_any_autocast_enabled():
        x_TH, w1, w2, b1, b2 = _autocast(x_TH, w1, w2, b1, b2)
    ids, rows = (ids_TK, (None, None, None)) if plan is None else (None, _rows(plan))
    offsets, gather, inverse = rows
    refused = None
    if ops.is_direct((x_TH, weights_TK, w1, w2, b1, b2, ids, offsets, gather, inverse)):
        try:
            dense, flipped = _dense(x_TH, weights_TK, w1, w2, b1, b2, transposed)
            ids = None if ids is None else ids.contiguous()
            return ops.direct_mlp(dense, ids, rows, (activation, flipped, interleaved))
        except Exception as error:
            refused = error
    try:
        # For the others, and to say in the words of this function what the kernel refused.
        scales: tuple[Tensor, ...] = ()
        if isinstance(w1, QuantizedWeight) or isinstance(w2, QuantizedWeight):
            numbers = _stand_ins(x_TH, w1, w2, transposed)
            (w1, w2), scales = zip(_codes(w1), _codes(w2), strict=True)
        else:
            numbers = w1, w2
        _check_mlp(x_TH, *numbers, b1, b2, activation, transposed, interleaved)
        experts = numbers[0].shape[0]
        if plan is None:
            if ids_TK is None:
                _check.wanted("ids", None, "expert ids [T, K], or a plan")
            plan = RoutingPlan.from_ids(ids_TK, experts)
        _check_plan("x", x_TH, plan)
        if plan.num_experts != experts:
            _check.wanted("plan", f"a plan for {plan.num_experts} experts", f"one for the {experts} of w1")
        _check_weights(weights_TK, "x", x_TH, plan)
        if refused is not None:
            raise refused
    finally:
        refused = None  # its traceback holds this frame, and the tensors of those below
    dense, transposed = _dense(x_TH, weights_TK, w1, w2, b1, b2, transposed)
    # A trace is also checked, and run, in other modes than that in which it was made.
    learns = torch.is_grad_enabled() or torch._C._get_tracing_state() is not None
    save_hidden = learns and any(t is not None and t.requires_grad for t in dense)
    out, _ = ops.mlp(*dense, *_rows(plan), activation, transposed, interleaved, save_hidden, *scales)
    return out


def grouped_mm(x_RK: Tensor, w_ENK: Tensor, offsets_E1: Tensor, *, bias: Tensor | None = None) -> Tensor:
    """One matrix product an expert: y[r] = w[e] @ x[r] + bias[e] for offsets[e] <= r < offsets[e + 1].

    Args:
        x_RK: [R, K] rows sorted by expert. (K is the number of columns here.)
        w_ENK: [E, N, K], dtype of x. A transposed view of a contiguous [E, K, N] is used as it is, without a
            copy.
        offsets_E1: int32 or int64 [E + 1], not decreasing, from 0 to at most R.
        bias: [E, N], dtype of x, or None.

    Returns:
        [R, N] in the dtype of x; rows past offsets[E] are 0. Differentiable in x, w and bias, any number of
        times; a `main_grad` of w is served as in `moe_mlp`.
    """
    if torch._C._is_any_autocast_enabled():
        x_RK, w_ENK, bias = _autocast(x_RK, w_ENK, bias)
    _check.floating("x", x_RK, "[R, K]")
    _check.floating("w", w_ENK, "[E, N, K]")
    experts, columns, _ = w_ENK.shape
    _check.shape("w", w_ENK, "[E, N, K]", (experts, columns, x_RK.shape[1]))
    _check.like("w", w_ENK, "x", x_RK)
    _check.tensor("offsets", offsets_E1, "[E + 1]")
    _check.shape("offsets", offsets_E1, "[E + 1]", (experts + 1,))
    _check.like("offsets", offsets_E1, "x", x_RK, dtype=False)
    if offsets_E1.dtype not in (torch.int32, torch.int64):
        _check.wanted("offsets", f"dtype {offsets_E1.dtype}", "int32 or int64", TypeError)
    if bias is not None:
        _check.floating("bias", bias, "[E, N]")
        _check.shape("bias", bias, "[E, N]", (experts, columns))
        _check.like("bias", bias, "x", x_RK)
        bias = bias.contiguous()
    if offsets_E1.dtype == torch.int64:  # what does not fit stays out of range
        offsets_E1 = offsets_E1.clamp(-1, 2**31 - 1).int()
    transposed = _is_transposed(w_ENK)
    w = w_ENK.transpose(1, 2) if transposed else w_ENK.contiguous()
    return ops.grouped_mm(x_RK.contiguous(), w, bias, offsets_E1.contiguous(), transposed)


def permute(x_TH: Tensor, plan: RoutingPlan) -> Tensor:
    """Rows in the order of the plan: out[r] = x[plan.gather[r]], zeros in unused rows.

    Args:
        x_TH: [T, H].
        plan: a plan of T tokens.

    Returns:
        [R, H] ([E * C, H] for a padded plan) in the dtype of x. Differentiable in x, any number of times.
    """
    _check.floating("x", x_TH, "[T, H]")
    _check_plan("x", x_TH, plan)
    return ops.permute(x_TH.contiguous(), plan.gather, plan.inverse)


def unpermute(y_RH: Tensor, plan: RoutingPlan, weights_TK: Tensor | None = None) -> Tensor:
    """Back to tokens: out[t] = sum over k of weights[t, k] * y[plan.inverse[t, k]], without the dropped rows.

    Args:
        y_RH: [R, H] ([E * C, H] for a padded plan), rows in the order of the plan.
        plan: the plan that sorted them.
        weights_TK: [T, K] in any float dtype; used in float32 (float64 beside a float64 y). None sums
            unweighted.

    Returns:
        [T, H] in the dtype of y. Differentiable in y and weights; a second derivative needs weights None,
        else it raises RuntimeError.
    """
    _check.floating("y", y_RH, "[R, H]")
    _check_plan_device("y", y_RH, plan)
    _check.shape("y", y_RH, "[R, H]", (plan.gather.shape[0], y_RH.shape[1]))
    weights = None
    if weights_TK is not None:
        _check_weights(weights_TK, "y", y_RH, plan)
        weights = _wide(weights_TK, y_RH)
    return ops.unpermute(y_RH.contiguous(), weights, plan.gather, plan.inverse)


def _autocast(*tensors: Any) -> tuple[Any, ...]:
    """The tensors as torch.autocast, where it is on, casts the arguments of a matrix product."""
    first = tensors[0]
    if not isinstance(first, Tensor) or first.is_meta:
        return tensors
    device = "cuda" if first.is_cuda else "cpu"
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() and t.dtype != torch.float64 else t
        for t in tensors
    )


def _check_mlp(
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    b1: Tensor | None,
    b2: Tensor | None,
    activation: str,
    transposed: bool,
    interleaved: bool,
) -> None:
    _check.floating("x", x, "[T, H]")
    _check.one_of("activation", activation, GATED + UNGATED)
    gated = activation in GATED
    if interleaved and not gated:
        _check.wanted("interleaved", True, f"False, because {activation!r} has no gate to interleave")
    rows = "2I" if gated else "I"
    rank1, rank2 = (f"[E, H, {rows}]", "[E, I, H]") if transposed else (f"[E, {rows}, H]", "[E, H, I]")
    _check.floating("w1", w1, rank1)
    _check.floating("w2", w2, rank2)
    experts, hidden, width = w1.shape[0], x.shape[1], w1.shape[2 if transposed else 1]
    if gated and width % 2:
        _check.wanted("w1", f"shape {tuple(w1.shape)}", f"{rank1}, with an even {rows} for {activation!r}")
    middle = width // 2 if gated else width
    size1, size2 = (experts, width, hidden), (experts, hidden, middle)
    if transposed:
        size1, size2 = (experts, hidden, width), (experts, middle, hidden)
    hint = "" if (w1.shape, w2.shape) == (size1, size2) else _fitting_options(w1, w2, hidden)
    _check.shape("w1", w1, rank1, size1, hint)
    _check.shape("w2", w2, rank2, size2, hint)
    for name, bias, rank, size in (("b1", b1, f"[E, {rows}]", width), ("b2", b2, "[E, H]", hidden)):
        if bias is not None:
            _check.floating(name, bias, rank)
            _check.shape(name, bias, rank, (experts, size))
            _check.like(name, bias, "x", x)
    _check.like("w1", w1, "x", x)
    _check.like("w2", w2, "x", x)


def _stand_ins(x: Tensor, w1: Any, w2: Any, transposed: bool) -> tuple[Tensor, Tensor]:
    """Tensors of no memory with the shapes of quantized weights, to be checked as any."""
    _check.floating("x", x, "[T, H]")
    if transposed:
        _check.wanted("transposed", True, "False, as quantized weights lie along their contraction")
    for name, w in (("w1", w1), ("w2", w2)):
        if not isinstance(w, QuantizedWeight):
            _check.wanted(name, type(w).__name__, "a QuantizedWeight, as the other weight is one", TypeError)
        _check.like(name, w.codes, "x", x, dtype=False)
    return x.new_empty(()).expand(w1.shape), x.new_empty(()).expand(w2.shape)


def _codes(w: Any) -> tuple[Tensor, Tensor]:
    return w.codes.view(torch.uint8).contiguous(), w.scales.contiguous()


def _fitting_options(w1: Tensor, w2: Tensor, hidden: int) -> str:
    """How to call `moe_mlp` for weights of these shapes, where they make sense in one way."""
    fitting = []
    for transposed in (False, True):
        (width, h1), (h2, middle) = (
            (w.shape[2], w.shape[1]) if transposed else tuple(w.shape[1:]) for w in (w1, w2)
        )
        if w1.shape[0] == w2.shape[0] and h1 == h2 == hidden and width in (middle, 2 * middle):
            kind = "a gated activation" if width == 2 * middle else "an activation without a gate"
            fitting.append(f"transposed={transposed} and {kind}")
    return f"; these weights fit {fitting[0]}" if len(fitting) == 1 else ""


def _check_plan(name: str, x: Tensor, plan: RoutingPlan) -> None:
    _check_plan_device(name, x, plan)
    if x.shape[0] != plan.tokens:
        _check.wanted(name, f"shape {tuple(x.shape)}", f"the {plan.tokens} tokens of the plan (or of ids)")


def _check_plan_device(name: str, x: Tensor, plan: RoutingPlan) -> None:
    if not all(isinstance(row, Tensor) for row in _rows(plan)):
        _check.wanted(
            "plan", "a plan (or ids) of NumPy arrays", "one of torch tensors: plan.to('cpu')", TypeError
        )
    if plan.inverse.device != x.device:
        _check.wanted(
            "plan", f"a plan (or ids) on {plan.inverse.device}", f"one on {x.device}, where {name} is"
        )


def _check_weights(weights: Tensor, name: str, beside: Tensor, plan: RoutingPlan) -> None:
    _check.floating("weights", weights, "[T, K]")
    _check.shape("weights", weights, "[T, K]", (plan.tokens, plan.top_k))
    _check.like("weights", weights, name, beside, dtype=False)


def _wide(weights: Tensor, beside: Tensor) -> Tensor:
    """Routing weights in the dtype of the sums."""
    dtype = wide(beside.dtype)
    if weights.dtype is not dtype:
        _check.floats("weights", weights)
        weights = weights.to(dtype)
    return weights.contiguous()


def _rows(plan: RoutingPlan) -> tuple[Any, Any, Any]:
    if not isinstance(plan, RoutingPlan):
        _check.wanted("plan", type(plan).__name__, "a RoutingPlan", TypeError)
    return plan.offsets, plan.gather, plan.inverse


def _dense(
    x: Tensor,
    weights: Tensor,
    w1: Any,
    w2: Any,
    b1: Tensor | None,
    b2: Tensor | None,
    transposed: bool,
) -> tuple[tuple[Any, ...], bool]:
    """The arguments as the kernels read them, and whether the weights are transposed now."""
    if not (w1.is_contiguous() and w2.is_contiguous()):
        if _is_transposed(w1) and _is_transposed(w2):
            transposed, w1, w2 = not transposed, w1.transpose(1, 2), w2.transpose(1, 2)
        w1, w2 = w1.contiguous(), w2.contiguous()
    b1 = None if b1 is None else b1.contiguous()
    b2 = None if b2 is None else b2.contiguous()
    return (x.contiguous(), _wide(weights, x), w1, w2, b1, b2), transposed


def _is_transposed(w: Tensor) -> bool:
    """Whether w [E, N, K] is a view of a contiguous [E, K, N], which the kernels read in place."""
    return not w.is_contiguous() and w.transpose(1, 2).is_contiguous()

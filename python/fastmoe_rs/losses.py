"""Auxiliary losses of a router, functions of what it gave: nothing is kept between calls.

    ids, weights, _ = functional.route(logits, top_k)
    loss = task_loss + 0.01 * losses.load_balancing_loss(logits, top_k) + 1e-3 * losses.router_z_loss(logits)

All balancing losses are a constant times the sum over experts of f_e * P_e: f_e routes to expert e per token,
which has no gradient, P_e its mean probability. They differ in the constant, in the probabilities, and in the
tokens that the two are means over.

- `mask`: padding tokens count nowhere, and whatever their logits hold, they get a gradient of zeros.
- `tokens`: a mean over tokens divides by it instead of by the tokens at hand. With the number of tokens of a
  whole step, the losses of its micro-batches add up to that of the step. Under data parallelism, which takes
  the mean of the gradients over ranks: the tokens of all ranks divided by the number of ranks.
- `group`: a torch.distributed process group whose tokens are counted together; True for the default one.

Losses are scalars in float32, float64 for float64 logits; 0 when no token counts. They run on any device,
wait for none, and compile. Wrong arguments raise ValueError or TypeError.

Legend: T tokens, E experts, K experts per token, L layers, G groups of neighbouring tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _check
from ._distributed import all_reduced, ranks
from .kernels import wide
from .load import Load, bins, counted
from .reference import scored

__all__ = [
    "Load",
    "global_batch_loss",
    "gshard_loss",
    "importance_loss",
    "load_balancing_loss",
    "load_loss",
    "router_z_loss",
    "sequence_balance_loss",
    "switch_loss",
]

Layers: TypeAlias = Tensor | Sequence[Tensor]


def load_balancing_loss(
    logits_TE: Layers,
    top_k: int,
    *,
    ids_TK: Layers | None = None,
    mask: Tensor | None = None,
    tokens: int | Tensor | None = None,
    load: Load | None = None,
) -> Tensor:
    """E * sum over experts of f_e * P_e, least when tokens spread evenly; then it is K.

    P_e is the mean softmax probability. Switch Transformers' loss in the form that transformers'
    `load_balancing_loss_func` gives it for K > 1 and several layers, which are pooled.

    Args:
        logits_TE: [T, E] router logits, or a sequence of L of them.
        top_k: K.
        ids_TK: int64 [T, K], the experts picked, or a sequence of L of them; when None, the K largest logits.
            Ids outside [0, E) are no routes.
        mask: [T] or any shape of T elements, 0 for padding tokens; the same for all layers.
        tokens: see above; tokens of all layers together.
        load: the load that f is taken from, when it is another one than that of these tokens.
    """
    logits, counts_T = _pooled(logits_TE, mask)
    ids = _picks(logits_TE, logits, top_k, ids_TK)
    return logits.shape[1] * _balance(logits, ids, counts_T, tokens, load=load)


def global_batch_loss(
    logits_TE: Layers,
    top_k: int,
    *,
    ids_TK: Layers | None = None,
    mask: Tensor | None = None,
    tokens: int | Tensor | None = None,
    group: Any = True,
    before: Load | None = None,
) -> tuple[Tensor, Load]:
    """`load_balancing_loss` by the load of the global batch (Qwen, arXiv:2501.11873, section 3).

    Routes are counted over all ranks of the group and, as in the paper, over the micro-batches of the step so
    far; P is that of the micro-batch, so the mean of the losses (of the gradients) over ranks is E * sum f P
    with both of the global batch.

        load = None
        for batch in micro_batches:
            loss, load = global_batch_loss(router_logits(batch), top_k, before=load)

    Args:
        logits_TE, top_k, ids_TK, mask, tokens, group: see `load_balancing_loss` and above; None is no group.
        before: the load that the call for the micro-batch before gave; None for the first.

    Returns:
        The loss, and the load so far.
    """
    logits, counts_T = _pooled(logits_TE, mask)
    ids = _picks(logits_TE, logits, top_k, ids_TK)
    load = Load.of(ids, logits.shape[1], mask=counts_T, group=group)
    load = load if before is None else before + load
    return logits.shape[1] * _balance(logits, ids, counts_T, tokens, load=load), load


def switch_loss(
    logits_TE: Layers,
    *,
    mask: Tensor | None = None,
    tokens: int | Tensor | None = None,
    group_size: int | None = None,
) -> Tensor:
    """E * sum of f_e * P_e, f_e the share of tokens that like e best (arXiv:2101.03961, eq. 4 to 6).

    It is 1 when tokens spread evenly.

    Args:
        logits_TE: [T, E] router logits, or a sequence of L of them.
        mask, tokens: see `load_balancing_loss`.
        group_size: so many neighbours are balanced among themselves, a divisor of T; as Switch Transformers'
            code does with the tokens of a core. The loss is the mean over tokens of that of their groups.
    """
    logits, counts_T = _pooled(logits_TE, mask)
    return logits.shape[1] * _balance(logits, _largest(logits, 1), counts_T, tokens, group_size=group_size)


def gshard_loss(
    logits_TE: Layers,
    *,
    mask: Tensor | None = None,
    tokens: int | Tensor | None = None,
    group_size: int | None = None,
) -> Tensor:
    """1 / E * sum of c_e / S * m_e (GShard, arXiv:2006.16668, algorithm 1): `switch_loss` over E^2.

    c_e / S is the share of the tokens of a group whose first choice is e, second choices do not count; m_e is
    the mean probability. The code of GShard (and fairseq, DeepSpeed) multiplies by E^2: use `switch_loss` for
    its numbers.

    Args:
        logits_TE, mask, tokens, group_size: see `switch_loss`.
    """
    logits, counts_T = _pooled(logits_TE, mask)
    return _balance(logits, _largest(logits, 1), counts_T, tokens, group_size=group_size) / logits.shape[1]


def sequence_balance_loss(
    logits_TE: Layers,
    top_k: int,
    sequence_length: int,
    *,
    score: str = "sigmoid",
    ids_TK: Layers | None = None,
    mask: Tensor | None = None,
    tokens: int | Tensor | None = None,
) -> Tensor:
    """E / K * sum of f_e * P_e of every sequence on its own, 1 when even (DeepSeek).

    P_e is the mean over the sequence of the scores divided by their sum over experts: the sequence-wise loss
    of DeepSeek-V3 (arXiv:2412.19437, eq. 17 to 20), with score="softmax" the expert-level balance loss of
    DeepSeek-V2 (arXiv:2405.04434, eq. 23 to 25). The loss is the mean over tokens of that of their sequences,
    with sequences of equal length the mean over sequences.

    Args:
        logits_TE: [T, E] router logits of whole sequences, one after the other, or a sequence of L of them.
        top_k: K.
        sequence_length: tokens of a sequence, padding included; a divisor of T.
        score: "sigmoid", "softmax" or "sqrt_softplus", see `functional.route`.
        ids_TK: see `load_balancing_loss`; when None, the K largest logits, without any selection bias, as in
            eq. 18.
        mask, tokens: see `load_balancing_loss`.
    """
    _check.one_of("score", score, ("sigmoid", "softmax", "sqrt_softplus"))
    logits, counts_T = _pooled(logits_TE, mask)
    ids = _picks(logits_TE, logits, top_k, ids_TK)
    _check.groups("sequence_length", sequence_length, len(logits))
    loss = _balance(logits, ids, counts_T, tokens, score=score, group_size=sequence_length)
    return logits.shape[1] / top_k * loss


def importance_loss(
    ids_TK: Tensor,
    weights_TK: Tensor,
    num_experts: int,
    *,
    mask: Tensor | None = None,
    group: Any = None,
) -> Tensor:
    """Squared coefficient of variation of the importance of experts, the sum of their routing weights.

    From Shazeer et al. (arXiv:1701.06538, eq. 6 and 7), 0 when even. It is not a mean over tokens: give
    micro-batches equal shares. With a group, the mean of the gradients over its ranks is that of the global
    batch.

    Args:
        ids_TK: int64 [T, K]; an id outside [0, E) is no route.
        weights_TK: [T, K], which have the gradient.
        num_experts: E.
        mask: any shape of T elements, 0 for padding tokens.
        group: see above.
    """
    bins_TK = bins(ids_TK, num_experts)
    _check.dimensions("weights", weights_TK, "[T, K]")
    _check.shape("weights", weights_TK, "[T, K]", tuple(ids_TK.shape))
    _check.floats("weights", weights_TK)
    gates_TE = weights_TK.new_zeros(len(ids_TK), num_experts + 1).scatter_add(1, bins_TK, weights_TK)
    return _variation(gates_TE[:, :num_experts], mask, group)


def load_loss(load_TE: Tensor, *, mask: Tensor | None = None, group: Any = None) -> Tensor:
    """Squared coefficient of variation of the smooth load of experts (arXiv:1701.06538, eq. 10 and 11).

    The load of an expert is the sum over tokens of the probability that it is picked if its noise were drawn
    again, which unlike a count has a gradient.

    Args:
        load_TE: [T, E], those probabilities, `routing.noisy_top_k_route(...).load`.
        mask, group: see `importance_loss`.
    """
    _check.dimensions("load", load_TE, "[T, E]")
    _check.floats("load", load_TE)
    return _variation(load_TE, mask, group)


def router_z_loss(
    logits_TE: Layers, *, mask: Tensor | None = None, tokens: int | Tensor | None = None
) -> Tensor:
    """Mean over tokens of logsumexp(logits)^2, which keeps logits small (ST-MoE, arXiv:2202.08906, eq. 5).

    Args:
        logits_TE: [T, E] router logits, or a sequence of L of them, whose tokens are pooled.
        mask: [T] or any shape of T elements, 0 for padding tokens; the same for all layers.
        tokens: see above; tokens of all layers together.
    """
    logits, counts_T = _pooled(logits_TE, mask)
    return (logits.logsumexp(-1).square() * counts_T).sum() / _denominator(counts_T, tokens)


def _balance(
    logits_TE: Tensor,
    ids_TK: Tensor,
    counts_T: Tensor,
    tokens: int | Tensor | None,
    *,
    load: Load | None = None,
    score: str = "softmax",
    group_size: int | None = None,
) -> Tensor:
    """Sum over experts of f * P, f that of the group where there are groups."""
    groups, size = _check.groups("group_size", group_size, len(logits_TE))
    if load is None:
        load = Load.of(ids_TK, logits_TE.shape[1], mask=counts_T, group_size=group_size)
    if score == "sigmoid":  # sigmoid / sum of sigmoids, without underflow
        logits_TE = F.logsigmoid(logits_TE)
    elif score != "softmax":
        logits_TE = scored(logits_TE, score).log()
    probabilities = logits_TE.softmax(-1) * counts_T[:, None]
    sums_GE = probabilities.view(groups, size, logits_TE.shape[1]).sum(1)
    return (load.frequency(sums_GE.dtype) * sums_GE).sum() / _denominator(counts_T, tokens)


def _variation(values_TE: Tensor, mask: Tensor | None, group: Any) -> Tensor:
    """Squared coefficient of variation of the sums over tokens."""
    values = values_TE.to(wide(values_TE.dtype))
    if mask is not None:
        values = values.masked_fill(counted(values, mask)[:, None] == 0, 0)
    total_E = values.sum(0)
    if group is not None:
        # Scale does not matter: a mean over ranks, so that the mean of its gradients is the gradient.
        mean = all_reduced(total_E.detach(), group) / ranks(group)
        total_E = total_E + (mean - total_E).detach()
    return total_E.var(correction=0) / total_E.mean().square().clamp(min=torch.finfo(total_E.dtype).tiny)


def _pooled(logits: Layers, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """All layers as one: the logits in the dtype of the loss, 0 in padding; int64 [T], 1 for what counts."""
    if not isinstance(logits, (Tensor, Sequence)):
        _check.wanted("logits", type(logits).__name__, "a torch tensor [T, E], or several", TypeError)
    layers = [logits] if isinstance(logits, Tensor) else list(logits)
    if not layers:
        _check.wanted("logits", "no layers", "at least 1")
    for layer in layers:
        _check.dimensions("logits", layer, "[T, E]")
        _check.floats("logits", layer)
        _check.shape("logits", layer, "[T, E]", (len(layer), layers[0].shape[1]))
    first = layers[0]
    counts_T = torch.cat([counted(layer, mask).to(first.device) for layer in layers])
    pooled = torch.cat([layer.to(first.device, wide(first.dtype)) for layer in layers])
    return pooled if mask is None else pooled.masked_fill(counts_T[:, None] == 0, 0), counts_T


def _picks(layers: Layers, logits: Tensor, top_k: int, ids: Layers | None) -> Tensor:
    """int64 [T, K] of all layers as one."""
    _check.top_k(top_k, logits.shape[1])
    if ids is None:
        return _largest(logits, top_k)
    picks = [ids] if isinstance(ids, Tensor) else list(ids)
    number = 1 if isinstance(layers, Tensor) else len(layers)
    if len(picks) != number:
        _check.wanted("ids", f"{len(picks)} layers", f"as many as logits, {number}")
    for pick in picks:
        _check.integers("ids", pick, "[T, K]")
    pooled = torch.cat([pick.to(logits.device) for pick in picks])
    _check.shape("ids", pooled, "[T, K]", (len(logits), top_k))
    return pooled


def _largest(logits: Tensor, top_k: int) -> Tensor:
    return logits.detach().topk(top_k).indices


def _denominator(counts_T: Tensor, tokens: int | Tensor | None) -> int | float | Tensor:
    if tokens is None:
        return counts_T.sum().clamp(min=1)
    if isinstance(tokens, Tensor):
        return tokens.to(counts_T.device).clamp(min=1)
    if tokens <= 0:
        _check.wanted("tokens", tokens, "more than 0")
    return tokens

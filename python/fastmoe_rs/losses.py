"""Auxiliary losses of a router, functions of its logits.

Legend: T tokens, E experts, K experts per token, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from . import _check
from .kernels import wide


def load_balancing_loss(
    logits_TE: Tensor | Sequence[Tensor],
    top_k: int,
    *,
    ids_TK: Tensor | Sequence[Tensor] | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """E * sum over experts of f_e * P_e, least when tokens spread evenly; then it is K.

    f_e is the number of routes to expert e per token, P_e its mean softmax probability; only P has a
    gradient. From Switch Transformers (arXiv:2101.03961, eq. 4 to 6), in the form that transformers'
    `load_balancing_loss_func` gives it for K > 1 and several layers, which are pooled.

    Args:
        logits_TE: [T, E] router logits, or a sequence of L of them.
        top_k: K.
        ids_TK: int64 [T, K], the experts picked, or a sequence of L of them; when None, the K largest logits.
        mask: [T] or any shape of T elements, 0 for padding tokens, which then count nowhere.

    Returns:
        A float32 scalar (float64 for float64 logits). 0 when no token counts.
    """
    layers = _layers(logits_TE)
    experts = layers[0].shape[1]
    if not 1 <= top_k <= experts:
        _check.wanted("top_k", top_k, f"1 to {experts}, the number of experts")
    if ids_TK is None:
        picks = [logits.detach().topk(top_k).indices for logits in layers]
    else:
        picks = [ids_TK] if isinstance(ids_TK, Tensor) else list(ids_TK)
    if len(picks) != len(layers):
        _check.wanted("ids", f"{len(picks)} layers", f"as many as logits, {len(layers)}")
    tokens = layers[0].new_zeros((), dtype=wide(layers[0].dtype))
    routes = probabilities = tokens.expand(experts)
    for logits, ids in zip(layers, picks, strict=True):
        weight_T = _token_weights(logits, mask)
        per_route = weight_T[:, None].expand(ids.shape).reshape(-1)
        routes = routes + weight_T.new_zeros(experts).scatter_add(0, ids.reshape(-1).long(), per_route)
        probabilities = probabilities + (logits.to(weight_T.dtype).softmax(-1) * weight_T[:, None]).sum(0)
        tokens = tokens + weight_T.sum()
    tokens = tokens.clamp(min=1)
    return experts * (routes / tokens * (probabilities / tokens)).sum()


def router_z_loss(logits_TE: Tensor | Sequence[Tensor], *, mask: Tensor | None = None) -> Tensor:
    """Mean over tokens of logsumexp(logits)^2, which keeps logits small (ST-MoE, arXiv:2202.08906, eq. 5).

    Args:
        logits_TE: [T, E] router logits, or a sequence of L of them, whose tokens are pooled.
        mask: [T] or any shape of T elements, 0 for padding tokens, which then count nowhere.

    Returns:
        A float32 scalar (float64 for float64 logits). 0 when no token counts.
    """
    layers = _layers(logits_TE)
    total = tokens = layers[0].new_zeros((), dtype=wide(layers[0].dtype))
    for logits in layers:
        weight_T = _token_weights(logits, mask)
        total = total + (logits.to(weight_T.dtype).logsumexp(-1).square() * weight_T).sum()
        tokens = tokens + weight_T.sum()
    return total / tokens.clamp(min=1)


def _layers(logits: Tensor | Sequence[Tensor]) -> list[Tensor]:
    layers = [logits] if isinstance(logits, Tensor) else list(logits)
    if not layers:
        _check.wanted("logits", "no layers", "at least 1")
    for layer in layers:
        _check.floating("logits", layer, "[T, E]")
    return layers


def _token_weights(logits: Tensor, mask: Tensor | None) -> Tensor:
    """[T] the weight of every token, in the dtype that the loss is summed in."""
    if mask is None:
        return logits.new_ones(logits.shape[0], dtype=wide(logits.dtype))
    if mask.numel() != logits.shape[0]:
        _check.wanted("mask", f"shape {tuple(mask.shape)}", f"{logits.shape[0]} elements, one per token")
    return mask.reshape(-1).to(device=logits.device, dtype=wide(logits.dtype))

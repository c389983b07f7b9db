"""Noisy top-k gating (Shazeer et al. 2017, arXiv:1701.06538, section 2.1 and appendix A)."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _check, functional
from ..kernels import wide
from .noise import Seed, normal


class NoisyRouting(NamedTuple):
    """`ids` int64 [T, K], `weights` [T, K], `scores` [T, E], and `load` [T, E] for `losses.load_loss`."""

    ids: Tensor
    weights: Tensor
    scores: Tensor
    load: Tensor


def noisy_top_k_route(
    logits_TE: Tensor,
    noise_logits_TE: Tensor,
    top_k: int,
    *,
    training: bool = True,
    noise_epsilon: float = 1e-2,
    seed: Seed = None,
) -> NoisyRouting:
    """Softmax over the K largest of logits + normal noise * (softplus(noise_logits) + noise_epsilon).

    Args:
        logits_TE: [T, E], x @ W_g in the paper.
        noise_logits_TE: [T, E], x @ W_noise in the paper; they learn how much noise an expert needs.
        top_k: K, 1 to E.
        training: False for no noise.
        noise_epsilon: the least standard deviation, as in tensor2tensor's `noisy_top_k_gating`.
        seed: see `noise`.

    Returns:
        ids, weights and scores as from `functional.route` of the noisy logits; and load, the probability that
        the expert would be picked if its own noise were drawn again (eq. 8 and 9). Without noise, or when
        K = E, load is 1 for the picked experts and 0 for others.
    """
    _check.floating("logits", logits_TE, "[T, E]")
    _check.floating("noise_logits", noise_logits_TE, "[T, E]")
    _check.shape("noise_logits", noise_logits_TE, "[T, E]", tuple(logits_TE.shape))
    clean = logits_TE.to(wide(logits_TE.dtype))
    std = F.softplus(noise_logits_TE.to(clean.dtype)) + noise_epsilon
    noisy = clean + normal(clean, seed=seed) * std if training else clean
    ids, weights, scores = functional.route(noisy, top_k, order="topk_score")
    picked = torch.zeros_like(noisy).scatter(1, ids, 1.0)
    if not training or top_k == clean.shape[1]:
        return NoisyRouting(ids, weights, scores, picked)
    # The others' K-th largest: K-th of all for an expert that is out, one further for one that is in.
    kth, next_ = noisy.topk(top_k + 1).values[:, -2:].split(1, dim=1)
    threshold = torch.where(picked > 0, next_, kth)
    return NoisyRouting(ids, weights, scores, torch.special.ndtr((clean - threshold) / std))

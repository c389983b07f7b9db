"""Product keys: N * N experts found by 2 N scores (Lample 2019, arXiv:1907.05242; PEER, arXiv:2407.04153)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import _check, functional
from ..functional import Routing


def product_key_route(row_logits_TN: Tensor, column_logits_TN: Tensor, top_k: int, **options: Any) -> Routing:
    """The K best of the N * N experts; the logit of expert i * N + j is row_logits[i] + column_logits[j].

    The K largest sums are among the pairs of the K largest of each side, so only K * K sums are made.

    Args:
        row_logits_TN: [T, N].
        column_logits_TN: [T, N].
        top_k: K, 1 to N * N.
        options: score, renormalize, scale and so on, as for `functional.route`.

    Returns:
        ids int64 [T, K] in [0, N * N); weights [T, K], scored among the K; scores [T, min(K, N)^2] of the
        pairs looked at, from the largest row and column on. Equal sums come in that order.
    """
    _check.floating("row_logits", row_logits_TN, "[T, N]")
    _check.shape("column_logits", column_logits_TN, "[T, N]", tuple(row_logits_TN.shape))
    keys = row_logits_TN.shape[1]
    rows, row_ids = row_logits_TN.topk(min(top_k, keys), dim=1)
    columns, column_ids = column_logits_TN.topk(min(top_k, keys), dim=1)
    pairs = (rows[:, :, None] + columns[:, None, :]).flatten(1)
    ids = (row_ids[:, :, None] * keys + column_ids[:, None, :]).flatten(1)
    picked, weights, scores = functional.route(pairs, top_k, order="topk_score", **options)
    return Routing(ids.gather(1, picked), weights, scores)

"""The routing of experts that the logits did not choose: from a table, a record, or a rule of one's own."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import functional
from ..functional import Routing


def route_given(logits_TE: Tensor, ids_TK: Tensor, **options: Any) -> Routing:
    """Weigh experts that are given.

    Args:
        logits_TE: [T, E].
        ids_TK: int64 or int32 [T, K]; one outside [0, E) is no expert and weighs 0.
        options: score, order, renormalize, scale and so on, as for `functional.route_weights`.

    Returns:
        ids int64 [T, K], those given; weights [T, K] and scores [T, E], differentiable in the logits.
    """
    weights = functional.route_weights(logits_TE, ids_TK, **options)
    of_all = {name: options[name] for name in ("score", "softcap") if name in options}
    return Routing(ids_TK.long(), weights, functional.route(logits_TE, 1, **of_all).scores)

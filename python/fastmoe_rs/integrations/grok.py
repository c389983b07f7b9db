"""The Mixture-of-Experts block of Grok-1 and Grok-2, which transformers does not have.

    y = sum over the K best experts of softmax(cap(W_r @ x))[e] * expert_e(x)           Grok-1
    y = (that sum + mlp(x)) / sqrt(2)                                                    Grok-2
    expert(x) = W_down @ (gelu_tanh(W_gate @ x) * (W_up @ x)), and mlp(x) likewise

The softmax is over all E experts and the K weights are not renormalised. cap(z) = c * tanh(z / c), where a
cap c is given. Grok-1 is as in `model.py` of xai-org/grok-1, which caps no router logits; Grok-2 as SGLang
serves it, which the model card of xai-org/grok-2 names. Norms and attention around the block are not here.

Legend: H hidden size, I intermediate size, E experts, K experts per token.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _check
from ..kernels import wide
from ..nn import MoE, Router, RoutingStats
from ..plan import RoutingPlan

__all__ = ["GrokMoE"]


class GrokMoE(MoE):
    """The block that both models repeat in every layer.

    Args:
        hidden_size: H.
        intermediate_size: I, of every expert.
        num_experts: E.
        top_k: K.
        router_softcap: the cap c of the router's logits; None for none.
        residual_intermediate_size: the intermediate size of Grok-2's dense MLP; None for none, as in Grok-1.

    Parameters: those of `nn.MoE`; the dense MLP is `shared`.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int = 8,
        top_k: int = 2,
        *,
        router_softcap: float | None = None,
        residual_intermediate_size: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(
            hidden_size,
            intermediate_size,
            num_experts,
            router=_CappedRouter(router_softcap, hidden_size, num_experts, top_k, **made),
            activation="geglu_tanh",
            shared_intermediate_size=residual_intermediate_size,
            **made,
        )

    @classmethod
    def from_config(cls, config: Mapping[str, Any], **options: Any) -> GrokMoE:
        """The block of a `config.json`.

        Args:
            config: hidden_size, num_local_experts (or num_experts) and num_experts_per_tok;
                moe_intermediate_size is I, or else intermediate_size; with residual_moe true, as in Grok-2,
                intermediate_size is that of the dense MLP; router_logit_softcapping is the cap.
            options: device and dtype.

        Raises:
            ValueError: a number is missing.
        """
        dense = _number(config, "intermediate_size") if config.get("residual_moe") else None
        return cls(
            _number(config, "hidden_size"),
            _number(config, "moe_intermediate_size", "intermediate_size"),
            _number(config, "num_local_experts", "num_experts"),
            _number(config, "num_experts_per_tok"),
            router_softcap=config.get("router_logit_softcapping"),
            residual_intermediate_size=dense,
            **options,
        )

    def forward(
        self, x: Tensor, *, plan: RoutingPlan | None = None, return_stats: bool = False, **inputs: Any
    ) -> Tensor | tuple[Tensor, RoutingStats]:
        """[..., H] to [..., H]; see `nn.MoE.forward`."""
        y, stats = super().forward(x, plan=plan, return_stats=True, **inputs)
        if self.shared is not None:
            y = y / math.sqrt(2)
        return (y, stats) if return_stats else y


class _CappedRouter(Router):
    """A router in float32, as both models have it, whose logits are capped; they are given capped."""

    def __init__(self, softcap: float | None, *sizes: int, **options: Any) -> None:
        super().__init__(*sizes, **options)
        if softcap is not None and not 0 < softcap < math.inf:
            _check.wanted("router_softcap", softcap, "None or a finite number of more than 0")
        self.softcap = softcap

    def project(self, x_TH: Tensor) -> Tensor:
        """The logits [T, E]."""
        dtype = wide(x_TH.dtype)
        logits = F.linear(x_TH.to(dtype), self.weight.to(dtype))
        return logits if self.softcap is None else self.softcap * (logits / self.softcap).tanh()


def _number(config: Mapping[str, Any], *names: str) -> int:
    for name in names:
        if config.get(name) is not None:
            return int(config[name])
    return _check.wanted("config", f"no {' nor '.join(names)}", "a configuration of Grok-1 or Grok-2")

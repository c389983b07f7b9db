"""How far the routers of two checkpoints of a model have moved apart, and how to keep them where they are.

Legend: T tokens, E experts, K experts per token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .layers import observe, routers


@dataclass(frozen=True)
class Drift:
    """What has changed in a layer.

    Attributes:
        agreement: share of the routes of the one model that the other one has too: 1 the same experts for
            every token. Behind the first layer, changes of the layers before count in.
        first_choice: share of the tokens whose most wanted expert, that of the largest logit, is the same.
        weight_change: norm of the difference of the router's parameters over their norm before.
    """

    agreement: float
    first_choice: float
    weight_change: float


def routing_drift(before: nn.Module, after: nn.Module, *args: Any, **kwargs: Any) -> dict[str, Drift]:
    """Run both models on the same inputs, without gradients, and compare their routers layer by layer.

    Args:
        before, after: two checkpoints of one model with `nn.MoE` layers or of transformers (>= 5), in
            evaluation mode: dropout and jitter count as drift.
        args, kwargs: of both forwards.

    Raises:
        TypeError: `before` or `after` is no module.
        ValueError: the models do not have the same MoE layers with as many experts, or have none.
    """
    old, new = routers(before), routers(after)
    if old.keys() != new.keys():
        raise ValueError(f"after: got MoE layers {sorted(new)}, wanted those of before, {sorted(old)}")
    chosen, choices = (_outputs(model, args, kwargs) for model in (before, after))
    drift = {}
    for name, router in old.items():
        (ids_TK, logits_TE), (other_ids_TK, other_logits_TE) = chosen[name], choices[name]
        if logits_TE.shape != other_logits_TE.shape:
            got, wanted = (tuple(logits.shape) for logits in (other_logits_TE, logits_TE))
            raise ValueError(f"after: got logits {got} in {name!r}, wanted {wanted} as before")
        same = (ids_TK[:, :, None] == other_ids_TK[:, None, :]).any(-1)
        change, size = (
            torch.cat([tensor.double().flatten() for tensor in tensors]).norm()
            for tensors in (_differences(router, new[name]), router.parameters())
        )
        drift[name] = Drift(
            agreement=same.double().mean().item(),
            first_choice=(logits_TE.argmax(-1) == other_logits_TE.argmax(-1)).double().mean().item(),
            weight_change=(change / size).item(),
        )
    return drift


def freeze_routers(model: nn.Module, frozen: bool = True) -> nn.Module:
    """Take the routers of a model out of training, or put them back; returns the model.

    Args:
        model: a module with `nn.MoE` layers, or a transformers (>= 5) model.
        frozen: False puts them back.

    Raises:
        TypeError: `model` is no module.
        ValueError: it has no MoE layer.
    """
    for router in routers(model).values():
        router.requires_grad_(not frozen)
    return model


def _differences(router: nn.Module, other: nn.Module) -> list[Tensor]:
    pairs = zip(router.parameters(), other.parameters(), strict=True)
    return [parameter.detach() - theirs.detach() for parameter, theirs in pairs]


@torch.no_grad()
def _outputs(model: nn.Module, args: Any, kwargs: Any) -> dict[str, tuple[Tensor, Tensor]]:
    outputs: dict[str, tuple[Tensor, Tensor]] = {}

    def keep(name: str, ids_TK: Tensor, logits_TE: Tensor) -> None:
        outputs[name] = ids_TK, logits_TE

    end = observe(routers(model), keep)
    try:
        model(*args, **kwargs)
    finally:
        end()
    return outputs

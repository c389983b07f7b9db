"""Recording the routing of a model's MoE layers, and routing a later forward the same way."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from .nn import MoE
from .plan import RoutingPlan


@contextmanager
def record_routing(model: nn.Module) -> Iterator[dict[str, RoutingPlan]]:
    """Within the block, keep the plan of the latest forward of every `nn.MoE` in `model`, by module name.

        with record_routing(model) as recorded:
            model(tokens)

    Args:
        model: a module; what is recorded belongs to it, there is no global state. Enter the block before
            compiling.
    """
    recorded: dict[str, RoutingPlan] = {}
    with ExitStack() as hooks:
        for name, moe in _layers(model):

            def keep(module: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
                recorded[name] = kwargs["plan"]

            hooks.callback(moe.experts.register_forward_pre_hook(keep, with_kwargs=True).remove)
        yield recorded


@contextmanager
def replay_routing(model: nn.Module, recorded: dict[str, RoutingPlan]) -> Iterator[None]:
    """Within the block, the MoE layers of `model` follow the recorded plans instead of choosing experts.

    Routing weights come from the live logits, with their gradients. With activation checkpointing the
    backward runs the forward again, so run it within the block too.

    Args:
        model: a module with the same MoE layers as the one recorded.
        recorded: what `record_routing` gave.

    Raises:
        ValueError: the names of the MoE layers are not those recorded; or, in a forward, a layer gets another
            number of tokens than its plan has.
    """
    layers = dict(_layers(model))
    if layers.keys() != recorded.keys():
        raise ValueError(f"recorded: got layers {sorted(recorded)}, wanted those of model, {sorted(layers)}")
    with ExitStack() as hooks:
        for name, moe in layers.items():

            def follow(module: nn.Module, args: Any, kwargs: Any, name: str = name) -> tuple[Any, Any]:
                return args, {**kwargs, "plan": recorded[name]}

            hooks.callback(moe.register_forward_pre_hook(follow, with_kwargs=True).remove)
        yield


def _layers(model: nn.Module) -> Iterator[tuple[str, MoE]]:
    return ((name, module) for name, module in model.named_modules() if isinstance(module, MoE))

"""Recording the routing of a model's MoE layers, keeping it, and routing a later forward the same way.

In reinforcement learning the engine that writes the answers and the one that learns from them differ in their
last bits, which is enough to choose other experts; replaying the first one's routing takes that away.

Legend: T tokens, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .layers import hf_routers, observe, routers, routing
from .nn import moe_layers
from .plan import RoutingPlan


@contextmanager
def record_routing(model: nn.Module) -> Iterator[dict[str, RoutingPlan]]:
    """Within the block, keep the plan of the latest forward of every MoE layer in `model`, by its name.

        with record_routing(model) as recorded:
            model(tokens)

    Args:
        model: a module with `nn.MoE` layers, or a transformers (>= 5) model; what is recorded belongs to it,
            there is no global state. Enter the block before compiling.

    Raises:
        TypeError: `model` is no module.
        ValueError: it has no MoE layer.
    """
    recorded: dict[str, RoutingPlan] = {}
    ours = moe_layers(model)
    theirs = {name: router for name, router in routers(model).items() if name not in ours}

    def keep_ids(name: str, ids_TK: Tensor, logits_TE: Tensor) -> None:
        recorded[name] = RoutingPlan.from_ids(ids_TK, logits_TE.shape[1])

    with ExitStack() as hooks:
        hooks.callback(observe(theirs, keep_ids))
        for name, moe in ours.items():

            def keep_plan(module: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
                recorded[name] = kwargs["plan"]

            hooks.callback(moe.experts.register_forward_pre_hook(keep_plan, with_kwargs=True).remove)
        yield recorded


@contextmanager
def replay_routing(model: nn.Module, recorded: Mapping[str, RoutingPlan]) -> Iterator[None]:
    """Within the block, the MoE layers of `model` follow the recorded plans instead of choosing experts.

    Routing weights come from the live logits, with their gradients. With activation checkpointing the
    backward runs the forward again, so run it within the block too. A transformers model is not compiled
    within the block.

    Args:
        model: a module with the same MoE layers as the one recorded.
        recorded: what `record_routing` or `load_routing` gave, or plans made of another engine's ids by
            `RoutingPlan.from_ids`.

    Raises:
        TypeError: `model` is no module.
        ValueError: the names of the MoE layers are not those recorded; or, in a forward, a layer gets another
            number of tokens than its plan has, or the router of a transformers model does not pick by top-k
            (on a GPU, which a forward does not wait for, raised at the end of the block).
    """
    ours, theirs = moe_layers(model), hf_routers(model)
    layers = ours.keys() | theirs.keys()
    if layers != recorded.keys():
        raise ValueError(f"recorded: got layers {sorted(recorded)}, wanted those of model, {sorted(layers)}")
    followed: list[_Picks] = []
    with ExitStack() as hooks:
        for name, moe in ours.items():

            def follow(module: nn.Module, args: Any, kwargs: Any, name: str = name) -> tuple[Any, Any]:
                return args, {**kwargs, "plan": recorded[name]}

            hooks.callback(moe.register_forward_pre_hook(follow, with_kwargs=True).remove)
        for name, router in theirs.items():
            picks = _Picks(name, recorded[name].ids)
            followed.append(picks)
            hooks.callback(router.register_forward_pre_hook(picks.enter).remove)
            hooks.callback(router.register_forward_hook(picks.leave, always_call=True).remove)
        yield
        for picks in followed:
            picks.check()


def save_routing(recorded: Mapping[str, RoutingPlan], path: str | Path) -> None:
    """Write recorded plans to a file that `load_routing` reads.

    Args:
        recorded: what `record_routing` gave.
        path: the file; one that is there is replaced.
    """
    torch.save({name: plan.state_dict() for name, plan in recorded.items()}, path)


def load_routing(path: str | Path, device: torch.device | str = "cpu") -> dict[str, RoutingPlan]:
    """Read what `save_routing` wrote. No code in the file is run.

    Args:
        path: the file.
        device: where the plans go.

    Raises:
        OSError: there is no such file.
        ValueError: it holds something else.
    """
    try:
        states = torch.load(path, map_location=device, weights_only=True)
    except OSError:
        raise
    except Exception as error:  # torch has no one error for a file of another kind
        raise ValueError(f"{path}: cannot be read, wanted plans written by save_routing") from error
    if not isinstance(states, dict) or not all(isinstance(state, dict) for state in states.values()):
        raise ValueError(f"{path}: got something else, wanted plans written by save_routing")
    return {name: RoutingPlan.from_state_dict(state) for name, state in states.items()}


class _Picks(TorchFunctionMode):
    """Makes the top-k of K of E experts within a router's forward pick the recorded ones."""

    def __init__(self, layer: str, ids_TK: Tensor) -> None:
        super().__init__()
        self.layer, self.ids_TK = layer, ids_TK
        self.differs: Tensor | bool = False

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function in (torch.topk, Tensor.topk):
            scores = args[0] if args else kwargs["input"]
            top_k = args[1] if len(args) > 1 else kwargs["k"]
            # Choices of groups have other shapes.
            if scores.ndim == 2 and top_k == self.ids_TK.shape[1] and len(scores) == len(self.ids_TK):
                return torch.return_types.topk((scores.gather(1, self.ids_TK), self.ids_TK))
        return function(*args, **kwargs)

    def enter(self, router: nn.Module, args: Any) -> None:
        self.__enter__()

    def leave(self, router: nn.Module, args: Any, output: Any) -> None:
        self.__exit__(None, None, None)
        if output is None:  # the forward raised
            return
        ids_TK, _ = routing(output)
        alike = ids_TK.shape == self.ids_TK.shape
        self.differs = (ids_TK != self.ids_TK).any() | self.differs if alike else True
        self.found = f"{type(router).__name__} gives {tuple(ids_TK.shape)}"
        if not alike or ids_TK.is_cpu:
            self.check()

    def check(self) -> None:
        """Raise if ids differed. Of those on a GPU it is asked at the end of the block only, as it waits."""
        differs, self.differs = self.differs, False
        if differs:
            raise ValueError(
                f"recorded: got ids {tuple(self.ids_TK.shape)} for {self.layer}, {self.found} of its own: "
                "other tokens, or it does not pick by top-k"
            )

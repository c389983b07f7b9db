"""Where a model routes: the routers of `nn.MoE` and of transformers' Mixture-of-Experts blocks.

Legend: T tokens, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

from .functional import Routing
from .integrations.swap import is_dispatched
from .nn import moe_layers
from .routers import RouterOutput


def hf_routers(model: nn.Module) -> dict[str, nn.Module]:
    """The routers of a transformers (>= 5) model by the name of the block that owns them.

    A router is the module beside the experts whose class is called a router or gate; it returns logits
    [T, E], weights [T, K] and ids [T, K], as it does in every family that transformers dispatches.

    Raises:
        ValueError: there is no such module beside the experts.
    """
    modules = dict(model.named_modules())
    routers = {}
    for experts in [name for name, module in modules.items() if is_dispatched(module)]:
        block, router = experts, None
        while block and router is None:  # PEFT puts wrappers between the experts and their block
            block = block.rpartition(".")[0]
            router = next((m for m in modules[block].children() if _is_router(m)), None)
        if router is None:
            raise ValueError(f"model: found no router beside the experts {experts}")
        routers[block] = router
    return routers


def routers(model: nn.Module) -> dict[str, nn.Module]:
    """All routers of a model, by the name of the layer that they belong to.

    Raises:
        TypeError: `model` is no module.
        ValueError: there are none.
    """
    found = {name: moe.router for name, moe in moe_layers(model).items()} | hf_routers(model)
    if not found:
        raise ValueError(
            f"model: got {type(model).__name__} without a Mixture-of-Experts layer, wanted nn.MoE layers, or "
            "experts that transformers dispatches"
        )
    return found


def observe(
    routers: Mapping[str, nn.Module], see: Callable[[str, Tensor, Tensor], None]
) -> Callable[[], None]:
    """After every forward of these routers, call `see(name, ids_TK, logits_TE)`; returns what ends that."""

    def hook(name: str, router: nn.Module, args: Any, output: Any) -> None:
        see(name, *routing(output))

    handles = [router.register_forward_hook(partial(hook, name)) for name, router in routers.items()]

    def end() -> None:
        for handle in handles:
            handle.remove()

    return end


def routing(output: Any) -> tuple[Tensor, Tensor]:
    """ids [T, K] and logits [T, E], as a router gave them."""
    if isinstance(output, (RouterOutput, Routing)):
        output = RouterOutput.of(output)
        return output.ids, output.logits
    return output[2], output[0]


def _is_router(module: nn.Module) -> bool:
    return type(module).__name__.endswith(("Router", "Gate"))

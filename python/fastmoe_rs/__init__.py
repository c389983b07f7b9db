"""Fast Mixture-of-Experts layers for PyTorch.

`functional` has the differentiable functions, `routing` routers beyond the plain one, `nn` the modules,
`quantization` weights in few bytes, `reference` the same in plain torch, `RoutingPlan` says which row goes to
which expert, and `accelerate(model)` switches a Hugging Face model over, `restore(model)` back.

`RoutingPlan` on NumPy arrays works without torch; everything else raises ImportError where torch is missing.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from typing import TYPE_CHECKING, Any

from ._native import __version__, empty_cache, memory_stats

if TYPE_CHECKING:
    from . import (
        checkpoints,
        distillation,
        expert_parallel,
        functional,
        losses,
        nn,
        quantization,
        reference,
        routing,
        sinks,
        telemetry,
        upcycling,
    )
    from .drift import freeze_routers, routing_drift
    from .integrations import accelerate, restore
    from .main_grad import main_grads
    from .plan import RoutingPlan
    from .replay import load_routing, record_routing, replay_routing, save_routing
    from .telemetry import ExpertCollapseWarning, watch

__all__ = [
    "ExpertCollapseWarning",
    "RoutingPlan",
    "__version__",
    "accelerate",
    "checkpoints",
    "distillation",
    "empty_cache",
    "expert_parallel",
    "freeze_routers",
    "functional",
    "load_routing",
    "losses",
    "main_grads",
    "memory_stats",
    "nn",
    "quantization",
    "record_routing",
    "reference",
    "replay_routing",
    "restore",
    "routing",
    "routing_drift",
    "save_routing",
    "sinks",
    "telemetry",
    "upcycling",
    "watch",
]

# Where the names come from that are not modules themselves.
_SOURCES = {
    "ExpertCollapseWarning": "telemetry",
    "RoutingPlan": "plan",
    "accelerate": "integrations",
    "freeze_routers": "drift",
    "load_routing": "replay",
    "main_grads": "main_grad",
    "record_routing": "replay",
    "replay_routing": "replay",
    "restore": "integrations",
    "routing_drift": "drift",
    "save_routing": "replay",
    "watch": "telemetry",
}


def __getattr__(name: str) -> Any:
    """Import what is asked for, so that `import fastmoe_rs` is quick and does not need torch."""
    if name not in __all__:
        # With both, Python suggests the name that was meant.
        raise AttributeError(
            f"module {__name__!r} has no attribute {name!r}", name=name, obj=sys.modules[__name__]
        )
    if name != "RoutingPlan" and importlib.util.find_spec("torch") is None:
        raise ImportError(f"fastmoe_rs.{name} needs torch, which is not installed: pip install torch")
    module = importlib.import_module(f".{_SOURCES.get(name, name)}", __name__)
    return getattr(module, name) if name in _SOURCES else module


def __dir__() -> list[str]:
    return __all__

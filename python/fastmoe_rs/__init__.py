"""Fast Mixture-of-Experts layers for PyTorch.

`functional` has the differentiable functions, `routing` routers beyond the plain one, `nn` the modules,
`reference` the same in plain torch, `RoutingPlan` says which row goes to which expert, and
`accelerate(model)` switches a Hugging Face model over.

`RoutingPlan` on NumPy arrays works without torch; everything else raises ImportError where torch is missing.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

from ._native import __version__, empty_cache, memory_stats

if TYPE_CHECKING:
    from . import functional, losses, nn, reference, routing
    from .integrations import accelerate
    from .plan import RoutingPlan
    from .replay import record_routing, replay_routing

__all__ = [
    "RoutingPlan",
    "__version__",
    "accelerate",
    "empty_cache",
    "functional",
    "losses",
    "memory_stats",
    "nn",
    "record_routing",
    "reference",
    "replay_routing",
    "routing",
]

_SOURCES = {
    "RoutingPlan": "plan",
    "accelerate": "integrations",
    "functional": "functional",
    "losses": "losses",
    "nn": "nn",
    "record_routing": "replay",
    "reference": "reference",
    "replay_routing": "replay",
    "routing": "routing",
}


def __getattr__(name: str) -> Any:
    """Import what is asked for, so that `import fastmoe_rs` is quick and does not need torch."""
    if name not in _SOURCES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name != "RoutingPlan" and importlib.util.find_spec("torch") is None:
        raise ImportError(f"fastmoe_rs.{name} needs torch, which is not installed: pip install torch")
    module = importlib.import_module(f".{_SOURCES[name]}", __name__)
    return module if name == _SOURCES[name] else getattr(module, name)


def __dir__() -> list[str]:
    return __all__

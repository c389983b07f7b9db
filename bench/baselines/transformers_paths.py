"""transformers' own experts module (Mixtral's), dispatched to each of its CPU implementations."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import Parameter

from .torch_paths import Call

try:
    from transformers import MixtralConfig
    from transformers.integrations.moe import ExpertsInterface
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    AVAILABLE = "grouped_mm" in ExpertsInterface()
except ImportError:
    AVAILABLE = False


def maker(implementation: str) -> Callable[[Parameter, Parameter], Call]:
    """Factory of the experts module with an implementation: "eager", "grouped_mm" or "batched_mm"."""

    def make(w1: Parameter, w2: Parameter) -> Call:
        experts, hidden, intermediate = w2.shape
        config = MixtralConfig(
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_local_experts=experts,
            experts_implementation=implementation,
        )
        with torch.device("meta"):
            module = MixtralExperts(config)
        module.gate_up_proj, module.down_proj = w1, w2
        return module

    return make

"""The trained model stepped on by fastmoe_rs and by transformers' own experts paths, turn by turn.

Every contender is a copy of the same model and optimizer and sees the same batches. Only the two grouped
matrix products of the experts, the activation between them and the weighted sum differ: router, attention and
optimizer are the same code. So is the routing plan, less than a thousandth of a step, which only fastmoe_rs
needs.
"""

from __future__ import annotations

import copy
import importlib.util
import statistics
import time
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..nn import Experts, MoE
from .trainer import Trainer

PATHS = ("grouped_mm", "batched_mm", "eager")
WARMUP_STEPS = 2
OURS = "fastmoe_rs"
# batched_mm copies the weights of an expert once for every routed row, and keeps the copies for the backward.
MAX_WEIGHT_COPIES = 256 << 20


@dataclass
class Comparison:
    """`milliseconds` a training step by path, and the `losses` of every step."""

    peer_version: str
    steps: int
    milliseconds: dict[str, float]
    losses: dict[str, list[float]]
    left_out: dict[str, str] = field(default_factory=dict)

    @property
    def best_peer(self) -> str:
        return min((name for name in self.milliseconds if name != OURS), key=self.milliseconds.__getitem__)

    @property
    def speed_ratio(self) -> float:
        return self.milliseconds[self.best_peer] / self.milliseconds[OURS]

    @property
    def loss_difference(self) -> float:
        """The largest one of any step, between fastmoe_rs and the fastest peer."""
        return max(abs(a - b) for a, b in zip(self.losses[OURS], self.losses[self.best_peer], strict=True))


def unavailable() -> str | None:
    """Why there is nothing to compare with, if so."""
    if importlib.util.find_spec("transformers") is None:
        return "transformers is not installed (pip install 'fastmoe_rs[demo]')"
    from transformers import __version__

    if int(__version__.split(".")[0]) < 5:
        return f"transformers {__version__} has no exchangeable experts paths, version 5 has"
    return None


def compare(trainer: Trainer, text: Tensor, steps: int) -> Comparison:
    """Time `steps` more training steps by every path from where `trainer` is; its weights do not change."""
    from transformers import __version__

    left_out = {}
    copies = weight_copies(trainer)
    if copies > MAX_WEIGHT_COPIES:
        left_out["batched_mm"] = f"it would copy {copies / 2**30:.0f} GiB of weights a step"
    contenders = {OURS: copy.deepcopy(trainer)}
    for path in PATHS:
        if path not in left_out:
            contenders[path] = copy.deepcopy(trainer)
            use_transformers(contenders[path].model, path)
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    losses: dict[str, list[float]] = {name: [] for name in contenders}
    for index in range(WARMUP_STEPS + steps):
        batch = trainer.next_batch(text)
        for name in rotated(list(contenders), index):
            start = time.perf_counter()
            result = contenders[name].train(batch)
            seconds[name].append(time.perf_counter() - start)
            losses[name].append(result.loss)
    milliseconds = {name: 1e3 * statistics.median(times[WARMUP_STEPS:]) for name, times in seconds.items()}
    return Comparison(__version__, steps, milliseconds, losses, left_out)


def rotated(names: list[str], by: int) -> list[str]:
    """The same names, another one first: no contender always runs in the wake of the same other one."""
    by %= len(names)
    return names[by:] + names[:by]


def weight_copies(trainer: Trainer) -> int:
    """Bytes of the expert weights that batched_mm gathers in one step."""
    config = trainer.config
    rows = config.tokens_per_step * config.top_k * config.layers
    itemsize = getattr(torch, config.dtype).itemsize
    return rows * 3 * config.intermediate_size * config.hidden_size * itemsize


def use_transformers(model: nn.Module, path: str) -> None:
    """Run the experts of `model` through transformers' experts path of that name, on the same parameters."""
    for module in model.modules():
        if isinstance(module, MoE):
            module.register_module("experts", TransformersExperts(module.experts, path))


class TransformersExperts(nn.Module):
    """Mixtral's experts, which transformers runs by any of its paths, on w1 [E, 2I, H] and w2 [E, H, I]."""

    def __init__(self, experts: Experts, path: str) -> None:
        super().__init__()
        from transformers import MixtralConfig
        from transformers.models.mixtral.modeling_mixtral import MixtralExperts

        self.w1, self.w2 = experts.w1, experts.w2
        num_experts, hidden_size, intermediate_size = self.w2.shape
        config = MixtralConfig(
            num_local_experts=num_experts, hidden_size=hidden_size, intermediate_size=intermediate_size
        )
        config._experts_implementation = path
        with torch.device("meta"):
            self._call = partial(functional_call, MixtralExperts(config))

    def forward(self, x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor, plan: object = None) -> Tensor:
        weights: dict[str, Tensor] = {"gate_up_proj": self.w1, "down_proj": self.w2}
        if torch.is_autocast_enabled(x_TH.device.type):
            # Not all of transformers' paths know autocast; without this one they would be timed in float32.
            dtype = torch.get_autocast_dtype(x_TH.device.type)
            x_TH = x_TH.to(dtype)
            weights = {name: weight.to(dtype) for name, weight in weights.items()}
        return self._call(weights, (x_TH, ids_TK, weights_TK))

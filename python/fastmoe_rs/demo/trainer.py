"""One training step, and the state that it carries from step to step."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import data
from .config import Config, DemoError
from .model import Model, Output

WARMUP_STEPS = 20
FINAL_LEARNING_RATE = 0.1  # of the peak
MAX_GRADIENT_NORM = 1.0
VALIDATION_BATCHES = 4


class StepResult(NamedTuple):
    """What a step saw: `loss` in nats a byte, `balance_loss`, and `load` [L, E], the shares of rows."""

    loss: float
    balance_loss: float
    load: list[list[float]]


class Trainer:
    """Model, AdamW, loss scaler and batch generator; deep copies train on independently."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.step = 0
        torch.manual_seed(config.seed)
        self.device = torch.device(config.device)
        self.model = Model(config).to(self.device)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=config.learning_rate, betas=(0.9, 0.95), weight_decay=0.01, fused=True
        )
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.dtype == "float16")
        self.batches = torch.Generator().manual_seed(config.seed)

    def next_batch(self, text: Tensor) -> Tensor:
        return data.windows(text, self.config.batch_size, self.config.context, self.batches)

    def train(self, batch: Tensor) -> StepResult:
        """One step on `batch`, int64 [B, S + 1]. Raises DemoError when the loss is no longer a number."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate * schedule(self.step, self.config.steps)
        output, loss = self.forward(batch)
        if not math.isfinite(loss.item()):
            raise DemoError(f"the loss became {loss.item()} at step {self.step + 1} in {self.config.dtype}")
        self.scaler.scale(loss + self.config.balance_weight * output.balance_loss).backward()
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.model.parameters(), MAX_GRADIENT_NORM)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.step += 1
        return StepResult(loss.item(), output.balance_loss.item(), output.load.tolist())

    def forward(self, batch: Tensor) -> tuple[Output, Tensor]:
        """What the model gives for `batch` [B, S + 1], and the mean loss of its bytes."""
        batch = batch.to(self.device)
        with self.autocast():
            output = self.model(batch[:, :-1])
            loss = F.cross_entropy(output.logits.float().flatten(0, 1), batch[:, 1:].flatten())
        return output, loss

    @torch.inference_mode()
    def validate(self, text: Tensor) -> float:
        """Mean loss over the same windows of `text` every time."""
        same = torch.Generator().manual_seed(0)
        shape = self.config.batch_size, self.config.context
        losses = [self.forward(data.windows(text, *shape, same))[1] for _ in range(VALIDATION_BATCHES)]
        return torch.stack(losses).mean().item()

    def autocast(self) -> torch.autocast:
        """Weights stay in float32; the matrix products run in the dtype asked for."""
        dtype = getattr(torch, self.config.dtype)
        return torch.autocast(self.device.type, dtype=dtype, enabled=dtype != torch.float32)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of a checkpoint, by name."""
        tensors = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        for index, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": value for name, value in state.items()}
        return {**tensors, "batches": self.batches.get_state()}

    def numbers(self) -> dict[str, Any]:
        """The rest of a checkpoint, ready for JSON."""
        return {"step": self.step, "scaler": self.scaler.state_dict()}

    def load(self, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
        """Take over what `tensors` and `numbers` gave, maybe in another process."""
        model: dict[str, Tensor] = {}
        moments: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            kind, _, name = key.partition(".")
            if kind == "model":
                model[name] = value
            elif kind == "optimizer":
                index, _, name = name.partition(".")
                moments.setdefault(int(index), {})[name] = value
        self.model.load_state_dict(model)
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": moments})
        self.batches.set_state(tensors["batches"])
        self.scaler.load_state_dict(numbers["scaler"])
        self.step = numbers["step"]


def schedule(step: int, steps: int) -> float:
    """Share of the peak learning rate: a short rise, then half a cosine down to the final one."""
    rise = min(1.0, (step + 1) / min(WARMUP_STEPS, 1 + steps // 10))
    fall = (1 + math.cos(math.pi * min(1.0, step / steps))) / 2
    return rise * (FINAL_LEARNING_RATE + (1 - FINAL_LEARNING_RATE) * fall)

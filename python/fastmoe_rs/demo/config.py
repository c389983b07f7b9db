"""What defines a run of the demo, and the errors that end it with one line."""

from __future__ import annotations

from dataclasses import dataclass

CHECKPOINT = "checkpoint.safetensors"  # in the folder of a run


class DemoError(Exception):
    """The demo cannot go on; the message is one line for its user."""


class BadArgument(DemoError):
    """Something that the user gave cannot be used."""


@dataclass(frozen=True)
class Config:
    """Everything that the trained weights depend on, besides the text.

    `hidden_size`, `intermediate_size` (of one expert), `layers` and `heads` size the model; `context` is the
    length of a training window in bytes and `batch_size` the number of windows a step.
    """

    steps: int = 400
    experts: int = 32
    top_k: int = 2
    dtype: str = "float32"
    device: str = "cpu"
    seed: int = 0
    hidden_size: int = 128
    intermediate_size: int = 256
    layers: int = 3
    heads: int = 4
    context: int = 128
    batch_size: int = 16
    learning_rate: float = 4e-3
    balance_weight: float = 0.05

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.context

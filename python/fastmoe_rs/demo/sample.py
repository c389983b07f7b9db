"""Text that the model writes."""

from __future__ import annotations

import torch

from .trainer import Trainer

TEMPERATURE = 0.7


@torch.inference_mode()
def continue_text(trainer: Trainer, prompt: bytes, length: int) -> bytes:
    """`length` more bytes after `prompt`, drawn at TEMPERATURE; the same ones every time."""
    generator = torch.Generator().manual_seed(trainer.config.seed)
    written = torch.tensor([list(prompt)], device=trainer.device)
    for _ in range(length):
        logits = trainer.model(written[:, -trainer.config.context :]).logits[:, -1]
        following = torch.multinomial((logits.cpu() / TEMPERATURE).softmax(-1), 1, generator=generator)
        written = torch.cat((written, following.to(trainer.device)), dim=1)
    return bytes(written[0, len(prompt) :].tolist())


def readable(text: bytes) -> str:
    """Text without what a terminal would act on, whatever the bytes are."""
    return "".join(
        letter if letter.isprintable() or letter == "\n" else "·" for letter in text.decode(errors="replace")
    )

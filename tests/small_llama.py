"""A Llama small enough to train in a test, and text to train it on."""

import argparse
import functools
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig


def llama(**options):
    sizes = {"vocab_size": 256, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    config = LlamaConfig(**sizes, **heads, **options)
    return AutoModelForCausalLM.from_config(config).eval()


@functools.cache
def text():
    """uint8, the source code of Python's argparse."""
    return torch.frombuffer(bytearray(Path(argparse.__file__).read_bytes()), dtype=torch.uint8)


def batches(steps, seed=0):
    """int64 [8, 32] random windows, of other places for another seed."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        starts = torch.randint(len(text()) - 32, (8, 1), generator=generator)
        yield text()[starts + torch.arange(32)].long()


def next_byte_loss(model, ids):
    return model(input_ids=ids, labels=ids, use_cache=False).loss


def train(model, steps, loss=next_byte_loss, seed=0, learning_rate=1e-2):
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    for ids in batches(steps, seed):
        loss(model, ids).backward()
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def evaluate(model, loss=next_byte_loss):
    """The mean loss of windows that `train` with another seed does not see."""
    return torch.stack([loss(model, ids) for ids in batches(8, seed=99)]).mean().item()

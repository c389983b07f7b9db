"""What the examples share: tiny random models and real text, so that each runs in seconds on a CPU.

Put your own model, `AutoModelForCausalLM.from_pretrained(...)`, and your own token ids in their place.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

SIZES = {
    "vocab_size": 256,  # bytes
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "norm_topk_prob": True}


def language_model(**options):
    """A Qwen3-MoE model with random weights, the same ones each time."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3_moe", **SIZES | EXPERTS | options))


def dense_model(intermediate_size=64):
    """Its dense counterpart, Qwen3."""
    torch.manual_seed(0)
    config = AutoConfig.for_model("qwen3", **SIZES, intermediate_size=intermediate_size)
    return AutoModelForCausalLM.from_config(config)


def text(windows, length=64):
    """int64 [windows, length]: the beginning of Python's standard library, byte by byte."""
    source = bytearray()
    for path in sorted(Path(argparse.__file__).parent.glob("*.py")):
        source += path.read_bytes()
        if len(source) >= windows * length:
            break
    return torch.frombuffer(source, dtype=torch.uint8)[: windows * length].view(windows, length).long()

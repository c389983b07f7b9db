"""A byte-level language model whose every block has a Mixture-of-Experts layer in the place of its MLP.

Legend: B windows, S bytes of a window, H hidden size, E experts, K experts per token, L layers, N heads,
D = H/N size of a head, T = B*S tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..losses import load_balancing_loss
from ..nn import MoE, RoutingStats
from .config import Config

BYTES = 256


class Output(NamedTuple):
    """`logits` [B, S, 256] of the next byte, mean `balance_loss` of the layers, `load` [L, E] as shares."""

    logits: Tensor
    balance_loss: Tensor
    load: Tensor


class Attention(nn.Module):
    """Causal self-attention with rotary positions and normalised queries and keys."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.out = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, x_BSH: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        qkv_3BNSD = self.qkv(x_BSH).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        query, key = (rotate(F.layer_norm(part, part.shape[-1:]), *rotation) for part in qkv_3BNSD[:2])
        # On the CPU, torch's attention runs many times faster in float32 than in the 16-bit dtypes.
        with torch.autocast(x_BSH.device.type, enabled=False):
            value = qkv_3BNSD[2].float()
            mixed_BNSD = F.scaled_dot_product_attention(query.float(), key.float(), value, is_causal=True)
        return self.out(mixed_BNSD.transpose(1, 2).flatten(-2))


class Block(nn.Module):
    """Attention, then experts, each behind a norm and beside a residual path."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.hidden_size, bias=False)
        self.attention = Attention(config)
        self.moe_norm = nn.LayerNorm(config.hidden_size, bias=False)
        self.moe = MoE(
            config.hidden_size,
            config.intermediate_size,
            config.experts,
            config.top_k,
            renormalize=config.top_k > 1,  # the weight of a single expert would always be 1
        )

    def forward(self, x_BSH: Tensor, rotation: tuple[Tensor, Tensor]) -> tuple[Tensor, RoutingStats]:
        x_BSH = x_BSH + self.attention(self.attention_norm(x_BSH), rotation)
        y_BSH, stats = self.moe(self.moe_norm(x_BSH), return_stats=True)
        return x_BSH + y_BSH, stats


class Model(nn.Module):
    """Bytes in, logits of the next byte out."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(BYTES, config.hidden_size)
        blocks = [Block(config) for _ in range(config.layers)]
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(config.hidden_size, bias=False)
        self.head = nn.Linear(config.hidden_size, BYTES, bias=False)
        # The embeddings are normalised before use: starting them small lets them turn quickly.
        nn.init.normal_(self.embedding.weight, std=0.02)
        # A branch that starts at zero leaves the residual path clean; equal logits start at the loss ln 256.
        for parameter in (*(block.attention.out.weight for block in blocks), self.head.weight):
            nn.init.zeros_(parameter)

    def forward(self, bytes_BS: Tensor) -> Output:
        x_BSH = F.layer_norm(self.embedding(bytes_BS), (self.config.hidden_size,))
        rotation = rotary(bytes_BS.shape[1], self.config.hidden_size // self.config.heads, bytes_BS.device)
        balance, load = [], []
        for block in self.blocks:
            x_BSH, stats = block(x_BSH, rotation)
            balance.append(
                load_balancing_loss(stats.router.logits, self.config.top_k, ids_TK=stats.router.ids)
            )
            load.append(stats.load)
        return Output(self.head(self.norm(x_BSH)), torch.stack(balance).mean(), torch.stack(load))


def rotary(length: int, head_size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines [length, head_size / 2] of RoFormer's rotary positions (arXiv 2104.09864)."""
    frequency = 10_000.0 ** (-torch.arange(0, head_size, 2, device=device) / head_size)
    angle = torch.outer(torch.arange(length, device=device), frequency)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat((first * cosine - second * sine, first * sine + second * cosine), -1)

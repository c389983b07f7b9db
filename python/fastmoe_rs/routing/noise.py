"""Random numbers for routers: torch's own, or ones that a seed alone decides.

With `seed=None` they come from torch's global generator: `torch.manual_seed` repeats them, and activation
checkpointing restores its state for the recomputation (unless told `preserve_rng_state=False`). With a seed
they are a hash of the seed and the position of the element: the same on every device and in every
recomputation, without a generator. Change the seed from step to step, not between a forward and its backward.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _check
from ..kernels import wide

Seed = int | Tensor | None

_WORD = 0xFFFFFFFF


def uniform(like: Tensor, *, seed: Seed = None, stream: int = 0) -> Tensor:
    """Numbers from [0, 1), from (0, 1) with a seed.

    Args:
        like: gives shape, device and dtype; float16 and bfloat16 get float32.
        seed: an int from 0 to 2^32 - 1, an integer tensor of one element, or None for torch's generator.
        stream: tells apart several draws under one seed.

    Raises:
        TypeError: `seed` is none of these.
    """
    dtype = wide(like.dtype)
    if seed is None:
        return torch.rand(like.shape, dtype=dtype, device=like.device)
    index = torch.arange(like.numel(), device=like.device).view(like.shape)
    if isinstance(seed, int):  # filled in on the device, where a copy would make a GPU wait
        seed = torch.full((), seed, device=like.device, dtype=torch.int64)
    _check.torch_tensor("seed", seed, "of one element, a whole number or None")
    seed = seed.to(like.device, torch.int64).reshape(())
    word = _hash(_hash(index) + _hash(_hash(seed) + stream))
    return ((word >> 9) + 0.5).to(dtype) * 2.0**-23


def normal(like: Tensor, *, seed: Seed = None, stream: int = 0) -> Tensor:
    """Numbers from the standard normal distribution; `like`, `seed` and `stream` as for `uniform`."""
    if seed is None:
        dtype = wide(like.dtype)
        return torch.randn(like.shape, dtype=dtype, device=like.device)
    return torch.erfinv(2 * uniform(like, seed=seed, stream=stream) - 1) * 2**0.5


def gumbel(like: Tensor, *, seed: Seed = None, stream: int = 0) -> Tensor:
    """Numbers from the standard Gumbel distribution; `like`, `seed` and `stream` as for `uniform`."""
    if seed is None:
        dtype = wide(like.dtype)
        return -torch.empty(like.shape, dtype=dtype, device=like.device).exponential_().log()
    return -(-uniform(like, seed=seed, stream=stream).log()).log()


def input_jitter(x: Tensor, epsilon: float, *, seed: Seed = None) -> Tensor:
    """x times noise from [1 - epsilon, 1 + epsilon] (Switch Transformers, arXiv:2101.03961, section 2.2).

    Args:
        x: of any shape and float dtype, which the result has too.
        epsilon: the largest share by which a number changes.
        seed: see `uniform`.
    """
    return x * (1 + epsilon * (2 * uniform(x, seed=seed) - 1)).to(x.dtype)


def logit_noise(logits: Tensor, std: float, *, seed: Seed = None) -> Tensor:
    """Logits plus normal noise; V-MoE has a standard deviation of 1 / E (arXiv:2106.05974, section 2.2).

    Args:
        logits: of any shape and float dtype, which the result has too.
        std: the standard deviation of the noise.
        seed: see `uniform`.
    """
    return logits + (std * normal(logits, seed=seed)).to(logits.dtype)


def _hash(word: Tensor) -> Tensor:
    """A bijection of 32-bit words that scatters them (triple32 by Wellons, nullprogram.com, 2018)."""
    word = word & _WORD
    # Multipliers below 2^31 in size: a product with a word fits 63 bits, and its low 32 bits are right.
    word = word ^ (word >> 17)
    word = word * (0xED5AD4BB - (1 << 32)) & _WORD
    word = word ^ (word >> 11)
    word = word * (0xAC4C1B51 - (1 << 32)) & _WORD
    word = word ^ (word >> 15)
    word = word * 0x31848BAB & _WORD
    return word ^ (word >> 14)

"""What arguments must look like. Every message names the argument, what was given and what was wanted."""

from __future__ import annotations

import math
from numbers import Real

import torch
from torch import Tensor, nn

from ._wanted import one_of as one_of
from ._wanted import wanted as wanted
from ._wanted import whole as whole

DEVICES = ("cpu", "cuda", "meta")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def more_than_0(name: str, value: float) -> None:
    if not isinstance(value, Real):
        wanted(name, repr(value), "a number", TypeError)
    if not 0 < value < math.inf:
        wanted(name, value, "a finite number of more than 0")


def positive(**sizes: int) -> None:
    for name, size in sizes.items():
        whole(name, size, least=1)


def module(name: str, value: object) -> None:
    if not isinstance(value, nn.Module):
        given = f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__
        wanted(name, given, "a torch.nn.Module", TypeError)


def top_k(value: int, experts: int) -> None:
    whole("top_k", value)
    if not 1 <= value <= experts:
        wanted("top_k", value, f"1 to {experts}, the number of experts")


def groups(name: str, size: int | None, tokens: int) -> tuple[int, int]:
    """How many groups of so many neighbours T tokens make, and the tokens of each; None is one group."""
    if size is None:
        return 1, tokens
    whole(name, size)
    if size < 1 or tokens % size:
        wanted(name, size, f"a divisor of {tokens}, the number of tokens")
    return tokens // size, size


def torch_tensor(name: str, value: Tensor, what: str) -> None:
    if not isinstance(value, Tensor):
        wanted(name, type(value).__name__, f"a torch tensor {what}", TypeError)


def dimensions(name: str, value: Tensor, rank: str) -> None:
    """A tensor on any device; `rank` spells its dimensions, as in "[T, H]"."""
    torch_tensor(name, value, rank)
    if value.ndim != rank.count(",") + 1:
        wanted(name, f"shape {tuple(value.shape)}", rank)


def floats(name: str, value: Tensor) -> None:
    if value.dtype not in DTYPES:
        wanted(name, f"dtype {value.dtype}", "float32, bfloat16, float16 or float64", TypeError)


def integers(name: str, value: Tensor, rank: str) -> None:
    """An int64 or int32 tensor on any device."""
    dimensions(name, value, rank)
    if value.dtype not in (torch.int64, torch.int32):
        wanted(name, f"dtype {value.dtype}", "int64 or int32", TypeError)


def tensor(name: str, value: Tensor, rank: str) -> None:
    """A tensor on a device that has kernels."""
    dimensions(name, value, rank)
    if value.device.type not in DEVICES:
        wanted(name, f"a tensor on {value.device}", "one on a device with kernels: cpu or cuda")
    if value.layout != torch.strided:
        wanted(name, f"layout {value.layout}", "a strided tensor", TypeError)


def floating(name: str, value: Tensor, rank: str) -> None:
    tensor(name, value, rank)
    floats(name, value)


def shape(name: str, value: Tensor, rank: str, sizes: tuple[int, ...], hint: str = "") -> None:
    if value.shape != sizes:
        wanted(name, f"shape {tuple(value.shape)}", f"{rank} = {tuple(sizes)}{hint}")


def like(name: str, value: Tensor, first_name: str, first: Tensor, *, dtype: bool = True) -> None:
    """The same device and, unless told otherwise, dtype as another argument."""
    if value.device != first.device:
        wanted(name, f"a tensor on {value.device}", f"one on {first.device}, where {first_name} is")
    if dtype and value.dtype != first.dtype:
        wanted(
            name,
            f"dtype {value.dtype}",
            f"{first.dtype}, that of {first_name} (or torch.autocast)",
            TypeError,
        )

"""Frozen expert weights in half or a quarter of the bytes of bfloat16: FP8 and MXFP4.

`functional.moe_mlp` takes a `QuantizedWeight` in place of w1 and of w2, and returns what it returns for the
numbers of `dequantize(x.dtype)`, to the bit. A CPU makes these numbers a block at a time, in its caches. On a
GPU the weights of a call are dequantized as a whole, before the call and again before its backward: that
saves memory, not time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

from . import _check
from .experts import Experts
from .quantized_weight import FORMATS, QuantizedWeight, of_bytes, quantize

__all__ = ["QuantizedExperts", "QuantizedWeight", "quantize", "quantize_experts"]

Model = TypeVar("Model", bound=nn.Module)


class QuantizedExperts(Experts):
    """`nn.Experts` whose weights are quantized and frozen; made by `quantize_experts` only.

    Buffers: w1_codes, w1_scales, w2_codes and w2_scales, the codes as uint8 in either format. No cast changes
    them. Biases stay the parameters that they were.

    Raises:
        TypeError: it is called, or told to draw its weights anew.
    """

    w1_codes: Tensor
    w1_scales: Tensor
    w2_codes: Tensor
    w2_scales: Tensor

    def __init__(self) -> None:
        raise TypeError("QuantizedExperts: made by fastmoe_rs.quantization.quantize_experts(model, format)")

    @property
    def w1(self) -> QuantizedWeight:  # type: ignore[override]
        """[E, 2I, H] ([E, I, H] when the activation has no gate)."""
        return of_bytes(self.w1_codes, self.w1_scales)

    @property
    def w2(self) -> QuantizedWeight:  # type: ignore[override]
        """[E, H, I]."""
        return of_bytes(self.w2_codes, self.w2_scales)

    def reset_parameters(self) -> None:
        """Raises TypeError: frozen weights are not drawn anew."""
        raise TypeError("QuantizedExperts: quantized weights are frozen")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedExperts:
        """Moves the scales but keeps their dtype."""
        before = {name: getattr(self, name) for name in ("w1_scales", "w2_scales")}
        super()._apply(fn, recurse)
        for name, scales in before.items():
            after = getattr(self, name)
            if after.dtype != scales.dtype:
                setattr(self, name, scales.to(after.device))
        return self

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, format={self.w1.format!r}"


def quantize_experts(model: Model, format: str) -> Model:
    """Quantize and freeze the weights of every `nn.Experts` in a model, in place, a weight at a time.

    Each module becomes a `QuantizedExperts`; the memory of a weight is free before the next is quantized.
    Give an optimizer the parameters that are left. To load a saved model, quantize a new one and load the
    state into it.

    Args:
        model: a module; the experts of `nn.MoE` are found in it.
        format: "mxfp4" or "fp8".

    Returns:
        `model` itself.

    Raises:
        TypeError: `model` is not a `torch.nn.Module`.
        ValueError: an unknown format; no experts that are not quantized yet; experts of a subclass, without
            memory (meta, FSDP), or of sizes that do not fit the format, before any is changed; NaN or
            infinite weights, where modules before may have been quantized.
    """
    _check.module("model", model)
    _check.one_of("format", format, FORMATS)
    found = [m for m in model.modules() if isinstance(m, Experts) and not isinstance(m, QuantizedExperts)]
    if not found:
        _check.wanted("model", f"a {type(model).__name__} without nn.Experts", "one with experts to quantize")
    for experts in found:
        _check_experts(experts, format)
    for experts in found:
        for name in ("w1", "w2"):
            weight = quantize(getattr(experts, name), format)
            delattr(experts, name)
            experts.register_buffer(f"{name}_codes", weight.codes.view(torch.uint8))
            experts.register_buffer(f"{name}_scales", weight.scales)
        experts.__class__ = QuantizedExperts
    return model


def _check_experts(experts: Experts, format: str) -> None:
    if type(experts) is not Experts:
        _check.wanted("model", f"experts of the class {type(experts).__name__}", "nn.Experts themselves")
    for weight in (experts.w1, experts.w2):
        if type(weight) is not nn.Parameter or weight.is_meta:
            _check.wanted(
                "model", "experts whose weights are not in memory here", "nn.Experts with parameters"
            )
        if format == "mxfp4" and weight.shape[2] % 32:
            shape = tuple(weight.shape)
            _check.wanted(
                "model", f"experts with a weight {shape}", "a last size of a multiple of 32 for 'mxfp4'"
            )

"""`accelerate(model)`: fastmoe_rs under a Hugging Face model, by one line; `restore(model)` takes it out."""

from __future__ import annotations

import importlib
import warnings
from typing import Any, TypeVar

import torch
from torch import nn

from .. import _check, _native
from .._check import DEVICES, DTYPES

NAME = "fastmoe_rs"  # of the experts implementation
_ADAPTERS = f"{__package__}.adapters"  # imports transformers, which need not be there

Model = TypeVar("Model", bound=nn.Module)


class _CannotServe(Exception):
    """Why a model is left alone."""


def accelerate(model: Model) -> Model:
    """Switch every mixture-of-experts layer of a transformers model to fastmoe_rs, in place.

    Args:
        model: a transformers (>= 5) model, or a module that holds one (PEFT, compiled, wrapped).

    Returns:
        `model` itself. A model that cannot be served is left as it was, with one `UserWarning` that names its
        class and the reason. `restore` undoes it.

    Raises:
        TypeError: `model` is not a `torch.nn.Module`.
    """
    _check.module("model", model)
    try:
        _switch(model)
    except _CannotServe as reason:
        warnings.warn(f"fastmoe_rs leaves {type(model).__name__} as it is: {reason}", stacklevel=2)
    return model


def restore(model: Model) -> Model:
    """Give a model the experts back that it had before `accelerate`, in place.

    Weights are left alone. A model that was built with fastmoe_rs, by name or by `register_adapters`, gets
    the "eager" experts of transformers; one without fastmoe_rs stays as it is.

    Args:
        model: as for `accelerate`.

    Returns:
        `model` itself.

    Raises:
        TypeError: `model` is not a `torch.nn.Module`.
    """
    _check.module("model", model)
    for module in model.modules():
        if is_dispatched(module):
            config: Any = module.config
            if config._experts_implementation == NAME:
                config._experts_implementation = getattr(module, "implementation_before_fastmoe", "eager")
        elif type(module).__module__ == _ADAPTERS:
            module.__class__ = type(module).__bases__[0]
    return model


def _switch(model: nn.Module) -> None:
    try:
        importlib.import_module(".transformers", __package__)  # registers the name, or says what is missing
        from .adapters import adapt, is_adaptable
    except ImportError as error:
        raise _CannotServe(str(error)) from error
    from transformers import PreTrainedModel

    pretrained = next((m for m in model.modules() if isinstance(m, PreTrainedModel)), None)
    if pretrained is None:
        raise _CannotServe("it holds no transformers model")
    adapted = [m for m in model.modules() if is_adaptable(m)]
    experts: list[Any] = [m for m in model.modules() if is_dispatched(m)]
    if not experts and not adapted:
        raise _CannotServe(_why_no_experts(pretrained))
    for module in experts + adapted:
        _check_parameters(module)
    for module in adapted:
        adapt(module)
    # Their forward looks the name up on every call. `model.set_experts_implementation` would set it too, but
    # refuses registered names before release 5.7 and skips models whose source code it cannot read.
    before = [module.config._experts_implementation for module in experts]  # layers share a configuration
    for module, implementation in zip(experts, before, strict=True):
        if implementation != NAME:
            module.implementation_before_fastmoe = implementation
        module.config._experts_implementation = NAME


def is_dispatched(module: nn.Module) -> bool:
    """Whether transformers' `use_experts_implementation` made it; both are its marks in every release 5."""
    return hasattr(module, "is_transposed") and hasattr(module, "_apply_gate")


def _check_parameters(experts: nn.Module) -> None:
    name = type(experts).__name__
    # `parameters` shows what lies beneath PEFT's parametrizations without computing them.
    for parameter in experts.parameters():
        device = parameter.device
        if device.type not in DEVICES:
            raise _CannotServe(f"{name} is on {device}, served are CPUs and NVIDIA GPUs")
        if device.type == "cuda":
            try:
                _native.load_cuda(device.index)
            except RuntimeError as error:
                raise _CannotServe(f"{name} is on {device}. {error}") from error
            if parameter.dtype == torch.float64:
                raise _CannotServe(f"{name} holds torch.float64, which is served on the CPU only")
        if parameter.dtype not in DTYPES:
            raise _CannotServe(
                f"{name} holds {parameter.dtype} (quantized?), served are float32, float64, bfloat16, float16"
            )


def _why_no_experts(model: nn.Module) -> str:
    if getattr(model, "is_quantized", False):
        return "its experts are quantized"
    if any("expert" in name.lower() for name, _ in model.named_modules()):
        return "transformers does not dispatch the experts of this family (no `use_experts_implementation`)"
    return "it has no mixture-of-experts layer"

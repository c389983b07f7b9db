"""Gradients of weights that are added to `parameter.main_grad`, where Megatron-LM collects them.

The attribute is a tensor like the parameter, in its dtype or in float32, that the kernel which computes the
gradient adds to: no tensor is made for the gradient, experts without tokens are not touched, and sums over
many micro-batches are not rounded to the dtype of the weights. `ops` asks here whether a weight has one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge, increment_version

from . import _check
from .kernels import wide


def main_grads(model: nn.Module) -> list[Tensor]:
    """Collect gradients in `parameter.main_grad` instead of `parameter.grad`, where Megatron-LM does not.

    Every parameter that requires grad gets a main_grad of zeros in float32 (float64 for float64). Backward
    adds the gradients of expert weights to it; any other gradient is moved there when it arrives, so that
    `parameter.grad` stays None.

    Args:
        model: the model as it will be trained, moved and cast before.

    Returns:
        The tensors, in the order of `model.parameters()`. Zero them for the next step.
    """
    _check.module("model", model)
    parameters: list[Any] = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in parameters:
        if not hasattr(parameter, "main_grad"):
            parameter.register_post_accumulate_grad_hook(_move)
        parameter.main_grad = parameter.new_zeros(parameter.shape, dtype=wide(parameter.dtype))
    return [parameter.main_grad for parameter in parameters]


def _move(parameter: Any) -> None:
    if parameter.grad is not None:  # as it is where kernels have added it
        parameter.main_grad.add_(parameter.grad.detach())
        parameter.grad = None


def owner(weight: Tensor) -> Tensor | None:
    """The leaf whose elements `weight` is, in the same order; None where anything lies between the two."""
    if weight.is_leaf:
        return weight
    leaf = weight._base
    if leaf is None or not leaf.is_leaf or weight._backward_hooks:
        return None
    places = [(t.shape, t.stride(), t.storage_offset()) for t in (weight, leaf)]
    return leaf if places[0] == places[1] else None


def target(name: str, leaf: Tensor | None) -> Tensor | None:
    """The checked main_grad of a leaf, if the backward that is running is to add to it.

    None where torch.autograd.grad asks for the gradient itself, or other gradients only, and where the owner
    of the buffer wants it overwritten (`overwrite_main_grad`, Megatron-FSDP).
    """
    sums: Tensor | None = getattr(leaf, "main_grad", None)
    if leaf is None or sums is None or getattr(leaf, "overwrite_main_grad", False) or not _accumulates(leaf):
        return None
    name += ".main_grad"
    if not isinstance(sums, Tensor):
        _check.wanted(name, type(sums).__name__, "a torch tensor", TypeError)
    _check.shape(name, sums, "that of the parameter", tuple(leaf.shape))
    _check.like(name, sums, "the parameter", leaf, dtype=False)
    if sums.dtype not in (leaf.dtype, wide(leaf.dtype)):
        choices = " or ".join(map(str, dict.fromkeys((wide(leaf.dtype), leaf.dtype))))
        _check.wanted(name, f"dtype {sums.dtype}", choices, TypeError)
    if sums.layout != torch.strided or not sums.is_contiguous():
        _check.wanted(name, "a tensor that is not contiguous", "one that is")
    if sums.requires_grad:
        _check.wanted(name, "a tensor that requires grad", "one that does not")
    return sums


def added(leaf: Any, sums: Tensor) -> Tensor | None:
    """What autograd is given for a leaf whose gradient was added to `sums`.

    That is None, or where Megatron-LM has marked the parameter a gradient of any content: its hooks want one,
    and throw it away when they see the mark set.
    """
    increment_version(sums)
    if not hasattr(leaf, "grad_added_to_main_grad"):
        return None
    leaf.grad_added_to_main_grad = True
    return torch.zeros_like(leaf) if getattr(leaf, "zero_out_wgrad", False) else torch.empty_like(leaf)


def _accumulates(leaf: Tensor) -> bool:
    """Whether the running backward ends in the `grad` of a leaf, as `backward()` does."""
    try:
        return torch._C._will_engine_execute_node(get_gradient_edge(leaf).node)
    except RuntimeError:  # torch.autograd.grad wants the gradient of this leaf
        return False

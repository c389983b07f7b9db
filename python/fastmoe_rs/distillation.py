"""A dense model from a Mixture-of-Experts one: what it starts from, and the loss that it learns by.

Sparse-to-dense distillation gathers the knowledge of the experts into one MLP, and then trains that on the
outputs of the teacher (Xue et al., "One Student Knows All Experts Know", arXiv:2201.10890).

Legend: H hidden size, I intermediate size, E experts, K experts per token, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from . import _check
from .kernels import wide
from .nn import MoE, Router, SharedExpert, SharedRouter, moe_layers
from .reference import GATED

__all__ = ["dense_student", "distillation_loss", "merge_experts", "merge_weights"]


def merge_experts(moe: MoE, load: Tensor | None = None, *, gather: int | None = None) -> SharedExpert:
    """One MLP that stands for all experts of a layer.

    Args:
        moe: the layer. It is left as it is. The routing weights of a token are taken to sum to its router's
            `scale`, as they do when they are renormalised.
        load: [E], how much each expert counts: its share of the routes, `RoutingStats.load` or what
            `moe.stats().load` counted. None counts all alike.
        gather: None averages the weights of the experts by their load: an MLP of the size I, right where
            experts have stayed near each other (after upcycling). A number n puts the n experts of the
            largest load side by side, each scaled by its share of their load: an MLP of the size n * I that
            computes what the layer would if every token went to these n with these weights.

    Returns:
        The MLP, in the dtype and on the device of the experts; the shared expert of the layer, where there is
        one, is put beside it and adds to its size.

    Raises:
        ValueError: load has another shape than [E], gather is not from 1 to E, the experts have biases, for
            which `SharedExpert` has no place, or the layer has a weighed shared expert or identity experts,
            or is of a subclass that computes something else.
    """
    experts = moe.experts
    if experts.b1 is not None:
        _check.wanted("moe", "experts with biases", "experts without")
    if type(moe).forward is not MoE.forward:
        _check.wanted("moe", f"{type(moe).__name__}, whose forward is its own", "an nn.MoE")
    if moe.shared_gate is not None or moe.identity_experts or isinstance(moe.router, SharedRouter):
        _check.wanted("moe", "a shared expert that is weighed, or identity experts", "a layer without")
    scale = moe.router.options.get("scale", 1.0) if isinstance(moe.router, Router) else 1.0
    gated = experts.activation in GATED
    w1, w2 = merge_weights(experts.w1, experts.w2, load, gather, gated=gated)
    w2 = w2 * scale
    if moe.shared is not None:
        w1, w2 = _side_by_side([(w1, w2), (moe.shared.w1, moe.shared.w2)], gated)
    dense = SharedExpert(*w2.shape, activation=experts.activation, device="meta", dtype=w2.dtype).to_empty(
        device=w2.device
    )
    with torch.no_grad():
        dense.w1.copy_(w1)
        dense.w2.copy_(w2)
    return dense.train(moe.training)


@torch.no_grad()
def merge_weights(
    w1: Tensor, w2: Tensor, load: Tensor | None = None, gather: int | None = None, *, gated: bool = True
) -> tuple[Tensor, Tensor]:
    """What `merge_experts` does, on the weights alone.

    Args:
        w1: [E, 2I, H], gate rows then up rows; [E, I, H] when the activation has no gate.
        w2: [E, H, I].
        load, gather: see `merge_experts`.
        gated: whether w1 has gate rows.

    Returns:
        w1 [2J, H] ([J, H]) and w2 [H, J] with J = I, or gather * I.

    Raises:
        ValueError: see `merge_experts`.
    """
    experts = w2.shape[0]
    share = _shares(load, w2)
    if gather is None:
        first, second = (torch.einsum("e,eij->ij", share.to(w.dtype), w) for w in (w1, w2))
        return first, second
    if not 1 <= gather <= experts:
        _check.wanted("gather", gather, f"None or 1 to {experts}, the number of experts")
    best, ids = share.topk(gather)
    scaled = w2[ids] * (best / best.sum())[:, None, None].to(w2.dtype)
    return _side_by_side(list(zip(w1[ids], scaled, strict=True)), gated)


def dense_student(
    model: nn.Module, load: Mapping[str, Tensor] | None = None, *, gather: int | None = None
) -> nn.Module:
    """A copy of a model whose every `nn.MoE` is replaced by its merged experts.

    Args:
        model: the teacher. It is left as it is.
        load: [E] by the name of the layer; None counts all experts alike.
        gather: see `merge_experts`.

    Raises:
        ValueError: the model has no `nn.MoE`, or `load` lacks one of them; and see `merge_experts`.
    """
    layers = moe_layers(model)
    if not layers:
        _check.wanted("model", f"{type(model).__name__} without nn.MoE layers", "one that has some")
    if load is not None and load.keys() != layers.keys():
        _check.wanted("load", f"layers {sorted(load)}", f"those of the model, {sorted(layers)}")
    # The experts are the bulk of a model: they are not copied first.
    merged = {
        name: merge_experts(layer, None if load is None else load[name], gather=gather)
        for name, layer in layers.items()
    }
    return copy.deepcopy(model, {id(layer): merged[name] for name, layer in layers.items()})


def distillation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    student_hidden: Sequence[Tensor] = (),
    teacher_hidden: Sequence[Tensor] = (),
    hidden_weight: float = 1.0,
) -> Tensor:
    """KL(teacher || student) of the next token, and how far hidden states are from the teacher's.

    The first is Hinton et al., arXiv:1503.02531: both distributions softened by the temperature, times its
    square, which keeps the gradient's size; the mean over the tokens. The second is, for every pair of
    hidden states, the squared difference over the teacher's mean square, the mean over pairs and tokens.

    Args:
        student_logits, teacher_logits: [..., V]. The teacher's gets no gradient.
        temperature: more than 0.
        mask: [...], 0 for padding tokens, which count nowhere, whatever their logits and hidden states hold.
        student_hidden, teacher_hidden: the same number of tensors [..., H], of matching layers. None need be
            given.
        hidden_weight: factor of the second part.

    Returns:
        A float32 scalar (float64 for float64 logits). 0 when no token counts.

    Raises:
        ValueError: shapes do not match, or temperature is not more than 0.
    """
    if not temperature > 0:
        _check.wanted("temperature", temperature, "more than 0")
    if len(student_hidden) != len(teacher_hidden):
        _check.wanted(
            "student_hidden", f"{len(student_hidden)} tensors", f"{len(teacher_hidden)}, as the teacher has"
        )
    dtype = wide(student_logits.dtype)
    for name, given, like in (
        ("teacher_logits", teacher_logits, student_logits),
        *(("teacher_hidden", *pair) for pair in zip(teacher_hidden, student_hidden, strict=True)),
    ):
        if given.shape != like.shape:
            _check.wanted(name, f"shape {tuple(given.shape)}", f"the student's {tuple(like.shape)}")
    tokens = student_logits.shape[:-1]
    if mask is not None and mask.shape != tokens:
        _check.wanted("mask", f"shape {tuple(mask.shape)}", f"{tuple(tokens)}, one number a token")
    count = max(tokens.numel(), 1) if mask is None else (mask != 0).sum().clamp(min=1)

    def counted(values: Tensor) -> Tensor:
        """In the dtype of the loss; zeros in padding, where student and teacher then agree."""
        values = values.to(dtype)
        return values if mask is None else values.masked_fill(mask[..., None] == 0, 0)

    student, teacher = (
        (counted(logits) / temperature).log_softmax(-1)
        for logits in (student_logits, teacher_logits.detach())
    )
    # What the teacher excludes, by a logit of -inf, counts nowhere: 0 * -inf would be NaN.
    kl = (teacher.exp() * (teacher - student)).masked_fill(teacher == -torch.inf, 0)
    loss = temperature**2 * kl.sum() / count
    for mine, its in zip(student_hidden, teacher_hidden, strict=True):
        mine, its = counted(mine), counted(its.detach())
        energy = its.square().mean(-1).sum().clamp(min=torch.finfo(dtype).tiny)
        distance = (mine - its).square().mean(-1).sum()
        loss = loss + hidden_weight / len(student_hidden) * distance / energy
    return loss


def _shares(load: Tensor | None, w2: Tensor) -> Tensor:
    """[E], summing to 1."""
    experts = w2.shape[0]
    if load is None:
        return w2.new_full((experts,), 1 / experts, dtype=wide(w2.dtype))
    if load.shape != (experts,):
        _check.wanted("load", f"shape {tuple(load.shape)}", f"[E] = ({experts},)")
    load = load.to(device=w2.device, dtype=wide(w2.dtype))
    load = torch.where(load.sum() > 0, load, 1.0)  # a layer that routed nothing tells nothing apart
    return load / load.sum()


def _side_by_side(pieces: Sequence[tuple[Tensor, Tensor]], is_gated: bool) -> tuple[Tensor, Tensor]:
    """MLPs as one whose intermediate units are those of all, so that it computes their sum."""
    halves = [w1.chunk(2) if is_gated else (w1,) for w1, _ in pieces]
    first = torch.cat([half for part in zip(*halves, strict=True) for half in part])
    return first, torch.cat([w2 for _, w2 in pieces], dim=1)

"""A dense model as the start of a Mixture-of-Experts one: sparse upcycling.

Every expert begins as a copy of the dense MLP, and the router at random (Komatsuzaki et al.,
arXiv:2212.05055). With routing weights that sum to 1 the model then computes what the dense one did.

Legend: H hidden size, I intermediate size, E experts, K experts per token.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import _check
from .kernels import wide
from .nn import MoE, Router, SharedExpert, moe_layers
from .reference import GATED

__all__ = ["DenseMLP", "copy_experts", "dense_mlp", "is_dense_mlp", "upcycle", "upcycle_model"]


class DenseMLP(NamedTuple):
    """The weights of an MLP in the layout of one expert: w1 [2I, H] ([I, H] without a gate), w2 [H, I]."""

    w1: Tensor
    w2: Tensor
    b1: Tensor | None
    b2: Tensor | None
    activation: str


def dense_mlp(mlp: nn.Module) -> DenseMLP:
    """Read an MLP: `nn.SharedExpert`, or one of transformers with `gate_proj`, `up_proj` and `down_proj`.

    The latter are those of Llama, Mistral, Qwen2, Qwen3, Gemma and others.

    Raises:
        TypeError: `mlp` is neither.
        ValueError: its activation is none that experts have.
    """
    if isinstance(mlp, SharedExpert):
        return DenseMLP(mlp.w1, mlp.w2, None, None, mlp.activation)
    gate, up, down = _projections(mlp)
    b1 = None if gate.bias is None else torch.cat([gate.bias, up.bias])
    return DenseMLP(torch.cat([gate.weight, up.weight]), down.weight, b1, down.bias, _activation(mlp))


def copy_experts(
    mlp: DenseMLP,
    num_experts: int,
    *,
    noise: float = 0.0,
    redraw: float = 0.0,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """The weights of E experts made from a dense MLP.

    Args:
        mlp: the weights to copy.
        num_experts: E.
        noise: add normal noise of this many standard deviations of each weight matrix, so that experts
            differ; the output then differs from the dense one's.
        redraw: of each expert, draw this share of the I intermediate units anew, each expert its own: the
            rows of gate and up and the columns of down, normally with the mean and standard deviation of
            the weights that they replace (Drop-Upcycling, arXiv:2502.19261, section 3, where 0.5 is best).
        generator: of the noise; on the device of the weights.

    Returns:
        w1 [E, 2I, H] ([E, I, H]) and w2 [E, H, I], on the device and in the dtype of the MLP's.

    Raises:
        ValueError: num_experts is less than 1, noise negative, or redraw not from 0 to 1.
    """
    _check.positive(num_experts=num_experts)
    if not noise >= 0:
        _check.wanted("noise", noise, "at least 0")
    if not 0 <= redraw <= 1:
        _check.wanted("redraw", redraw, "0 to 1")
    w1, w2 = (w.detach().expand(num_experts, *w.shape).clone() for w in (mlp.w1, mlp.w2))

    def normal(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator, device=like.device, dtype=like.dtype)

    if noise:
        for w in (w1, w2):
            w += normal(w) * (noise * w[0].std())
    size = w2.shape[2]
    count = round(redraw * size)
    units = torch.rand(num_experts, size, generator=generator, device=w2.device).argsort(1)[:, :count]
    for expert, redrawn in enumerate(units if count else ()):
        # Gate and up are matrices of their own, in whose statistics each is drawn.
        for w in (*w1[expert].split(size), w2[expert].T):
            old = w[redrawn].to(wide(w.dtype))
            w.index_copy_(0, redrawn, (normal(old) * old.std(correction=0) + old.mean()).to(w.dtype))
    return w1, w2


def upcycle(
    mlp: nn.Module,
    num_experts: int,
    top_k: int,
    *,
    noise: float = 0.0,
    redraw: float = 0.0,
    router_std: float = 0.02,
    generator: torch.Generator | None = None,
    **options: Any,
) -> MoE:
    """A `nn.MoE` whose experts are copies of a dense MLP; without `noise` and `redraw` it computes the same.

    Args:
        mlp: see `dense_mlp`. It is left as it is.
        num_experts, top_k: E and K.
        noise, redraw, generator: see `copy_experts`.
        router_std: the router's weights are drawn normally with this standard deviation.
        options: of `nn.MoE`, capacity_factor, jitter or selection_bias, for instance. The routing weights of
            a token are renormalised to a sum of 1 unless `renormalize=False` is given; then the output at the
            start is smaller than the dense one's by that sum. With K = 1 they are all 1, and only auxiliary
            losses move the router (`nn.MoE` warns).

    Returns:
        The layer, on the device and in the dtype of `mlp`.

    Raises:
        TypeError, ValueError: see `dense_mlp`, `copy_experts` and `nn.MoE`.
    """
    dense = dense_mlp(mlp)
    w1, w2 = copy_experts(dense, num_experts, noise=noise, redraw=redraw, generator=generator)
    layer = MoE(
        w2.shape[1],
        w2.shape[2],
        num_experts,
        top_k,
        activation=dense.activation,
        bias=dense.b1 is not None or dense.b2 is not None,
        device="meta",
        dtype=w1.dtype,
        **{"renormalize": True, **options},
    ).to_empty(device=w1.device)
    with torch.no_grad():
        assert isinstance(layer.router, Router), "made by MoE"
        layer.router.reset_parameters()
        layer.router.weight.normal_(std=router_std, generator=generator)
        for parameter, value in (
            (layer.experts.w1, w1),
            (layer.experts.w2, w2),
            (layer.experts.b1, dense.b1),
            (layer.experts.b2, dense.b2),
        ):
            if parameter is not None:
                parameter.copy_(torch.zeros_like(parameter) if value is None else value)
        for shared in (layer.shared, layer.shared_gate):
            if shared is not None:
                shared.reset_parameters()
    return layer.train(mlp.training)


def upcycle_model(model: nn.Module, num_experts: int, top_k: int, *, every: int = 1, **options: Any) -> int:
    """Replace the dense MLPs of a model by `nn.MoE` layers, in place; attention and embeddings stay.

    Args:
        model: any module with MLPs that `dense_mlp` reads, a Llama or Qwen of transformers, for instance.
        num_experts, top_k: E and K.
        every: replace the last MLP of every so many in the order of the model (the paper: every second one).
        options: of `upcycle`.

    Returns:
        How many MLPs were replaced.

    Raises:
        ValueError: there is no such MLP, or `every` is less than 1.
    """
    _check.positive(every=every)
    shared = tuple(f"{name}." for name in moe_layers(model))
    names = [
        name
        for name, module in model.named_modules()
        if name and not name.startswith(shared) and is_dense_mlp(module)
    ]
    names = names[every - 1 :: every]
    if not names:
        _check.wanted("model", f"{type(model).__name__} without a gated MLP to copy", "a dense model")
    for name in names:
        parent, _, child = name.rpartition(".")
        layer = upcycle(model.get_submodule(name), num_experts, top_k, **options)
        setattr(model.get_submodule(parent), child, layer)
    return len(names)


def is_dense_mlp(module: nn.Module) -> bool:
    """Whether `dense_mlp` reads the module."""
    try:
        return isinstance(module, SharedExpert) or bool(_projections(module) and _activation(module))
    except (TypeError, ValueError):
        return False


def _projections(mlp: nn.Module) -> list[nn.Linear]:
    """Gate, up and down of a transformers MLP."""
    projections = [getattr(mlp, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    linears = [layer for layer in projections if isinstance(layer, nn.Linear)]
    if len(linears) < 3:
        wanted = "a SharedExpert, or a module with linear gate_proj, up_proj and down_proj"
        _check.wanted("mlp", type(mlp).__name__, wanted, TypeError)
    return linears


def _activation(mlp: Any) -> str:
    """The name of the gated activation of a transformers MLP."""
    from .integrations.transformers import gated

    name = gated(mlp.act_fn)
    if not isinstance(name, str):
        _check.wanted("mlp", f"activation {mlp.act_fn}", f"one that is the gate of {', '.join(GATED)}")
    return name

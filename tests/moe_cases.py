"""Random inputs of the expert MLP, how close to the float64 reference a result must be, and a small model."""

from __future__ import annotations

import os

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from fastmoe_rs import RoutingPlan, functional, nn, reference

ACTIVATIONS = reference.GATED + reference.UNGATED
# Of the largest element: what rounding the inputs of each product to the dtype can cost, with some room.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
# Whether `make test-emulated` sends the tensors to an emulated GPU, which has no kernels for float64.
EMULATED = os.environ.get("FASTMOE_BACKEND") == "emulator"
DTYPES = tuple(TOLERANCES)[1 if EMULATED else 0 :]
WIDEST = DTYPES[0]
trains = pytest.mark.cpu_only(reason="trains for minutes in an emulator")
needs_float64 = pytest.mark.cpu_only(reason="in float64, for which GPUs have no kernels")


def mlp_case(
    tokens=13,
    hidden=24,
    intermediate=20,
    experts=5,
    top_k=2,
    *,
    dtype=WIDEST,
    activation="swiglu",
    bias=False,
    transposed=False,
    interleaved=False,
    requires_grad=True,
    device="cpu",
):
    """(arguments, options) of moe_mlp. Expert 0 gets no token, and the other groups are ragged."""
    width = 2 * intermediate if activation in reference.GATED else intermediate
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def draw(*shape, dtype=dtype, scale=1.0):
        numbers = torch.randn(shape, dtype=torch.float64, device=device)
        return numbers.mul(scale).to(dtype).requires_grad_(requires_grad)

    w1, w2 = (experts, width, hidden), (experts, hidden, intermediate)
    if transposed:
        w1, w2 = (experts, hidden, width), (experts, intermediate, hidden)
    # Half precision rounds pre-activations across the clamps of swiglu_oai: keep them below, else reach them.
    scale = hidden**-0.5 if dtype in (torch.bfloat16, torch.float16) else 1.0
    ids = torch.rand(tokens, experts - 1, device=device).argsort(dim=1)[:, :top_k] + 1
    arguments = (
        draw(tokens, hidden),
        ids,
        draw(tokens, top_k, dtype=wide),
        draw(*w1, scale=scale),
        draw(*w2),
    )
    options = {"activation": activation, "transposed": transposed, "interleaved": interleaved}
    if bias:
        options |= {"b1": draw(experts, width), "b2": draw(experts, hidden)}
    return arguments, options


def widened(value):
    """A float64 copy, a leaf of its own, of a float tensor; anything else as it is."""
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return value.detach().double().requires_grad_(value.requires_grad)
    return value


def differentiable(arguments, options):
    """The inputs that require grad, by position or name."""
    inputs = {**dict(enumerate(arguments)), **options}
    return {
        name: value
        for name, value in inputs.items()
        if isinstance(value, torch.Tensor) and value.requires_grad
    }


def assert_near(actual, expected, dtype=None, what=""):
    """`actual` in the tolerance of its dtype (or of `dtype`) around the float64 `expected`."""
    assert actual.shape == expected.shape, what
    if not expected.numel():
        return
    error = (actual.double() - expected).abs().max().item()
    allowed = TOLERANCES[dtype or actual.dtype] * max(expected.abs().max().item(), 0.1)
    assert error <= allowed, f"{what}: error {error:.2e}, allowed {allowed:.2e}"


def assert_same(actual, expected):
    """One thing computed twice in WIDEST: by element in float64, up to the largest's rounding in float32."""
    if torch.float64 == WIDEST:
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    else:
        assert_near(actual, expected)


def assert_matches_reference(function, oracle, arguments, options):
    """`function` gives the output and gradients of `oracle`, which runs on the same numbers in float64."""
    wide_arguments = [widened(value) for value in arguments]
    wide_options = {name: widened(value) for name, value in options.items()}
    out, expected = function(*arguments, **options), oracle(*wide_arguments, **wide_options)
    assert out.dtype == arguments[0].dtype
    assert_near(out, expected, what="output")
    inputs, wide_inputs = differentiable(arguments, options), differentiable(wide_arguments, wide_options)
    direction = torch.randn_like(expected).to(out.dtype)
    grads = torch.autograd.grad(out, inputs.values(), direction)
    wanted = torch.autograd.grad(expected, wide_inputs.values(), direction.double())
    for name, grad, want in zip(inputs, grads, wanted, strict=True):
        assert grad.dtype == inputs[name].dtype
        assert_near(grad, want, out.dtype, what=f"gradient of {name}")


def dense(ids, weights, experts):
    """[T, E] the weight of every expert for every token; ids that are no expert count nowhere."""
    real = (ids >= 0) & (ids < experts)
    out = torch.zeros(len(ids), experts + 1, dtype=weights.dtype)
    return out.scatter_add(1, ids.where(real, experts), weights)[:, :experts]


def by_dense_weights(x, weights_TE, w1, w2):
    """Every expert on every token."""
    y = 0
    for e in range(len(w1)):
        gate, up = (x @ w1[e].T).chunk(2, dim=1)
        y = y + weights_TE[:, e, None] * ((F.silu(gate) * up) @ w2[e].T)
    return y


def routed_mlp(x, ids, weights, w1, w2, rows=None):
    """moe_mlp of a routing whose ids may be no expert; `rows` are all that the plan uses."""
    plan = RoutingPlan.from_ids(ids, len(w1), out_of_range="drop")
    if rows is not None:
        plan = plan.trimmed(rows)
    return functional.moe_mlp(x, None, weights, w1, w2, plan=plan)


def draw_experts(e=6, dtype=torch.float64):
    """w1 and w2 of E experts, with H = 8 and I = 5."""
    return torch.randn(e, 10, 8, dtype=dtype), torch.randn(e, 8, 5, dtype=dtype)


class Stack(torch.nn.Module):
    """Layers `nn.MoE(*sizes, **options)` on a residual path, checkpointed where `use_reentrant` is given."""

    def __init__(self, *sizes, layers=2, use_reentrant=None, **options):
        super().__init__()
        self.layers = torch.nn.ModuleList(nn.MoE(*sizes, **options) for _ in range(layers))
        self.use_reentrant = use_reentrant

    def forward(self, x):
        for layer in self.layers:
            if self.use_reentrant is None:
                x = x + layer(x)
            else:
                x = x + checkpoint(layer, x, use_reentrant=self.use_reentrant)
        return x

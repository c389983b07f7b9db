"""Results on the device: those of the reference in float64, those of the CPU, and the same every time."""

import itertools

import pytest
import torch
from layers import assert_same_bits, layer

from fastmoe_rs import RoutingPlan, functional, reference
from fastmoe_rs.quantization import quantize
from moe_cases import ACTIVATIONS, assert_matches_reference, assert_near, mlp_case

HALF = (torch.bfloat16, torch.float16)
DTYPES = (*HALF, torch.float32)
# Tokens, hidden, intermediate, experts, top_k: one row, tails in every direction, aligned or not, many tiles.
SMALL = [(13, 24, 20, 5, 2), (1, 64, 32, 4, 1), (33, 40, 33, 9, 3), (70, 128, 64, 4, 2)]
LARGE = [(1, 2048, 768, 128, 8), (257, 1024, 520, 16, 4), (4096, 512, 384, 8, 2), (1025, 1440, 720, 16, 4)]


def assert_right_on(device, *sizes, **options):
    """Output and gradients of a case, against plain torch in float64 on the same device."""
    case = mlp_case(*sizes, device=device, **options)
    assert_matches_reference(functional.moe_mlp, reference.moe_mlp, *case)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SMALL + LARGE, ids=str)
def test_sizes(device, quick, sizes, dtype):
    if quick and sizes in LARGE:
        pytest.skip("large sizes are left out by --quick")
    assert_right_on(device, *sizes, dtype=dtype)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_activations_with_biases(device, activation, dtype):
    assert_right_on(device, 40, 64, 32, 4, 2, dtype=dtype, activation=activation, bias=True)


@pytest.mark.parametrize(("transposed", "interleaved"), [*itertools.product((False, True), repeat=2)])
@pytest.mark.parametrize("aligned", [True, False])
def test_layouts(device, transposed, interleaved, aligned):
    sizes = (40, 64, 32, 4, 2) if aligned else (40, 63, 31, 4, 2)
    options = {"transposed": transposed, "interleaved": interleaved, "dtype": torch.bfloat16}
    assert_right_on(device, *sizes, **options)


@pytest.mark.parametrize("top_k", [1, 4])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_router_and_plan_have_the_bits_of_the_cpu(device, top_k, score):
    logits = torch.randn(300, 16).mul(4).round().div(4)  # with ties
    logits[7] = float("nan")
    on_cpu = functional.route(logits, top_k, score=score, renormalize=True)
    there = functional.route(logits.to(device), top_k, score=score, renormalize=True)
    for name in ("ids", "weights", "scores"):
        ours, want = getattr(there, name).cpu(), getattr(on_cpu, name)
        assert torch.equal(ours.nan_to_num(-7), want.nan_to_num(-7)), name
    for options in ({}, {"capacity": 20}, {"capacity": 20, "drop": "score", "pad": True}):
        plans = [
            RoutingPlan.from_ids(routing.ids, 16, weights=routing.weights.nan_to_num(0), **options)
            for routing in (on_cpu, there)
        ]
        for name in ("counts", "offsets", "gather", "inverse"):
            want, ours = (getattr(plan, name) for plan in plans)
            assert torch.equal(ours.cpu(), want), (name, options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pieces_agree_with_the_whole(device, dtype):
    """permute, two grouped products and unpermute, against moe_mlp."""
    case = layer(device, dtype=dtype)
    routing = functional.route(case.logits, case.top_k)
    plan = RoutingPlan.from_ids(routing.ids, len(case.w1))
    hidden = functional.grouped_mm(functional.permute(case.x, plan), case.w1, plan.offsets)
    activated = functional.activate(hidden, "swiglu")
    y = functional.grouped_mm(activated, case.w2, plan.offsets)
    out = functional.unpermute(y, plan, routing.weights)
    whole = functional.moe_mlp(case.x, None, routing.weights, case.w1, case.w2, plan=plan)
    assert_near(out.detach(), whole.detach().double())


def test_40_passes_have_the_same_bits(device, quick):
    sizes = (64, 64, 96, 8, 2) if quick else (2048, 1024, 768, 64, 8)
    case = layer(device, *sizes)
    first = case.step()
    for _ in range(39):
        assert_same_bits(case.step(), first)


def test_experts_without_tokens_get_gradients_of_zero(device):
    case = layer(device)
    with torch.no_grad():
        case.logits[:, 3] = -1e9
    *_, grad_w1, grad_w2 = case.step()
    assert not grad_w1[3].any()
    assert not grad_w2[3].any()
    assert grad_w1[2].any()


def test_nan_stays_with_its_token(device):
    case = layer(device)
    with torch.no_grad():
        case.x[5] = float("nan")
        out = case.forward()
    assert out[5].isnan().all()
    assert out[torch.arange(len(out), device=out.device) != 5].isfinite().all()


@pytest.mark.cuda
def test_float64_is_for_the_cpu(device):
    with pytest.raises(TypeError, match="float64"):
        layer(device, dtype=torch.float64).step()


@pytest.mark.cuda
@pytest.mark.parametrize("name", ["logits", "w1", "w2"])
def test_tensors_of_two_devices_are_refused(device, name):
    case = layer(device)
    setattr(case, name, getattr(case, name).detach().cpu())
    with pytest.raises(ValueError, match="cuda"):
        case.forward()


@pytest.mark.parametrize("format", ["mxfp4", "fp8"])
def test_quantized_weights_have_the_bits_of_dequantized_ones(device, format):
    case = layer(device)
    routing = functional.route(case.logits.detach(), case.top_k)
    quantized = [quantize(weight.detach(), format) for weight in (case.w1, case.w2)]
    plain = [weight.dequantize(case.x.dtype) for weight in quantized]
    results = []
    for weights in (quantized, plain):
        out = functional.moe_mlp(case.x, routing.ids, routing.weights, *weights)
        results.append((out.detach(), *torch.autograd.grad(out, case.x, case.grad_out)))
    assert_same_bits(*results)

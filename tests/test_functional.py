"""moe_mlp, grouped_mm, permute and unpermute against the reference, forward and backward."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastmoe_rs import RoutingPlan, functional, reference
from moe_cases import (
    ACTIVATIONS,
    DTYPES,
    WIDEST,
    assert_matches_reference,
    assert_near,
    differentiable,
    mlp_case,
    needs_float64,
)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_mlp(activation, bias, dtype):
    arguments, options = mlp_case(dtype=dtype, activation=activation, bias=bias)
    assert_matches_reference(functional.moe_mlp, reference.moe_mlp, arguments, options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("activation", ["swiglu", "geglu", "swiglu_oai"])
def test_mlp_layouts(activation, interleaved, dtype):
    arguments, options = mlp_case(
        dtype=dtype, activation=activation, bias=True, transposed=True, interleaved=interleaved
    )
    assert_matches_reference(functional.moe_mlp, reference.moe_mlp, arguments, options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "hidden", "intermediate", "experts", "top_k"),
    [
        (1, 1, 1, 2, 1),
        (1, 64, 32, 9, 8),
        (7, 33, 17, 4, 3),
        (200, 40, 48, 5, 4),
        (65, 130, 70, 3, 1),
        (16, 256, 96, 33, 8),
        (40, 8, 300, 6, 2),
    ],
)
def test_mlp_shapes(tokens, hidden, intermediate, experts, top_k, dtype):
    arguments, options = mlp_case(tokens, hidden, intermediate, experts, top_k, dtype=dtype, bias=True)
    assert_matches_reference(functional.moe_mlp, reference.moe_mlp, arguments, options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("drop", "pad"), [("position", False), ("position", True), ("score", True)])
def test_mlp_with_a_capacity(drop, pad, dtype):
    (x, ids, weights, w1, w2), options = mlp_case(30, dtype=dtype, bias=True)
    plan = RoutingPlan.from_ids(ids, 5, weights=weights, capacity=9, drop=drop, pad=pad)
    assert (plan.inverse < 0).any()
    options["plan"] = plan
    assert_matches_reference(functional.moe_mlp, reference.moe_mlp, (x, None, weights, w1, w2), options)
    out = functional.moe_mlp(x, None, weights, w1, w2, **options)
    (grad,) = torch.autograd.grad(out.sum(), weights)
    assert (grad[plan.inverse < 0] == 0).all()


@pytest.mark.parametrize("memory", ["lazily negated", "offset", "expanded", "transposed"])
def test_mlp_of_tensors_that_are_views(memory):
    """Same values, other memory: the signs, strides and offsets of a view count, forward and backward."""

    def view(tensor):
        if not tensor.is_floating_point():
            return tensor
        plain = tensor.detach()
        if memory == "lazily negated":
            plain = torch._neg_view(-plain)
        elif memory == "offset":
            plain = torch.cat([plain.flatten(), plain.flatten()])[plain.numel() :].view(plain.shape)
        elif memory == "expanded":
            plain = plain[..., :1].expand(plain.shape)
        else:
            plain = plain.transpose(0, -1).contiguous().transpose(0, -1)
        return plain.requires_grad_()

    arguments = [view(argument) for argument in mlp_case()[0]]
    plain = [argument.detach().resolve_neg().contiguous() for argument in arguments]
    copies = [a.clone().requires_grad_(b.requires_grad) for a, b in zip(plain, arguments, strict=True)]
    grad_out = view(torch.randn(arguments[0].shape, dtype=torch.float64)).detach()
    outs = []
    for taken in (arguments, copies):
        out = functional.moe_mlp(*taken)
        outs.append((out, *torch.autograd.grad(out, differentiable(taken, {}).values(), grad_out)))
    for got, want in zip(*outs, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("tokens", [0, 1, 13, 700])
def test_mlp_of_ids_is_that_of_their_plan(tokens, ids_dtype):
    (x, ids, *rest), options = mlp_case(tokens, dtype=torch.float32, bias=True)
    plan = RoutingPlan.from_ids(ids, 5)
    inputs = differentiable((x, ids, *rest), options).values()
    outs = []
    for routed in ({"ids_TK": ids.to(ids_dtype)}, {"ids_TK": None, "plan": plan}):
        out = functional.moe_mlp(x, weights_TK=rest[0], w1=rest[1], w2=rest[2], **routed, **options)
        with torch.no_grad():
            alone = functional.moe_mlp(x, weights_TK=rest[0], w1=rest[1], w2=rest[2], **routed, **options)
        outs.append((out, alone, *torch.autograd.grad(out.sum(), inputs)))
    for got, want in zip(*outs, strict=True):
        assert torch.equal(got, want)


def test_the_plan_is_kept_behind_an_odd_number_of_elements():
    tokens, hidden, intermediate, experts = 3, 8, 5, 4
    ids = torch.tensor([[3], [0], [3]])
    inputs = [
        torch.randn(shape).bfloat16().requires_grad_()
        for shape in ((tokens, hidden), (experts, intermediate, hidden), (experts, hidden, intermediate))
    ]
    x, w1, w2 = inputs
    weights = torch.rand(tokens, 1)
    plan = RoutingPlan.from_ids(ids, experts)
    outs = []
    for routed in ({"ids_TK": ids}, {"ids_TK": None, "plan": plan}):
        out = functional.moe_mlp(x, weights_TK=weights, w1=w1, w2=w2, activation="relu", **routed)
        outs.append((out, *torch.autograd.grad(out.sum(), inputs)))
    for got, want in zip(*outs, strict=True):
        assert torch.equal(got, want)


def test_mlp_with_out_of_range_ids_dropped():
    (x, ids, weights, w1, w2), _ = mlp_case()
    elsewhere = torch.where(ids == 2, 5, ids)
    plan = RoutingPlan.from_ids(elsewhere, 5, out_of_range="drop")
    out = functional.moe_mlp(x, None, weights, w1, w2, plan=plan)
    kept = weights.masked_fill(ids == 2, 0)
    assert_near(out, reference.moe_mlp(x, ids, kept, w1, w2))
    (grad,) = torch.autograd.grad(out.sum(), weights)
    assert (grad[ids == 2] == 0).all()


def test_mlp_takes_duplicate_ids():
    (x, ids, weights, w1, w2), options = mlp_case(dtype=torch.float32)
    arguments = x, torch.full_like(ids, 3), weights, w1, w2
    assert_matches_reference(functional.moe_mlp, reference.moe_mlp, arguments, options)


@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("weights_dtype", DTYPES)
def test_mlp_takes_any_dtype_of_ids_and_weights(weights_dtype, ids_dtype):
    (x, ids, _, w1, w2), _ = mlp_case(dtype=torch.float32)
    weights = torch.randn(ids.shape).to(weights_dtype).requires_grad_()
    out = functional.moe_mlp(x, ids.to(ids_dtype), weights, w1, w2)
    assert out.dtype == torch.float32
    out.sum().backward()
    assert weights.grad.dtype == weights_dtype
    expected = reference.moe_mlp(*(t.double() for t in (x,)), ids, weights.double(), w1.double(), w2.double())
    assert_near(out, expected)


@needs_float64
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_mlp_gradcheck(activation, transposed):
    interleaved = transposed and activation in reference.GATED
    (x, ids, *rest), options = mlp_case(
        4, 3, 2, 4, 2, activation=activation, bias=True, transposed=transposed, interleaved=interleaved
    )
    b1, b2 = options.pop("b1"), options.pop("b2")

    def mlp(x, weights, w1, w2, b1, b2, plan=None):
        return functional.moe_mlp(x, ids, weights, w1, w2, b1=b1, b2=b2, plan=plan, **options)

    assert torch.autograd.gradcheck(mlp, (x, *rest, b1, b2))
    plan = RoutingPlan.from_ids(ids, 4, capacity=2)
    assert torch.autograd.gradcheck(lambda *inputs: mlp(*inputs, plan), (x, *rest, b1, b2))


@pytest.mark.parametrize("wanted", range(6))
def test_mlp_computes_one_gradient_alone(wanted):
    arguments, options = mlp_case(bias=True, dtype=torch.float32)
    full = functional.moe_mlp(*arguments, **options)
    inputs = differentiable(arguments, options)
    all_grads = torch.autograd.grad(full.sum(), inputs.values())
    name = list(inputs)[wanted]
    for other, tensor in inputs.items():
        tensor.requires_grad_(other == name)
    out = functional.moe_mlp(*arguments, **options)
    out.sum().backward()
    for other, tensor in inputs.items():
        assert (tensor.grad is not None) == (other == name)
    assert torch.equal(inputs[name].grad, all_grads[wanted])


def test_expert_without_tokens_has_zero_gradients():
    arguments, options = mlp_case(bias=True, dtype=torch.bfloat16)
    functional.moe_mlp(*arguments, **options).sum().backward()
    for name, tensor in differentiable(arguments, options).items():
        if name not in (0, 2):
            assert (tensor.grad[0] == 0).all()
            assert (tensor.grad[1] != 0).any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_tokens(dtype):
    arguments, options = mlp_case(0, bias=True, dtype=dtype)
    out = functional.moe_mlp(*arguments, **options)
    assert out.shape == (0, 24)
    out.sum().backward()
    for tensor in differentiable(arguments, options).values():
        assert (tensor.grad == 0).all()


def test_transposed_views_are_used_in_place():
    (x, ids, weights, w1, w2), options = mlp_case(transposed=True, bias=True)
    expected = functional.moe_mlp(x, ids, weights, w1, w2, **options)
    expected_grad = torch.autograd.grad(expected.sum(), (w1, w2))
    options["transposed"] = False
    out = functional.moe_mlp(x, ids, weights, w1.transpose(1, 2), w2.transpose(1, 2), **options)
    assert torch.equal(out, expected)
    saved = {tensor.data_ptr() for tensor in out.grad_fn.saved_tensors if tensor is not None}
    assert {w1.data_ptr(), w2.data_ptr()} <= saved
    for grad, want in zip(torch.autograd.grad(out.sum(), (w1, w2)), expected_grad, strict=True):
        assert torch.equal(grad, want)


def test_non_contiguous_inputs():
    (x, ids, weights, w1, w2), options = mlp_case(bias=True)
    expected = functional.moe_mlp(x, ids, weights, w1, w2, **options)

    def strided(tensor):
        return torch.stack([tensor, tensor], dim=-1)[..., 0]

    views = [strided(tensor) for tensor in (x, ids, weights, w1, w2)]
    options |= {"b1": strided(options["b1"]), "b2": strided(options["b2"])}
    assert not any(view.is_contiguous() for view in views)
    out = functional.moe_mlp(*views, **options)
    assert torch.equal(out, expected)
    inputs = (x, weights, w1, w2)
    direction = torch.randn(24, 13, dtype=WIDEST).T
    grads = torch.autograd.grad(out, inputs, direction)
    wanted = torch.autograd.grad(expected, inputs, direction.contiguous())
    for grad, want in zip(grads, wanted, strict=True):
        assert torch.equal(grad, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forty_passes_give_one_answer(dtype):
    arguments, options = mlp_case(64, 32, 32, 8, 4, dtype=dtype, bias=True)
    inputs = list(differentiable(arguments, options).values())
    first = None
    for _ in range(40):
        out = functional.moe_mlp(*arguments, **options)
        results = [out, *torch.autograd.grad(out.float().square().sum(), inputs)]
        first = first or results
        assert all(torch.equal(a, b) for a, b in zip(results, first, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_number_of_threads_does_not_change_the_bits(dtype, set_threads):
    arguments, options = mlp_case(300, 48, 64, 8, 4, dtype=dtype, bias=True)
    inputs = list(differentiable(arguments, options).values())
    results = []
    for threads in (1, 2, 3):
        set_threads(threads)
        out = functional.moe_mlp(*arguments, **options)
        results.append([out, *torch.autograd.grad(out.float().square().sum(), inputs)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@settings(max_examples=40)
@given(
    tokens=st.integers(0, 40),
    hidden=st.integers(1, 70),
    intermediate=st.integers(1, 40),
    experts=st.integers(2, 9),
    dtype=st.sampled_from(DTYPES[:-1]),
    activation=st.sampled_from(ACTIVATIONS),
    transposed=st.booleans(),
    data=st.data(),
)
def test_mlp_of_any_shape(tokens, hidden, intermediate, experts, dtype, activation, transposed, data):
    top_k = data.draw(st.integers(1, experts - 1))
    arguments, options = mlp_case(
        tokens,
        hidden,
        intermediate,
        experts,
        top_k,
        dtype=dtype,
        activation=activation,
        transposed=transposed,
        interleaved=activation in reference.GATED and data.draw(st.booleans()),
        bias=data.draw(st.booleans()),
    )
    assert_matches_reference(functional.moe_mlp, reference.moe_mlp, arguments, options)


def offsets_of(*counts):
    return torch.tensor([0, *counts], dtype=torch.int32).cumsum(0, dtype=torch.int32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("counts", [(3, 0, 9, 1), (0, 0, 0, 20), (5, 5, 5, 5), (0, 0, 0, 0)])
def test_grouped_mm(counts, transposed, bias, dtype):
    x = torch.randn(20, 33).to(dtype).requires_grad_()
    w = torch.randn(4, *((33, 21) if transposed else (21, 33))).to(dtype).requires_grad_()
    options = {"bias": torch.randn(4, 21).to(dtype).requires_grad_()} if bias else {}

    def transposing(function):
        return lambda x, w, *a, **o: function(x, w.transpose(1, 2) if transposed else w, *a, **o)

    assert_matches_reference(
        transposing(functional.grouped_mm),
        transposing(reference.grouped_mm),
        (x, w, offsets_of(*counts)),
        options,
    )


@pytest.mark.cpu_only(reason="about what the CPU packs at a time, and large for an emulator")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_weights_that_are_packed_in_parts(dtype):
    x = torch.randn(3000, 1024).to(dtype)
    w = (torch.randn(6, 1024, 1024) / 32).to(dtype).requires_grad_()
    offsets = offsets_of(0, 900, 1, 0, 2000, 99)
    grad_out = torch.randn(3000, 1024).to(dtype)
    functional.grouped_mm(x, w, offsets).backward(grad_out)
    for expert, (start, end) in enumerate(pairwise(offsets)):
        want = grad_out[start:end].double().T @ x[start:end].double()
        assert_near(w.grad[expert], want, dtype)


@needs_float64
@pytest.mark.parametrize("transposed", [False, True])
def test_grouped_mm_gradcheck(transposed):
    x = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    w = torch.randn(3, *((3, 2) if transposed else (2, 3)), dtype=torch.float64, requires_grad=True)
    bias = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)

    def product(x, w, bias):
        w = w.transpose(1, 2) if transposed else w
        return functional.grouped_mm(x, w, offsets_of(2, 0, 3), bias=bias)

    assert torch.autograd.gradcheck(product, (x, w, bias))
    assert torch.autograd.gradgradcheck(product, (x, w, bias))


def test_grouped_mm_takes_int64_offsets():
    x, w = torch.randn(4, 3), torch.randn(2, 5, 3)
    offsets = torch.tensor([0, 1, 4])
    assert torch.equal(functional.grouped_mm(x, w, offsets), functional.grouped_mm(x, w, offsets.int()))


PLANS = {
    "all": {},
    "capacity": {"capacity": 3},
    "padded": {"capacity": 4, "pad": True},
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", PLANS.values(), ids=PLANS)
def test_permute_and_unpermute(options, dtype):
    ids = torch.randint(0, 4, (9, 3))
    plan = RoutingPlan.from_ids(ids, 4, **options)
    x = torch.randn(9, 21).to(dtype).requires_grad_()
    y = torch.randn(len(plan.gather), 21).to(dtype).requires_grad_()
    weights = torch.randn(9, 3, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    weights.requires_grad_()
    assert torch.equal(functional.permute(x, plan), reference.permute(x, plan))
    assert_matches_reference(functional.permute, reference.permute, (x, plan), {})
    assert_matches_reference(functional.unpermute, reference.unpermute, (y, plan), {})
    assert_matches_reference(functional.unpermute, reference.unpermute, (y, plan, weights), {})


@needs_float64
@pytest.mark.parametrize("options", PLANS.values(), ids=PLANS)
def test_permute_and_unpermute_gradcheck(options):
    plan = RoutingPlan.from_ids(torch.randint(0, 3, (4, 2)), 3, **options)
    x = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)
    y = torch.randn(len(plan.gather), 2, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)
    for function, inputs in ((functional.permute, x), (functional.unpermute, y)):
        assert torch.autograd.gradcheck(lambda t, f=function: f(t, plan), inputs)
        assert torch.autograd.gradgradcheck(lambda t, f=function: f(t, plan), inputs)
    assert torch.autograd.gradcheck(lambda y, w: functional.unpermute(y, plan, w), (y, weights))


def test_unpermute_of_permute_counts_the_kept_routes():
    plan = RoutingPlan.from_ids(torch.randint(0, 4, (9, 3)), 4, capacity=3)
    x = torch.randn(9, 5, dtype=WIDEST)
    kept = (plan.inverse >= 0).sum(1, keepdim=True)
    torch.testing.assert_close(functional.unpermute(functional.permute(x, plan), plan), x * kept)


def test_second_derivative_names_what_cannot():
    (x, ids, weights, w1, w2), _ = mlp_case()
    (grad,) = torch.autograd.grad(functional.moe_mlp(x, ids, weights, w1, w2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"moe_mlp cannot be differentiated again"):
        grad.sum().backward()
    plan = RoutingPlan.from_ids(ids, 5)
    y = torch.randn(26, 4, dtype=WIDEST, requires_grad=True)
    (grad,) = torch.autograd.grad(functional.unpermute(y, plan, weights).sum(), y, create_graph=True)
    with pytest.raises(RuntimeError, match=r"unpermute cannot be differentiated again"):
        grad.sum().backward()

"""route: the choice of the reference, ties and NaN defined, gradients of weights and scores."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastmoe_rs import functional, reference
from moe_cases import DTYPES, WIDEST, assert_near, needs_float64

SCORES = ("softmax", "sigmoid", "sqrt_softplus")
CHOICES = [(score, order) for score in SCORES for order in ("score_topk", "topk_score")]
GROUPS = [
    {"n_group": n, "topk_group": m, "group_score": worth, "group_losers": losers}
    for n, m in ((4, 2), (8, 3))
    for worth in ("top2", "max")
    for losers in ("-inf", "zero")
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize(("score", "order"), CHOICES)
@pytest.mark.parametrize(("experts", "top_k"), [(8, 2), (64, 8), (37, 5), (128, 16), (40, 40)])
def test_equals_the_reference(experts, top_k, score, order, renormalize, dtype):
    logits = torch.randn(33, experts, dtype=dtype)
    options = {"score": score, "order": order, "renormalize": renormalize, "scale": 2.5}
    for bias in (None, torch.randn(experts)):
        actual = functional.route(logits, top_k, **options, bias=bias)
        expected = reference.route(logits, top_k, **options, bias=bias)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        assert actual.ids.dtype == torch.int64
        assert actual.weights.dtype == actual.scores.dtype == wide
        assert torch.equal(actual.ids, expected.ids)
        assert_near(actual.weights, expected.weights.double(), what="weights")
        assert_near(actual.scores, expected.scores.double(), what="scores")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize(("score", "order"), CHOICES)
def test_groups_softcap_scale_and_eps_equal_the_reference(score, order, groups, dtype):
    logits = (3 * torch.randn(33, 64)).to(dtype)
    options = {"score": score, "order": order, "renormalize": True, "renormalize_eps": 0.5, **groups}
    options |= {"softcap": None if order == "topk_score" else 5.0, "expert_scale": torch.rand(64) + 0.5}
    for bias in (None, torch.randn(64)):
        actual = functional.route(logits, 6, **options, bias=bias)
        expected = reference.route(logits.double(), 6, **options, bias=bias)
        # Keys that round differently may change places: compare the sum of what was picked.
        assert (actual.ids == expected.ids).float().mean() > 0.99
        same = (actual.ids == expected.ids).all(1)
        assert_near(actual.weights[same], expected.weights[same], torch.float32, what="weights")
        assert_near(actual.scores, expected.scores, torch.float32, what="scores")


def test_softcap_replaces_the_logits():
    logits = 10 * torch.randn(40, 16)
    for options in ({}, {"score": "sigmoid", "bias": torch.randn(16)}, {"order": "topk_score"}):
        capped = functional.route(logits, 3, softcap=4.0, **options)
        plain = functional.route(4 * (logits / 4).tanh(), 3, **options)
        torch.testing.assert_close(capped.scores, plain.scores)
        torch.testing.assert_close(capped.weights, plain.weights)


def test_groups_leave_only_the_best():
    logits = torch.randn(50, 24)
    bias = torch.randn(24)
    ids = functional.route(
        logits, 4, score="sigmoid", bias=bias, n_group=6, topk_group=2, group_score="max"
    ).ids
    keys = logits.sigmoid() + bias
    best = keys.view(50, 6, 4).amax(2).topk(2).indices
    for row, groups in zip(ids.tolist(), best.tolist(), strict=True):
        assert {e // 4 for e in row} <= set(groups)


def test_sqrt_softplus_of_extreme_logits_is_finite_and_so_is_its_gradient():
    for dtype in {torch.float32, WIDEST}:
        logits = torch.tensor([[-1e30, -800.0, -110.0, -50.0, 0.0, 50.0, 1e30]], dtype=dtype)
        for module in (functional, reference):
            leaf = logits.clone().requires_grad_()
            out = module.route(leaf, 7, score="sqrt_softplus", renormalize=True)
            (out.weights.square().sum() + out.scores.sum()).backward()
            assert out.weights.isfinite().all()
            assert leaf.grad.isfinite().all()


@given(st.data())
def test_ties_go_to_the_lower_expert(data):
    experts = data.draw(st.integers(1, 40))
    top_k = data.draw(st.integers(1, experts))
    levels = data.draw(st.lists(st.integers(-2, 2), min_size=3 * experts, max_size=3 * experts))
    score, order = data.draw(st.sampled_from(CHOICES))
    logits = torch.tensor(levels, dtype=torch.float32).view(3, experts)
    ids = functional.route(logits, top_k, score=score, order=order).ids
    for row, picked in zip(logits.tolist(), ids.tolist(), strict=True):
        assert picked == sorted(range(experts), key=lambda e: (-row[e], e))[:top_k]


@pytest.mark.parametrize(("score", "order"), CHOICES)
@pytest.mark.parametrize("top_k", [2, 20])
def test_nan_comes_last(score, order, top_k):
    logits = torch.randn(4, 30)
    logits[1, ::2] = torch.nan
    logits[2] = torch.nan
    logits[3, :29] = torch.nan
    ids = functional.route(logits, top_k, score=score, order=order).ids
    for row, picked in zip(logits, ids.tolist(), strict=True):
        values = row.tolist()
        assert picked == sorted(range(30), key=lambda e: (values[e] != values[e], -values[e], e))[:top_k]


def test_nan_logit_makes_the_softmax_of_its_row_nan_and_no_other():
    logits = torch.randn(3, 4)
    logits[1, 2] = torch.nan
    weights, scores = functional.route(logits, 2)[1:]
    assert scores[1].isnan().all()
    assert weights[1].isnan().all()
    assert not scores[[0, 2]].isnan().any()
    for score in ("sigmoid", "sqrt_softplus"):
        each = functional.route(logits, 2, score=score)
        assert not each.weights.isnan().any()
        assert each.scores.isnan().sum() == 1


@pytest.mark.parametrize(("score", "order"), CHOICES)
def test_infinite_logits_are_ordinary_keys(score, order):
    logits = torch.tensor([[0.0, torch.inf, -torch.inf, 1.0], [-torch.inf, -torch.inf, -torch.inf, 0.0]])
    ids = functional.route(logits, 3, score=score, order=order).ids
    assert ids.tolist() == [[1, 3, 0], [3, 0, 1]]
    weights = functional.route(logits[1:], 2, score=score, order=order).weights
    torch.testing.assert_close(weights, reference.route(logits[1:], 2, score=score, order=order).weights)


@needs_float64
@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize(("score", "order"), CHOICES)
def test_gradients(score, order, renormalize):
    logits = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(5, dtype=torch.float64)
    options = {"score": score, "order": order, "renormalize": renormalize, "scale": 1.7, "bias": bias}

    def weights_and_scores(logits):
        return functional.route(logits, 3, **options)[1:]

    assert torch.autograd.gradcheck(weights_and_scores, logits)
    assert torch.autograd.gradgradcheck(weights_and_scores, logits)


@needs_float64
@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize(("score", "order"), CHOICES)
def test_gradients_with_softcap_groups_and_expert_scale(score, order, renormalize):
    logits = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    expert_scale = torch.rand(6, dtype=torch.float64, requires_grad=True)
    options = {"score": score, "order": order, "renormalize": renormalize, "renormalize_eps": 0.3}
    options |= {"scale": 1.7, "softcap": 2.0, "n_group": 3, "topk_group": 2}

    def weights_and_scores(logits, expert_scale):
        return functional.route(logits, 3, **options, expert_scale=expert_scale)[1:]

    assert torch.autograd.gradcheck(weights_and_scores, (logits, expert_scale))
    assert torch.autograd.gradgradcheck(weights_and_scores, (logits, expert_scale))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("score", "order"), CHOICES)
def test_gradient_in_the_dtype_of_the_logits(score, order, dtype):
    logits = torch.randn(9, 12, dtype=dtype, requires_grad=True)
    wide = logits.detach().double().requires_grad_()
    for tensor, route in ((logits, functional.route), (wide, reference.route)):
        out = route(tensor, 4, score=score, order=order, renormalize=True)
        (out.weights.square().sum() + out.scores.square().sum()).backward()
    assert logits.grad.dtype == dtype
    assert_near(logits.grad, wide.grad)


def gradients(out, inputs, grads, **options):
    """d inputs of the outputs that have a gradient: `grads` of (weights, scores), each may be None."""
    given = [(tensor, grad) for tensor, grad in zip(out[1:], grads, strict=True) if grad is not None]
    tensors, grads = zip(*given, strict=True)
    return torch.autograd.grad(tensors, inputs, grads, **options)


RULES = [
    {"score": score, "order": order, "renormalize": renormalize, "softcap": softcap}
    for score, order in CHOICES
    for renormalize in (False, True)
    for softcap in (None, 3.0)
]
# Of the largest element: what rounding to the dtype costs, and sums in another order.
GRADIENT_TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("rules", RULES)
def test_kernel_of_the_gradient_equals_its_formula(rules, scaled, dtype):
    """The formula is what a backward with create_graph=True computes."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for tokens, experts, top_k in ((21, 40, 6), (3, 5, 5), (2, 70, 33)):
        logits = torch.randn(tokens, experts).to(dtype).requires_grad_()
        expert_scale = torch.rand(experts, dtype=wide, requires_grad=True) if scaled else None
        inputs = [tensor for tensor in (logits, expert_scale) if tensor is not None]
        out = functional.route(
            logits, top_k, **rules, expert_scale=expert_scale, scale=1.7, renormalize_eps=0.01
        )
        weights, scores = (torch.randn(tensor.shape, dtype=wide) for tensor in out[1:])
        for grads in ((weights, None), (None, scores), (weights, scores)):
            keep = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
            actual = gradients(out, inputs, grads, **keep)
            formula = gradients(out, inputs, grads, create_graph=True, **keep)
            for tensor, grad, wanted in zip(inputs, actual, formula, strict=True):
                assert grad.dtype == tensor.dtype
                assert not grad.requires_grad
                tolerance = GRADIENT_TOLERANCES[tensor.dtype]
                size = max(1.0, wanted.abs().max().item())
                torch.testing.assert_close(grad, wanted, rtol=tolerance, atol=tolerance * size)


@pytest.mark.parametrize("rules", RULES)
def test_gradient_of_nan_logits_is_nan_where_the_formula_says_so(rules):
    logits = torch.randn(6, 8)
    logits[1, 3], logits[2], logits[3, 5], logits[4, :7] = torch.nan, torch.nan, -torch.inf, torch.nan
    logits.requires_grad_()
    out = functional.route(logits, 2, **rules)
    for grads in ((torch.ones(6, 2), None), (None, torch.ones(6, 8)), (torch.ones(6, 2), torch.ones(6, 8))):
        actual = gradients(out, logits, grads, retain_graph=True)[0]
        wanted = gradients(out, logits, grads, create_graph=True)[0]
        torch.testing.assert_close(actual, wanted, equal_nan=True)
        assert actual[[0, 5]].isfinite().all()


@pytest.mark.cpu_only(reason="about the threads of the CPU")
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_has_the_same_bits_for_any_number_of_threads(set_threads, dtype):
    logits = torch.randn(2000, 24, dtype=dtype, requires_grad=True)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    expert_scale = torch.rand(24, dtype=wide, requires_grad=True)
    results = []
    for threads in (1, 2, 1):
        set_threads(threads)
        out = functional.route(logits, 4, score="sigmoid", renormalize=True, expert_scale=expert_scale)
        results.append(torch.autograd.grad(out.weights.square().sum(), (logits, expert_scale)))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_gradient_without_eps_of_scores_alone():
    logits = torch.randn(4, 6, requires_grad=True)
    for order in ("score_topk", "topk_score"):
        out = functional.route(logits, 2, order=order, renormalize=True, renormalize_eps=0.0)
        (grad,) = torch.autograd.grad(out.scores.square().sum(), logits)
        (wanted,) = torch.autograd.grad(logits.softmax(1).square().sum(), logits)
        torch.testing.assert_close(grad, wanted)


def test_gradients_that_are_views():
    logits = torch.randn(4, 6, requires_grad=True)
    out = functional.route(logits, 2)
    expected = gradients(out, logits, (torch.ones(4, 2), torch.ones(4, 6)), retain_graph=True)
    expanded = (torch.ones(1, 1).expand(4, 2), torch.ones(1, 6).expand(4, 6))
    assert torch.equal(gradients(out, logits, expanded)[0], expected[0])


def test_batches_of_gradients():
    logits = torch.randn(4, 6, requires_grad=True)
    weights, batch = functional.route(logits, 2).weights, torch.randn(3, 4, 2)

    def gradient(grad, **options):
        return torch.autograd.grad(weights, logits, grad, retain_graph=True, **options)[0]

    expected = torch.stack([gradient(grad) for grad in batch])
    torch.testing.assert_close(gradient(batch, is_grads_batched=True), expected)
    torch.testing.assert_close(torch.func.vmap(gradient)(batch), expected)


def test_scale_learns_where_the_logits_are_frozen():
    logits, expert_scale = torch.randn(4, 6), torch.rand(6, requires_grad=True)
    out = functional.route(logits, 2, expert_scale=expert_scale)
    out.weights.sum().backward()
    weights = out.weights.detach() / expert_scale.detach()[out.ids]
    torch.testing.assert_close(
        expert_scale.grad, torch.zeros(6).index_add(0, out.ids.flatten(), weights.flatten())
    )


def test_bias_chooses_but_has_no_gradient():
    bias = torch.zeros(4, requires_grad=True)
    logits = torch.randn(3, 4, requires_grad=True)
    functional.route(logits, 2, bias=bias).weights.sum().backward()
    assert bias.grad is None
    assert logits.grad is not None


@needs_float64
@pytest.mark.parametrize(("score", "order"), CHOICES)
def test_route_weights_of_the_picked_experts_are_the_weights(score, order):
    logits = torch.randn(6, 8, dtype=torch.float64, requires_grad=True)
    options = {"score": score, "order": order, "renormalize": True, "scale": 0.5}
    ids, weights, _ = functional.route(logits, 3, **options)
    torch.testing.assert_close(functional.route_weights(logits, ids, **options), weights)
    other = torch.randint(0, 8, (6, 3), dtype=torch.int32)
    assert torch.autograd.gradcheck(lambda l: functional.route_weights(l, other, **options), logits)


@pytest.mark.parametrize(("score", "order"), CHOICES)
def test_ids_that_are_no_expert_weigh_nothing(score, order):
    logits = torch.randn(5, 6, requires_grad=True)
    options = {"score": score, "order": order, "renormalize": True, "softcap": 5.0}
    ids = torch.tensor([[0, 1, -1], [6, 2, 4], [-1, 3, 9], [5, 4, 3], [-1, -1, 6]])
    weights = functional.route_weights(logits, ids, **options)
    for row, picked, of_row in zip(logits, ids, weights, strict=True):
        real = (picked >= 0) & (picked < 6)
        if real.any():
            wanted = functional.route_weights(row[None], picked[real][None], **options)[0]
            torch.testing.assert_close(of_row[real], wanted)
        assert (of_row[~real] == 0).all()
    weights.square().sum().backward()
    assert logits.grad.isfinite().all()


def test_no_tokens():
    logits, expert_scale = torch.empty(0, 4, requires_grad=True), torch.ones(4, requires_grad=True)
    ids, weights, scores = functional.route(logits, 2, expert_scale=expert_scale)
    assert (ids.shape, weights.shape, scores.shape) == ((0, 2), (0, 2), (0, 4))
    (weights.sum() + scores.sum()).backward()
    assert logits.grad.shape == (0, 4)
    assert torch.equal(expert_scale.grad, torch.zeros(4))

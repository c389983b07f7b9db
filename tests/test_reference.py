"""The oracle itself, against loops that follow the definitions word by word."""

import pytest
import torch

from fastmoe_rs import reference
from moe_cases import ACTIVATIONS, mlp_case


def test_mlp_is_the_weighted_sum_of_expert_mlps():
    (x, ids, weights, w1, w2), options = mlp_case(bias=True)
    out = reference.moe_mlp(x, ids, weights, w1, w2, **options)
    for t in range(len(x)):
        expected = 0
        for k, e in enumerate(ids[t]):
            gate, up = (w1[e] @ x[t] + options["b1"][e]).chunk(2)
            y = w2[e] @ (gate * gate.sigmoid() * up) + options["b2"][e]
            expected = expected + weights[t, k] * y
        torch.testing.assert_close(out[t], expected)


@pytest.mark.parametrize("interleaved", [False, True])
def test_layout_flags_only_say_where_the_numbers_are(interleaved):
    (x, ids, weights, w1, w2), options = mlp_case(bias=True)
    plain = reference.moe_mlp(x, ids, weights, w1, w2, **options)
    if interleaved:
        width = w1.shape[1]
        order = torch.arange(width).view(2, width // 2).T.reshape(-1)
        w1, options["b1"] = w1[:, order], options["b1"][:, order]
    options |= {"interleaved": interleaved, "transposed": True}
    w1, w2 = (w.transpose(1, 2).contiguous() for w in (w1, w2))
    torch.testing.assert_close(reference.moe_mlp(x, ids, weights, w1, w2, **options), plain)


def test_activations_by_their_formulas():
    h = torch.linspace(-9, 9, 40, dtype=torch.float64).view(2, 20)
    gate, up = h.chunk(2, dim=1)
    normal = 0.5 * (1 + torch.erf(gate / 2**0.5))
    tanh = 0.5 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3)))
    clamped = gate.clamp(max=7)
    expected = {
        "swiglu": gate / (1 + torch.exp(-gate)) * up,
        "geglu": gate * normal * up,
        "geglu_tanh": gate * tanh * up,
        "reglu": gate.clamp(min=0) * up,
        "swiglu_oai": (up.clamp(-7, 7) + 1) * clamped / (1 + torch.exp(-1.702 * clamped)),
    }
    for name, want in expected.items():
        torch.testing.assert_close(reference.activate(h, name), want)
    one_up = torch.ones_like(gate)
    ungated = {"silu": "swiglu", "gelu": "geglu", "gelu_tanh": "geglu_tanh", "relu": "reglu"}
    for name, gated in ungated.items():
        want = reference.activate(torch.cat([gate, one_up], dim=1), gated)
        torch.testing.assert_close(reference.activate(gate, name), want)
    torch.testing.assert_close(reference.activate(gate, "relu2"), gate.clamp(min=0) ** 2)
    assert {*expected, *ungated, "relu2"} == {*ACTIVATIONS}


def test_plan_by_hand():
    ids = torch.tensor([[2, 0], [2, 1], [0, 2], [2, 0]])
    weights = torch.tensor([[0.1, 0.2], [0.9, 0.3], [0.4, 0.5], [0.7, 0.6]])
    plan = reference.plan(ids, 4, weights=weights)
    assert plan.counts.tolist() == [3, 1, 4, 0]
    assert plan.offsets.tolist() == [0, 3, 4, 8, 8]
    assert plan.gather.tolist() == [0, 2, 3, 1, 0, 1, 2, 3]
    assert plan.inverse.tolist() == [[4, 0], [5, 3], [1, 6], [7, 2]]
    assert torch.equal(plan.weights, torch.tensor([0.2, 0.4, 0.6, 0.3, 0.1, 0.9, 0.5, 0.7]))

    first = reference.plan(ids, 4, weights=weights, capacity=2)
    assert first.counts.tolist() == [2, 1, 2, 0]
    assert first.gather.tolist() == [0, 2, 1, 0, 1, -1, -1, -1]
    assert first.inverse.tolist() == [[3, 0], [4, 2], [1, -1], [-1, -1]]

    best = reference.plan(ids, 4, weights=weights, capacity=2, drop="score", pad=True)
    assert best.offsets.tolist() == [0, 2, 4, 6, 8]
    assert best.gather.tolist() == [2, 3, 1, -1, 1, 3, -1, -1]
    assert best.inverse.tolist() == [[-1, -1], [4, 2], [0, -1], [5, 1]]
    assert torch.equal(best.weights, torch.tensor([0.4, 0.6, 0.3, 0, 0.9, 0.7, 0, 0]))


def test_route_by_hand():
    logits = torch.tensor([[1.0, 3.0, 3.0, 2.0]])
    picked = reference.route(logits, 3)
    assert picked.ids.tolist() == [[1, 2, 3]]
    torch.testing.assert_close(picked.weights, logits.softmax(1)[:, [1, 2, 3]])
    among = reference.route(logits, 2, order="topk_score", scale=3.0)
    torch.testing.assert_close(among.weights, torch.tensor([[1.5, 1.5]]))
    biased = reference.route(
        logits, 2, score="sigmoid", renormalize=True, bias=torch.tensor([1.0, 0.0, 0.0, 1.0])
    )
    assert biased.ids.tolist() == [[3, 0]]
    torch.testing.assert_close(
        biased.weights, logits.sigmoid()[:, [3, 0]] / logits.sigmoid()[:, [3, 0]].sum()
    )


def test_can_be_differentiated_twice():
    (x, ids, weights, w1, w2), _ = mlp_case(3, 2, 2, 3, 2)
    assert torch.autograd.gradgradcheck(lambda *t: reference.moe_mlp(t[0], ids, *t[1:]), (x, weights, w1, w2))

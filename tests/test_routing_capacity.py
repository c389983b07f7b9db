"""How many tokens an expert gets: capacity and its queues, GShard, expert choice, token rounding."""

import math
from types import SimpleNamespace

import pytest
import torch

from fastmoe_rs import RoutingPlan, functional, routing
from moe_cases import by_dense_weights, dense, draw_experts, needs_float64, routed_mlp


@pytest.mark.parametrize("capacity", [0, 1, 4, 50])
def test_capacity_of_every_sequence_is_that_of_switch_transformers(capacity):
    module = pytest.importorskip(
        "transformers.models.switch_transformers.modeling_switch_transformers", reason="needs transformers"
    )
    config = SimpleNamespace(
        num_experts=4,
        expert_capacity=capacity,
        hidden_size=8,
        router_bias=False,
        router_jitter_noise=0.0,
        router_ignore_padding_tokens=False,
        router_dtype="float32",
    )
    router = module.SwitchTransformersTop1Router(config)
    kept, probabilities, logits = router(torch.randn(3, 20, 8))
    ids, weights, _ = functional.route(logits.view(60, 4), 1)
    ids = routing.drop_over_capacity(ids, 4, capacity, group_size=20)
    assert torch.equal(dense(ids, torch.ones(60, 1, dtype=torch.long), 4), kept.view(60, 4))
    torch.testing.assert_close(weights, probabilities.view(60, 1))


@pytest.mark.parametrize("queue", ["token", "choice", "batch", "score"])
@pytest.mark.parametrize("group_size", [None, 10])
def test_a_full_expert_refuses_whoever_comes_later(queue, group_size):
    ids = torch.randint(-1, 6, (40, 3))
    weights = torch.rand(40, 3)
    dropped = routing.drop_over_capacity(ids, 5, 4, queue=queue, weights=weights, group_size=group_size)
    rows = [(t, k) for t in range(40) for k in range(3)]
    if queue == "choice":
        rows.sort(key=lambda row: row[1])
    elif queue == "batch":
        rows.sort(key=lambda row: (row[1], -weights[row[0]].max()))
    elif queue == "score":
        rows.sort(key=lambda row: -weights[row])
    wanted = torch.full_like(ids, -1)
    seats = {}
    for t, k in rows:
        e = int(ids[t, k])
        seat = (t // (group_size or 40), e)
        if 0 <= e < 5 and seats.setdefault(seat, 0) < 4:
            seats[seat] += 1
            wanted[t, k] = e
    assert torch.equal(dropped, wanted)
    if group_size is None and queue in ("token", "score"):
        drop = "position" if queue == "token" else "score"
        options = {"capacity": 4, "drop": drop, "out_of_range": "drop"}
        plan = RoutingPlan.from_ids(ids, 5, weights=weights, **options)
        assert torch.equal(plan.inverse >= 0, dropped >= 0)


# Theirs samples out of training too, and compares the second weight before renormalisation in any case.
@pytest.mark.parametrize("prioritized", [False, True])
@pytest.mark.parametrize(
    ("policy", "before", "training"),
    [
        ("all", False, False),
        ("all", True, False),
        ("all", False, True),
        ("all", True, True),
        ("random", False, True),
        ("sampling", False, True),
        ("sampling", True, True),
    ],
)
def test_gshard_is_the_router_of_nllb(policy, before, prioritized, training):
    module = pytest.importorskip(
        "transformers.models.nllb_moe.modeling_nllb_moe", reason="needs transformers"
    )
    config = SimpleNamespace(
        num_experts=6,
        expert_capacity=9,
        hidden_size=8,
        router_bias=False,
        router_ignore_padding_tokens=False,
        router_dtype="float32",
        second_expert_policy=policy,
        normalize_router_prob_before_dropping=before,
        batch_prioritized_routing=prioritized,
        moe_eval_capacity_token_fraction=0.15,
    )
    router = module.NllbMoeTop2Router(config).train(training)
    logits = torch.randn(60, 6)
    torch.manual_seed(3)
    _, theirs = router.route_tokens(logits.clone())
    capacity = 9 if training else math.ceil(0.15 * 60)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastmoe_rs.routing.capacity.gumbel", lambda like, **o: gumbel_of_torch(like))
        torch.manual_seed(3)
        ours = routing.gshard_route(
            logits,
            capacity,
            second=policy,
            renormalize="before" if before else "after",
            queue="batch" if prioritized else "choice",
            training=training,
        )
    torch.testing.assert_close(dense(ours.ids, ours.weights, 6), theirs)
    assert (ours.ids < 0).any()


def gumbel_of_torch(like):
    return torch.distributions.gumbel.Gumbel(0, 1).rsample(like.shape)


def test_gshard_keeps_the_second_by_its_weight():
    logits = torch.randn(20000, 4)
    ours = routing.gshard_route(logits, 20000, second="random", seed=1)
    weights = logits.softmax(1).topk(2).values
    chance = (2 * weights[:, 1] / weights.sum(1)).clamp(max=1)
    kept = (ours.ids[:, 1] >= 0).float()
    for low in (0.0, 0.25, 0.5, 0.75):
        some = (chance >= low) & (chance < low + 0.25)
        assert (kept[some].mean() - chance[some].mean()).abs() < 0.03


# Experts choose tokens


@needs_float64
@pytest.mark.parametrize("capacity", [0, 3, 7, 100])
def test_expert_choice_by_its_definition(capacity):
    x = torch.randn(20, 8, dtype=torch.float64)
    weight = torch.randn(6, 8, dtype=torch.float64, requires_grad=True)
    w1, w2 = draw_experts()
    ids, weights, scores = routing.expert_choice_route(x @ weight.T, capacity)
    wanted = torch.zeros(20, 6, dtype=torch.float64)
    for e in range(6):
        gates, tokens = (x @ weight.T).softmax(1)[:, e].topk(min(capacity, 20))
        wanted[tokens, e] = gates
    torch.testing.assert_close(dense(ids, weights, 6), wanted)
    assert torch.equal((ids >= 0).sum(0), torch.full((6,), min(capacity, 20)))
    y = routed_mlp(x, ids, weights, w1, w2, rows=6 * min(capacity, 20))
    torch.testing.assert_close(y, by_dense_weights(x, wanted, w1, w2))
    if capacity:
        (grad,) = torch.autograd.grad(y.square().sum(), weight, retain_graph=True)
        (want,) = torch.autograd.grad(
            by_dense_weights(x, scores.masked_fill(ids < 0, 0), w1, w2).square().sum(), weight
        )
        torch.testing.assert_close(grad, want)


def test_trimmed_plan():
    ids, _, _ = routing.expert_choice_route(torch.randn(12, 4), 3)
    plan = RoutingPlan.from_ids(ids, 4, weights=torch.rand(12, 4), out_of_range="drop")
    short = plan.trimmed(12)
    assert (plan.gather.shape, short.gather.shape, short.weights.shape) == ((48,), (12,), (12,))
    x, (w1, w2) = torch.randn(12, 8), draw_experts(4, dtype=torch.float32)
    weights = torch.rand(12, 4)
    full = functional.moe_mlp(x, None, weights, w1, w2, plan=plan)
    assert torch.equal(functional.moe_mlp(x, None, weights, w1, w2, plan=short), full)
    with pytest.raises(ValueError, match="offsets"):
        functional.moe_mlp(x, None, weights, w1, w2, plan=plan.trimmed(11))
    with pytest.raises(ValueError, match="rows: got -1, wanted at least 0"):
        plan.trimmed(-1)


@pytest.mark.parametrize("rounding", ["nearest", "up", "down"])
@pytest.mark.parametrize("tile", [1, 4, 8])
def test_token_rounding_by_its_definition(tile, rounding):
    logits = torch.randn(40, 6)
    plain = functional.route(logits, 2, renormalize=True)
    ids, weights, scores = routing.round_tokens(plain, tile, rounding=rounding)
    chosen = dense(plain.ids, torch.ones(40, 2), 6) > 0
    preference = scores - 1 + chosen.float()  # as SonicMoE's algorithm 4 makes chosen tokens come first
    for e in range(6):
        count = int(chosen[:, e].sum())
        low, high = count // tile * tile, math.ceil(count / tile) * tile
        wanted = {"down": low, "up": high, "nearest": low if count - low < high - count else high}[rounding]
        got = (ids[:, e] == e).nonzero()[:, 0]
        assert set(got.tolist()) == set(preference[:, e].topk(wanted).indices.tolist())
    assert ((ids >= 0).sum(0) % tile == 0).all()
    both = (ids >= 0) & chosen
    torch.testing.assert_close(weights[both], dense(plain.ids, plain.weights, 6)[both])
    added = (ids >= 0) & ~chosen
    assert torch.equal(weights[added], scores[added])
    assert (weights[ids < 0] == 0).all()
    x, (w1, w2) = torch.randn(40, 8), draw_experts(dtype=torch.float32)
    y = routed_mlp(x, ids, weights, w1, w2, rows=40 * 2 + 6 * tile)
    torch.testing.assert_close(y, by_dense_weights(x, weights, w1, w2), rtol=1e-4, atol=1e-4)


def test_rounding_up_stops_at_the_number_of_tokens():
    plain = functional.route(torch.tensor([[1.0, 0.0]]).repeat(10, 1), 1)
    ids, _, _ = routing.round_tokens(plain, 8, rounding="up")
    assert (ids >= 0).sum(0).tolist() == [8, 0]

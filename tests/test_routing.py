"""The routers of fastmoe_rs.routing, each against a plain transcription of where it comes from."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from fastmoe_rs import RoutingPlan, functional, routing
from moe_cases import needs_float64


def dense(ids, weights, experts):
    """[T, E] the weight of every expert for every token; ids that are no expert count nowhere."""
    real = (ids >= 0) & (ids < experts)
    out = torch.zeros(len(ids), experts + 1, dtype=weights.dtype)
    return out.scatter_add(1, ids.where(real, experts), weights)[:, :experts]


def moe(x, ids, weights, w1, w2, rows=None):
    plan = RoutingPlan.from_ids(ids, len(w1), out_of_range="drop")
    if rows is not None:
        plan = plan.trimmed(rows)
    return functional.moe_mlp(x, None, weights, w1, w2, plan=plan)


def by_dense_weights(x, weights_TE, w1, w2):
    """Every expert on every token."""
    y = 0
    for e in range(len(w1)):
        gate, up = (x @ w1[e].T).chunk(2, dim=1)
        y = y + weights_TE[:, e, None] * ((F.silu(gate) * up) @ w2[e].T)
    return y


def experts(e=6, h=8, i=5, dtype=torch.float64):
    return torch.randn(e, 2 * i, h, dtype=dtype), torch.randn(e, h, i, dtype=dtype)


# Noise


def test_seeded_numbers_are_those_of_their_distribution():
    like = torch.empty(200, 1000)
    u = routing.uniform(like, seed=7)
    assert (u > 0).all()
    assert (u < 1).all()
    quantiles = torch.histc(u, 20, 0, 1) / u.numel()
    assert (quantiles - 0.05).abs().max() < 2e-3
    n = routing.normal(like, seed=7)
    assert n.mean().abs() < 0.01
    assert (n.std() - 1).abs() < 0.01
    g = routing.gumbel(like, seed=7)
    assert (g.mean() - 0.57722).abs() < 0.02
    assert (g.std() - math.pi / 6**0.5).abs() < 0.02
    assert torch.corrcoef(torch.stack([u[:, 0], u[:, 1]]))[0, 1].abs() < 0.3


@pytest.mark.parametrize("draw", [routing.uniform, routing.normal, routing.gumbel])
def test_a_seed_alone_decides(draw):
    like = torch.empty(30, 16)
    first = draw(like, seed=3)
    state = torch.get_rng_state()
    assert torch.equal(draw(like, seed=torch.tensor([3])), first)
    assert torch.equal(torch.get_rng_state(), state)
    for other in (draw(like, seed=4), draw(like, seed=3, stream=1), draw(like, seed=2**31 + 3)):
        assert (other != first).float().mean() > 0.99
    assert torch.equal(draw(like.double(), seed=3).float(), first) or draw is not routing.uniform
    assert draw(like.half(), seed=3).dtype == torch.float32
    torch.manual_seed(5)
    unseeded = draw(like)
    torch.manual_seed(5)
    assert torch.equal(draw(like), unseeded)


def test_seeded_numbers_compile():
    like = torch.empty(30, 16)
    compiled = torch.compile(lambda seed: routing.uniform(like, seed=seed), fullgraph=True)
    for seed in (1, 2):
        assert torch.equal(compiled(torch.tensor(seed)), routing.uniform(like, seed=seed))


def test_jitter_and_logit_noise():
    x = torch.full((100, 8), 2.0, dtype=torch.bfloat16)
    jittered = routing.input_jitter(x, 0.25, seed=1)
    assert jittered.dtype == torch.bfloat16
    assert (jittered >= 1.5).all()
    assert (jittered <= 2.5).all()
    assert jittered.float().std() > 0.2
    noisy = routing.logit_noise(torch.zeros(1000, 8), 0.5, seed=1)
    assert (noisy.std() - 0.5).abs() < 0.02


NOISY = {
    "noisy_topk": lambda logits, **o: routing.noisy_top_k_route(logits, logits.flip(1), 2, **o)[:2],
    "sparsemixer": lambda logits, **o: routing.sparsemixer_route(logits, 2, jitter=5.0, **o)[:2],
    "gshard": lambda logits, **o: routing.gshard_route(logits, 6, second="random", **o)[:2],
    "gshard_sampling": lambda logits, **o: routing.gshard_route(logits, 6, second="sampling", **o)[:2],
}


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("seed", [None, 11])
@pytest.mark.parametrize("name", NOISY)
def test_noise_is_the_same_in_a_recomputation(name, seed, use_reentrant):
    x = torch.randn(20, 8, requires_grad=True)
    weight = torch.randn(6, 8, requires_grad=True)
    w1, w2 = experts(dtype=torch.float32)
    picked = []

    def layer(x, weight):
        ids, weights = NOISY[name](x @ weight.T, seed=seed)
        picked.append(ids)
        return moe(x, ids, weights, w1, w2)

    torch.manual_seed(2)
    wanted = torch.autograd.grad(layer(x, weight).square().sum(), (x, weight))
    torch.manual_seed(2)
    # With a seed the state of the generator need not be kept.
    options = {"use_reentrant": use_reentrant, "preserve_rng_state": seed is None}
    checkpoint(layer, x, weight, **options).square().sum().backward()
    assert len(picked) == 3
    assert torch.equal(picked[0], picked[1])
    assert torch.equal(picked[1], picked[2])
    for tensor, want in zip((x, weight), wanted, strict=True):
        assert torch.equal(tensor.grad, want)
    torch.manual_seed(9)
    ids, _ = NOISY[name](x @ weight.T, seed=None if seed is None else seed + 1)
    assert not torch.equal(ids, picked[0])


# Shazeer's noisy top-k


def tensor2tensor_gating(clean, raw_noise, noise, k, eps=1e-2):
    """tensor2tensor/utils/expert_utils.py: noisy_top_k_gating and _prob_in_top_k."""
    std = F.softplus(raw_noise) + eps
    noisy = clean + noise * std
    top_logits, top_ids = noisy.topk(k + 1)
    gates = torch.zeros_like(clean).scatter(1, top_ids[:, :k], top_logits[:, :k].softmax(1))
    threshold_if_in, threshold_if_out = top_logits[:, k : k + 1], top_logits[:, k - 1 : k]
    is_in = noisy > threshold_if_in
    distribution = torch.distributions.Normal(0.0, 1.0)
    if_in = distribution.cdf((clean - threshold_if_in) / std)
    if_out = distribution.cdf((clean - threshold_if_out) / std)
    return gates, torch.where(is_in, if_in, if_out)


@needs_float64
def test_noisy_top_k_is_that_of_tensor2tensor():
    clean, raw = (torch.randn(30, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    noise = routing.normal(clean, seed=4)
    gates, load = tensor2tensor_gating(clean, raw, noise, 3)
    ours = routing.noisy_top_k_route(clean, raw, 3, seed=4)
    torch.testing.assert_close(dense(ours.ids, ours.weights, 8), gates)
    torch.testing.assert_close(ours.load, load)
    direction = torch.randn_like(gates)
    for mine, theirs in ((dense(ours.ids, ours.weights, 8), gates), (ours.load, load)):
        grads = torch.autograd.grad((mine * direction).sum(), (clean, raw), retain_graph=True)
        wanted = torch.autograd.grad((theirs * direction).sum(), (clean, raw), retain_graph=True)
        torch.testing.assert_close(grads, wanted)


def test_noisy_top_k_without_noise():
    logits = torch.randn(30, 8)
    ours = routing.noisy_top_k_route(logits, torch.randn(30, 8), 3, training=False)
    plain = functional.route(logits, 3, order="topk_score")
    assert torch.equal(ours.ids, plain.ids)
    assert torch.equal(ours.weights, plain.weights)
    assert torch.equal(ours.load.sum(0), torch.bincount(plain.ids.flatten(), minlength=8).float())


# Hash routing


def test_hash_route_is_that_of_deepseek_v4():
    module = pytest.importorskip(
        "transformers.models.deepseek_v4.modeling_deepseek_v4", reason="needs transformers"
    )
    config = SimpleNamespace(
        num_experts_per_tok=3,
        num_local_experts=8,
        hidden_size=12,
        scoring_func="sqrtsoftplus",
        routed_scaling_factor=1.5,
        vocab_size=50,
    )
    router = module.DeepseekV4HashRouter(config)
    torch.nn.init.normal_(router.weight)
    router.tid2eid.copy_(routing.hash_table(50, 8, 3))
    tokens = torch.randint(0, 50, (2, 10))
    x = torch.randn(2, 10, 12)
    logits, weights, ids = router(x, tokens)
    ours = routing.hash_route(
        logits, router.tid2eid, tokens, score="sqrt_softplus", renormalize=True, scale=1.5
    )
    assert torch.equal(ours.ids, ids)
    torch.testing.assert_close(ours.weights, weights)
    torch.testing.assert_close(ours.scores, F.softplus(logits).sqrt())


def test_hash_table_spreads_tokens():
    table = routing.hash_table(4000, 16, 4, seed=1)
    assert table.shape == (4000, 4)
    assert (table.sort(1).values.diff(dim=1) > 0).all()
    counts = torch.bincount(table.flatten(), minlength=16)
    assert (counts - 1000).abs().max() < 150
    assert torch.equal(table, routing.hash_table(4000, 16, 4, seed=1))
    assert not torch.equal(table, routing.hash_table(4000, 16, 4, seed=2))


# Experts without weights, shared experts


@needs_float64
def test_identity_experts_are_those_of_longcat():
    module = pytest.importorskip(
        "transformers.models.longcat_flash.modeling_longcat_flash", reason="needs transformers"
    )
    config = SimpleNamespace(
        num_experts_per_tok=3,
        num_local_experts=6,
        n_routed_experts=6,
        zero_expert_num=4,
        hidden_size=8,
        expert_ffn_hidden_size=5,
        hidden_act="silu",
        routed_scaling_factor=6.0,
    )
    block = module.LongcatFlashMoE(config).double()
    for tensor in (*block.parameters(), *block.buffers()):
        torch.nn.init.normal_(tensor, std=0.3)
    x = torch.randn(1, 40, 8, dtype=torch.float64)
    wanted = block(x)[0]
    router = block.router
    logits, its_weights, its_ids = router(x)
    ids, weights, _ = functional.route(logits, 3, scale=6.0, bias=router.e_score_correction_bias)
    assert (ids >= 6).any()
    its_order = its_ids.sort(1).indices  # it picks experts in no order
    torch.testing.assert_close(ids.sort(1).values, its_ids.gather(1, its_order))
    torch.testing.assert_close(weights.gather(1, ids.sort(1).indices), its_weights.gather(1, its_order))
    ids, weights = its_ids, its_weights  # which are float32, and the experts float64
    w1, w2 = block.experts.gate_up_proj[:6], block.experts.down_proj
    y = moe(x[0], ids, weights, w1, w2) + routing.identity_weight(ids, weights, 6)[:, None] * x[0]
    torch.testing.assert_close(y, wanted)


def test_skipped_tokens_are_those_of_zaya():
    module = pytest.importorskip("transformers.models.zaya.modeling_zaya", reason="needs transformers")
    config = SimpleNamespace(
        num_experts=4, hidden_size=8, num_experts_per_tok=1, router_hidden_size=6, rms_norm_eps=1e-6
    )
    router = module.ZayaRouter(config, layer_idx=0)
    for tensor in (*router.parameters(), *router.buffers()):
        torch.nn.init.normal_(tensor)
    router.balancing_biases.zero_()
    x = torch.randn(1, 50, 8)
    logits, theirs, their_ids, _ = router(x)
    ids, weights, _ = functional.route(logits, 1, bias=router.balancing_biases)
    assert (ids == 4).any()
    torch.testing.assert_close(dense(ids, weights, 4), dense(their_ids, theirs, 4))


def test_shared_experts_are_weighed_as_in_inkling():
    module = pytest.importorskip("transformers.models.inkling.modeling_inkling", reason="needs transformers")
    config = SimpleNamespace(
        n_routed_experts=8, n_shared_experts=2, hidden_size=12, route_scale=8.0, num_experts_per_tok=3
    )
    router = module.InklingTopkRouter(config)
    for tensor in (*router.parameters(), *router.buffers()):
        torch.nn.init.normal_(tensor)
    x = torch.randn(30, 12)
    _, theirs, their_ids, their_shared = router(x)
    ours = routing.route_with_shared(
        F.linear(x, router.weight), 2, 3, scale=8.0, bias=router.e_score_correction_bias
    )
    scale = router.global_scale
    torch.testing.assert_close(dense(ours.ids, ours.weights * scale, 8), dense(their_ids, theirs, 8))
    torch.testing.assert_close(ours.shared_weights * scale, their_shared)
    total = ours.weights.sum(1) + ours.shared_weights.sum(1)
    torch.testing.assert_close(total, torch.full((30,), 8.0))


# SparseMixer, product keys


@pytest.mark.parametrize("training", [False, True])
def test_sparsemixer_is_that_of_phimoe(training):
    module = pytest.importorskip("transformers.models.phimoe.modeling_phimoe", reason="needs transformers")
    logits = torch.randn(200, 8, requires_grad=True)
    torch.manual_seed(1)
    theirs, their_ids = module.sparsemixer(logits, jitter_eps=0.3, training=training)
    torch.manual_seed(1)
    ids, weights, scores = routing.sparsemixer_route(logits, 2, jitter=0.3, training=training)
    torch.testing.assert_close(scores, logits.softmax(1))
    assert torch.equal(ids, their_ids)
    if training:
        assert (ids[:, 0] != logits.argmax(1)).any()
        # They draw the coin of the second pick twice, so it may fall otherwise: the factor is 1 or 0.3333.
        torch.testing.assert_close(weights[:, 0], theirs[:, 0])
        ratio = weights[:, 1] / theirs[:, 1]
        assert torch.stack([(ratio - f).abs() for f in (1, 0.3333, 1 / 0.3333)]).amin(0).max() < 1e-4
    else:
        torch.testing.assert_close(weights, theirs)
    direction = torch.randn_like(weights)
    (grad,) = torch.autograd.grad(weights, logits, direction)
    (wanted,) = torch.autograd.grad(theirs, logits, direction)
    torch.testing.assert_close(grad, wanted, rtol=1e-4, atol=1e-6)


def test_sparsemixer_of_any_k():
    ids, weights, _ = routing.sparsemixer_route(torch.randn(20, 5), 5, seed=1)
    assert torch.equal(ids.sort(1).values, torch.arange(5).expand(20, 5))
    torch.testing.assert_close(weights[:, -1], torch.ones(20))


@pytest.mark.parametrize("top_k", [1, 3, 20])
def test_product_keys_find_the_best_of_all_pairs(top_k):
    rows, columns = (torch.randn(30, 6, requires_grad=True) for _ in range(2))
    ids, weights, _ = routing.product_key_route(rows, columns, top_k)
    sums = (rows[:, :, None] + columns[:, None, :]).flatten(1)
    plain = functional.route(sums, top_k, order="topk_score")
    assert torch.equal(ids, plain.ids)
    torch.testing.assert_close(weights, plain.weights)
    direction = torch.randn_like(weights)
    for tensor in (rows, columns):
        grads = [
            torch.autograd.grad(w, tensor, direction, retain_graph=True) for w in (weights, plain.weights)
        ]
        torch.testing.assert_close(*grads)


def test_product_keys_are_those_of_doge():
    module = pytest.importorskip("transformers.models.doge.modeling_doge", reason="needs transformers")
    config = SimpleNamespace(
        hidden_size=8,
        intermediate_size=6,
        hidden_act="silu",
        num_experts=25,
        num_experts_per_tok=4,
        norm_topk_prob=False,
        mlp_bias=False,
    )
    block = module.DogeCDMoE(config)
    x = torch.randn(1, 12, 8)
    wanted, logits = block(x)
    rows, columns = logits
    ids, weights, _ = routing.product_key_route(rows, columns, 4)
    hidden = F.silu((block.down_embed(ids) @ x[0, :, :, None])[..., 0]) * weights
    routed = (hidden[:, None] @ block.up_embed(ids))[:, 0]
    shared = block.down_proj(F.silu(block.gate_proj(x)) * block.up_proj(x))
    torch.testing.assert_close(shared + routed, wanted)


# Capacity


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
    w1, w2 = experts()
    ids, weights, scores = routing.expert_choice_route(x @ weight.T, capacity)
    wanted = torch.zeros(20, 6, dtype=torch.float64)
    for e in range(6):
        gates, tokens = (x @ weight.T).softmax(1)[:, e].topk(min(capacity, 20))
        wanted[tokens, e] = gates
    torch.testing.assert_close(dense(ids, weights, 6), wanted)
    assert torch.equal((ids >= 0).sum(0), torch.full((6,), min(capacity, 20)))
    y = moe(x, ids, weights, w1, w2, rows=6 * min(capacity, 20))
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
    x, (w1, w2) = torch.randn(12, 8), experts(4, dtype=torch.float32)
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
    x, (w1, w2) = torch.randn(40, 8), experts(dtype=torch.float32)
    y = moe(x, ids, weights, w1, w2, rows=40 * 2 + 6 * tile)
    torch.testing.assert_close(y, by_dense_weights(x, weights, w1, w2), rtol=1e-4, atol=1e-4)


def test_rounding_up_stops_at_the_number_of_tokens():
    plain = functional.route(torch.tensor([[1.0, 0.0]]).repeat(10, 1), 1)
    ids, _, _ = routing.round_tokens(plain, 8, rounding="up")
    assert (ids >= 0).sum(0).tolist() == [8, 0]


# Sinkhorn


def megatron_sinkhorn(cost, tol=1e-6):
    """megatron/core/transformer/moe/moe_utils.py: sinkhorn."""
    cost = torch.exp(cost)
    d0, d1 = torch.ones(cost.size(0)), torch.ones(cost.size(1))
    eps, error, d1_old = 0.00000001, 1e9, d1
    while error > tol:
        d0 = (1 / d0.size(0)) * 1 / (torch.sum(d1 * cost, 1) + eps)
        d1 = (1 / d1.size(0)) * 1 / (torch.sum(d0.unsqueeze(1) * cost, 0) + eps)
        error = torch.mean(torch.abs(d1_old - d1))
        d1_old = d1
    return d1 * cost * d0.unsqueeze(1)


@pytest.mark.parametrize("top_k", [1, 2])
def test_sinkhorn_is_that_of_megatron(top_k):
    logits = 2 * torch.randn(64, 8) + torch.linspace(-2, 2, 8)
    wanted = megatron_sinkhorn(logits)
    torch.testing.assert_close(routing.sinkhorn(logits), wanted, rtol=1e-3, atol=1e-7)
    ids, weights, scores = routing.sinkhorn_route(logits, top_k)
    assert torch.equal(ids.sort(1).values, wanted.topk(top_k).indices.sort(1).values)
    plain = logits.sigmoid() if top_k == 1 else logits.softmax(1)
    torch.testing.assert_close(weights, plain.gather(1, ids))
    torch.testing.assert_close(scores, plain)
    counts = torch.bincount(ids.flatten(), minlength=8)
    free = torch.bincount(logits.topk(top_k).indices.flatten(), minlength=8)
    assert counts.float().std() < free.float().std()
    evaluated = routing.sinkhorn_route(logits, top_k, training=False)
    assert torch.equal(evaluated.ids, functional.route(logits, top_k).ids)


def test_sinkhorn_survives_large_logits():
    plan = routing.sinkhorn(1e4 * torch.randn(16, 4))
    assert plan.isfinite().all()
    torch.testing.assert_close(plan.sum(0), torch.full((4,), 0.25))


# Balance


def test_selection_bias_moves_against_the_load():
    bias = torch.zeros(4)
    routing.update_selection_bias(bias, torch.tensor([8, 0, 4, 4]), rate=0.1)
    torch.testing.assert_close(bias, torch.tensor([-0.1, 0.1, 0.0, 0.0]))


def test_selection_bias_balances_a_skewed_router():
    logits = torch.randn(512, 8) + torch.linspace(-1, 1, 8)
    bias = torch.zeros(8)
    loads = []
    for _ in range(200):
        ids = functional.route(logits, 2, score="sigmoid", bias=bias).ids
        counts = torch.bincount(ids.flatten(), minlength=8)
        routing.update_selection_bias(bias, counts, rate=5e-3)
        loads.append(counts.max() / counts.float().mean())
    assert loads[0] > 1.5
    assert loads[-1] < 1.1


# All of them


ROUTES = {
    **NOISY,
    "product_keys": lambda logits, seed: routing.product_key_route(logits, logits.flip(1), 3)[:2],
    "shared": lambda logits, seed: routing.route_with_shared(logits, 2, 3)[:2],
    "expert_choice": lambda logits, seed: routing.expert_choice_route(logits, 5)[:2],
    "sinkhorn": lambda logits, seed: routing.sinkhorn_route(logits, 2, iterations=5)[:2],
    "token_rounding": lambda logits, seed: routing.round_tokens(functional.route(logits, 2), 4)[:2],
    "hash": lambda logits, seed: routing.hash_route(logits, TABLE, torch.arange(20))[:2],
    "jitter": lambda logits, seed: functional.route(routing.logit_noise(logits, 0.5, seed=seed), 2)[:2],
}
TABLE = routing.hash_table(20, 6, 2)


INDUCTOR = pytest.mark.cpu_only(reason="inductor writes the code of CPU tensors for an emulated GPU too")


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=INDUCTOR)])
@pytest.mark.parametrize("name", ROUTES)
def test_compiles_without_a_graph_break(name, backend):
    torch._dynamo.reset()
    logits = torch.randn(20, 6, requires_grad=True)
    seed = torch.tensor(5)
    compiled = torch.compile(ROUTES[name], fullgraph=True, backend=backend)
    (ids, weights), (want_ids, want) = compiled(logits, seed=seed), ROUTES[name](logits, seed=seed)
    assert torch.equal(ids, want_ids)
    torch.testing.assert_close(weights, want)
    (grad,) = torch.autograd.grad(weights.square().sum(), logits)
    torch.testing.assert_close(grad, torch.autograd.grad(want.square().sum(), logits)[0])


@pytest.mark.parametrize("name", ROUTES)
def test_no_tokens(name):
    if name == "hash":
        ids, weights = routing.hash_route(torch.empty(0, 6), TABLE, torch.arange(0))[:2]
    else:
        ids, weights = ROUTES[name](torch.empty(0, 6), seed=3)
    assert ids.shape == weights.shape
    assert len(ids) == 0


@pytest.mark.parametrize("name", ROUTES)
def test_half_precision_logits_get_float32_weights(name):
    ids, weights = ROUTES[name](torch.randn(20, 6, dtype=torch.bfloat16), seed=3)
    assert ids.dtype == torch.int64
    assert weights.dtype == torch.float32
    assert ids.shape == weights.shape


# Sparsemixer's gradient is an estimate, and not the derivative of the sampled weight.
@needs_float64
@pytest.mark.parametrize("name", sorted(ROUTES.keys() - {"sparsemixer"}))
def test_gradient_of_the_weights(name):
    logits = torch.randn(20, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda logits: ROUTES[name](logits, seed=torch.tensor(5))[1], logits)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: routing.hash_table(9, 4, 5), "top_k: got 5, wanted 1 to 4"),
        (
            lambda: routing.hash_route(torch.randn(3, 4), torch.zeros(9, 1).long(), torch.zeros(2).long()),
            "token_ids",
        ),
        (lambda: routing.sparsemixer_route(torch.randn(3, 4), 5), "top_k: got 5, wanted 1 to 4"),
        (
            lambda: routing.product_key_route(torch.randn(3, 4), torch.randn(3, 5), 2),
            "column_logits: got shape",
        ),
        (lambda: routing.route_with_shared(torch.randn(3, 4), 0, 2), "num_shared: got 0, wanted at least 1"),
        (
            lambda: routing.drop_over_capacity(torch.zeros(4, 2).long(), 3, 1, queue="fair"),
            "queue: got 'fair'",
        ),
        (
            lambda: routing.drop_over_capacity(torch.zeros(4, 2).long(), 3, 1, queue="score"),
            "weights: got None",
        ),
        (
            lambda: routing.drop_over_capacity(torch.zeros(4, 2).long(), 3, 1, group_size=3),
            "group_size: got 3, wanted a divisor of 4",
        ),
        (lambda: routing.drop_over_capacity(torch.zeros(4, 2).long(), 3, -1), "capacity: got -1"),
        (lambda: routing.gshard_route(torch.randn(4, 3), 1, second="third"), "second: got 'third'"),
        (lambda: routing.gshard_route(torch.randn(4, 1), 1), "top_k: got 2, wanted 1 to 1"),
        (lambda: routing.expert_choice_route(torch.randn(4, 3), -1), "capacity: got -1, wanted at least 0"),
        (lambda: routing.round_tokens(functional.route(torch.randn(4, 3), 1), 0), "tile: got 0"),
        (
            lambda: routing.round_tokens(functional.route(torch.randn(4, 3), 1), 2, rounding="even"),
            "rounding",
        ),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()

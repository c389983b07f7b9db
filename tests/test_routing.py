"""The routers of fastmoe_rs.routing, each against a plain transcription of where it comes from."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from fastmoe_rs import functional, routing
from moe_cases import dense, needs_float64, routed_mlp

# Shazeer's noisy top-k


def tensor2tensor_gating(clean, raw_noise, noise, k):
    """tensor2tensor/utils/expert_utils.py: noisy_top_k_gating and _prob_in_top_k."""
    std = F.softplus(raw_noise) + 1e-2
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
    y = routed_mlp(x[0], ids, weights, w1, w2) + routing.identity_weight(ids, weights, 6)[:, None] * x[0]
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
    ids, weights, scores = routing.sparsemixer_route(logits, 2, nearness=0.3, training=training)
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


# Sinkhorn


def megatron_sinkhorn(cost):
    """megatron/core/transformer/moe/moe_utils.py: sinkhorn."""
    cost = torch.exp(cost)
    d0, d1 = torch.ones(cost.size(0)), torch.ones(cost.size(1))
    eps, error, d1_old = 0.00000001, 1e9, d1
    while error > 1e-6:
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


NOISY = {
    "noisy_topk": lambda logits, **o: routing.noisy_top_k_route(logits, logits.flip(1), 2, **o)[:2],
    "sparsemixer": lambda logits, **o: routing.sparsemixer_route(logits, 2, nearness=5.0, **o)[:2],
    "gshard": lambda logits, **o: routing.gshard_route(logits, 6, second="random", **o)[:2],
    "gshard_sampling": lambda logits, **o: routing.gshard_route(logits, 6, second="sampling", **o)[:2],
}
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
        (
            lambda: routing.drop_over_capacity(torch.zeros(4, 2).long(), 3, 1, weights=torch.ones(2, 4)),
            r"weights: got shape \(2, 4\), wanted \[T, K\] = \(4, 2\)",
        ),
        (
            lambda: routing.update_selection_bias(torch.zeros(4), torch.ones(3)),
            r"routes: got shape \(3,\), wanted \[E\] = \(4,\)",
        ),
        (
            lambda: routing.noisy_top_k_route(torch.randn(4, 3), torch.randn(4, 2), 1),
            r"noise_logits: got shape \(4, 2\), wanted \[T, E\] = \(4, 3\)",
        ),
        (
            lambda: routing.route_with_shared(torch.randn(4, 3), 3, 1),
            "num_shared: got 3, wanted less than the 3 columns of logits",
        ),
        (lambda: routing.sinkhorn(torch.randn(4, 3), 0), "iterations: got 0, wanted at least 1"),
        (lambda: routing.sinkhorn(torch.randn(4)), r"logits: got shape \(4,\), wanted \[T, E\]"),
        (
            lambda: routing.sparsemixer_route(torch.randn(4, 3), 1, nearness=-1.0),
            r"nearness: got -1\.0, wanted at least 0",
        ),
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


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: routing.hash_route(torch.randn(1, 3), TABLE, [0]),
            "token_ids: got list, wanted a torch tensor of one element per token",
        ),
        (
            lambda: routing.uniform(torch.empty(3), seed=1.5),
            "seed: got float, wanted a torch tensor of one element, a whole number or None",
        ),
        (
            lambda: routing.expert_choice_route(torch.randn(4, 3), 1.5),
            r"capacity: got 1\.5, wanted a whole number",
        ),
        (
            lambda: routing.sparsemixer_route(torch.randn(4, 3), 1.0),
            r"top_k: got 1\.0, wanted a whole number",
        ),
    ],
)
def test_wrong_types(call, message):
    with pytest.raises(TypeError, match=message):
        call()

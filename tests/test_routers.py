"""What every router does in a layer: its function, replayed, checkpointed, compiled, saved, watched."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from fastmoe_rs import (
    functional,
    losses,
    record_routing,
    replay_routing,
    routing,
    watch,
)
from moe_cases import WIDEST
from router_cases import ROUTERS, TOKENS, E, H, T, all_experts, assert_close, build, inputs


def by_function(name, router, logits, x):
    """ids asked for, ids served, weights."""
    training, seed = router.training, router.seed
    scores = logits.softmax(1)
    if name == "groups":
        options = {"score": "sigmoid", "renormalize": True, "n_group": 3, "topk_group": 2}
        ids, weights, _ = functional.route(logits, 2, **options, bias=router.selection_bias)
        return ids, ids, weights
    if name == "gemma":
        ids, weights, _ = functional.route(logits, 2, softcap=5.0, expert_scale=router.expert_scale)
        return ids, ids, weights
    if name == "switch":
        weights, ids = scores.max(1, keepdim=True)
        return ids, routing.drop_over_capacity(ids, E, math.ceil(0.75 * T / E)), weights
    if name == "capacity":
        weights, ids = scores.topk(2)
        options = {"queue": "score", "weights": weights, "group_size": 12}
        return ids, routing.drop_over_capacity(ids, E, math.ceil(0.75 * 2 * 12 / E), **options), weights
    if name.startswith("gshard"):
        factor = 1.0 if name == "gshard" else 0.5
        second = "random" if name == "gshard" else "sampling"
        options = {"second": second, "training": training, "seed": seed}
        ids, weights, _ = routing.gshard_route(logits, math.ceil(factor * 2 * T / E), **options)
        return None, ids, weights
    if name == "logit_noise":
        ids, weights, _ = functional.route(logits, 2)
    if name == "shared":
        both = torch.cat([logits, x @ router.shared_weight.T], dim=1)
        ids, weights, _, _ = routing.route_with_shared(both, 2, 2, scale=8.0, bias=router.selection_bias)
    if name == "noisy":
        noise_logits = x @ router.noise_weight.T
        ids, weights, _, _ = routing.noisy_top_k_route(logits, noise_logits, 2, training=training, seed=seed)
    if name == "expert_choice":
        ids, weights, _ = routing.expert_choice_route(logits, math.ceil(1.5 * T / E))
    if name == "sinkhorn":
        ids, weights, _ = routing.sinkhorn_route(logits, 2, training=training, iterations=10)
    if name == "hash":
        ids, weights, _ = routing.hash_route(logits, router.table, TOKENS, renormalize=True)
    if name == "rounding":
        routed = functional.route(logits, 2, score="sigmoid")
        ids, weights, _ = routing.round_tokens(routed, 4) if training else routed
    if name == "sparsemixer":
        ids, weights, _ = routing.sparsemixer_route(logits, 2, nearness=5.0, training=training, seed=seed)
    return ids, ids, weights


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ROUTERS)
def test_layer_does_what_the_function_says(name, training):
    moe = build(name, dtype=WIDEST).train(training)
    moe.router.seed = 5
    x = torch.randn(T, H, dtype=WIDEST, requires_grad=True)
    y, stats = moe(x, return_stats=True, **inputs(name))
    routed = x
    if moe.router.jitter and training:
        routed = routing.input_jitter(x, 0.1, seed=5)
    logits = F.linear(routed, moe.router.weight, moe.router.bias)
    if moe.router.logit_noise and training:
        logits = routing.logit_noise(logits, 0.5, seed=5)
    asked, served, weights = by_function(name, moe.router, logits, routed)
    wanted = all_experts(moe, x, served, weights)
    assert_close(y, wanted)
    parameters = (x, *moe.parameters())
    grads = torch.autograd.grad(y.square().sum(), parameters, allow_unused=True)
    expected = torch.autograd.grad(wanted.square().sum(), parameters, allow_unused=True)
    for grad, want in zip(grads, expected, strict=True):
        assert (grad is None) == (want is None)
        if want is not None:
            assert_close(grad, want)
    if asked is not None:
        assert torch.equal(stats.router.ids, asked)
        real = asked[(asked >= 0) & (asked < E)]
        assert torch.equal(stats.routes, torch.bincount(real, minlength=E))
        refused = ((served < 0) & (asked >= 0)).sum() / len(real)
        torch.testing.assert_close(stats.dropped, refused)
    assert torch.equal(stats.counts, torch.bincount(served[served >= 0], minlength=E).int())
    torch.testing.assert_close(stats.load.sum(), torch.tensor(1.0))


@pytest.mark.parametrize("name", ROUTERS)
def test_recorded_routing_is_followed(name):
    """Also what a capacity dropped, with the weights of live logits."""
    model = torch.nn.Sequential(build(name, dtype=WIDEST)).eval()
    if name.startswith("gshard"):
        model.train()
    x = torch.randn(T, H, dtype=WIDEST)
    layer = model[0]
    with record_routing(model) as recorded:
        wanted = layer(x, **inputs(name))
    with replay_routing(model, recorded):
        torch.testing.assert_close(layer(x, **inputs(name)), wanted)
        layer(x, **inputs(name)).sum().backward()
    assert layer.router.weight.grad.isfinite().all()


@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize("name", ROUTERS)
def test_checkpointing_routes_the_recomputation_the_same(name, seed):
    moe = build(name)
    moe.router.seed = seed
    x = torch.randn(T, H, requires_grad=True)
    parameters = [x, *(p for p in moe.parameters())]

    def forward(x):
        y, stats = moe(x, return_stats=True, **inputs(name))
        return y.square().sum() + losses.router_z_loss(stats.router.logits)

    torch.manual_seed(1)
    wanted = torch.autograd.grad(forward(x), parameters, allow_unused=True)
    torch.manual_seed(1)
    loss = checkpoint(forward, x, use_reentrant=False, preserve_rng_state=seed is None)
    for grad, want in zip(torch.autograd.grad(loss, parameters, allow_unused=True), wanted, strict=True):
        assert (grad is None and want is None) or torch.equal(grad, want)


@pytest.mark.parametrize("name", ROUTERS)
def test_compiles_without_a_graph_break(name):
    torch._dynamo.reset()
    moe = build(name)
    moe.router.seed = 3
    x = torch.randn(T, H, requires_grad=True)
    compiled = torch.compile(moe, fullgraph=True, backend="aot_eager")
    y, wanted = compiled(x, **inputs(name)), moe(x, **inputs(name))
    torch.testing.assert_close(y, wanted)
    torch.testing.assert_close(*(torch.autograd.grad(value.sum(), x) for value in (y, wanted)))


@pytest.mark.parametrize("name", ROUTERS)
def test_meta_device_then_real_and_saved(name):
    moe = build(name, device="meta")
    meta = {"token_ids": TOKENS.to("meta")} if name == "hash" else {}
    y, stats = moe(torch.empty(T, H, device="meta"), return_stats=True, **meta)
    assert y.is_meta
    assert stats.load.is_meta
    assert stats.dropped.is_meta
    moe.to_empty(device="cpu")
    for module in moe.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    x = torch.randn(T, H)
    moe.eval()
    y = moe(x, **inputs(name))
    assert y.isfinite().all()
    again = build(name).eval()
    again.load_state_dict(moe.state_dict())
    assert torch.equal(again(x, **inputs(name)), y)


@pytest.mark.parametrize("name", ROUTERS)
def test_no_tokens_and_half_precision(name):
    moe = build(name, dtype=torch.bfloat16)
    tokens = {"token_ids": TOKENS[:0]} if name == "hash" else {}
    assert moe(torch.empty(0, H, dtype=torch.bfloat16), **tokens).shape == (0, H)
    y = moe(torch.randn(2, T // 2, H, dtype=torch.bfloat16), **inputs(name))
    assert y.dtype == torch.bfloat16
    assert y.shape == (2, T // 2, H)


@pytest.mark.parametrize("name", ROUTERS)
def test_watched(name):
    model = torch.nn.ModuleList([build(name)])
    watched = watch(model)
    _, stats = model[0](torch.randn(T, H), return_stats=True, **inputs(name))
    counted = watched.stats()["0"]
    assert torch.equal(counted.routes, stats.routes)
    torch.testing.assert_close(counted.load, stats.load)
    torch.testing.assert_close(counted.dropped, stats.dropped)
    assert counted.router_entropy.isfinite()
    watched.close()

"""Routers as modules of nn.MoE: each against its function, replayed, checkpointed, compiled; stats."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from fastmoe_rs import (
    RoutingPlan,
    functional,
    losses,
    nn,
    record_routing,
    replay_routing,
    routing,
    telemetry,
    watch,
)
from fastmoe_rs.functional import Routing
from moe_cases import WIDEST, by_dense_weights, dense

T, H, I, E = 24, 8, 5, 6
TOKENS = torch.arange(T) % 7

ROUTERS = {
    "groups": lambda **o: nn.Router(
        H, E, 2, score="sigmoid", n_group=3, topk_group=2, selection_bias=True, renormalize=True, **o
    ),
    "gemma": lambda **o: nn.Router(H, E, 2, expert_scale=True, bias=True, softcap=5.0, **o),
    "switch": lambda **o: nn.CapacityRouter(H, E, 1, capacity_factor=0.75, jitter=0.1, **o),
    "capacity": lambda **o: nn.CapacityRouter(
        H, E, 2, capacity_factor=0.75, queue="score", group_size=12, **o
    ),
    "gshard": lambda **o: nn.GShardRouter(H, E, **o),
    "gshard_sampling": lambda **o: nn.GShardRouter(H, E, second="sampling", capacity_factor=0.5, **o),
    "noisy": lambda **o: nn.NoisyTopKRouter(H, E, 2, **o),
    "expert_choice": lambda **o: nn.ExpertChoiceRouter(H, E, capacity_factor=1.5, **o),
    "sinkhorn": lambda **o: nn.SinkhornRouter(H, E, 2, iterations=10, **o),
    "hash": lambda **o: nn.HashRouter(H, E, 2, vocab_size=7, renormalize=True, **o),
    "logit_noise": lambda **o: nn.Router(H, E, 2, logit_noise=0.5, **o),
    "shared": lambda **o: nn.SharedRouter(H, E, 2, num_shared=2, scale=8.0, selection_bias=True, **o),
    "sparsemixer": lambda **o: nn.SparseMixerRouter(H, E, 2, nearness=5.0, **o),
    "rounding": lambda **o: nn.TokenRoundingRouter(H, E, 2, score="sigmoid", tile=4, **o),
}


def build(name, **options):
    router = ROUTERS[name](**options)
    moe = nn.MoE(H, I, E, router=router, **options)
    if moe.experts.w1.is_meta:
        return moe
    with torch.no_grad():
        for tensor in (*moe.parameters(), *moe.buffers()):
            if tensor.is_floating_point():
                tensor.normal_()
    return moe


def inputs(name):
    return {"token_ids": TOKENS} if name == "hash" else {}


def all_experts(moe, x, ids, weights):
    return by_dense_weights(x, dense(ids, weights.to(x.dtype), E), moe.experts.w1, moe.experts.w2)


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


def assert_close(actual, expected):
    """Near by element; in float32, the most that an emulated GPU has, in units of the largest one."""
    largest = 1 if torch.float64 == WIDEST else expected.abs().max().clamp(min=1)
    torch.testing.assert_close(actual / largest, expected / largest)


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


# Routers of one's own


class Uniform(torch.nn.Module):
    """Sends token t to expert t modulo Z, with the plain output of a router function."""

    def __init__(self, experts=E + 2):
        super().__init__()
        self.experts = experts
        self.weight = torch.nn.Parameter(torch.randn(E, H, dtype=WIDEST))

    def forward(self, x, ids=None):
        ids = torch.arange(len(x))[:, None] % self.experts if ids is None else ids
        scores = (x @ self.weight.T).softmax(1)
        return Routing(ids, scores.gather(1, ids.clamp(0, E - 1)), scores)


def test_any_module_that_returns_a_routing():
    moe = nn.MoE(H, I, E, router=Uniform(), dtype=WIDEST)
    x = torch.randn(T, H, dtype=WIDEST)
    y, stats = moe(x, return_stats=True)
    ids = torch.arange(T)[:, None] % (E + 2)
    scores = (x @ moe.router.weight.T).softmax(1)
    torch.testing.assert_close(y, all_experts(moe, x, ids, scores.gather(1, ids.clamp(max=E - 1))))
    assert (y[ids[:, 0] >= E] == 0).all()
    # Ids from E on are routed to nobody: they are neither load nor dropped.
    assert stats.routes.tolist() == [T // (E + 2)] * E
    torch.testing.assert_close(stats.load, torch.full((E,), 1 / E))
    assert stats.dropped == 0
    torch.testing.assert_close(stats.router.logits.softmax(1), scores)
    model = torch.nn.Sequential(moe)
    watched = watch(model)
    with record_routing(model) as recorded:
        assert torch.equal(model(x), y)
    with replay_routing(model, recorded):
        assert torch.equal(model(x), y)
    torch.testing.assert_close(watched.stats()["0"].load, stats.load)


class Exploring(nn.Router):
    """A tenth of the tokens go anywhere while it trains, the example of docs/routing.md."""

    def choose(self, logits, x):
        if not self.training:
            return super().choose(logits, x)
        anywhere = torch.rand(len(x), 1, device=x.device) < 0.1
        ids = torch.where(anywhere, torch.rand_like(logits), logits).topk(self.top_k).indices
        return self.chosen(logits, x, ids)


def test_choice_of_a_subclass():
    moe = nn.MoE(H, I, E, router=Exploring(H, E, 2, renormalize=True, dtype=WIDEST), dtype=WIDEST)
    x = torch.randn(T, H, dtype=WIDEST)
    y, stats = moe(x, return_stats=True)
    logits, ids = x @ moe.router.weight.T, stats.router.ids
    plain = functional.route(logits, 2, renormalize=True)
    assert 0 < (ids != plain.ids).any(1).sum() < T / 2
    weights = functional.route_weights(logits, ids, renormalize=True)
    torch.testing.assert_close(y, all_experts(moe, x, ids, weights))
    moe.eval()
    torch.testing.assert_close(moe(x), all_experts(moe, x, plain.ids, plain.weights))


@pytest.mark.parametrize("rounding", ["nearest", "up", "down"])
def test_token_rounding_fills_whole_tiles(rounding):
    moe = nn.MoE(H, I, E, router=nn.TokenRoundingRouter(H, E, 2, tile=4, rounding=rounding))
    _, stats = moe(torch.randn(T, H), return_stats=True)
    assert (stats.routes % 4 == 0).all()
    assert stats.dropped == 0
    plain = functional.route(stats.router.logits, 2)
    assert torch.equal(stats.router.ids, routing.round_tokens(plain, 4, rounding=rounding).ids)
    assert len(stats.plan.gather) == T * 2 + 4 * E  # not the T * E that ids have room for


@pytest.mark.parametrize(
    "options", [{}, {"score": "sigmoid", "renormalize": True, "scale": 2.0, "bias": True}]
)
def test_product_keys_in_a_layer(options):
    """Nine experts by three rows and three columns are those of a plain router with all nine keys."""
    router = nn.ProductKeyRouter(H, 9, 4, **options, dtype=WIDEST)  # more than a plain one has of the 6 keys
    moe = nn.MoE(H, I, 9, router=router, dtype=WIDEST)
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.normal_()
    x = torch.randn(T, H, dtype=WIDEST, requires_grad=True)

    def of_all(rows_and_columns):
        return (rows_and_columns[:3, None] + rows_and_columns[None, 3:]).flatten(0, 1)

    logits = F.linear(x, of_all(router.weight), of_all(router.bias) if options else None)
    scoring = {name: value for name, value in options.items() if name != "bias"}
    ids, weights, scores = functional.route(logits, 4, order="topk_score", **scoring)
    model = torch.nn.Sequential(moe)
    with record_routing(model) as recorded:
        y, stats = moe(x, return_stats=True)
    assert_close(y, moe.experts(x, ids, weights))
    assert torch.equal(stats.router.ids, ids)
    assert_close(stats.router.logits, logits)
    assert_close(stats.router.scores, scores)
    grads, wanted = (
        torch.autograd.grad(out.square().sum(), (x, *router.parameters()), retain_graph=True)
        for out in (y, moe.experts(x, ids, weights))
    )
    for grad, want in zip(grads, wanted, strict=True):
        assert_close(grad, want)
    with replay_routing(model, recorded):
        torch.testing.assert_close(moe(x), y)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(moe, fullgraph=True, backend="aot_eager")(x), y)
    assert str(router).startswith(f"ProductKeyRouter({H}, 6, top_k=4")


def test_load_ignores_ids_that_are_no_expert():
    ids = torch.tensor([[0, -1], [E, 1], [-5, 10**9], [0, 2]])
    router = nn.RouterOutput(ids, torch.ones(4, 2), torch.ones(4, E), torch.ones(4, E))
    stats = nn.RoutingStats(router, RoutingPlan.from_ids(ids, E, out_of_range="drop", capacity=1))
    assert stats.routes.tolist() == [2, 1, 1, 0, 0, 0]
    torch.testing.assert_close(stats.load, torch.tensor([0.5, 0.25, 0.25, 0, 0, 0]))
    torch.testing.assert_close(stats.dropped, torch.tensor(0.25))
    assert stats.max_vio == 2
    assert torch.equal(telemetry.load(stats.routes), stats.load)


def test_identity_experts():
    moe = nn.MoE(H, I, E, 3, identity_experts=4, scale=6.0, dtype=WIDEST)
    x = torch.randn(T, H, dtype=WIDEST)
    y, stats = moe(x, return_stats=True)
    ids, weights, _ = functional.route(x @ moe.router.weight.T, 3, scale=6.0)
    assert (ids >= E).any()
    own = (weights * (ids >= E)).sum(1, keepdim=True)
    torch.testing.assert_close(y, all_experts(moe, x, ids, weights) + own * x)
    assert stats.dropped == 0
    with_zero_experts = nn.MoE(H, I, E, router=nn.Router(H, E + 4, 3, scale=6.0, dtype=WIDEST))
    with_zero_experts.to(WIDEST).load_state_dict(moe.state_dict())
    torch.testing.assert_close(with_zero_experts(x), all_experts(moe, x, ids, weights))


def test_shared_gate():
    moe = nn.MoE(H, I, E, 2, shared_intermediate_size=7, shared_gate=True, dtype=WIDEST)
    x = torch.randn(T, H, dtype=WIDEST)
    ids, weights, _ = functional.route(x @ moe.router.weight.T, 2)
    gate = 1 / (1 + (-x @ moe.shared_gate.weight.T).exp())
    torch.testing.assert_close(moe(x), all_experts(moe, x, ids, weights) + gate * moe.shared(x))


def test_shared_experts_weighed_by_the_router():
    moe = nn.MoE(
        H, I, E, router=nn.SharedRouter(H, E, 2, num_shared=3, scale=8.0), shared_intermediate_size=12
    )
    moe.to(WIDEST)
    x = torch.randn(T, H, dtype=WIDEST)
    ids, weights, _, shared_weights = routing.route_with_shared(
        x @ torch.cat([moe.router.weight, moe.router.shared_weight]).T, 3, 2, scale=8.0
    )
    wanted = all_experts(moe, x, ids, weights)
    gate, up = moe.shared.w1.chunk(2)
    for s in range(3):
        own = slice(4 * s, 4 * s + 4)
        hidden = F.silu(x @ gate[own].T) * (x @ up[own].T)
        wanted = wanted + shared_weights[:, s, None] * (hidden @ moe.shared.w2[:, own].T)
    torch.testing.assert_close(moe(x), wanted)


# Balance without an auxiliary loss


def test_selection_bias_balances_a_layer():
    moe = nn.MoE(H, I, E, 2, score="sigmoid", selection_bias=True)
    x = torch.randn(200, H) + 1
    violations = []
    for _ in range(150):
        routes = torch.zeros(E, dtype=torch.int64)
        for part in x.split(50):  # counted over the micro-batches of a step
            _, stats = moe(part, return_stats=True)
            routes += stats.routes
        violations.append(telemetry.max_vio(telemetry.load(routes)))
        moe.router.balance(routes, rate=5e-3)
    assert violations[0] > 0.5
    assert violations[-1] < 0.15
    with pytest.raises(ValueError, match="selection_bias: got a router without one"):
        nn.Router(H, E, 2).balance(routes)


def test_noisy_routers_feed_importance_and_load():
    moe = build("noisy")
    _, stats = moe(torch.randn(T, H), return_stats=True)
    router = stats.router
    loss = losses.importance_loss(router.ids, router.weights, E) + losses.load_loss(router.load)
    loss.backward()
    assert (moe.router.weight.grad != 0).any()
    assert (moe.router.noise_weight.grad != 0).any()


WEIGHING = {
    "score": "sqrt_softplus",
    "order": "topk_score",
    "scale": 3.0,
    "softcap": 0.1,
    "expert_scale": True,
}


@pytest.mark.filterwarnings("ignore:MoE. with top_k=1")
@pytest.mark.parametrize("name", ROUTERS)
def test_options_are_followed_by_the_choice_and_its_replay_or_refused(name):
    x, refused = torch.randn(T, H, dtype=WIDEST), {}

    def layer(**options):
        moe = nn.MoE(H, I, E, router=ROUTERS[name](**options), dtype=WIDEST).to(WIDEST)
        moe.router.seed = 1
        torch.manual_seed(3)
        with torch.no_grad():
            for tensor in (*moe.parameters(), *moe.buffers()):
                if tensor.is_floating_point():
                    tensor.normal_()
        return moe

    plain = layer()
    renormalizes = plain.router.options.get("renormalize", False)
    _, without = plain(x, return_stats=True, **inputs(name))
    for option, value in (WEIGHING | {"renormalize": not renormalizes}).items():
        try:
            moe = layer(**{option: value})
        except (TypeError, ValueError) as error:
            refused[option] = str(error)
            continue
        y, stats = moe(x, return_stats=True, **inputs(name))
        assert not torch.equal(stats.router.weights, without.router.weights), option
        torch.testing.assert_close(moe(x, plan=stats.plan, **inputs(name)), y)
    assert all(option in message for option, message in refused.items())


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: nn.MoE(H, I, E), ValueError, "top_k: got None, wanted K, or a router"),
        (
            lambda: nn.MoE(H, I, E, 2, router=nn.Router(H, E, 2), score="sigmoid"),
            ValueError,
            "router: got a router and top_k, score, wanted one or the other",
        ),
        (lambda: nn.MoE(H, I, E, 2, shared_gate=True), ValueError, "shared_gate: got True"),
        (lambda: nn.MoE(H, I, E, 2, identity_experts=-1), ValueError, "identity_experts: got -1"),
        (lambda: nn.MoE(H, I, E, 2, identity_experts=1.0), TypeError, "identity_experts: got 1.0"),
        (lambda: nn.MoE(H, I, E, 2, scores="sigmoid"), TypeError, "scores"),
        (lambda: nn.Router(H, E, 2, n_group=4), ValueError, "n_group: got 4, wanted a divisor of 6"),
        (
            lambda: nn.CapacityRouter(H, E, 2, capacity_factor=0.0),
            ValueError,
            "capacity_factor: got 0.0, wanted a finite number of more than 0",
        ),
        (
            lambda: nn.CapacityRouter(H, E, 2, capacity_factor=1.0, queue="fair"),
            ValueError,
            "queue: got 'fair'",
        ),
        (
            lambda: nn.CapacityRouter(H, E, 2, capacity_factor=1.0, group_size=0),
            ValueError,
            "group_size: got 0",
        ),
        (lambda: nn.Router(H, E, 2, logit_noise=-1.0), ValueError, "logit_noise: got -1.0, wanted a finite"),
        (lambda: nn.SharedRouter(H, E, 2, num_shared=0), ValueError, "num_shared: got 0"),
        (lambda: nn.GShardRouter(H, E, second="third"), ValueError, "second: got 'third'"),
        (lambda: nn.TokenRoundingRouter(H, E, 2, tile=0), ValueError, "tile: got 0"),
        (lambda: nn.TokenRoundingRouter(H, E, 2, rounding="even"), ValueError, "rounding: got 'even'"),
        (
            lambda: nn.TokenRoundingRouter(H, E, 2, renormalize=True),
            ValueError,
            "renormalize: got True, wanted only options that this router has: score, softcap, ",
        ),
        (lambda: nn.ProductKeyRouter(H, 6, 2), ValueError, "num_experts: got 6, wanted a square number"),
        (lambda: nn.ProductKeyRouter(H, -4, 2), ValueError, "num_experts: got -4, wanted a square number"),
        (lambda: nn.ProductKeyRouter(H, 9, 10), ValueError, "top_k: got 10, wanted 1 to 9"),
        (
            lambda: nn.ProductKeyRouter(H, 9, 2, selection_bias=True),
            ValueError,
            "selection_bias: got True, wanted only options that this router has: score, renormalize, scale, ",
        ),
        (lambda: nn.HashRouter(H, E, 2, vocab_size=0), ValueError, "vocab_size: got 0"),
        (
            lambda: build("hash")(torch.randn(3, H), token_ids=TOKENS),
            ValueError,
            "token_ids: got shape .*, wanted 3 elements",
        ),
        (lambda: build("hash")(torch.randn(3, H)), TypeError, "token_ids"),
    ],
)
def test_bad_options(call, error, message):
    with pytest.raises(error, match=message):
        call()

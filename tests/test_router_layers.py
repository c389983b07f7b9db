"""What a router asks of its layer: whole tiles, product keys, identity and shared experts, balance."""

import pytest
import torch
import torch.nn.functional as F

from fastmoe_rs import RoutingPlan, functional, losses, nn, record_routing, replay_routing, routing, telemetry
from moe_cases import WIDEST
from router_cases import E, H, I, T, all_experts, assert_close, build


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

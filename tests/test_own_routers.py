"""Routers of one's own: any module that returns a Routing, and subclasses of Router."""

import torch

from fastmoe_rs import functional, nn, record_routing, replay_routing, watch
from fastmoe_rs.functional import Routing
from moe_cases import WIDEST
from router_cases import E, H, I, T, all_experts


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

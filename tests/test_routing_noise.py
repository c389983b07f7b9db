"""Random numbers of routers: their distribution, and that a seed or a recomputation repeats them."""

import math

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from fastmoe_rs import routing
from moe_cases import draw_experts, routed_mlp
from test_routing import NOISY


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


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("seed", [None, 11])
@pytest.mark.parametrize("name", NOISY)
def test_noise_is_the_same_in_a_recomputation(name, seed, use_reentrant):
    x = torch.randn(20, 8, requires_grad=True)
    weight = torch.randn(6, 8, requires_grad=True)
    w1, w2 = draw_experts(dtype=torch.float32)
    picked = []

    def layer(x, weight):
        ids, weights = NOISY[name](x @ weight.T, seed=seed)
        picked.append(ids)
        return routed_mlp(x, ids, weights, w1, w2)

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

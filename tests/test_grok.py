"""The block of Grok-1 and Grok-2 against token-by-token code after their public sources.

Legend: T tokens, H hidden size, I intermediate size, E experts, K experts per token.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from fastmoe_rs import record_routing, replay_routing, watch
from fastmoe_rs.integrations.grok import GrokMoE
from moe_cases import WIDEST, assert_near, needs_float64

# The numbers of run.py in xai-org/grok-1 and of config.json in xai-org/grok-2, the sizes divided.
GROK1 = {"hidden_size": 48, "intermediate_size": 256, "num_experts": 8, "num_experts_per_tok": 2}
GROK2 = {
    "hidden_size": 32,
    "intermediate_size": 128,
    "moe_intermediate_size": 64,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "residual_moe": True,
    "router_logit_softcapping": 30.0,
}
CONFIGS = pytest.mark.parametrize("config", [GROK1, GROK2], ids=["grok-1", "grok-2"])


def block(config, dtype=WIDEST):
    """A block whose router logits are spread so widely that the cap matters."""
    moe = GrokMoE.from_config(config, dtype=dtype)
    with torch.no_grad():
        moe.router.weight.normal_(std=5.0)
    return moe


def geglu(x_H, w1, w2):
    gate, up = w1[: len(w1) // 2], w1[len(w1) // 2 :]
    return w2 @ (F.gelu(gate @ x_H, approximate="tanh") * (up @ x_H))


def by_hand(moe, x_TH, cap):
    """One token and one expert at a time."""
    rows = []
    for x_H in x_TH:
        logits_E = moe.router.weight @ x_H
        if cap:
            logits_E = cap * torch.tanh(logits_E / cap)
        probabilities_E = torch.exp(logits_E - logits_E.max()) / torch.exp(logits_E - logits_E.max()).sum()
        best = sorted(range(len(logits_E)), key=lambda e: -logits_E[e].item())[:2]
        y_H = sum(probabilities_E[e] * geglu(x_H, moe.experts.w1[e], moe.experts.w2[e]) for e in best)
        if moe.shared is not None:
            y_H = (y_H + geglu(x_H, moe.shared.w1, moe.shared.w2)) / math.sqrt(2)
        rows.append(y_H)
    return torch.stack(rows)


@CONFIGS
def test_output_and_every_gradient(config):
    moe = block(config)
    x = torch.randn(21, config["hidden_size"], dtype=WIDEST, requires_grad=True)
    expected = by_hand(moe, x, config.get("router_logit_softcapping"))
    actual = moe(x)
    assert_near(actual, expected)
    inputs = {"x": x, **dict(moe.named_parameters())}
    assert ("shared.w1" in inputs) == (config is GROK2)
    direction = torch.randn_like(expected)
    grads = torch.autograd.grad(actual, inputs.values(), direction)
    wanted = torch.autograd.grad(expected, inputs.values(), direction)
    for name, grad, want in zip(inputs, grads, wanted, strict=True):
        assert (want != 0).any(), name
        assert_near(grad, want, what=name)


def test_the_cap_counts():
    moe = block(GROK2)
    x = torch.randn(9, 32, dtype=WIDEST)
    assert (F.linear(x, moe.router.weight).abs().max() > 30).item()
    assert not torch.allclose(moe(x), by_hand(moe, x, None), rtol=1e-3)
    _, stats = moe(x, return_stats=True)
    assert stats.router.logits.abs().max() < 30
    assert (stats.router.weights.sum(1) < 0.999).any()  # not renormalised


@needs_float64
@CONFIGS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_dtypes_are_close_to_float64(config, dtype):
    moe = block(config, dtype)
    truth = block(config).requires_grad_(False)
    truth.load_state_dict(moe.state_dict())
    x = torch.randn(21, config["hidden_size"]).to(dtype)
    y, stats = moe(x, return_stats=True)
    assert y.dtype == dtype
    assert stats.router.logits.dtype == torch.float32  # as the router is computed in both models
    assert_near(y, truth(x.double()))


@CONFIGS
def test_serves_what_serves_other_layers(config):
    moe, x = block(config, torch.float32), torch.randn(2, 5, config["hidden_size"], requires_grad=True)
    watched = watch(moe)
    expected = moe(x)
    assert watched.stats()[""].tokens == 10
    watched.close()
    with record_routing(moe) as recorded:
        moe(x)
    with replay_routing(moe, recorded):
        torch.testing.assert_close(moe(x), expected)
    again = checkpoint(moe, x, use_reentrant=False)
    for one, other in zip(
        *(torch.autograd.grad(y.sum(), [*moe.parameters()]) for y in (expected, again)), strict=True
    ):
        assert torch.equal(one, other)
    compiled = torch.compile(moe, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected)
    assert GrokMoE.from_config(config, device="meta")(x.to("meta")).shape == x.shape


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "config: got no hidden_size, wanted a configuration of Grok-1 or Grok-2"),
        ({"hidden_size": 8}, "config: got no moe_intermediate_size nor intermediate_size"),
        (GROK2 | {"intermediate_size": None}, "config: got no intermediate_size"),
        (GROK2 | {"router_logit_softcapping": 0.0}, r"router_softcap: got 0\.0, wanted None or a finite"),
    ],
)
def test_bad_configurations(config, message):
    with pytest.raises(ValueError, match=message):
        GrokMoE.from_config(config)

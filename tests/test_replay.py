"""Routing kept in files and followed by transformers models, frozen routers, drift between checkpoints."""

import copy

import pytest
import torch

from fastmoe_rs import (
    RoutingPlan,
    accelerate,
    freeze_routers,
    load_routing,
    nn,
    record_routing,
    replay_routing,
    routing_drift,
    save_routing,
)
from transformers_models import build, tokens


def with_other_routers(model):
    """A copy whose routers choose otherwise, and whose other weights are the same."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if any(part in name for part in (".gate.", ".router.")):
                parameter.neg_()
    return other


def test_routing_survives_a_file(tmp_path):
    moe = nn.MoE(16, 12, 6, 2, capacity_factor=1.0)
    x = torch.randn(10, 16)
    with record_routing(moe) as recorded:
        expected = moe(x)
    save_routing(recorded, tmp_path / "routing.pt")
    loaded = load_routing(tmp_path / "routing.pt")
    assert loaded[""].capacity == recorded[""].capacity == 4
    with replay_routing(moe, loaded):
        torch.testing.assert_close(moe(x), expected)
    torch.save(3, tmp_path / "other.pt")
    with pytest.raises(
        ValueError, match=r"other\.pt: got something else, wanted plans written by save_routing"
    ):
        load_routing(tmp_path / "other.pt")
    (tmp_path / "text.pt").write_text("hello")
    with pytest.raises(ValueError, match=r"text\.pt: cannot be read, wanted plans written by save_routing"):
        load_routing(tmp_path / "text.pt")


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gpt_oss", "qwen3_moe", "granitemoe"])
def test_transformers_models_follow_recorded_routing(family, tmp_path):
    model = accelerate(build(family))
    with record_routing(model) as recorded:
        expected = model(tokens()).logits
    assert all(isinstance(plan, RoutingPlan) and plan.tokens == 18 for plan in recorded.values())
    save_routing(recorded, tmp_path / "routing.pt")
    recorded = load_routing(tmp_path / "routing.pt")
    with replay_routing(model, recorded):
        torch.testing.assert_close(model(tokens()).logits, expected)
    other = with_other_routers(model)
    with record_routing(other) as followed, replay_routing(other, recorded):
        other(tokens()).logits.square().sum().backward()
    for name, plan in recorded.items():
        assert torch.equal(followed[name].ids, plan.ids)
        router = other.get_submodule(
            name + (".gate" if hasattr(other.get_submodule(name), "gate") else ".router")
        )
        assert (router.weight.grad != 0).any()
    with record_routing(other) as free:
        other(tokens())
    assert any(not torch.equal(free[name].ids, plan.ids) for name, plan in recorded.items())


def test_checkpointing_follows_too():
    model = accelerate(build("mixtral"))
    with record_routing(model) as recorded:
        model(tokens())
    other = with_other_routers(model)
    with replay_routing(other, recorded):
        other(tokens()).logits.sum().backward()
    expected = {name: parameter.grad for name, parameter in other.named_parameters()}
    other = with_other_routers(model).train()
    other.gradient_checkpointing_enable()
    with replay_routing(other, recorded):
        other(tokens()).logits.sum().backward()
    for name, parameter in other.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name])


@pytest.mark.parametrize(("family", "shape"), [("mixtral", (2, 4)), ("phimoe", (2, 9))])
def test_what_cannot_be_followed_is_refused(family, shape):
    model = build(family)
    with record_routing(model) as recorded:
        model(tokens())
    model = with_other_routers(model)
    with (
        replay_routing(model, recorded),
        pytest.raises(ValueError, match=r"recorded: got ids \(18, 2\) for model.layers.0.mlp, .*TopKRouter"),
    ):
        model(tokens(shape))
    model(tokens(shape))  # nothing is left behind


def test_frozen_routers():
    model = freeze_routers(build("mixtral"))
    model(tokens()).logits.sum().backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert all((grad is None) == (".gate." in name) for name, grad in grads.items())
    moe = nn.MoE(16, 12, 6, 2)
    assert freeze_routers(moe) is moe
    assert not moe.router.weight.requires_grad
    assert freeze_routers(moe, False).router.weight.requires_grad


@pytest.mark.parametrize("build_model", [lambda: build("mixtral"), lambda: build("deepseek_v3")])
def test_drift(build_model):
    before = build_model()
    same = routing_drift(before, copy.deepcopy(before), tokens())
    assert {(d.agreement, d.first_choice, d.weight_change) for d in same.values()} == {(1.0, 1.0, 0.0)}
    drift = routing_drift(before, with_other_routers(before), tokens())
    first = next(iter(drift.values()))
    assert first.weight_change == pytest.approx(2.0)
    assert first.first_choice == 0.0
    assert first.agreement < 1


def test_drift_counts_shared_experts_in_any_order():
    before, after = nn.MoE(4, 4, 4, 2), nn.MoE(4, 4, 4, 2)
    x = torch.tensor([[1.0, 0, 0, 0], [0, 1.0, 0, 0]])
    with torch.no_grad():
        before.router.weight.copy_(torch.tensor([[4.0, 4, 0, 0], [3, 3, 0, 0], [2, 2, 0, 0], [1, 1, 0, 0]]))
        after.router.weight.copy_(torch.tensor([[3.0, 1, 0, 0], [4, 2, 0, 0], [2, 4, 0, 0], [1, 3, 0, 0]]))
    drift = routing_drift(before, after, x)[""]
    assert drift.agreement == 0.5  # both experts of the first token, in the other order, none of the second
    assert drift.first_choice == 0.0
    with pytest.raises(ValueError, match=r"after: got MoE layers \['0'\], wanted those of before, \[''\]"):
        routing_drift(before, torch.nn.Sequential(after), x)
    with pytest.raises(ValueError, match=r"after: got logits \(2, 5\) in '', wanted \(2, 4\) as before"):
        routing_drift(before, nn.MoE(4, 4, 5, 2), x)

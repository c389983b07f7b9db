"""Losses of what the layers of a model routed: eager, checkpointed, compiled."""

import pytest
import torch

from fastmoe_rs import losses, nn
from moe_cases import WIDEST, Stack

T, H = 24, 8


def stack(use_reentrant=None):
    return Stack(H, 5, 6, 2, layers=3, use_reentrant=use_reentrant, dtype=WIDEST)


def auxiliary(routed):
    logits = [stats.router.logits for stats in routed]
    return losses.load_balancing_loss(logits, 2) + losses.router_z_loss(logits)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_losses_of_collected_stats(checkpointed):
    model = stack(use_reentrant=False if checkpointed else None)
    x = torch.randn(T, H, dtype=WIDEST)
    logits, hidden = [], x
    for layer in model.layers:
        y, stats = layer(hidden, return_stats=True)
        logits.append(stats.router.logits)
        hidden = hidden + y
    wanted = hidden.sum() + losses.load_balancing_loss(logits, 2) + losses.router_z_loss(logits)
    expected = torch.autograd.grad(wanted, list(model.parameters()))
    with nn.collect_stats(model) as routed:
        loss = model(x).sum() + auxiliary(routed)
        grads = torch.autograd.grad(loss, list(model.parameters()))
        assert len(routed) == 3
        model(x)
        assert len(routed) == 6
    torch.testing.assert_close(loss, wanted)
    torch.testing.assert_close(grads, expected)
    model(x)
    assert len(routed) == 6


@pytest.mark.parametrize("within", [False, True])
def test_stats_are_collected_of_a_compiled_model(within):
    """Also of one that was compiled before, and where the block is part of the graph."""
    torch._dynamo.reset()
    model, x = stack(), torch.randn(T, H, dtype=WIDEST)

    def step(layers):
        with nn.collect_stats(model) as routed:
            y = layers(x)
        return y.sum() + auxiliary(routed)

    def gradients(loss):
        return loss, torch.autograd.grad(loss, list(model.parameters()))

    expected = gradients(step(model))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled(x)
    if within:
        whole = torch.compile(lambda: step(model), fullgraph=True, backend="aot_eager")
    for _ in range(2):
        torch.testing.assert_close(gradients(whole() if within else step(compiled)), expected)
    with nn.collect_stats(model) as routed:
        compiled(x)
        compiled(x)
    compiled(x)
    assert len(routed) == 6


def test_collecting_of_a_compiled_checkpointed_model_is_refused():
    torch._dynamo.reset()
    model, x = stack(use_reentrant=False), torch.randn(T, H, dtype=WIDEST)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with nn.collect_stats(model), pytest.raises(torch._dynamo.exc.Unsupported, match="side effect"):
        compiled(x)


def test_the_innermost_block_collects():
    model, x = stack(), torch.randn(T, H, dtype=WIDEST)
    with nn.collect_stats(model) as outer:
        with nn.collect_stats(model) as inner:
            model(x)
        assert (len(outer), len(inner)) == (0, 3)
        model(x)
    assert (len(outer), len(inner)) == (3, 3)


def test_collected_stats_without_a_graph_are_told():
    model = stack(use_reentrant=True)
    x = torch.randn(T, H, dtype=WIDEST, requires_grad=True)
    with nn.collect_stats(model), pytest.warns(RuntimeWarning, match="use_reentrant"):
        model(x)
    model = stack().eval()
    with nn.collect_stats(model) as routed, torch.no_grad():
        model(x)
    assert len(routed) == 3
    with (
        pytest.raises(ValueError, match=r"model: got Linear, wanted a module with nn.MoE layers"),
        nn.collect_stats(torch.nn.Linear(2, 2)),
    ):
        pass

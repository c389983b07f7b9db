"""Dense models to Mixture-of-Experts ones: the same output at the start, and what noise and redrawing do.

Legend: H hidden size, I intermediate size, E experts.
"""

import copy

import pytest
import torch

from fastmoe_rs import nn, reference
from fastmoe_rs.upcycling import copy_experts, dense_mlp, upcycle, upcycle_model

pytest.importorskip("transformers", "5", reason="reads the MLPs of transformers")

from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from moe_cases import WIDEST, assert_same, trains
from small_llama import evaluate, llama, train
from transformers_models import relative, tokens


def llama_mlp(**options):
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    mlp = LlamaMLP(LlamaConfig(**sizes, **options))
    with torch.no_grad():
        for parameter in mlp.parameters():  # biases start as zeros, which hides errors
            parameter.normal_(std=0.3)
    return mlp


@pytest.mark.filterwarnings("ignore:MoE. with top_k=1")
@pytest.mark.parametrize("activation", reference.GATED + reference.UNGATED)
@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_layer_computes_what_the_dense_one_did(activation, top_k):
    dense = nn.SharedExpert(16, 24, activation=activation, dtype=WIDEST)
    layer = upcycle(dense, 5, top_k)
    x = torch.randn(3, 7, 16, dtype=WIDEST)
    assert_same(layer(x), dense(x))


@pytest.mark.parametrize("options", [{}, {"mlp_bias": True}, {"hidden_act": "gelu_pytorch_tanh"}], ids=str)
def test_mlp_of_transformers_is_read_with_its_biases_and_activation(options):
    dense = llama_mlp(**options).to(WIDEST)
    x = torch.randn(7, 16, dtype=WIDEST)
    assert_same(upcycle(dense, 4, 2)(x), dense(x))


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma"])
def test_models_give_the_logits_of_the_dense_one(family):
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes, **heads)).eval()
    expected = model(tokens()).logits
    mlps = [layer.mlp for layer in model.model.layers]
    assert upcycle_model(model, 4, 2, every=2) == 2
    assert [layer.mlp is mlp for layer, mlp in zip(model.model.layers, mlps, strict=True)] == [1, 0, 1, 0]
    assert relative(model(tokens()).logits, expected) <= 2e-6
    assert upcycle_model(model, 4, 2) == 2  # those that are left, not what is inside of the others
    assert relative(model(tokens()).logits, expected) <= 2e-6


def test_without_renormalisation_the_output_is_scaled_by_the_sum_of_the_weights():
    dense, x = nn.SharedExpert(16, 24), torch.randn(9, 16)
    y, stats = upcycle(dense, 4, 2, renormalize=False, router_std=1.0)(x, return_stats=True)
    torch.testing.assert_close(y, dense(x) * stats.router.weights.sum(1, keepdim=True))
    assert (stats.router.weights.sum(1) < 0.99).any()


def test_dtype_mode_and_options_are_kept_and_the_dense_layer_is_left_alone():
    dense = llama_mlp().bfloat16().eval()
    before = copy.deepcopy(dense.state_dict())
    layer = upcycle(dense, 4, 2, capacity_factor=1.5, selection_bias=True, noise=0.1, redraw=0.5)
    assert {p.dtype for p in layer.parameters()} == {torch.bfloat16}
    assert all(p.isfinite().all() and p.requires_grad for p in layer.parameters())
    assert not layer.training
    assert layer.capacity_factor == 1.5
    assert (layer.router.selection_bias == 0).all()
    assert layer(torch.randn(9, 16).bfloat16()).dtype == torch.bfloat16
    assert all(torch.equal(dense.state_dict()[name], value) for name, value in before.items())


def test_router_is_drawn_as_asked():
    generator = torch.Generator().manual_seed(1)
    layer = upcycle(nn.SharedExpert(256, 4), 64, 2, router_std=0.05, generator=generator)
    again = upcycle(nn.SharedExpert(256, 4), 64, 2, router_std=0.05, generator=generator.manual_seed(1))
    torch.testing.assert_close(layer.router.weight.std().item(), 0.05, rtol=0.03, atol=0)
    assert torch.equal(layer.router.weight, again.router.weight)


def test_noise_is_relative_to_the_weights_and_differs_between_experts():
    dense = dense_mlp(nn.SharedExpert(64, 96))
    w1, w2 = copy_experts(dense, 3, noise=0.1)
    for w, start in ((w1, dense.w1), (w2, dense.w2)):
        moved = w - start
        torch.testing.assert_close(moved.std(), 0.1 * start.std(), rtol=0.05, atol=0)
        assert not torch.equal(moved[0], moved[1])


@pytest.mark.parametrize("activation", ["swiglu", "relu"])
def test_redrawing_takes_whole_units_in_the_statistics_of_what_they_replace(activation):
    E, H, I = 4, 200, 60
    mlp = nn.SharedExpert(H, I, activation=activation)
    with torch.no_grad():
        mlp.w1[:I].mul_(3).add_(0.5)  # the gate is drawn in its own mean and deviation, not in those of both
    dense = dense_mlp(mlp)
    w1, w2 = copy_experts(dense, E, redraw=0.25)
    parts = [*zip(w1.split(I, 1), dense.w1.split(I), strict=True), (w2.transpose(1, 2), dense.w2.T)]
    units = (parts[0][0] != parts[0][1]).any(2)  # [E, I]
    assert (units.sum(1) == 15).all()
    assert len({tuple(row.tolist()) for row in units}) == E
    for drawn, start in parts:
        start = start.expand_as(drawn)
        assert torch.equal((drawn != start).all(2), units)
        assert torch.equal(drawn[~units], start[~units])
        for new, old in zip(drawn, start, strict=True):
            new, old = new[(new != old).all(1)], old[(new != old).all(1)]
            torch.testing.assert_close(new.std(), old.std(), rtol=0.1, atol=0)
            torch.testing.assert_close(new.mean(), old.mean(), rtol=0, atol=5 * old.std().item() / 50)


def test_all_or_nothing_redrawn():
    dense = dense_mlp(nn.SharedExpert(16, 24))
    assert all((w == s).all() for w, s in zip(copy_experts(dense, 2), dense[:2], strict=True))
    assert all((w != s).all() for w, s in zip(copy_experts(dense, 2, redraw=1), dense[:2], strict=True))


def test_nothing_waits_for_the_device():
    """Meta tensors have no values to wait for."""
    moe = upcycle(nn.SharedExpert(16, 24, device="meta"), 4, 2, noise=0.1, redraw=0.5)
    assert moe.experts.w1.is_meta
    assert moe(torch.randn(7, 16, device="meta")).shape == (7, 16)


@trains
@pytest.mark.parametrize("options", [{}, {"redraw": 0.5}], ids=str)
def test_training_goes_on_below_the_loss_of_the_dense_model(options):
    model = llama()
    train(model, 40)
    dense_loss = evaluate(model)
    assert upcycle_model(model, 4, 2, **options) == 2
    start = evaluate(model)
    if not options:
        assert start == pytest.approx(dense_loss, rel=1e-5)
    train(model, 80, seed=1)
    assert evaluate(model) < 0.9 * dense_loss
    w1 = model.model.layers[0].mlp.experts.w1
    assert all((w1[e] - w1[0]).abs().max() > 1e-3 for e in range(1, 4))  # the experts have parted


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: upcycle(torch.nn.Linear(2, 2), 4, 2), TypeError, "mlp: got Linear, wanted a SharedExpert"),
        (
            lambda: upcycle(llama_mlp(hidden_act="mish"), 4, 2),
            ValueError,
            "mlp: got activation .*Mish.*, wanted one that is the gate of swiglu",
        ),
        (lambda: upcycle(llama_mlp(), 0, 1), ValueError, "num_experts: got 0, wanted at least 1"),
        (lambda: upcycle(llama_mlp(), 4, 5), ValueError, "top_k: got 5, wanted 1 to 4"),
        (lambda: upcycle(llama_mlp(), 4, 2, noise=-1.0), ValueError, r"noise: got -1\.0, wanted at least 0"),
        (lambda: upcycle(llama_mlp(), 4, 2, redraw=1.5), ValueError, r"redraw: got 1\.5, wanted 0 to 1"),
        (
            lambda: upcycle_model(torch.nn.Sequential(torch.nn.Linear(2, 2)), 4, 2),
            ValueError,
            "model: got Sequential without a gated MLP to copy",
        ),
        (lambda: upcycle_model(llama(), 4, 2, every=0), ValueError, "every: got 0, wanted at least 1"),
        (lambda: upcycle_model(llama(), 4, 2, every=3), ValueError, "model: got LlamaForCausalLM"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()

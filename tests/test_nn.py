"""Modules: Router, Experts, MoE, their options, statistics, and recorded routings."""

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from fastmoe_rs import RoutingPlan, functional, losses, nn, record_routing, reference, replay_routing, watch
from moe_cases import WIDEST, Stack


def small_moe(**options):
    return nn.MoE(16, 12, 6, 2, **options)


@pytest.mark.parametrize("shape", [(16,), (5, 16), (2, 5, 16), (2, 0, 16), (2, 2, 3, 16)])
def test_takes_any_leading_dimensions(shape):
    moe, x = small_moe(), torch.randn(shape)
    y = moe(x)
    assert y.shape == shape
    torch.testing.assert_close(y.reshape(-1, 16), moe(x.reshape(-1, 16)))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"renormalize": True, "score": "sigmoid", "scale": 2.5, "selection_bias": True},
        {"order": "topk_score", "activation": "swiglu_oai", "bias": True},
        {"activation": "relu2", "shared_intermediate_size": 10},
        {"activation": "geglu", "shared_intermediate_size": 10, "capacity_factor": 0.5},
    ],
)
def test_is_route_then_mlp_then_shared(options):
    moe = small_moe(dtype=WIDEST, **options)
    with torch.no_grad():
        for tensor in (*moe.parameters(), *moe.buffers()):
            tensor.normal_(std=0.3)
    x = torch.randn(9, 16, dtype=WIDEST)
    router = {name: options[name] for name in ("score", "order", "renormalize", "scale") if name in options}
    bias = moe.router.selection_bias
    ids, weights, _ = reference.route(F.linear(x, moe.router.weight), 2, **router, bias=bias)
    capacity = math.ceil(0.5 * 9 * 2 / 6) if "capacity_factor" in options else None
    experts = moe.experts
    expected = reference.moe_mlp(
        x,
        ids,
        weights,
        experts.w1,
        experts.w2,
        b1=experts.b1,
        b2=experts.b2,
        activation=options.get("activation", "swiglu"),
        plan=reference.plan(ids, 6, capacity=capacity),
    )
    if moe.shared is not None:
        hidden = F.linear(x, moe.shared.w1)
        expected = expected + F.linear(reference.activate(hidden, options["activation"]), moe.shared.w2)
    torch.testing.assert_close(moe(x), expected)


def test_every_parameter_learns():
    moe = small_moe(shared_intermediate_size=8, bias=True, jitter=0.1)
    moe(torch.randn(64, 16)).square().sum().backward()
    for name, parameter in moe.named_parameters():
        assert parameter.grad is not None, name
        assert (parameter.grad != 0).any(), name


def test_jitter_moves_the_router_only_and_only_in_training():
    moe, x = small_moe(jitter=0.4), torch.ones(64, 16)
    _, noisy = moe(x, return_stats=True)
    _, noisy_again = moe(x, return_stats=True)
    assert not torch.equal(noisy.router.logits, noisy_again.router.logits)
    moe.eval()
    _, quiet = moe(x, return_stats=True)
    torch.testing.assert_close(quiet.router.logits, F.linear(x, moe.router.weight))
    bound = 0.4 * moe.router.weight.abs().sum(1)
    assert ((noisy.router.logits - quiet.router.logits).abs() <= bound + 1e-5).all()


def test_capacity_factor_drops_the_last_tokens():
    moe = small_moe(capacity_factor=1.0)
    x = torch.randn(1, 16).repeat(12, 1)  # all tokens choose the same two experts
    y, stats = moe(x, return_stats=True)
    assert stats.plan.capacity == math.ceil(12 * 2 / 6) == int(stats.counts.max())
    assert (y[:4] != 0).any(1).all()
    assert (y[4:] == 0).all()
    torch.testing.assert_close(stats.dropped, torch.tensor(16 / 24))


def test_statistics():
    moe = small_moe()
    _, stats = moe(torch.randn(50, 16), return_stats=True)
    asked = torch.bincount(stats.router.ids.flatten(), minlength=6)
    assert torch.equal(stats.counts, asked.int())
    torch.testing.assert_close(stats.load, asked / 100)
    torch.testing.assert_close(stats.max_vio, asked.max() / (100 / 6) - 1)
    share = asked[asked > 0] / 100
    torch.testing.assert_close(stats.load_entropy, -(share * share.log()).sum() / math.log(6))
    assert stats.dropped == 0


def test_statistics_of_no_tokens_are_finite():
    _, stats = small_moe()(torch.empty(0, 16), return_stats=True)
    for value in (stats.load, stats.load_entropy, stats.dropped):
        assert (value == 0).all()


def test_router_logits_feed_the_auxiliary_losses():
    moe = small_moe()
    _, stats = moe(torch.randn(20, 16), return_stats=True)
    loss = losses.load_balancing_loss(stats.router.logits, 2) + losses.router_z_loss(stats.router.logits)
    loss.backward()
    assert (moe.router.weight.grad != 0).any()
    assert moe.experts.w1.grad is None


def test_initialisation_is_that_of_linear_layers():
    torch.manual_seed(1)
    experts = nn.Experts(256, 64, 4, bias=True)
    assert experts.w1.shape == (4, 128, 256)
    for weight in (experts.w1, experts.w2, nn.Router(256, 8, 2).weight):
        bound = weight.shape[-1] ** -0.5
        assert 0.98 * bound < weight.abs().max() <= bound
        torch.testing.assert_close(weight.std(), torch.tensor(bound / 3**0.5), rtol=0.05, atol=0)
    assert (experts.b1 == 0).all()
    assert (experts.b2 == 0).all()


def test_says_what_it_is():
    text = repr(
        small_moe(activation="geglu", capacity_factor=1.5, shared_intermediate_size=8, score="sigmoid")
    )
    for part in ("capacity_factor=1.5", "16, 6, top_k=2", "score='sigmoid'", "16, 12, 6", "'geglu'", "16, 8"):
        assert part in text


def test_copies_give_the_same_output(tmp_path):
    moe = small_moe(shared_intermediate_size=8, bias=True, selection_bias=True)
    x = torch.randn(10, 16)
    expected = moe(x)
    loaded = small_moe(shared_intermediate_size=8, bias=True, selection_bias=True)
    save_file(moe.state_dict(), tmp_path / "moe.safetensors")
    loaded.load_state_dict(load_file(tmp_path / "moe.safetensors"))
    for other in (copy.deepcopy(moe), pickle.loads(pickle.dumps(moe)), loaded):
        assert torch.equal(other(x), expected)


def test_copies_of_a_watched_layer_are_neither_watched_nor_collected_from():
    moe, x = small_moe(), torch.randn(10, 16)
    watched = watch(moe)
    with nn.collect_stats(moe) as routed:
        moe(x)
        copies = copy.deepcopy(moe), pickle.loads(pickle.dumps(moe))
        for other in copies:
            other(x)
        assert len(routed) == 1
    assert watched.stats()[""].tokens == 10
    for other in copies:
        watch(other).close()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_selection_bias_stays_in_float32(dtype):
    """In bfloat16 a step of 1e-3 is lost beside a bias of 1."""
    moe = small_moe(selection_bias=True).to(dtype)
    bias = moe.router.selection_bias.fill_(1)
    assert (moe.router.weight.dtype, bias.dtype) == (dtype, torch.float32)
    _, stats = moe(torch.randn(9, 16, dtype=dtype), return_stats=True)
    moe.router.balance(stats.routes, rate=1e-3)
    assert (moe.router.selection_bias != 1).any()
    moe.load_state_dict({name: tensor.to(dtype) for name, tensor in moe.state_dict().items()})
    assert moe.router.selection_bias.dtype == torch.float32
    assert moe.to("meta", torch.float32).router.selection_bias.is_meta
    assert moe.to_empty(device="cpu").to(dtype).router.selection_bias.dtype == torch.float32


def test_state_dict_keys():
    moe = small_moe(shared_intermediate_size=8, bias=True, selection_bias=True)
    assert {name: tuple(tensor.shape) for name, tensor in moe.state_dict().items()} == {
        "router.weight": (6, 16),
        "router.selection_bias": (6,),
        "experts.w1": (6, 24, 16),
        "experts.w2": (6, 16, 12),
        "experts.b1": (6, 24),
        "experts.b2": (6, 16),
        "shared.w1": (16, 16),
        "shared.w2": (16, 8),
    }


def test_meta_device_then_real():
    moe = small_moe(shared_intermediate_size=8, bias=True, selection_bias=True, device="meta")
    y, stats = moe(torch.empty(7, 16, device="meta"), return_stats=True)
    assert y.is_meta
    assert y.shape == (7, 16)
    assert stats.plan.gather.shape == (14,)
    moe.to_empty(device="cpu")
    for module in moe.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert moe(torch.randn(7, 16)).isfinite().all()


def test_dtype_and_device_arguments():
    moe = small_moe(shared_intermediate_size=8, dtype=torch.bfloat16, device="cpu")
    assert {parameter.dtype for parameter in moe.parameters()} == {torch.bfloat16}
    assert moe(torch.randn(3, 16, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_recorded_routing_is_followed_with_live_gradients():
    model, x = Stack(16, 12, 6, 2, capacity_factor=1.0), torch.randn(10, 16)
    with record_routing(model) as recorded:
        expected = model(x)
    assert recorded.keys() == {"layers.0", "layers.1"}
    assert not model.layers[0]._forward_pre_hooks
    with replay_routing(model, recorded):
        torch.testing.assert_close(model(x), expected)
    with torch.no_grad():  # a router that would choose otherwise
        for layer in model.layers:
            layer.router.weight.neg_()
    with record_routing(model) as followed, replay_routing(model, recorded):
        model(x).square().sum().backward()
    for name, layer in model.named_modules():
        if isinstance(layer, nn.MoE):
            assert torch.equal(followed[name].ids, recorded[name].ids)
            assert torch.equal(followed[name].inverse, recorded[name].inverse)
            assert (layer.router.weight.grad != 0).any()
    with record_routing(model) as free:
        model(x)
    assert not torch.equal(free["layers.0"].ids, recorded["layers.0"].ids)


def test_plan_from_another_layer_weighs_with_live_logits():
    moe, x = small_moe(renormalize=True), torch.randn(8, 16)
    ids = torch.randint(0, 6, (8, 2))
    y, stats = moe(x, plan=RoutingPlan.from_ids(ids, 6), return_stats=True)
    weights = functional.route_weights(stats.router.logits, ids, renormalize=True)
    torch.testing.assert_close(y, moe.experts(x, ids, weights))


def test_replay_needs_the_same_layers():
    with (
        pytest.raises(ValueError, match=r"recorded: got layers \[\], wanted those of model"),
        replay_routing(Stack(16, 12, 6, 2), {}),
    ):
        pass


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_size": 0}, "hidden_size: got 0, wanted at least 1"),
        ({"intermediate_size": 0}, "intermediate_size: got 0, wanted at least 1"),
        ({"shared_intermediate_size": 0}, "intermediate_size: got 0, wanted at least 1"),
        ({"num_experts": 0}, "num_experts: got 0, wanted at least 1"),
        ({"top_k": 7}, "top_k: got 7, wanted 1 to 6"),
        ({"top_k": 0}, "top_k: got 0, wanted 1 to 6"),
        ({"activation": "tanh"}, "activation: got 'tanh', wanted one of 'swiglu'"),
        ({"score": "relu"}, "score: got 'relu', wanted one of 'softmax', 'sigmoid'"),
        ({"order": "first"}, "order: got 'first', wanted one of 'score_topk', 'topk_score'"),
        ({"jitter": -0.1}, "jitter: got -0.1, wanted at least 0"),
        ({"capacity_factor": 0.0}, "capacity_factor: got 0.0, wanted a finite number of more than 0"),
        ({"capacity_factor": math.inf}, "capacity_factor: got inf, wanted a finite number of more than 0"),
        ({"capacity_factor": math.nan}, "capacity_factor: got nan, wanted a finite number of more than 0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        nn.MoE(**{"hidden_size": 8, "intermediate_size": 8, "num_experts": 6, "top_k": 2} | options)


@pytest.mark.parametrize("options", [{}, {"shared_intermediate_size": 8}, {"identity_experts": 2}])
def test_the_output_is_no_view_and_may_be_changed_in_place(options):
    """FSDP2 warns of modules that return views: its hooks are lost when those are changed in place."""
    moe, x = nn.MoE(16, 12, 6, 2, **options), torch.randn(2, 5, 16, requires_grad=True)
    y = moe(x)
    assert y.shape == x.shape
    assert not y._is_view()
    expected = torch.autograd.grad((y * 2 + x).square().sum(), [x, *moe.parameters()])
    y = moe(x)
    y *= 2
    y += x
    actual = torch.autograd.grad(y.square().sum(), [x, *moe.parameters()])
    assert all(map(torch.equal, actual, expected))

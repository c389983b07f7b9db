"""Bad input raises ValueError or TypeError that names the argument, what was given and what was wanted."""

import re

import numpy as np
import pytest
import torch

import fastmoe_rs
from fastmoe_rs import (
    RoutingPlan,
    functional,
    losses,
    nn,
    record_routing,
    replay_routing,
    routing_drift,
    watch,
)
from moe_cases import mlp_case

X, IDS, WEIGHTS = torch.randn(6, 8), torch.zeros(6, 2, dtype=torch.long), torch.rand(6, 2)
W1, W2 = torch.randn(4, 10, 8), torch.randn(4, 8, 5)


def mlp(x=X, ids=IDS, weights=WEIGHTS, w1=W1, w2=W2, **options):
    return functional.moe_mlp(x, ids, weights, w1, w2, **options)


def id_at(t, k, value):
    ids = IDS.clone()
    ids[t, k] = value
    return ids


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": X[0]}, ValueError, "x: got shape (8,), wanted [T, H]"),
        ({"x": X.int()}, TypeError, "x: got dtype torch.int32, wanted float32"),
        ({"x": X.numpy()}, TypeError, "x: got ndarray, wanted a torch tensor [T, H]"),
        ({"x": X.to_sparse()}, TypeError, "x: got layout torch.sparse_coo, wanted a strided tensor"),
        ({"x": X[:5]}, ValueError, "x: got shape (5, 8), wanted the 6 tokens"),
        ({"x": X[:, :7]}, ValueError, "w1: got shape (4, 10, 8), wanted [E, 2I, H] = (4, 10, 7)"),
        ({"x": X.bfloat16()}, TypeError, "w1: got dtype torch.float32, wanted torch.bfloat16, that of x"),
        ({"w2": W2.double()}, TypeError, "w2: got dtype torch.float64, wanted torch.float32, that of x"),
        ({"w1": W1[0]}, ValueError, "w1: got shape (10, 8), wanted [E, 2I, H]"),
        ({"w1": W1[:, :9]}, ValueError, "w1: got shape (4, 9, 8), wanted [E, 2I, H], with an even 2I"),
        (
            {"w1": W1.mT, "w2": W2.mT},
            ValueError,
            "wanted [E, 2I, H] = (4, 8, 8); these weights fit transposed=True and a gated activation",
        ),
        (
            {"activation": "silu"},
            ValueError,
            "= (4, 8, 10); these weights fit transposed=False and a gated activation",
        ),
        (
            {"w2": torch.randn(4, 8, 10)},
            ValueError,
            "= (4, 8, 5); these weights fit transposed=False and an activation without a gate",
        ),
        ({"activation": "SwigLU"}, ValueError, "'relu2' (did you mean 'swiglu'?)"),
        ({"w1": W1.mT}, ValueError, "w1: got shape (4, 8, 10), wanted [E, 2I, H] = (4, 8, 8)"),
        ({"w2": W2.mT}, ValueError, "w2: got shape (4, 5, 8), wanted [E, H, I] = (4, 8, 5)"),
        ({"transposed": True}, ValueError, "w1: got shape (4, 10, 8), wanted [E, H, 2I] = (4, 8, 8)"),
        ({"activation": "silu"}, ValueError, "w2: got shape (4, 8, 5), wanted [E, H, I] = (4, 8, 10)"),
        ({"activation": "swish"}, ValueError, "activation: got 'swish', wanted one of 'swiglu', 'geglu'"),
        (
            {"activation": "silu", "interleaved": True},
            ValueError,
            "interleaved: got True, wanted False, because 'silu' has no gate",
        ),
        ({"b1": torch.randn(4, 5)}, ValueError, "b1: got shape (4, 5), wanted [E, 2I] = (4, 10)"),
        ({"b2": torch.randn(4, 5)}, ValueError, "b2: got shape (4, 5), wanted [E, H] = (4, 8)"),
        ({"b2": torch.randn(4, 8).half()}, TypeError, "b2: got dtype torch.float16, wanted torch.float32"),
        ({"weights": WEIGHTS[:, :1]}, ValueError, "weights: got shape (6, 1), wanted [T, K] = (6, 2)"),
        ({"weights": IDS}, TypeError, "weights: got dtype torch.int64, wanted float32"),
        ({"weights": None}, TypeError, "weights: got NoneType, wanted a torch tensor [T, K]"),
        ({"ids": None}, ValueError, "ids: got None, wanted expert ids [T, K], or a plan"),
        ({"ids": IDS[0]}, ValueError, "ids: got shape (2,), wanted [T, K] with K >= 1"),
        ({"ids": IDS[:, :0]}, ValueError, "ids: got shape (6, 0), wanted [T, K] with K >= 1"),
        ({"ids": IDS.float()}, TypeError, "ids: got dtype float32, wanted int64 or int32"),
        ({"ids": IDS.tolist()}, TypeError, "ids: got list, wanted a torch tensor or a NumPy array"),
        ({"plan": RoutingPlan.from_ids(IDS, 3)}, ValueError, "plan: got a plan for 3 experts, wanted"),
        ({"plan": (IDS, 4)}, TypeError, "plan: got tuple, wanted a RoutingPlan"),
        (
            {"plan": RoutingPlan.from_ids(IDS.numpy(), 4)},
            TypeError,
            "plan: got a plan (or ids) of NumPy arrays, wanted one of torch tensors",
        ),
        ({"ids": IDS.numpy()}, TypeError, "plan: got a plan (or ids) of NumPy arrays, wanted one of torch"),
    ],
)
def test_mlp(change, error, message):
    with pytest.raises(error, match=re.escape(message)) as raised:
        mlp(**change)
    assert raised.value.__context__ is None, "one error, without that of the kernel before it"


@pytest.mark.parametrize("name", ["x", "ids", "weights", "w1", "w2"])
def test_mix_of_devices(name):
    tensors = {"x": X, "ids": IDS, "weights": WEIGHTS, "w1": W1, "w2": W2}
    with pytest.raises(ValueError, match=r"on meta|on cpu"):
        mlp(**{name: tensors[name].to("meta")})


@pytest.mark.parametrize("value", [4, -1, 2**40])
def test_id_out_of_range_names_the_first(value):
    message = rf"ids\[3, 1\]: got {value}, wanted an expert id from 0 to 3"
    with pytest.raises(ValueError, match=message):
        mlp(ids=id_at(3, 1, value))
    with pytest.raises(ValueError, match=message):
        RoutingPlan.from_ids(id_at(3, 1, value).numpy(), 4)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"ids_TK": None}, TypeError, "ids: got NoneType, wanted a torch tensor or a NumPy array"),
        ({"num_experts": 0}, ValueError, "num_experts: got 0, wanted at least 1"),
        ({"num_experts": "4"}, TypeError, "num_experts: got '4', wanted a whole number"),
        ({"capacity": -1}, ValueError, "capacity: got -1, wanted at least 0"),
        ({"capacity": 1.5}, TypeError, "capacity: got 1.5, wanted a whole number"),
        ({"drop": "random"}, ValueError, "drop: got 'random', wanted one of 'position', 'score'"),
        ({"drop": "score", "capacity": 1}, ValueError, "weights: got None, wanted the routing weights"),
        ({"pad": True}, ValueError, "capacity: got None, wanted the rows per expert"),
        ({"out_of_range": "clamp"}, ValueError, "out_of_range: got 'clamp', wanted one of 'error', 'drop'"),
        ({"weights": WEIGHTS[:3]}, ValueError, "weights: got shape (3, 2), wanted that of ids, (6, 2)"),
        ({"weights": IDS}, TypeError, "weights: got dtype int64, wanted a float dtype"),
        (
            {"weights": WEIGHTS.numpy()},
            TypeError,
            "weights: got a NumPy array beside torch ids, wanted the same kind",
        ),
    ],
)
def test_plan(options, error, message):
    with pytest.raises(error, match=re.escape(message)):
        RoutingPlan.from_ids(**({"ids_TK": IDS, "num_experts": 4} | options))


def test_plan_made_by_hand_cannot_reach_outside():
    good = RoutingPlan.from_ids(torch.randint(0, 4, (6, 2)), 4).state_dict()
    for name, index, value in [
        ("gather", 0, 6),
        ("gather", 0, -2),
        ("inverse", (0, 0), 12),
        ("offsets", 4, 13),
        ("offsets", 1, -1),
    ]:
        tampered = good[name].clone()
        tampered[index] = value
        plan = RoutingPlan.from_state_dict(good | {name: tampered})
        with pytest.raises(ValueError, match=name):
            mlp(plan=plan)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((X[0], 2), {}, ValueError, "logits: got shape (8,), wanted [T, E]"),
        ((X.long(), 2), {}, TypeError, "logits: got dtype torch.int64, wanted float32"),
        ((X, 0), {}, ValueError, "top_k: got 0, wanted 1 to 8, the number of experts"),
        ((X, 9), {}, ValueError, "top_k: got 9, wanted 1 to 8, the number of experts"),
        ((X, -1), {}, ValueError, "top_k: got -1, wanted 1 to 8, the number of experts"),
        ((X, 2.0), {}, TypeError, "top_k: got 2.0, wanted a whole number"),
        ((X, None), {}, TypeError, "top_k: got None, wanted a whole number"),
        ((X[:, :0], 1), {}, ValueError, "top_k: got 1, wanted 1 to 0"),
        ((X, 2), {"score": "tanh"}, ValueError, "score: got 'tanh', wanted one of 'softmax', 'sigmoid'"),
        ((X, 2), {"order": "topk"}, ValueError, "order: got 'topk', wanted one of 'score_topk'"),
        ((X, 2), {"bias": torch.zeros(7)}, ValueError, "bias: got shape (7,), wanted [E] = (8,)"),
        ((X, 2), {"expert_scale": X}, ValueError, "expert_scale: got shape (6, 8), wanted [E]"),
        ((X, 2), {"softcap": 0.0}, ValueError, "softcap: got 0.0, wanted None or a finite number of more"),
        ((X, 2), {"renormalize_eps": -1.0}, ValueError, "renormalize_eps: got -1.0, wanted a finite number"),
        ((X, 2), {"n_group": 3}, ValueError, "n_group: got 3, wanted a divisor of 8, the number of experts"),
        ((X, 2), {"n_group": 8}, ValueError, "n_group: got 8, wanted groups of at least 2 experts"),
        ((X, 2), {"topk_group": 2}, ValueError, "topk_group: got 2, wanted 1 to 1, the number of groups"),
        ((X, 3), {"n_group": 4}, ValueError, "top_k: got 3, wanted 1 to 2, the experts in topk_group groups"),
        ((X, 2), {"group_score": "sum"}, ValueError, "group_score: got 'sum', wanted one of 'top2', 'max'"),
        ((X, 2), {"group_losers": "0"}, ValueError, "group_losers: got '0', wanted one of '-inf', 'zero'"),
        (
            (X, 2),
            {"bias": torch.zeros(8, device="meta")},
            ValueError,
            "bias: got a tensor on meta, wanted one",
        ),
    ],
)
def test_route(arguments, options, error, message):
    with pytest.raises(error, match=re.escape(message)):
        functional.route(*arguments, **options)


OFFSETS = torch.tensor([0, 1, 2, 3, 6])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": X[0]}, ValueError, "x: got shape (8,), wanted [R, K]"),
        ({"w": W1[..., :7]}, ValueError, "w: got shape (4, 10, 7), wanted [E, N, K] = (4, 10, 8)"),
        ({"w": W1.double()}, TypeError, "w: got dtype torch.float64, wanted torch.float32, that of x"),
        ({"offsets": OFFSETS[1:]}, ValueError, "offsets: got shape (4,), wanted [E + 1] = (5,)"),
        ({"offsets": OFFSETS.float()}, TypeError, "offsets: got dtype torch.float32, wanted int32 or int64"),
        ({"bias": torch.randn(4, 9)}, ValueError, "bias: got shape (4, 9), wanted [E, N] = (4, 10)"),
        ({"offsets": torch.tensor([0, 1, 2, 3, 7])}, ValueError, "offsets"),
        ({"offsets": torch.tensor([0, 2, 1, 3, 6])}, ValueError, "offsets"),
        ({"offsets": torch.tensor([1, 2, 3, 3, 6])}, ValueError, "offsets"),
        ({"offsets": torch.tensor([0, 2**33, 3, 3, 6])}, ValueError, "offsets"),
    ],
)
def test_grouped_mm(change, error, message):
    arguments = {"x": X, "w": W1, "offsets": OFFSETS, "bias": None} | change
    with pytest.raises(error, match=re.escape(message)):
        functional.grouped_mm(arguments["x"], arguments["w"], arguments["offsets"], bias=arguments["bias"])


def test_permute_and_unpermute():
    plan = RoutingPlan.from_ids(IDS, 4)
    with pytest.raises(ValueError, match=r"x: got shape \(5, 8\), wanted the 6 tokens"):
        functional.permute(X[:5], plan)
    with pytest.raises(ValueError, match=r"y: got shape \(6, 8\), wanted \[R, H\] = \(12, 8\)"):
        functional.unpermute(X, plan)
    with pytest.raises(ValueError, match=r"weights: got shape \(2, 6\), wanted \[T, K\] = \(6, 2\)"):
        functional.unpermute(torch.randn(12, 8), plan, WEIGHTS.T)


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (X[:, :7], ValueError, "x: got shape (6, 7), wanted [..., H] with H = 8"),
        (torch.tensor(1.0), ValueError, "x: got shape (), wanted [..., H] with H = 8"),
        (
            X.bfloat16(),
            TypeError,
            "w1: got dtype torch.float32, wanted torch.bfloat16, that of x (or torch.auto",
        ),
        (X.long(), TypeError, "x: got dtype torch.int64, wanted float32"),
        ([1.0] * 8, TypeError, "x: got list, wanted a strided torch tensor [..., H]"),
        (
            torch.nested.nested_tensor([X[:2], X[2:]], layout=torch.jagged),
            TypeError,
            "x: got layout torch.jagged, wanted a strided torch tensor [..., H]",
        ),
    ],
)
def test_layer(x, error, message):
    with pytest.raises(error, match=re.escape(message)):
        nn.MoE(8, 5, 4, 2)(x)


def test_layer_wants_a_plan():
    with pytest.raises(TypeError, match="plan: got Tensor, wanted a RoutingPlan"):
        nn.MoE(8, 5, 4, 2)(X, plan=IDS)
    with pytest.raises(ValueError, match="plan: got one of 3 tokens, wanted one of the 6 tokens of x"):
        nn.MoE(8, 5, 4, 2)(X, plan=RoutingPlan.from_ids(IDS[:3], 4))


def test_shares_of_the_shared_expert():
    message = r"weights: got shape \(6, 2\), wanted \[T, S\] with S a divisor of the 5 hidden units"
    with pytest.raises(ValueError, match=message):
        nn.SharedExpert(8, 5)(X, WEIGHTS)


@pytest.mark.parametrize(
    "call",
    [
        watch,
        lambda model: nn.collect_stats(model).__enter__(),
        lambda model: record_routing(model).__enter__(),
        lambda model: replay_routing(model, {}).__enter__(),
        lambda model: routing_drift(model, model),
    ],
)
def test_what_is_no_module(call):
    with pytest.raises(TypeError, match=r"model: got str, wanted a torch\.nn\.Module"):
        call("model")


@pytest.mark.parametrize(
    ("sizes", "error", "message"),
    [
        ((8.0, 5, 4, 2), TypeError, "hidden_size: got 8.0, wanted a whole number"),
        ((8, "5", 4, 2), TypeError, "intermediate_size: got '5', wanted a whole number"),
        ((8, 5, 0, 2), ValueError, "num_experts: got 0, wanted at least 1"),
        ((8, 5, 4, 2.0), TypeError, "top_k: got 2.0, wanted a whole number"),
        ((8, 5, 4), ValueError, "top_k: got None, wanted K, or a router"),
    ],
)
def test_sizes_of_a_layer(sizes, error, message):
    with pytest.raises(error, match=re.escape(message)):
        nn.MoE(*sizes)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"renormalise": True},
            TypeError,
            "options: got 'renormalise', wanted one of 'jitter', 'logit_noise'",
        ),
        ({"renormalise": True}, TypeError, "(did you mean 'renormalize'?)"),
        ({"capacity_factor": "1.0"}, TypeError, "capacity_factor: got '1.0', wanted a number"),
        (
            {"top_k": None, "router": nn.Router},
            TypeError,
            "router: got the class Router, wanted a torch.nn.Mod",
        ),
        ({"top_k": None, "router": len}, TypeError, "router: got builtin_function_or_method, wanted a torch"),
    ],
)
def test_options_of_a_layer(options, error, message):
    with pytest.raises(error, match=re.escape(message)):
        nn.MoE(8, 5, 4, **{"top_k": 2} | options)


@pytest.mark.parametrize(
    ("plan", "error", "message"),
    [
        (
            RoutingPlan.from_ids(IDS[:3], 4),
            ValueError,
            "plan: got one of 3 tokens, wanted one of the 6 tokens",
        ),
        ({"": RoutingPlan.from_ids(IDS, 4)}, TypeError, "plan: got dict, wanted a RoutingPlan"),
    ],
)
def test_plan_of_a_layer(plan, error, message):
    with pytest.raises(error, match=re.escape(message)):
        nn.MoE(8, 5, 4, 2)(X, plan=plan)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: losses.router_z_loss(X.numpy()),
            "logits: got ndarray, wanted a torch tensor [T, E], or several",
        ),
        (lambda: losses.load_balancing_loss(X, 2.0), "top_k: got 2.0, wanted a whole number"),
        (lambda: losses.router_z_loss(X, mask=[1] * 6), "mask: got list, wanted a torch tensor"),
    ],
)
def test_losses(call, message):
    with pytest.raises(TypeError, match=re.escape(message)):
        call()


def test_python_suggests_the_name_that_was_meant():
    with pytest.raises(AttributeError, match="no attribute 'acelerate'") as raised:
        fastmoe_rs.acelerate  # noqa: B018
    assert raised.value.name == "acelerate"
    assert "accelerate" in dir(raised.value.obj)


@pytest.mark.parametrize("output", [None, (IDS, WEIGHTS)])
def test_a_router_that_returns_something_else(output):
    class Own(torch.nn.Module):
        def forward(self, x):
            return output

    message = rf"router: got an output of type {type(output).__name__}, wanted a functional\.Routing"
    with pytest.raises(TypeError, match=message):
        nn.MoE(8, 5, 4, router=Own())(X)


def test_a_subclass_is_computed_as_the_tensor_that_it_is():
    class Mine(torch.Tensor):
        pass

    for requires_grad in (False, True):
        arguments, _ = mlp_case(dtype=torch.float32, requires_grad=requires_grad)
        x, *others = arguments
        out = functional.moe_mlp(x.detach().as_subclass(Mine).requires_grad_(requires_grad), *others)
        assert isinstance(out, Mine)
        expected = functional.moe_mlp(*arguments)
        assert torch.equal(out.as_subclass(torch.Tensor), expected)
        if requires_grad:
            mine, plain = (torch.autograd.grad(y.sum(), others[1:]) for y in (out, expected))
            assert all(map(torch.equal, mine, plain))
            assert all(gradient.abs().sum() > 0 for gradient in plain)


def test_transforms_that_are_not_supported():
    (x, ids, weights, w1, w2), _ = mlp_case(dtype=torch.float32)
    y = functional.moe_mlp(x, ids, weights, w1, w2)
    with pytest.raises(ValueError, match=r"grad_out: .* without memory of its own, as inside of vmap"):
        torch.autograd.grad(y, x, torch.ones(3, *y.shape), is_grads_batched=True)
    with pytest.raises(RuntimeError, match=r"torch\.func transforms are not supported"):
        torch.func.grad(lambda x: functional.moe_mlp(x, ids, weights, w1, w2).sum())(x)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises(NotImplementedError, match="mlp: forward-mode differentiation is not supported"):
            functional.moe_mlp(dual, ids, weights, w1, w2)


def test_device_without_kernels():
    class Elsewhere(torch.Tensor):
        @property
        def device(self):
            return torch.device("xpu", 0)

    with pytest.raises(
        ValueError, match="x: got a tensor on xpu:0, wanted one on a device with kernels: cpu or cuda"
    ):
        mlp(x=X.as_subclass(Elsewhere))


def test_nan_and_infinite_inputs_stay_in_their_tokens():
    (x, ids, weights, w1, w2), _ = mlp_case(dtype=torch.float32, requires_grad=False)
    clean = functional.moe_mlp(x, ids, weights, w1, w2)
    x[3], x[5, 0] = torch.nan, torch.inf
    out = functional.moe_mlp(x, ids, weights, w1, w2)
    others = [t for t in range(13) if t not in (3, 5)]
    assert torch.equal(out[others], clean[others])
    assert out[3].isnan().all()
    assert not out[5].isfinite().any()


def test_arrays_in_any_order_make_the_same_plan():
    ids = np.asfortranarray(np.arange(12).reshape(6, 2) % 4)
    plan = RoutingPlan.from_ids(ids, 4)
    assert plan.inverse.tolist() == RoutingPlan.from_ids(ids.copy(order="C"), 4).inverse.tolist()

"""torch.compile without a graph break, the operators' contracts, export and function transforms."""

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend

from fastmoe_rs import RoutingPlan, functional, nn, ops
from moe_cases import mlp_case

BACKENDS = ["aot_eager", "inductor"]


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()


def assert_compiles(function, inputs, backend):
    """The compiled function gives the eager outputs and gradients without a graph break."""
    compiled = torch.compile(function, fullgraph=True, backend=backend)
    wanted = [tensor for tensor in inputs if tensor.requires_grad]
    results = []
    for version in (function, compiled):
        out = version(*inputs)
        results.append([out, *torch.autograd.grad(out.square().sum(), wanted)])
    for eager, traced in zip(*results, strict=True):
        torch.testing.assert_close(traced, eager)


@pytest.mark.parametrize("backend", BACKENDS)
def test_moe(backend):
    moe = nn.MoE(16, 12, 6, 2, shared_intermediate_size=8, capacity_factor=1.5, renormalize=True)
    x = torch.randn(3, 5, 16, requires_grad=True)
    assert_compiles(moe, [x], backend)
    compiled = torch.compile(moe, fullgraph=True, backend=backend)
    moe.zero_grad()
    moe(x).square().sum().backward()
    eager = [parameter.grad for parameter in moe.parameters()]
    moe.zero_grad(set_to_none=True)
    compiled(x).square().sum().backward()
    for parameter, want in zip(moe.parameters(), eager, strict=True):
        torch.testing.assert_close(parameter.grad, want)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), moe(x))


def test_other_numbers_of_tokens_compile_nothing_new():
    moe = nn.MoE(16, 12, 6, 2, capacity_factor=1.5)
    graphs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(moe, fullgraph=True, backend=graphs, dynamic=True)
    compilations = []
    for tokens in (8, 13, 21):
        x = torch.randn(tokens, 16)
        torch.testing.assert_close(compiled(x), moe(x))
        compilations.append(graphs.frame_count)
    assert compilations == [compilations[0]] * 3


def test_statistics_come_out_of_a_compiled_layer():
    moe, x = nn.MoE(16, 12, 6, 2), torch.randn(9, 16)
    y, stats = torch.compile(moe, fullgraph=True, backend="aot_eager")(x, return_stats=True)
    want_y, want = moe(x, return_stats=True)
    torch.testing.assert_close(y, want_y)
    assert torch.equal(stats.plan.inverse, want.plan.inverse)
    torch.testing.assert_close(stats.load, want.load)


def test_plan_goes_into_a_compiled_function():
    (x, ids, weights, w1, w2), _ = mlp_case(dtype=torch.float32)
    plan = RoutingPlan.from_ids(ids, 5, capacity=4, pad=True)

    def mlp(x, weights, w1, w2):
        return functional.moe_mlp(x, None, weights, w1, w2, plan=plan)

    assert_compiles(mlp, [x, weights, w1, w2], "aot_eager")


def test_pieces():
    logits = torch.randn(9, 5, requires_grad=True)
    x, w = torch.randn(9, 8, requires_grad=True), torch.randn(5, 8, 7, requires_grad=True)

    def layer(logits, x, w):
        ids, weights, _ = functional.route(
            logits, 2, score="sigmoid", bias=logits[0].detach(), softcap=9.0, expert_scale=logits[1]
        )
        plan = RoutingPlan.from_ids(ids, 5, weights=weights, capacity=4, drop="score")
        y = functional.grouped_mm(functional.permute(x, plan), w.transpose(1, 2), plan.offsets)
        return functional.unpermute(y, plan, weights) + functional.unpermute(y, plan)

    for backend in BACKENDS:
        assert_compiles(layer, [logits, x, w], backend)


def test_backward_of_the_router_is_one_operator():
    graphs = []

    def keep(graph, inputs):
        graphs.append([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
        return make_boxed_func(graph.forward)

    def router(logits, scale):
        return functional.route(logits, 2, renormalize=True, softcap=9.0, expert_scale=scale)[1]

    logits, scale = torch.randn(9, 5, requires_grad=True), torch.rand(5, requires_grad=True)
    backend = aot_autograd(fw_compiler=keep, bw_compiler=keep)
    torch.compile(router, fullgraph=True, backend=backend)(logits, scale).square().sum().backward()
    forward, backward = graphs
    assert "fastmoe_rs.route.default" in forward
    assert "fastmoe_rs.route_backward.default" in backward
    assert not any("softmax" in name or "tanh" in name or "scatter" in name for name in backward)


def operator_calls():
    """Every operator with arguments that it is called with."""
    arguments, options = mlp_case(6, 4, 3, 4, 2, bias=True, dtype=torch.float32)
    (x, ids, weights, w1, w2), b1, b2 = arguments, options["b1"], options["b2"]
    plan = RoutingPlan.from_ids(ids, 4)
    index = plan.offsets, plan.gather, plan.inverse
    y = torch.randn(12, 4, requires_grad=True)
    hidden, grad = torch.randn(12, 6), torch.randn(6, 4)
    logits, bias = torch.randn(6, 4, requires_grad=True), torch.randn(4)
    scale = torch.rand(4, requires_grad=True)
    w = torch.randn(4, 5, 4, requires_grad=True)
    scores = torch.rand(6, 4)
    routed = logits.detach(), scale.detach(), ids, scores
    flags = "swiglu", False, False
    return [
        ("plan", (ids, weights.detach(), 4, 2, "score", True, "error")),
        ("plan", (ids, None, 4, None, "position", False, "drop")),
        (
            "route",
            (
                logits,
                bias,
                scale,
                2,
                5.0,
                "sqrt_softplus",
                "score_topk",
                2,
                1,
                "top2",
                "-inf",
                True,
                1e-20,
                2.0,
            ),
        ),
        (
            "route",
            (logits, None, None, 2, None, "softmax", "topk_score", 1, 1, "top2", "-inf", False, 1e-20, 1.0),
        ),
        (
            "route_backward",
            (*routed, weights.detach(), scores, 5.0, "sigmoid", "score_topk", True, 1e-20, 2.0, True),
        ),
        (
            "route_backward",
            (*routed, weights.detach(), None, None, "softmax", "topk_score", False, 1e-20, 1.0, False),
        ),
        ("mlp", (x, weights, w1, w2, b1, b2, *index, *flags, True)),
        ("mlp", (x.detach(), weights.detach(), w1.detach(), w2.detach(), None, None, *index, *flags, False)),
        (
            "mlp_backward",
            (grad, *(t.detach() for t in (x, weights, w1, w2, b1, b2)), *index, hidden, *flags, [True] * 6),
        ),
        ("grouped_mm", (x, w, None, torch.tensor([0, 1, 1, 4, 5], dtype=torch.int32), False)),
        ("grouped_mm_grad_weight", (y, y, torch.tensor([0, 1, 1, 4, 5], dtype=torch.int32), False, True)),
        ("permute", (x, plan.gather, plan.inverse)),
        ("unpermute", (y, weights, plan.gather, plan.inverse)),
        ("unpermute", (y, None, plan.gather, plan.inverse)),
        (
            "unpermute_backward",
            (grad, y.detach(), weights.detach(), plan.gather, plan.inverse, [True, False]),
        ),
    ]


# opcheck looks at the gradients of copies that it makes of the arguments.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("number", range(15))
def test_opcheck(number):
    name, arguments = operator_calls()[number]
    torch.library.opcheck(getattr(torch.ops.fastmoe_rs, name).default, arguments)


def test_every_operator_is_checked():
    calls = operator_calls()
    assert len(calls) == 15
    defined = {name for name in vars(ops) if hasattr(torch.ops.fastmoe_rs, name) and name[0] != "_"}
    assert {name for name, _ in calls} == defined


def test_export():
    moe, x = nn.MoE(16, 12, 6, 2), torch.randn(9, 16)
    with torch.no_grad():
        inference = torch.export.export(moe, (x,)).module()
    with pytest.raises(RuntimeError, match="it was traced or exported without gradients"):
        inference(x).sum().backward()
    program = torch.export.export(moe, (x,), dynamic_shapes={"x": {0: torch.export.Dim("tokens", min=2)}})
    other = torch.randn(14, 16)
    torch.testing.assert_close(program.module()(other), moe(other))


def test_fake_tensors_have_the_shapes():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        moe = nn.MoE(16, 12, 6, 2, dtype=torch.bfloat16)
        x = torch.empty(9, 16, dtype=torch.bfloat16, requires_grad=True)
        y, stats = moe(x, return_stats=True)
        assert (y.shape, y.dtype) == ((9, 16), torch.bfloat16)
        assert stats.plan.gather.shape == (18,)
        y.sum().backward()
        assert x.grad.shape == x.shape
        assert moe.experts.w1.grad.shape == (6, 24, 16)


def test_dispatch_modes_see_the_operators():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    seen = []
    arguments, options = mlp_case(dtype=torch.float32)
    with Names():
        out = functional.moe_mlp(*arguments, **options)
    assert "fastmoe_rs.mlp.default" in seen
    torch.testing.assert_close(out, functional.moe_mlp(*arguments, **options))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*deprecated:FutureWarning")
def test_jit_trace_takes_other_numbers_of_tokens(tmp_path):
    moe, other = nn.MoE(16, 12, 6, 2), torch.randn(9, 16)
    for made_with_gradients in (True, False):
        with torch.set_grad_enabled(made_with_gradients):
            traced = torch.jit.trace(moe, torch.randn(7, 16))  # torch checks it without gradients
        torch.jit.save(traced, tmp_path / "moe.pt")
        assert torch.equal(torch.jit.load(tmp_path / "moe.pt")(other), moe(other))
        mine, plain = (torch.autograd.grad(layer(other).sum(), moe.experts.w1)[0] for layer in (traced, moe))
        assert torch.equal(mine, plain)

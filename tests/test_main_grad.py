"""Gradients of weights that are added to `parameter.main_grad`."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import fastmoe_rs
from fastmoe_rs import _native, functional, main_grad, nn
from moe_cases import WIDEST, assert_near, mlp_case

HALVES = [torch.bfloat16, torch.float16]
LAYOUTS = {
    "plain": {},
    "transposed": {"transposed": True},
    "interleaved": {"interleaved": True},
    "biased": {"bias": True, "transposed": True, "interleaved": True},
    "ungated": {"activation": "gelu"},
}


def with_main_grads(*weights, dtype=None):
    """Gives weights a main_grad of random numbers and returns copies of these."""
    for weight in weights:
        weight.main_grad = torch.randn(weight.shape, dtype=dtype or weight.dtype)
    return [weight.main_grad.clone() for weight in weights]


def backward(arguments, options, **call):
    functional.moe_mlp(*arguments, **options).square().sum().backward(**call)


def plain_gradients(arguments, options):
    """The gradients of w1 and w2 as `.grad` gets them."""
    weights = arguments[3:]
    out = functional.moe_mlp(*arguments, **options).square().sum()
    return torch.autograd.grad(out, weights)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_steps_are_the_sum_of_two_gradients(layout):
    arguments, options = mlp_case(**LAYOUTS[layout])
    weights = arguments[3:]
    grads = plain_gradients(arguments, options)
    sums = with_main_grads(*weights)
    backward(arguments, options)
    assert arguments[0].grad is not None
    bias_grads = [options[name].grad.clone() for name in ("b1", "b2") if name in options]
    backward(arguments, options)
    for weight, before, grad in zip(weights, sums, grads, strict=True):
        assert weight.grad is None
        assert torch.equal(weight.main_grad, before + grad + grad), "to the bit"
    for name, grad in zip(("b1", "b2"), bias_grads, strict=False):
        torch.testing.assert_close(options[name].grad, 2 * grad)


@pytest.mark.parametrize("dtype", HALVES)
def test_sums_in_float32_are_not_rounded_to_the_dtype_of_the_weights(dtype):
    w, offsets = torch.randn(3, 20, 24).to(dtype).requires_grad_(), torch.tensor([0, 10, 10, 31])
    steps = [(torch.randn(31, 24).to(dtype), torch.randn(31, 20).to(dtype)) for _ in range(24)]
    exact = torch.zeros(w.shape, dtype=torch.float64)
    for x, grad_out in steps:
        for e in range(3):
            rows = slice(offsets[e], offsets[e + 1])
            exact[e] += grad_out[rows].double().T @ x[rows].double()

    def error(sums):
        for x, grad_out in steps:
            functional.grouped_mm(x, w, offsets).backward(grad_out)
        return (sums().double() - exact).abs().max() / exact.abs().max()

    as_ever = error(lambda: w.grad)
    w.main_grad = torch.zeros(w.shape, dtype=dtype)
    narrow = error(lambda: w.main_grad)
    w.main_grad = torch.zeros(w.shape)
    assert error(lambda: w.main_grad) < 1e-6
    assert 1e-4 < narrow < as_ever, "one rounding a step, not two"


@pytest.mark.parametrize("dtype", [WIDEST, *HALVES])
@pytest.mark.parametrize("wide", [False, True])
def test_experts_without_tokens_keep_their_bits(dtype, wide):
    arguments, options = mlp_case(dtype=dtype)
    weights = arguments[3:]
    before = with_main_grads(*weights, dtype=functional.wide(dtype) if wide else dtype)
    for weight, numbers in zip(weights, before, strict=True):
        for tensor in (weight.main_grad, numbers):  # mlp_case sends no token to expert 0
            tensor[0, 0], tensor[0, 1] = -0.0, torch.nan
    backward(arguments, options)
    for weight, numbers in zip(weights, before, strict=True):
        assert torch.equal(weight.main_grad[0].view(torch.uint8), numbers[0].view(torch.uint8))
        assert (weight.main_grad[1:] != numbers[1:]).any(2).any(1).all()


def test_one_weight_with_a_main_grad_and_everything_else_frozen():
    (x, ids, weights, w1, w2), options = mlp_case()
    _, want = plain_gradients((x, ids, weights, w1, w2), options)
    for tensor in (x, weights, w1):
        tensor.requires_grad_(False)
    (before,) = with_main_grads(w2)
    backward((x, ids, weights, w1, w2), options)
    assert torch.equal(w2.main_grad, before + want)
    assert all(tensor.grad is None for tensor in (x, weights, w1, w2))
    del w2.main_grad
    backward((x, ids, weights, w1, w2), options)
    assert torch.equal(w2.grad, want)


def test_a_frozen_weight_leaves_its_main_grad_alone():
    arguments, options = mlp_case()
    w1, w2 = arguments[3:]
    before = with_main_grads(w1, w2)
    w1.requires_grad_(False)
    backward(arguments, options)
    assert torch.equal(w1.main_grad, before[0])
    assert not torch.equal(w2.main_grad, before[1])


@pytest.mark.parametrize("transposed", [False, True])
def test_grouped_mm(transposed):
    x, offsets = torch.randn(9, 7, dtype=WIDEST), torch.tensor([0, 4, 4, 8])
    w = torch.randn(3, 5, 7, dtype=WIDEST)
    leaf = (w.mT.contiguous() if transposed else w).requires_grad_()
    w = leaf.mT if transposed else leaf
    bias = torch.randn(3, 5, dtype=WIDEST, requires_grad=True)
    out = functional.grouped_mm(x, w, offsets, bias=bias).square().sum()
    (want,) = torch.autograd.grad(out, leaf)
    (before,) = with_main_grads(leaf)
    functional.grouped_mm(x, w, offsets, bias=bias).square().sum().backward()
    assert leaf.grad is None
    assert torch.equal(leaf.main_grad, before + want)
    assert bias.grad is not None


def test_views_that_are_read_in_place_are_the_parameter():
    arguments, options = mlp_case(transposed=True)
    want = plain_gradients(arguments, options)
    *inputs, w1, w2 = arguments
    before = with_main_grads(w1, w2)
    functional.moe_mlp(*inputs, w1.mT, w2.mT, **options | {"transposed": False}).square().sum().backward()
    for weight, numbers, grad in zip((w1, w2), before, want, strict=True):
        assert weight.grad is None
        assert torch.equal(weight.main_grad, numbers + grad)


def test_what_lies_between_the_parameter_and_the_call_gets_gradients():
    """Scaled, cut, cast or copied: its gradient is another one than that of the parameter."""
    (x, ids, weights, w1, w2), options = mlp_case(dtype=torch.float32)
    copied = w1.detach().mT.contiguous().requires_grad_()
    before = with_main_grads(w1, w2, copied)
    functional.moe_mlp(x, ids, weights, w1 * 2, w2[:], **options).square().sum().backward()
    functional.moe_mlp(x, ids, weights, copied.mT, w2[:, :, : w2.shape[2]], **options).sum().backward()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        functional.moe_mlp(x, ids, weights, w1, w2, **options).float().sum().backward()
    functional.moe_mlp(x, ids, weights, w1[:, :8], w2[:, :, :4], **options).sum().backward()
    for weight, numbers in ((w1, before[0]), (copied, before[2])):
        assert weight.grad is not None
        assert torch.equal(weight.main_grad, numbers)


def test_autograd_grad_returns_gradients_as_ever():
    arguments, options = mlp_case()
    x, w1, w2 = arguments[0], *arguments[3:]
    want = plain_gradients(arguments, options)
    before = with_main_grads(w1, w2)
    out = functional.moe_mlp(*arguments, **options).square().sum()
    for got, grad in zip(torch.autograd.grad(out, (w1, w2), retain_graph=True), want, strict=True):
        assert torch.equal(got, grad)
    torch.autograd.grad(out, x, retain_graph=True)
    out.backward(inputs=[x], retain_graph=True)
    assert torch.equal(w1.main_grad, before[0])
    out.backward(inputs=[w1])
    assert torch.equal(w1.main_grad, before[0] + want[0])
    assert torch.equal(w2.main_grad, before[1])


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
def test_create_graph_and_dispatch_modes_see_gradients():
    class Mode(torch.utils._python_dispatch.TorchDispatchMode):
        seen = ()

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.seen += (str(function),)
            return function(*args, **(kwargs or {}))

    arguments, options = mlp_case()
    want = plain_gradients(arguments, options)
    w1, w2 = arguments[3:]
    before = with_main_grads(w1, w2)
    backward(arguments, options, create_graph=True)
    out = functional.moe_mlp(*arguments, **options).square().sum()
    with Mode() as mode:
        out.backward()
    assert "fastmoe_rs.mlp_backward.default" in mode.seen
    for weight, numbers, grad in zip((w1, w2), before, want, strict=True):
        torch.testing.assert_close(weight.grad.detach(), 2 * grad)
        assert torch.equal(weight.main_grad, numbers)
        weight.grad = None


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_code_gives_gradients(backend):
    torch._dynamo.reset()
    arguments, options = mlp_case(dtype=torch.float32)
    weights = arguments[3:]
    want = plain_gradients(arguments, options)
    before = with_main_grads(*weights)
    compiled = torch.compile(functional.moe_mlp, fullgraph=True, backend=backend)
    compiled(*arguments, **options).square().sum().backward()
    for weight, numbers, grad in zip(weights, before, want, strict=True):
        torch.testing.assert_close(weight.grad, grad)
        assert torch.equal(weight.main_grad, numbers)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing(use_reentrant):
    arguments, options = mlp_case()
    want = plain_gradients(arguments, options)
    weights = arguments[3:]
    before = with_main_grads(*weights)
    x, *others = arguments
    out = checkpoint(lambda x: functional.moe_mlp(x, *others, **options), x, use_reentrant=use_reentrant)
    out.square().sum().backward()
    for weight, numbers, grad in zip(weights, before, want, strict=True):
        assert weight.grad is None
        assert torch.equal(weight.main_grad, numbers + grad)


def test_marks_of_megatron():
    """Its hooks want a gradient where they are told to ignore it, and add one that has to be zeros."""
    arguments, options = mlp_case()
    want = plain_gradients(arguments, options)
    w1, w2 = arguments[3:]
    before = with_main_grads(w1, w2)
    ignored = []

    def hook(parameter):
        if not parameter.grad_added_to_main_grad or getattr(parameter, "zero_out_wgrad", False):
            parameter.main_grad.add_(parameter.grad)
        ignored.append(parameter.grad.shape)
        parameter.grad = None

    for weight in (w1, w2):
        weight.grad_added_to_main_grad = False
        weight.register_post_accumulate_grad_hook(hook)
    w2.zero_out_wgrad = True
    backward(arguments, options)
    assert sorted(ignored) == sorted([w1.shape, w2.shape])
    for weight, numbers, grad in zip((w1, w2), before, want, strict=True):
        assert weight.grad_added_to_main_grad is True
        assert torch.equal(weight.main_grad, numbers + grad)
    w1.grad_added_to_main_grad, w1.overwrite_main_grad = False, True  # Megatron-FSDP
    backward(arguments, options)
    assert w1.grad_added_to_main_grad is False
    assert torch.equal(w1.main_grad, before[0] + want[0] + want[0])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda g: g[1:], ValueError, r"^w2\.main_grad: got shape .*, wanted that of the parameter = \(5,"),
        (
            lambda g: g.to(torch.float16),
            TypeError,
            r"^w2\.main_grad: got dtype torch\.float16, wanted torch\.",
        ),
        (lambda g: g.to("meta"), ValueError, r"^w2\.main_grad: got a tensor on meta, wanted one on cpu"),
        (lambda g: g.mT.contiguous().mT, ValueError, r"^w2\.main_grad: .*not contiguous"),
        (lambda g: g.to_sparse(), ValueError, r"^w2\.main_grad: .*not contiguous"),
        (lambda g: g.requires_grad_(), ValueError, r"^w2\.main_grad: got a tensor that requires grad"),
        (lambda g: g.numpy(), TypeError, r"^w2\.main_grad: got ndarray, wanted a torch tensor"),
    ],
)
def test_a_bad_main_grad_is_named(change, error, message):
    arguments, options = mlp_case(dtype=torch.float32)
    arguments[4].main_grad = change(torch.zeros(arguments[4].shape))
    with pytest.raises(error, match=message):
        backward(arguments, options)


def test_a_main_grad_that_is_the_memory_of_the_weight():
    arguments, options = mlp_case()
    arguments[3].main_grad = arguments[3].detach()
    with pytest.raises(ValueError, match=r"^grad_w1: got memory shared with w1, wanted memory of its own$"):
        backward(arguments, options)


def test_autograd_notices_that_it_has_changed():
    arguments, options = mlp_case()
    w1 = arguments[3]
    with_main_grads(w1)
    scale = torch.ones((), dtype=WIDEST, requires_grad=True)
    out = (w1.main_grad * scale).sum()
    backward(arguments, options)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


@pytest.mark.cpu_only(reason="about the memory pool of the CPU backend")
def test_no_memory_is_taken_for_the_gradients():
    experts = nn.Experts(64, 64, 512)
    gradients = sum(w.numel() * 4 for w in (experts.w1, experts.w2))
    x, ids = torch.randn(2, 64), torch.tensor([[3], [5]])

    def taken():
        """Bytes that the pool got from the system for a step."""
        _native.empty_cache()
        held = _native.memory_stats()["used_bytes"]
        experts(x, ids, torch.ones(2, 1)).sum().backward()
        stats = _native.memory_stats()
        return stats["used_bytes"] + stats["cached_bytes"] - held

    assert taken() >= gradients
    experts.zero_grad()
    fastmoe_rs.main_grads(experts)
    assert taken() < gradients / 8, "what the kernels work with"


def test_the_same_bits_for_every_number_of_threads(set_threads):
    arguments, options = mlp_case(300, 96, 200, 6, dtype=torch.bfloat16)
    weights = arguments[3:]
    results = []
    for threads in (1, 2, 3):
        set_threads(threads)
        for weight in weights:
            weight.main_grad = torch.ones(weight.shape)
        backward(arguments, options)
        results.append([weight.main_grad for weight in weights])
    for other in results[1:]:
        assert all(map(torch.equal, other, results[0]))


def test_main_grads_of_a_model():
    moe = nn.MoE(16, 12, 6, 2, shared_intermediate_size=8, bias=True).to(torch.bfloat16)
    moe.shared.w1.requires_grad_(False)
    x = torch.randn(40, 16, dtype=torch.bfloat16)
    moe(x).sum().backward()
    parameters = [parameter for parameter in moe.parameters() if parameter.requires_grad]
    grads = [parameter.grad for parameter in parameters]
    moe.zero_grad()
    for _ in range(2):  # a second call begins anew
        sums = fastmoe_rs.main_grads(moe)
        moe(x).sum().backward()
        moe(x).sum().backward()
    assert not hasattr(moe.shared.w1, "main_grad")
    for parameter, total, grad in zip(parameters, sums, grads, strict=True):
        assert parameter.grad is None
        assert total is parameter.main_grad
        assert total.dtype == torch.float32
        assert_near(total, 2 * grad.double(), torch.bfloat16)
    with pytest.raises(TypeError, match=r"^model: got list, wanted a torch\.nn\.Module$"):
        fastmoe_rs.main_grads([])


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "inkling2_text"])
def test_experts_of_transformers(family, monkeypatch):
    """Fused; transposed, interleaved and biased; grouped products around the model's own activation."""
    pytest.importorskip("transformers", minversion="5", reason="the integration is for transformers >= 5")
    from transformers_models import build, tokens

    model, ids = fastmoe_rs.accelerate(build(family)), tokens()
    names = {parameter: name for name, parameter in model.named_parameters()}

    def step():
        model(ids, labels=ids).loss.backward()

    step()
    grads = {p: p.grad.clone() for p in names if p.grad is not None}
    model.zero_grad()
    moved, move = set(), main_grad._move

    def spy(parameter):
        if parameter.grad is not None:
            moved.add(names[parameter])
        move(parameter)

    monkeypatch.setattr(main_grad, "_move", spy)
    fastmoe_rs.main_grads(model)
    step()
    step()
    added = {names[parameter] for parameter in grads} - moved
    assert {name.rpartition(".")[2] for name in added} == {"gate_up_proj", "down_proj"}
    for parameter, grad in grads.items():
        torch.testing.assert_close(parameter.main_grad, 2 * grad, rtol=1e-4, atol=1e-5)

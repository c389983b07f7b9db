"""CUDA tensors without a GPU: dispatch, what is refused, and that nothing waits for a device.

Fake tensors say that they are on a GPU and have only shapes: an operation whose result depends on numbers
(`.item()`, `nonzero`, a boolean mask) raises, as there are none. Backwards are run on "meta" instead, where
that holds too, as autograd wants a driver for CUDA tensors, even fake ones.
"""

import os
import re
import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from fastmoe_rs import RoutingPlan, functional, losses, nn, ops, routing, watch
from fastmoe_rs.distillation import distillation_loss, merge_weights
from fastmoe_rs.integrations import swap
from fastmoe_rs.integrations.grok import GrokMoE
from fastmoe_rs.upcycling import copy_experts, dense_mlp

KINDS = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
LAYERS = {
    "plain": {},
    "capacity": {"capacity_factor": 1.5, "renormalize": True},
    "shared": {"shared_intermediate_size": 8, "activation": "relu2", "jitter": 0.1},
    "biases": {"activation": "swiglu_oai", "order": "topk_score", "bias": True, "selection_bias": True},
}

ROUTERS = {
    "switch": lambda **o: nn.CapacityRouter(16, 6, 1, capacity_factor=1.0, **o),
    "gshard": lambda **o: nn.GShardRouter(16, 6, group_size=4, **o),
    "noise": lambda **o: nn.NoisyTopKRouter(16, 6, 2, logit_noise=0.1, **o),
    "expert choice": lambda **o: nn.ExpertChoiceRouter(16, 6, **o),
    "balanced": lambda **o: nn.SinkhornRouter(16, 6, 2, **o),
    "with shared": lambda **o: nn.SharedRouter(16, 6, 2, num_shared=2, selection_bias=True, **o),
    "mixer": lambda **o: nn.SparseMixerRouter(16, 6, 2, **o),
    "rounded": lambda **o: nn.TokenRoundingRouter(16, 6, 2, tile=4, **o),
}


@pytest.fixture
def fake():
    with FakeTensorMode() as mode:
        yield mode


class StaysOnDevice(TorchDispatchMode):
    """Refuses what makes a host wait for its GPU: numbers read, sizes of numbers, copies between devices."""

    WAITS = re.compile(
        r"aten\.(_local_scalar_dense|item|is_nonzero|nonzero|masked_select|equal|allclose|bincount|unique|_unique2|"
        r"unique_consecutive|unique_dim|argwhere|histc|repeat_interleave\.Tensor)\b"
    )

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        assert not self.WAITS.search(str(function)), f"{function} waits for the device"
        tensors = [arg for arg in args if isinstance(arg, torch.Tensor) and arg.dim() > 0]
        if str(function).startswith(("aten.index.", "aten.index_put")):
            masks = [index for index in args[1] if index is not None and index.dtype == torch.bool]
            assert not masks, f"{function} with a mask waits for the device"
        devices = {tensor.device for tensor in (*tensors, out) if isinstance(tensor, torch.Tensor)}
        assert len(devices) <= 1, f"{function} copies between {devices}"
        return out


def steps(device, dtype):
    """Everything that a forward may be made of, as functions without arguments."""
    x, logits = (torch.randn(12, n, device=device, dtype=dtype, requires_grad=True) for n in (16, 6))
    w1, w2 = (
        torch.randn(6, *s, device=device, dtype=dtype, requires_grad=True) for s in ((24, 16), (16, 12))
    )
    scale = torch.rand(6, device=device, requires_grad=True)

    def layer(options):
        moe = nn.MoE(16, 12, 6, 2, **options, device=device, dtype=dtype)
        watch(moe)
        y, stats = moe(x.view(3, 4, 16), return_stats=True)
        loss = losses.load_balancing_loss(stats.router.logits, 2, ids_TK=stats.router.ids)
        loss = loss + losses.router_z_loss(stats.router.logits)
        return y, loss, stats.load, stats.max_vio, stats.load_entropy, stats.dropped

    def routed_by(router):
        made = {"device": device, "dtype": dtype}
        moe = nn.MoE(16, 12, 6, router=router(**made), shared_intermediate_size=8, **made)
        watch(moe)
        moe.router.seed = 3

        def forward():
            y, stats = moe(x, return_stats=True)
            if moe.router.selection_bias is not None:
                moe.router.balance(stats.routes)
            return y, stats.load, stats.dropped

        return forward

    def balance():
        ids, weights, _ = functional.route(logits, 2)
        options = {"mask": mask, "tokens": tokens.sum()}
        loss, load = losses.global_batch_loss(logits, 2, group=None, **options)
        return (
            loss,
            losses.load_balancing_loss([logits, logits], 2, load=load, **options),
            losses.switch_loss(logits, group_size=4, **options),
            losses.gshard_loss(logits, **options),
            losses.sequence_balance_loss(logits, 2, 6, **options),
            losses.importance_loss(ids, weights, 6, mask=mask),
            losses.load_loss(routing.noisy_top_k_route(logits, logits, 2, seed=1).load, mask=mask),
            losses.router_z_loss(logits, **options),
        )

    def pieces():
        ids, weights, _ = functional.route(
            logits,
            2,
            score="sigmoid",
            softcap=9.0,
            expert_scale=scale,
            bias=scale,
            n_group=3,
            topk_group=2,
            renormalize=True,
        )
        plan = RoutingPlan.from_ids(ids, 6, weights=weights, capacity=3, drop="score", pad=True)
        h = functional.grouped_mm(functional.permute(x, plan), w1, plan.offsets.long(), bias=w1[:, :, 0])
        h = functional.grouped_mm(functional.activate(h, "geglu"), w2, plan.offsets)
        again = functional.route_weights(logits, ids, order="topk_score", expert_scale=scale)
        return functional.unpermute(h, plan, weights), functional.unpermute(h, plan), again

    def mlp(routed, **options):
        def forward():
            ids, weights, _ = routed()
            plan = RoutingPlan.from_ids(ids, 6, out_of_range="drop", **options)
            return functional.moe_mlp(x, None, weights, w1, w2, plan=plan)

        return forward

    dense = nn.SharedExpert(16, 12, device=device, dtype=dtype)
    caps = {"router_softcap": 30.0, "residual_intermediate_size": 8}
    grok = GrokMoE(16, 12, 6, 2, **caps, device=device, dtype=dtype)

    def distilled():
        copies = copy_experts(dense_mlp(dense), 6, noise=0.1, redraw=0.5)
        merged = merge_weights(*copies, scale, gather=2)
        hidden = {"student_hidden": [dense(x)], "teacher_hidden": [x], "mask": scale.new_ones(12)}
        return distillation_loss(logits, 2 * logits, **hidden), *copies, *merged

    table = routing.hash_table(50, 6, 2, device=device)
    tokens = torch.zeros(12, dtype=torch.int64, device=device)
    mask = torch.ones(3, 4, device=device)
    routers = {
        "drops": lambda: routing.gshard_route(logits, 3, queue="batch", group_size=4, seed=5),
        "choice": lambda: routing.expert_choice_route(logits, 4),
        "hashed": lambda: routing.hash_route(logits, table, tokens),
        "noisy": lambda: routing.noisy_top_k_route(logits, logits, 2)[:3],
        "sinkhorn": lambda: routing.sinkhorn_route(logits, 2),
        "sparsemixer": lambda: routing.sparsemixer_route(logits, 2, seed=3),
        "rounded": lambda: routing.round_tokens(functional.route(logits, 2), 2),
    }
    yield from ((name, lambda options=options: layer(options)) for name, options in LAYERS.items())
    yield from ((name, routed_by(router)) for name, router in ROUTERS.items())
    yield "losses", balance
    yield "pieces", pieces
    yield "grok", lambda: grok(x)
    yield "distilled", distilled
    yield from ((name, mlp(router)) for name, router in routers.items())


@KINDS
def test_no_forward_waits_for_a_gpu(fake, dtype):
    for name, step in steps("cuda", dtype):
        with StaysOnDevice():
            out = step()
        for tensor in out if isinstance(out, tuple) else (out,):
            assert tensor.device == torch.device("cuda", 0), name


@KINDS
def test_no_backward_waits_for_a_gpu(dtype):
    for name, step in steps("meta", dtype):
        out = step()
        out = out if isinstance(out, tuple) else (out,)
        with StaysOnDevice():
            sum(tensor.float().sum() for tensor in out if tensor.requires_grad).backward()
        assert any(tensor.requires_grad for tensor in out), name


@pytest.mark.emulated_only(reason="runs the kernels")
def test_no_pass_through_the_kernels_waits_for_a_gpu():
    for name, step in steps("cpu", torch.float32):
        with StaysOnDevice():
            out = step()
            out = out if isinstance(out, tuple) else (out,)
            sum(tensor.float().sum() for tensor in out if tensor.requires_grad).backward()
        assert all(tensor.isfinite().all() for tensor in out), name


def test_every_operator_has_a_kernel_for_both_devices():
    names = [name for name in vars(ops) if hasattr(torch.ops.fastmoe_rs, name) and name[0] != "_"]
    assert len(names) == 10
    for name in names:
        for key in ("CPU", "CUDA"):
            assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fastmoe_rs::{name}", key)


def test_gradients_and_the_saved_hidden_states_are_memory_of_the_device(fake):
    x, weights = torch.empty(5, 16, device="cuda"), torch.empty(5, 2, device="cuda")
    w1, w2 = torch.empty(6, 24, 16, device="cuda"), torch.empty(6, 16, 12, device="cuda")
    plan = RoutingPlan.from_ids(torch.empty(5, 2, dtype=torch.int64, device="cuda"), 6)
    index, flags = (plan.offsets, plan.gather, plan.inverse), ("swiglu", False, False)
    out, hidden = torch.ops.fastmoe_rs.mlp(x, weights, w1, w2, None, None, *index, *flags, True)
    assert (hidden.shape, hidden.device.type) == ((10, 24), "cuda")
    needs = [True, True, True, True, False, False]
    grads = torch.ops.fastmoe_rs.mlp_backward(
        out, x, weights, w1, w2, None, None, *index, hidden, *flags, needs
    )
    for grad, tensor in zip(grads[:4], (x, weights, w1, w2), strict=True):
        assert (grad.shape, grad.device) == (tensor.shape, tensor.device)


def test_export_traces_a_layer_of_cuda_tensors(fake):
    moe = nn.MoE(16, 12, 6, 2, shared_intermediate_size=8, capacity_factor=1.5, device="cuda")
    x = torch.empty(9, 16, device="cuda")
    program = torch.export.export(moe, (x,), dynamic_shapes={"x": {0: torch.export.Dim("tokens", min=2)}})
    called = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert [name for name in called if name.startswith("fastmoe_rs")] == [
        f"fastmoe_rs.{name}.default" for name in ("route", "plan", "mlp")
    ]
    assert not [name for name in called if StaysOnDevice.WAITS.search(name)]


def test_modules_move_with_all_that_they_hold():
    moe = nn.MoE(16, 12, 6, 2, shared_intermediate_size=8, bias=True, selection_bias=True)
    names = {name for name, _ in (*moe.named_parameters(), *moe.named_buffers())}
    moe.to("meta")
    assert {name for name, t in (*moe.named_parameters(), *moe.named_buffers()) if t.is_meta} == names
    assert moe(torch.empty(3, 16, device="meta")).is_meta


X, IDS, WEIGHTS = (5, 16), (5, 2), (5, 2)
W1, W2, LOGITS = (6, 24, 16), (6, 16, 12), (5, 6)


def on(device, shape, dtype=torch.float32):
    return torch.empty(shape, device=device, dtype=dtype)


MLP = {"x_TH": X, "weights_TK": WEIGHTS, "w1": W1, "w2": W2, "b1": (6, 24), "b2": (6, 16)}


@pytest.mark.parametrize("name", [*MLP, "ids_TK"])
def test_moe_mlp_refuses_a_mix_of_devices(fake, name):
    arguments = {argument: on("cuda", shape) for argument, shape in MLP.items()}
    arguments["ids_TK"] = on("cuda", IDS, torch.int64)
    functional.moe_mlp(**arguments)
    arguments[name] = arguments[name].cpu()
    others = (
        r"\w+: got a tensor on cuda:0, wanted one on cpu, where x is"
        if name == "x_TH"
        else (rf"{name.partition('_')[0]}: got a tensor on cpu, wanted one on cuda:0, where x is")
    )
    if name == "ids_TK":
        others = r"plan: got a plan \(or ids\) on cpu, wanted one on cuda:0, where x is"
    with pytest.raises(ValueError, match=others):
        functional.moe_mlp(**arguments)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: functional.route(on("cuda", LOGITS), 2, bias=on("cpu", 6)),
            "bias: got a tensor on cpu, wanted one on cuda:0, where logits is",
        ),
        (
            lambda: functional.route_weights(on("cuda", LOGITS), on("cpu", IDS, torch.int64)),
            "ids: got a tensor on cpu, wanted one on cuda:0, where logits is",
        ),
        (
            lambda: RoutingPlan.from_ids(on("cuda", IDS, torch.int64), 6, weights=on("cpu", IDS)),
            "weights: got a tensor on cpu, wanted one on cuda:0, where ids is",
        ),
        (
            lambda: functional.grouped_mm(on("cuda", X), on("cuda", W1), on("cpu", 7, torch.int32)),
            "offsets: got a tensor on cpu, wanted one on cuda:0, where x is",
        ),
        (
            lambda: nn.MoE(16, 12, 6, 2, device="cuda")(on("cpu", X)),
            "x: got a tensor on cpu, wanted one on cuda:0, where the weight is",
        ),
        (
            lambda: functional.permute(on("cpu", X), RoutingPlan.from_ids(on("cuda", IDS, torch.int64), 6)),
            r"plan: got a plan \(or ids\) on cuda:0, wanted one on cpu, where x is",
        ),
    ],
)
def test_mixed_devices_are_refused(fake, call, message):
    with pytest.raises(ValueError, match=message):
        call()


class Foreign:
    """An array of a library with DLPack that is neither torch nor NumPy."""

    def __init__(self, tensor):
        self.tensor = tensor
        self.dtype, self.shape, self.ndim = (
            str(tensor.dtype).removeprefix("torch."),
            tensor.shape,
            tensor.ndim,
        )

    def __dlpack__(self, **options):
        return self.tensor.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.tensor.__dlpack_device__()


def test_arrays_of_other_libraries_make_plans_of_tensors():
    ids, weights = torch.randint(0, 4, (6, 2)), torch.rand(6, 2)
    plan = RoutingPlan.from_ids(Foreign(ids), 4, weights=Foreign(weights), capacity=2)
    expected = RoutingPlan.from_ids(ids, 4, weights=weights, capacity=2)
    assert plan.ids.data_ptr() == ids.data_ptr()
    for name in ("counts", "offsets", "gather", "inverse", "weights"):
        assert torch.equal(getattr(plan, name), getattr(expected, name))


@pytest.mark.emulated_only(reason="runs the kernels")
def test_plan_made_by_hand_reaches_nothing_outside_its_tensors():
    """Unchecked, an index that points nowhere stands for a dropped row; the emulator sees every access."""
    code = """
import torch
from fastmoe_rs import RoutingPlan, functional
torch.manual_seed(0)
x, weights = torch.randn(6, 8, requires_grad=True), torch.rand(6, 2, requires_grad=True)
w1, w2, b2 = (torch.randn(s, requires_grad=True) for s in ((4, 10, 8), (4, 8, 5), (4, 8)))
good = RoutingPlan.from_ids(torch.tensor([[0, 9]] + 5 * [[1, 2]]), 4)  # 9 is dropped, nobody waits to say so
assert good.inverse[0].tolist() == [0, -1]
for name, index, value in [
    ("gather", 0, 6), ("gather", 3, 2**31 - 1), ("inverse", (0, 0), 12), ("inverse", (2, 1), -7),
    ("offsets", 4, 13), ("offsets", 1, -1), ("offsets", slice(2, 5), 2**31 - 1),
]:
    bad = getattr(good, name).clone()
    bad[index] = value
    plan = RoutingPlan.from_state_dict(good.state_dict() | {name: bad})
    out = functional.moe_mlp(x, None, weights, w1, w2, b2=b2, plan=plan)
    out = out + functional.unpermute(functional.permute(x, plan), plan, weights)
    out.sum().backward()
    out = functional.grouped_mm(functional.permute(x, plan), w1, plan.offsets, bias=w1[..., 0])
    out.sum().backward()
print("done")
"""
    environment = os.environ | {"FASTMOE_CHECK": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False
    )
    assert done.stdout == "done\n", done.stderr


@pytest.fixture
def matmul_precision():
    """Sets the precision of float32 products, by the old or the new door of torch, for a test."""
    matmul = torch.backends.cuda.matmul

    def set_precision(door, precision):
        if door == "old":
            torch.set_float32_matmul_precision({"tf32": "high", "ieee": "highest"}[precision])
        elif hasattr(matmul, "fp32_precision"):
            matmul.fp32_precision = precision
        else:
            pytest.skip("torch has no fp32_precision before 2.9")

    yield set_precision
    if hasattr(matmul, "fp32_precision"):
        matmul.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")


@pytest.mark.emulated_only(reason="runs the kernels")
@pytest.mark.parametrize("door", ["old", "new"])
def test_float32_products_use_tf32_where_torch_does(matmul_precision, door):
    x, w = torch.randn(40, 64), torch.randn(1, 32, 64)
    truth = x.double() @ w[0].double().T
    errors = {}
    for precision in ("ieee", "tf32"):
        matmul_precision(door, precision)
        y = functional.grouped_mm(x, w, torch.tensor([0, 40]))
        errors[precision] = ((y - truth).abs().max() / truth.abs().max()).item()
    assert errors["ieee"] < 1e-6
    assert 1e-5 < errors["tf32"] < 2e-3


@pytest.mark.parametrize(
    ("dtype", "loads", "reason"),
    [
        (
            torch.float32,
            "CUDA: no NVIDIA driver on this machine",
            r"Experts is on cuda:0\. CUDA: no NVIDIA driver",
        ),
        (torch.float64, None, r"Experts holds torch\.float64, which is served on the CPU only"),
        (torch.bfloat16, None, None),
    ],
)
def test_accelerate_asks_the_gpu_of_a_model(fake, monkeypatch, dtype, loads, reason):
    asked = []

    def load_cuda(device):
        asked.append(device)
        if loads:
            raise RuntimeError(loads)

    monkeypatch.setattr(swap._native, "load_cuda", load_cuda)
    experts = nn.Experts(16, 12, 6, device="cuda", dtype=dtype)
    if reason is None:
        swap._check_parameters(experts)
    else:
        with pytest.raises(swap._CannotServe, match=reason):
            swap._check_parameters(experts)
    assert set(asked) == {0}

"""What surrounds a layer in training: autocast, inference_mode, checkpointing, frozen weights, ranks."""

import copy
import gc
import weakref

import pytest
import torch
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from fastmoe_rs import RoutingPlan, functional, kernels, nn, reference
from moe_cases import EMULATED, WIDEST, assert_near, differentiable, mlp_case


def small_moe(**options):
    return nn.MoE(16, 12, 6, 2, **options)


def gradients(module):
    return [parameter.grad.clone() for parameter in module.parameters()]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_runs_the_products_in_its_dtype(dtype):
    arguments, options = mlp_case(dtype=torch.float32, bias=True)
    expected = functional.moe_mlp(*arguments, **options)
    with torch.autocast("cpu", dtype=dtype):
        out = functional.moe_mlp(*arguments, **options)
    assert out.dtype == dtype
    assert_near(out, expected.detach().double())
    out.float().sum().backward()
    for tensor in differentiable(arguments, options).values():
        assert tensor.grad.dtype == torch.float32
    with torch.autocast("cpu", dtype=dtype), torch.no_grad():
        x, w = arguments[0], arguments[3]
        offsets = torch.tensor([0, 3, 3, 8, 9, 13])
        assert functional.grouped_mm(x, w, offsets).dtype == dtype
        assert functional.moe_mlp(*mlp_case(dtype=WIDEST)[0]).dtype == (dtype if EMULATED else torch.float64)


def test_autocast_of_a_layer():
    moe, x = small_moe(shared_intermediate_size=8), torch.randn(9, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, stats = moe(x, return_stats=True)
    assert y.dtype == torch.bfloat16
    assert stats.router.weights.dtype == torch.float32
    y.float().sum().backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in moe.parameters())


def test_inference_mode_and_no_grad():
    moe, x = small_moe(), torch.randn(9, 16)
    expected = moe(x)
    for mode in (torch.inference_mode, torch.no_grad):
        with mode():
            y = moe(x)
            assert torch.equal(y, expected)
            assert not y.requires_grad
    assert torch.equal(moe.requires_grad_(False)(x), expected)


def test_nothing_is_saved_when_nothing_needs_a_gradient():
    saved = []
    arguments, options = mlp_case(dtype=torch.float32, requires_grad=False)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out = functional.moe_mlp(*arguments, **options)
    assert not saved
    assert out.grad_fn is None


def test_only_the_input_the_pre_activation_and_the_plan_are_kept():
    arguments, options = mlp_case(30, 24, 20, 5, 2, dtype=torch.float32)
    x, _, weights, w1, w2 = arguments
    saved = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.setdefault(t.data_ptr(), t), lambda t: t):
        functional.moe_mlp(*arguments, **options)
    for tensor in (x, weights, w1, w2):
        del saved[tensor.data_ptr()]
    hidden, plan = 60 * 40, 2 * 5 + 1 + 2 * 60
    assert [tensor.numel() for tensor in saved.values()] == [hidden + 2 * plan + 1]


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("jitter", [0.0, 0.3])
def test_checkpointing_routes_the_recomputation_the_same(jitter, use_reentrant):
    moe = small_moe(jitter=jitter, capacity_factor=1.0, shared_intermediate_size=8)
    x = torch.randn(40, 16, requires_grad=True)
    torch.manual_seed(3)
    moe(x).square().sum().backward()
    expected = [x.grad.clone(), *gradients(moe)]
    x.grad = None
    moe.zero_grad()
    routings = []
    handle = moe.router.register_forward_hook(lambda module, args, out: routings.append(out.ids))
    torch.manual_seed(3)
    checkpoint(moe, x, use_reentrant=use_reentrant).square().sum().backward()
    handle.remove()
    assert len(routings) == 2
    assert torch.equal(*routings)
    for grad, want in zip([x.grad, *gradients(moe)], expected, strict=True):
        assert torch.equal(grad, want)


def test_a_forward_that_runs_out_of_memory_keeps_none(monkeypatch):
    """Its exception is in no cycle: those who try again with less have all their memory."""
    arguments, options = mlp_case()
    kept = []

    def fail(*tensors):
        kept.extend(weakref.ref(tensor) for tensor in tensors if isinstance(tensor, torch.Tensor))
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(kernels._native, "mlp_forward", fail)
    gc.disable()
    try:
        with pytest.raises(torch.OutOfMemoryError, match="no memory"):
            functional.moe_mlp(*arguments, **options)
        given = {id(value) for value in (*arguments, *options.values())}
        assert len(kept) > len(given & {id(ref()) for ref in kept}) > 0
        assert all(ref() is None or id(ref()) in given for ref in kept)
    finally:
        gc.enable()


def test_frozen_experts_train_the_router_and_the_other_way_round():
    moe, x = small_moe(), torch.randn(9, 16)
    moe.experts.requires_grad_(False)
    moe(x).sum().backward()
    assert moe.router.weight.grad is not None
    assert moe.experts.w1.grad is None
    moe.requires_grad_(True).zero_grad()
    moe.router.requires_grad_(False)
    moe(x).sum().backward()
    assert moe.router.weight.grad is None
    assert (moe.experts.w2.grad != 0).any()


def test_gradients_accumulate_and_reach_weights_that_are_not_leaves():
    (x, ids, weights, w1, w2), _ = mlp_case(dtype=torch.float32)
    scale = torch.tensor(2.0, requires_grad=True)
    for _ in range(2):
        functional.moe_mlp(x, ids, weights, w1 * scale, w2).sum().backward()
    twice = w1.grad.clone()
    w1.grad = None
    functional.moe_mlp(x, ids, weights, w1 * scale, w2).sum().backward()
    torch.testing.assert_close(twice, 2 * w1.grad)
    assert scale.grad != 0


def test_gradient_memory_is_reused_without_mixing():
    arguments, options = mlp_case(dtype=torch.float32)
    w1 = arguments[3]

    def gradient(factor):
        (grad,) = torch.autograd.grad((functional.moe_mlp(*arguments, **options) * factor).sum(), w1)
        return grad

    one, two = gradient(1), gradient(2)
    kept = one.clone()
    del two
    three = gradient(3)
    assert torch.equal(one, kept)
    torch.testing.assert_close(three, 3 * one, rtol=1e-4, atol=1e-4)


def test_gradients_are_not_copied_on_their_way_to_the_parameters():
    moe, computed = small_moe(), {}
    for name, parameter in moe.experts.named_parameters():
        parameter.register_hook(lambda grad, name=name: computed.update({name: grad.data_ptr()}))
    moe(torch.randn(9, 16)).sum().backward()
    for name, parameter in moe.experts.named_parameters():
        assert parameter.grad.data_ptr() == computed[name]


def test_weights_changed_in_place_before_the_backward_are_noticed():
    (x, ids, weights, w1, w2), _ = mlp_case(dtype=torch.float32)
    out = functional.moe_mlp(x, ids, weights, w1, w2)
    with torch.no_grad():
        w1.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_backward_twice_through_one_graph():
    (x, ids, weights, w1, w2), _ = mlp_case(dtype=torch.float32)
    out = functional.moe_mlp(x, ids, weights, w1, w2).sum()
    first = torch.autograd.grad(out, w1, retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(out, w1)[0], first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_lowers_the_loss_as_the_reference_does(dtype):
    torch.manual_seed(1)
    ours = small_moe(activation="geglu", renormalize=True).to(dtype)
    x = torch.randn(64, 16).to(dtype)
    target = torch.randn(64, 16)
    theirs = copy.deepcopy(ours).double()

    def reference_moe(x):
        ids, weights, _ = reference.route(x @ theirs.router.weight.T, 2, renormalize=True)
        return reference.moe_mlp(x, ids, weights, theirs.experts.w1, theirs.experts.w2, activation="geglu")

    curves = []
    for model, forward, data in ((ours, ours, x), (theirs, reference_moe, x.double())):
        optimizer = torch.optim.SGD(model.parameters(), lr=5.0)
        curve = []
        for _ in range(15):
            loss = (forward(data).double() - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            curve.append(loss.item())
        curves.append(torch.tensor(curve))
    assert curves[0][-1] < 0.9 * curves[0][0]
    torch.testing.assert_close(*curves, rtol=1e-5 if dtype == torch.float32 else 2e-2, atol=0)


def test_meta_tensors_have_shapes():
    x = torch.empty(7, 24, device="meta", dtype=torch.bfloat16, requires_grad=True)
    w1 = torch.empty(5, 40, 24, device="meta", dtype=torch.bfloat16, requires_grad=True)
    w2 = torch.empty(5, 24, 20, device="meta", dtype=torch.bfloat16)
    ids, weights, scores = functional.route(torch.empty(7, 5, device="meta"), 2)
    assert (ids.shape, weights.shape, scores.shape) == ((7, 2), (7, 2), (7, 5))
    plan = RoutingPlan.from_ids(ids, 5, weights=weights, capacity=3, pad=True)
    assert (plan.gather.shape, plan.weights.shape, plan.inverse.shape) == ((15,), (15,), (7, 2))
    out = functional.moe_mlp(x, None, weights, w1, w2, plan=plan)
    assert (out.shape, out.dtype, out.device.type) == ((7, 24), torch.bfloat16, "meta")
    out.sum().backward()
    assert x.grad.shape == x.shape
    assert w1.grad.shape == w1.shape
    y = functional.grouped_mm(functional.permute(x, plan), w1, plan.offsets)
    assert y.shape == (15, 40)
    assert functional.unpermute(y, plan).shape == (7, 40)


def test_inputs_are_left_as_they_were():
    arguments, options = mlp_case(dtype=torch.float32, bias=True)
    tensors = [t for t in (*arguments, *options.values()) if isinstance(t, torch.Tensor)]
    before = [tensor.detach().clone() for tensor in tensors]
    functional.moe_mlp(*arguments, **options).sum().backward()
    assert all(torch.equal(tensor, want) for tensor, want in zip(tensors, before, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unused_rows_are_never_read(dtype):
    """Tokens that are all dropped may hold NaN: neither outputs nor gradients of the others see them."""
    arguments, options = mlp_case(12, dtype=dtype)
    x, ids, weights, w1, w2 = arguments
    plan = RoutingPlan.from_ids(ids, 5, capacity=2, pad=True)
    gone = (plan.inverse < 0).all(1)
    assert gone.any()
    with torch.no_grad():
        x[gone] = torch.nan
    out = functional.moe_mlp(x, None, weights, w1, w2, plan=plan, **options)
    assert (out[gone] == 0).all()
    for grad in torch.autograd.grad(out.sum(), (x, weights, w1, w2)):
        assert grad.isfinite().all()


def layer_and_batch():
    torch.manual_seed(0)
    return small_moe(dtype=WIDEST), torch.randn(10, 16, dtype=WIDEST)


def gradients_of_rank(rank, folder):
    rendezvous = f"file://{folder}/rendezvous"
    torch.distributed.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=2)
    moe, x = layer_and_batch()
    parallel = DistributedDataParallel(moe)  # which has to live until the gradients are summed
    parallel(x.chunk(2)[rank]).square().sum().backward()
    torch.save(gradients(moe), folder / str(rank))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_two_ranks_of_data_parallelism_have_the_mean_of_their_gradients(tmp_path):
    mp.spawn(gradients_of_rank, args=(tmp_path,), nprocs=2)
    moe, x = layer_and_batch()
    (moe(x).square().sum() / 2).backward()
    for rank in range(2):
        torch.testing.assert_close(torch.load(tmp_path / str(rank)), gradients(moe))

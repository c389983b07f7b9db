"""What every rank of a process group does in test_expert_parallel.py; each sees the batch of all ranks."""

import copy
import io
import pickle

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import fastmoe_rs
from fastmoe_rs import RoutingPlan, functional, nn
from fastmoe_rs.expert_parallel import ExpertParallel, clip_grad_norm_, full_state_dict, shard_experts
from moe_cases import DTYPES, EMULATED, WIDEST, Stack, assert_near, assert_same

H, I, E, K = 16, 12, 7, 2


def layer(experts=E, top_k=K, dtype=WIDEST, **options):
    """The same one on every rank; weights of bfloat16 are exact in every dtype."""
    torch.manual_seed(1)
    moe = nn.MoE(H, I, experts, top_k, dtype=dtype, **options)
    with torch.no_grad():
        for weight in moe.parameters():
            weight.copy_(torch.randn(weight.shape).mul(0.3).bfloat16())
    return moe


def batch(*tokens, dtype=WIDEST):
    """Each rank's tokens, and the directions in which their outputs are summed up."""
    torch.manual_seed(2)
    total = sum(tokens)
    x, direction = (torch.randn(total, H).bfloat16().to(dtype) for _ in range(2))
    return x.split(tokens), direction.split(tokens)


def share_of(experts):
    """Which of all experts this rank has."""
    first = sum(experts.shares[: experts.rank])
    return slice(first, first + experts.shares[experts.rank])


def summed(tensor):
    dist.all_reduce(tensor)
    return tensor


def gathered(value):
    told = [None] * dist.get_world_size()
    dist.all_gather_object(told, value)
    return told


def assert_computes_what_one_process_does(moe, x, direction, **forward):
    """Outputs and all gradients, with the gradients of the experts summed over the ranks."""
    rank, dtype = dist.get_rank(), x[0].dtype
    parts = [part.clone().requires_grad_() for part in x]
    one = copy.deepcopy(moe).to(WIDEST)
    wanted = []
    for part, towards in zip(parts, direction, strict=True):  # a capacity counts the rows of one rank
        wanted.append(one(part.to(one.experts.w1.dtype), **forward))
        wanted[-1].backward(towards.to(wanted[-1].dtype))
    mine = x[rank].clone().requires_grad_()
    shard_experts(moe, gradients="sum")
    y = moe(mine, **forward)
    y.backward(direction[rank])
    assert y.dtype == dtype
    assert_near(y, wanted[rank].double(), what="output")
    assert_near(mine.grad, parts[rank].grad.double(), what="gradient of x")
    for name, weight in one.router.named_parameters():
        grad = summed(moe.router.get_parameter(name).grad)
        assert_near(grad, weight.grad.double(), what=f"gradient of router.{name}")
    for name, weight in moe.experts.named_parameters():
        whole = one.experts.get_parameter(name)
        held = share_of(moe.experts)
        assert torch.equal(weight, whole[held].to(dtype))
        assert_near(weight.grad, whole.grad[held].double(), what=f"gradient of {name}")


def outputs_and_gradients(rank, ranks):
    for dtype in DTYPES:
        uneven = [5 + 4 * other for other in range(ranks)]
        assert_computes_what_one_process_does(layer(dtype=dtype), *batch(*uneven, dtype=dtype))


def options_of_the_layer(rank, ranks):
    for options in (
        {"bias": True, "activation": "swiglu_oai"},
        {"activation": "relu2", "top_k": 1},
        {"capacity_factor": 0.6, "shared_intermediate_size": 8},
        {"identity_experts": 2},
        {"experts": 2 * ranks},
        {"experts": 1, "top_k": 1},  # so that other ranks hold none
        {"experts": ranks - 1, "top_k": 1, "bias": True},
    ):
        assert_computes_what_one_process_does(layer(**options), *batch(*[9] * ranks))


def ranks_without_tokens(rank, ranks):
    for empty in range(ranks):
        assert_computes_what_one_process_does(
            layer(bias=True), *batch(*[0 if other == empty else 6 for other in range(ranks)])
        )
    assert_computes_what_one_process_does(layer(), *batch(*[0] * ranks))


def experts_that_all_or_none_pick(rank, ranks):
    for picked in (0, E - 1):
        moe = layer()
        x, direction = batch(*[6] * ranks)
        ids = torch.full((6, K), picked)
        assert_computes_what_one_process_does(moe, x, direction, plan=RoutingPlan.from_ids(ids, E))
        mine = share_of(moe.experts)
        for e, grad in zip(range(mine.start, mine.stop), moe.experts.w1.grad, strict=True):
            assert bool(grad.any()) == (e == picked)
    nobody = RoutingPlan.from_ids(torch.full((6, K), -1), E, out_of_range="drop")
    assert_computes_what_one_process_does(layer(), *batch(*[6] * ranks), plan=nobody)
    padded = RoutingPlan.from_ids(torch.arange(6 * K).view(6, K) % E, E, capacity=1, pad=True)
    assert_computes_what_one_process_does(layer(), *batch(*[6] * ranks), plan=padded)


def capacity_of_fixed_buffers(rank, ranks):
    """Drops what a plan with the capacity drops; nothing on the way asks a tensor for a number."""
    for experts, tokens in ((E, 17), (ranks - 1, 5)):
        x, direction = batch(*[tokens + other for other in range(ranks)])
        full, moe = layer(experts, 1, bias=True), layer(experts, 1, bias=True)
        shard_experts(moe, capacity=2, gradients="sum")
        mine, same = (x[rank].clone().requires_grad_() for _ in range(2))
        with pytest.MonkeyPatch.context() as patch:
            for name in ("tolist", "item", "__bool__", "__int__", "nonzero"):
                patch.setattr(torch.Tensor, name, None)
            y, stats = moe(mine, return_stats=True)
        y.backward(direction[rank])
        plan = RoutingPlan.from_ids(stats.router.ids, experts, capacity=2)
        assert torch.equal(stats.counts, plan.counts)
        assert stats.counts.sum() < len(mine)
        torch.testing.assert_close(stats.dropped, 1 - stats.counts.sum() / len(mine))
        wanted = full(same, plan=plan)
        wanted.backward(direction[rank])
        assert_same(y, wanted)
        assert_same(mine.grad, same.grad)
        assert_same(moe.router.weight.grad, full.router.weight.grad)
        for name, weight in moe.experts.named_parameters():
            assert_same(weight.grad, summed(full.experts.get_parameter(name).grad)[share_of(moe.experts)])
        # Plans of others, with more rows than there are seats, and with fewer.
        assert_same(moe.experts(x[rank], stats.router.ids, stats.router.weights), y)
        fewer = RoutingPlan.from_ids(stats.router.ids, experts, capacity=1)
        with pytest.MonkeyPatch.context() as patch:
            computed, mlp = [], functional.moe_mlp

            def spy(*args, plan, computed=computed, mlp=mlp, **options):
                computed.append(plan)
                return mlp(*args, plan=plan, **options)

            patch.setattr(functional, "moe_mlp", spy)
            y = moe(x[rank], plan=fewer)
        assert_same(y, full(x[rank], plan=fewer))
        rows = sum(plan.counts.sum() for plan in computed) + torch.tensor(0)
        assert summed(rows) == summed(fewer.counts.sum().long())  # and none of the empty seats


def the_same_bits(rank, ranks):
    """From run to run, and on the CPU for two ranks and three."""
    tokens = 24 if EMULATED else 300
    torch.manual_seed(4)
    routing = torch.rand(tokens, E).argsort(1)[:, :3], torch.rand(tokens, 3)
    before = {}
    for members in (ranks, 2, 2):
        group = dist.new_group(range(members))
        for dtype in DTYPES if rank < members else ():
            part = tokens // members
            x, direction = batch(*[part] * members, dtype=dtype)
            ids, weights = (tensor.split(part)[rank].clone() for tensor in routing)
            experts = ExpertParallel(layer(dtype=dtype).experts, group, gradients="sum")
            mine, weights = x[rank].clone().requires_grad_(), weights.requires_grad_()
            y = experts(mine, ids, weights)
            y.backward(direction[rank])
            told = [None] * members
            ours = y.detach(), mine.grad, weights.grad, *(weight.grad for weight in experts.parameters())
            dist.all_gather_object(told, ours, group)
            bits = [torch.cat(parts) for parts in zip(*told, strict=True)]
            same = before.setdefault((dtype, members if EMULATED else "any"), bits)
            assert all(torch.equal(*pair) for pair in zip(bits, same, strict=True))
        if rank < members:
            dist.destroy_process_group(group)


def training_steps_of_data_parallelism(rank, ranks):
    """DDP and FSDP2 around it train what one process trains on the whole batch."""
    sizes = {"layers": 2, "dtype": WIDEST, "shared_intermediate_size": 8}
    for wrap in (
        DistributedDataParallel,
        lambda model: fully_shard(
            model,
            mesh=init_device_mesh("cpu", (ranks,)),
            ignored_params={w for layer in model.layers for w in layer.experts.parameters()},
        ),
    ):
        tokens = [4 + 3 * other for other in range(ranks)]
        x, target = batch(*tokens)
        torch.manual_seed(3)
        model = Stack(H, I, E, K, **sizes)
        one = copy.deepcopy(model)
        parallel = wrap(shard_experts(model))
        for trained, data, wanted, factor in (
            (one, torch.cat(x), torch.cat(target), 1 / sum(tokens)),
            (parallel, x[rank], target[rank], ranks / sum(tokens)),
        ):
            optimizer = torch.optim.SGD(trained.parameters(), lr=0.2)
            for _ in range(3):
                ((trained(data) - wanted).square().sum() * factor).backward()
                optimizer.step()
                optimizer.zero_grad()
        for ours, theirs in zip(model.layers, one.layers, strict=True):
            for name, weight in theirs.router.named_parameters():
                mine = ours.router.get_parameter(name)
                assert_same(getattr(mine, "full_tensor", lambda mine=mine: mine)(), weight)
            for name, weight in ours.experts.named_parameters():
                assert_same(weight, theirs.experts.get_parameter(name)[share_of(ours.experts)])


def checkpointed_layers(rank, ranks):
    for experts, top_k in ((E, K), (1, 1)):
        x, direction = batch(*[5 + other for other in range(ranks)])
        moe = shard_experts(layer(experts, top_k, jitter=0.1))
        results = []
        for run in (
            moe,
            lambda x, moe=moe: checkpoint(moe, x, use_reentrant=False),
            lambda x, moe=moe: checkpoint(moe, x, use_reentrant=True),
        ):
            torch.manual_seed(rank)
            mine = x[rank].clone().requires_grad_()
            run(mine).backward(direction[rank])
            results.append([mine.grad, *(weight.grad for weight in moe.parameters())])
            moe.zero_grad()
        for again in results[1:]:
            assert all(torch.equal(*pair) for pair in zip(results[0], again, strict=True))


def without_gradients(rank, ranks):
    x, direction = batch(*[6] * ranks)
    moe = shard_experts(layer())
    y = moe(x[rank])
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(moe(x[rank]), y)
    for frozen in (moe.experts, moe.router, moe):
        moe.requires_grad_(True).zero_grad()
        frozen.requires_grad_(False)
        assert moe(x[rank]).requires_grad == (frozen is not moe)
        if frozen is not moe:
            moe(x[rank]).backward(direction[rank])
            assert all((w.grad is not None) == w.requires_grad for w in moe.parameters())
    few = shard_experts(layer(1, 1))  # a rank without experts learns nothing, and stays in step all the same
    few.router.requires_grad_(False)
    few(x[rank]).backward(direction[rank])


def mean_of_gradients(rank, ranks):
    """Also of those that go to `main_grad`, and in a copy."""
    x, direction = batch(*[6] * ranks)
    total = shard_experts(layer(), gradients="sum")
    for moe in (total, shard_experts(layer()), copy.deepcopy(shard_experts(layer()))):
        for _ in range(2):
            moe(x[rank]).backward(direction[rank])
        grads = [weight.grad.clone() for weight in moe.experts.parameters()]
        moe.zero_grad()
        sums = fastmoe_rs.main_grads(moe.experts)
        for _ in range(2):
            moe(x[rank]).backward(direction[rank])
        for grad, added, weight in zip(grads, sums, total.experts.parameters(), strict=True):
            assert_same(added, grad)
            assert_same(grad, weight.main_grad if moe is total else weight.main_grad / ranks)


def copies(rank, ranks):
    x, _ = batch(*[6] * ranks)
    moe = shard_experts(layer(bias=True))
    y = moe(x[rank])
    saved = io.BytesIO()
    torch.save(moe, saved)
    saved.seek(0)
    group = dist.new_group()
    grouped = shard_experts(layer(bias=True), group)
    for other in (
        copy.deepcopy(moe),
        pickle.loads(pickle.dumps(moe)),
        torch.load(saved, weights_only=False),
        grouped,
        copy.deepcopy(grouped),
    ):
        assert torch.equal(other(x[rank]), y)
        assert other.experts.w1 is not moe.experts.w1
    assert copy.deepcopy(grouped).experts.group is group
    dist.destroy_process_group(group)


def state_dicts(rank, ranks):
    x, _ = batch(*[6] * ranks)
    for experts in (E, ranks - 1):
        full = Stack(H, I, experts, 1, layers=2, bias=True, dtype=WIDEST)
        full.load_state_dict(gathered(full.state_dict())[0])
        wanted = full.state_dict()
        model = DistributedDataParallel(shard_experts(copy.deepcopy(full)))
        y = model(x[rank])
        whole = full_state_dict(model.module)
        assert full_state_dict(model).keys() == {f"module.{name}" for name in whole}
        if rank == 0:
            assert list(whole) == list(wanted)
            assert all(torch.equal(whole[name], wanted[name]) for name in wanted)
        else:
            assert whole.keys() == {name for name in wanted if ".experts." not in name}
        mine = model.module.state_dict()
        assert mine.keys() == wanted.keys()
        with torch.device("meta"):
            empty = Stack(H, I, experts, 1, layers=2, bias=True, dtype=WIDEST)
        for state in (wanted, mine):
            loaded = shard_experts(copy.deepcopy(empty))
            loaded.load_state_dict(state, assign=True)
            assert torch.equal(loaded(x[rank]), y)
            held = loaded.layers[0].experts.w1
            assert held.untyped_storage().nbytes() == held.numel() * held.element_size()
        with pytest.raises(RuntimeError, match="size mismatch for layers"):
            loaded.load_state_dict(mine | {"layers.0.experts.w1": torch.zeros(E + 1, 2 * I, H)})


def what_reads_the_router(rank, ranks):
    x, _ = batch(*[6 + other for other in range(ranks)])
    full, model = Stack(H, I, E, K, dtype=WIDEST), Stack(H, I, E, K, dtype=WIDEST)
    model.load_state_dict(full.state_dict())
    shard_experts(model)
    assert gathered(model.layers[0].router.weight[0, 0].item())  # the others' weights are other ones
    model.load_state_dict(gathered(full.state_dict())[0])
    full.load_state_dict(gathered(full.state_dict())[0])
    watched = fastmoe_rs.watch(model), fastmoe_rs.watch(full)
    results = []
    for each in (model, full):
        with nn.collect_stats(each) as routed, fastmoe_rs.record_routing(each) as recorded:
            y = each(x[rank])
        loss = fastmoe_rs.losses.load_balancing_loss([stats.router.logits for stats in routed], K)
        with fastmoe_rs.replay_routing(each, recorded):
            assert_same(each(x[rank]), y)
        results.append((y, loss))
    for ours, theirs in zip(*results, strict=True):
        assert_same(ours, theirs)
    ours, theirs = (watching.stats() for watching in watched)
    assert all(torch.equal(ours[name].routes, theirs[name].routes) for name in theirs)


def clipped_gradients(rank, ranks):
    x, direction = batch(*[6] * ranks)
    one, moe = layer(), layer()
    parallel = DistributedDataParallel(shard_experts(moe))
    parallel(x[rank]).backward(direction[rank])
    (one(torch.cat(x)) * torch.cat(direction)).sum().div(ranks).backward()
    norm = clip_grad_norm_(parallel, 0.5)
    assert_same(norm, torch.nn.utils.clip_grad_norm_(one.parameters(), 0.5))
    assert norm > 0.5
    assert_same(moe.router.weight.grad, one.router.weight.grad)
    assert_same(moe.experts.w2.grad, one.experts.w2.grad[share_of(moe.experts)])
    few = shard_experts(layer(1, 1)).requires_grad_(False)
    few.router.requires_grad_(True)
    few(x[rank]).backward(direction[rank])
    clip_grad_norm_(few, 0.5)


def autocast(rank, ranks):
    x, direction = batch(*[6] * ranks, dtype=torch.float32)
    for experts in (E, 1):
        full, moe = (layer(experts, 1, dtype=torch.float32) for _ in range(2))
        shard_experts(moe)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y, wanted = moe(x[rank]), full(x[rank])
        assert y.dtype == torch.bfloat16
        assert_near(y, wanted.double())
        y.float().backward(direction[rank])
        assert all(weight.grad.dtype == torch.float32 for weight in moe.parameters())


def compiled(rank, ranks):
    if ranks > 2:
        return  # the same again, and slow
    x, _ = batch(*[6] * ranks)
    moe = shard_experts(layer())
    wanted = moe(x[rank])
    assert_same(torch.compile(moe, backend="eager")(x[rank]), wanted)
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"ExpertParallel\.forward"):
        torch.compile(moe, backend="eager", fullgraph=True)(x[rank])
    torch._dynamo.reset()


def shared_experts_of_two_layers(rank, ranks):
    model = torch.nn.ModuleList([layer(), layer()])
    model[1].experts = model[0].experts
    shard_experts(model)
    assert model[1].experts is model[0].experts
    assert isinstance(model[0].experts, ExpertParallel)
    names = {f"{i}.experts.{name}" for i in range(2) for name in ("w1", "w2")}
    assert model._ddp_params_and_buffers_to_ignore == names
    assert "3 of 7 experts, rank 0 of" in repr(gathered(repr(model))[0]).replace("4 of", "3 of")


def refused_experts(rank, ranks):
    sizes = torch.nn.Sequential(layer(E + rank))
    model = layer()
    for give, error, message in (
        (lambda: ExpertParallel(layer(E + rank).experts), ValueError, f"experts: got .*{E}.* on rank 0"),
        (
            lambda: ExpertParallel(layer().experts, capacity=rank + 1),
            ValueError,
            "capacity=2.*the same on every",
        ),
        (
            lambda: ExpertParallel(torch.nn.Linear(2, 2) if rank else layer().experts),
            ValueError,
            "Linear, capacity=None, .* on rank 1",
        ),
        (
            lambda: ExpertParallel(layer().requires_grad_(not rank).experts),
            ValueError,
            "the same on every rank",
        ),
        (lambda: ExpertParallel(torch.nn.Linear(2, 2)), TypeError, "experts: got Linear, wanted nn.Experts"),
        (
            lambda: ExpertParallel(layer().experts, capacity=0),
            ValueError,
            "capacity: got 0, wanted at least 1",
        ),
        (lambda: ExpertParallel(layer().experts, gradients="men"), ValueError, "did you mean 'mean'"),
        (lambda: ExpertParallel(layer().experts, "world"), TypeError, "group: got str, wanted None or a"),
        (lambda: shard_experts(sizes), ValueError, "model: got .*the same on every rank"),
        (
            lambda: shard_experts(torch.nn.Linear(2, 2)),
            ValueError,
            "model: got Linear, wanted a module with nn.MoE",
        ),
        (lambda: shard_experts("model"), TypeError, "model: got str, wanted a torch.nn.Module"),
        (lambda: full_state_dict("model"), TypeError, "model: got str, wanted a torch.nn.Module"),
        (lambda: shard_experts(shard_experts(model)), TypeError, "model: got ExpertParallel in it, wanted"),
    ):
        with pytest.raises(error, match=message):
            give()
    alone = [dist.new_group([member]) for member in range(ranks)]
    with pytest.raises(ValueError, match="group: got a process group without this rank"):
        ExpertParallel(layer().experts, alone[rank - 1])
    assert ExpertParallel(layer().experts, alone[rank]).shares == [E]


def refused_inputs(rank, ranks):
    """All before anything is sent: the ranks stay in step."""
    moe = shard_experts(layer(bias=True))
    x, weights = torch.randn(6, H, dtype=WIDEST), torch.rand(6, K)
    ids = torch.zeros(6, K, dtype=torch.long)
    plan = RoutingPlan.from_ids(ids, E)
    for arguments, error, message in (
        ((x, ids + E, weights), ValueError, "ids.*: got 7, wanted an expert id"),
        ((x, None, weights), TypeError, "ids: got NoneType"),
        ((x[:5], None, weights, plan), ValueError, "x: got shape .*wanted the 6 tokens of the plan"),
        ((x[:, :5], ids, weights), ValueError, "x: got shape .*wanted .T, H. = .6, 16."),
        ((x.half(), ids, weights), TypeError, "x: got dtype torch.float16, wanted .*that of w1"),
        ((x, ids, weights[:, :1]), ValueError, "weights: got shape"),
        ((x, None, weights, "plan"), TypeError, "plan: got str, wanted a RoutingPlan"),
        (
            (x, None, weights, RoutingPlan.from_ids(ids, E + 1)),
            ValueError,
            "plan: got a plan for 8 experts, wanted",
        ),
        ((x, None, weights, RoutingPlan.from_ids(ids.numpy(), E)), TypeError, "plan: got a plan .*NumPy"),
    ):
        with pytest.raises(error, match=message):
            moe.experts(*arguments)
    assert moe(x).shape == x.shape


CASES = [
    outputs_and_gradients,
    options_of_the_layer,
    ranks_without_tokens,
    experts_that_all_or_none_pick,
    capacity_of_fixed_buffers,
    the_same_bits,
    training_steps_of_data_parallelism,
    checkpointed_layers,
    without_gradients,
    mean_of_gradients,
    copies,
    state_dicts,
    what_reads_the_router,
    clipped_gradients,
    autocast,
    compiled,
    shared_experts_of_two_layers,
    refused_experts,
    refused_inputs,
]

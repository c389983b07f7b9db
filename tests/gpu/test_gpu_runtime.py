"""What a CUDA program does around the layer: graphs, streams, compilation, running out of memory."""

import pytest
import torch
from layers import assert_same_bits, layer

import fastmoe_rs
from fastmoe_rs import RoutingPlan

on_cuda = pytest.mark.cuda


@pytest.fixture
def case(device):
    """A layer whose kernels are loaded."""
    found = layer(device)
    found.step()
    return found


def captured(function):
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = function()
    return graph, results


@on_cuda
def test_a_graph_replays_with_other_routing(case):
    graph, results = captured(case.step)
    for seed in range(5):
        case.redraw(seed)
        graph.replay()
        replayed = [result.clone() for result in results]
        assert_same_bits(replayed, case.step())


@on_cuda
def test_a_graph_of_inference_replays_with_other_routing(case):
    with torch.no_grad():
        graph, out = captured(case.forward)
        for seed in range(5):
            case.redraw(seed)
            graph.replay()
            assert torch.equal(out, case.forward())


@on_cuda
def test_nothing_waits_for_the_device(case):
    torch.cuda.set_sync_debug_mode("error")
    try:
        case.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@on_cuda
def test_calls_return_while_the_device_is_busy(case):
    """Neither torch nor our own launches wait: the stream still sleeps when the call returns."""
    done = torch.cuda.Event()
    torch.cuda._sleep(2_000_000_000)
    case.step()
    done.record()
    assert not done.query()
    torch.cuda.synchronize()


@on_cuda
def test_a_side_stream_gives_the_same_bits(case):
    want = case.step()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        results = case.step()
    for result in results:
        result.record_stream(torch.cuda.current_stream())
    torch.cuda.current_stream().wait_stream(side)
    assert_same_bits(results, want)


@on_cuda
def test_two_streams_do_not_share_scratch_memory(device):
    cases = [layer(device), layer(device, tokens=96)]
    wanted = [case.step() for case in cases]
    streams = [torch.cuda.Stream() for _ in cases]
    results = []
    torch.cuda.synchronize()
    for _ in range(10):
        for case, stream in zip(cases, streams, strict=True):
            with torch.cuda.stream(stream):
                torch.cuda._sleep(1_000_000)
                results.append(case.step())
    torch.cuda.synchronize()
    for index, result in enumerate(results):
        assert_same_bits(result, wanted[index % 2])


@on_cuda
def test_a_cupy_array_makes_the_plan_of_a_tensor(device):
    cupy = pytest.importorskip("cupy", reason="CuPy is not on this machine")
    ids = torch.randint(8, (64, 2))
    plan, want = (RoutingPlan.from_ids(given, 8) for given in (cupy.asarray(ids.numpy()), ids.to(device)))
    for name in ("counts", "offsets", "gather", "inverse"):
        ours = getattr(plan, name)
        assert ours.is_cuda
        assert torch.equal(ours, getattr(want, name)), name


def test_compiled_without_graph_breaks(case, quick):
    want = case.step()
    compiled = torch.compile(type(case).forward, fullgraph=True, backend="aot_eager" if quick else "inductor")
    out = compiled(case)
    grads = torch.autograd.grad(out, case.leaves, case.grad_out)
    for result, expected in zip((out.detach(), *grads), want, strict=True):
        torch.testing.assert_close(result, expected, rtol=2e-2, atol=2e-2)


def test_autocast_and_a_module(device):
    moe = fastmoe_rs.nn.MoE(64, 96, 8, 2).to(device)
    x = torch.randn(4, 16, 64, device=device, requires_grad=True)
    with torch.autocast(device, dtype=torch.bfloat16):
        out = moe(x)
    out.float().square().mean().backward()
    assert x.grad.isfinite().all()
    assert all(parameter.grad is not None for parameter in moe.parameters())


@on_cuda
def test_the_process_goes_on_after_running_out_of_memory_in_mid_step(device, quick):
    """With less memory allowed a step fails earlier and earlier; a small one still gives its bits."""
    small = layer(device)
    want = small.step()
    sizes = (2048, 256, 512, 8, 2) if quick else (16384, 1024, 2048, 16, 4)
    large = layer(device, *sizes)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    base = torch.cuda.memory_reserved()
    torch.cuda.reset_peak_memory_stats()
    large.step()
    need = torch.cuda.max_memory_reserved() - base
    total = torch.cuda.get_device_properties(device).total_memory
    failures = 0
    try:
        for share in (0.9, 0.7, 0.5, 0.3, 0.1):
            torch.cuda.empty_cache()
            torch.cuda.set_per_process_memory_fraction((base + share * need) / total)
            try:
                large.step()
            except torch.OutOfMemoryError:
                failures += 1
            torch.cuda.empty_cache()
            assert_same_bits(small.step(), want)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert failures >= 3
    assert all(result.isfinite().all() for result in large.step())

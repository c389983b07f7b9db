"""What the native module takes, by every door, and that it leaves other threads their turn."""

import threading
import time

import numpy as np
import pytest
import torch

from fastmoe_rs import _native
from native_cases import (
    CASES,
    E,
    H,
    I,
    K,
    R,
    T,
    argument_of,
    arguments,
    call,
    function,
    int32,
    plan_in,
    routed_rows,
)


@pytest.mark.parametrize("name", CASES)
def test_the_case_itself_is_accepted(name):
    assert call(name) is None


class Bare:
    """A tensor of a torch that has no DLPack exchange table."""

    def __init__(self, tensor):
        self._tensor = tensor

    def __getattr__(self, name):
        return getattr(self._tensor, name)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("door", [Bare, lambda tensor: tensor.numpy()], ids=["data_ptr", "numpy"])
def test_every_door_gives_the_same_result(name, door):
    inputs, expected, options = arguments(name)
    function(name)(**inputs, **expected, **options, threads=1)
    inputs, results, options = arguments(name)
    through = {key: door(tensor) for key, tensor in (inputs | results).items()}
    function(name)(**through, **options, threads=1)
    for key, tensor in expected.items():
        assert torch.equal(results[key], tensor), key
        assert tensor.count_nonzero() > 0, f"{key} was not computed"


def test_bare_tensor_on_another_device():
    with pytest.raises(ValueError, match=r"^x: got .* on device meta, wanted a dense tensor"):
        call("permute", x=Bare(torch.zeros(T, H, device="meta")))


@pytest.mark.parametrize("wrap", [torch.nn.Parameter, lambda x: x.requires_grad_() * 1])
def test_inputs_may_require_grad(wrap):
    x = torch.randn(T, H)
    out = torch.zeros(R, H)
    call("permute", x=wrap(x), out=out)
    assert torch.equal(out, x[routed_rows()["gather"].long()])


def test_read_only_inputs():
    ids = np.arange(R, dtype=np.int32).reshape(T, K) % E
    ids.flags.writeable = False
    counts = np.zeros(E, np.int32)
    call("plan", ids=ids, counts=counts)
    assert counts.tolist() == np.bincount(ids.ravel(), minlength=E).tolist()


def test_views_with_an_offset():
    x = torch.randn(2 * T, H)
    out = torch.zeros(R, H)
    call("permute", x=x[T:], out=out)
    assert torch.equal(out, x[T:][routed_rows()["gather"].long()])


def test_no_tokens():
    plan = {"gather": int32(0), "inverse": int32(0, K), "offsets": int32(E + 1)}
    empty = {"x": torch.zeros(0, H), "weights": torch.zeros(0, K), "hidden": torch.zeros(0, 2 * I)}
    call("mlp_forward", out=torch.zeros(0, H), **empty, **plan)
    grads = {
        name: torch.full_like(argument_of("mlp_backward", name), torch.nan)
        for name in ("grad_w1", "grad_b1", "grad_w2", "grad_b2")
    }
    rows = {"grad_out": torch.zeros(0, H), "grad_x": torch.zeros(0, H), "grad_weights": torch.zeros(0, K)}
    call("mlp_backward", **empty, **plan, **rows, **grads)
    assert all(grad.count_nonzero() == 0 for grad in grads.values())


def test_plan_of_ids_is_that_of_plan():
    inputs, made, options = CASES["mlp_forward_of_ids"]()
    _native.mlp_forward(**inputs, **made, **options, threads=1)
    _, plan_out, plan_options = CASES["plan"]()
    plan_out["sorted_weights"] = None
    _native.plan(inputs["ids"], None, **plan_out, **plan_options, threads=1)
    rows = [plan_out[name] for name in ("counts", "offsets", "gather", "inverse")]
    assert torch.equal(plan_in(made["hidden"]), torch.cat([row.flatten() for row in rows]))
    for other in ({}, {"ids": None} | {name: plan_out[name] for name in routed_rows()}):
        out = torch.zeros(T, H)
        call("mlp_forward_of_ids", **(inputs | {"out": out, "hidden": None} | other))
        assert torch.equal(out, made["out"])


@pytest.mark.cpu_only(reason="takes minutes in an emulator")
def test_the_gil_is_released_during_work():
    ticks, stop = [], threading.Event()

    def tick():
        while not stop.wait(0.001):
            ticks.append(time.perf_counter())

    x, w = torch.randn(2048, 1024), torch.randn(1, 1024, 1024)
    offsets, out = torch.tensor([0, 2048], dtype=torch.int32), torch.zeros(2048, 1024)
    ticker = threading.Thread(target=tick)
    ticker.start()
    inside = 0
    for _ in range(20):
        start = time.perf_counter()
        _native.grouped_mm(x, w, offsets, None, out, transposed=False, threads=1)
        end = time.perf_counter()
        margin = (end - start) / 4
        inside += sum(start + margin < tick < end - margin for tick in ticks)
    stop.set()
    ticker.join()
    assert inside > 0

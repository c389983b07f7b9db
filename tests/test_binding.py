"""The native module as such: what it takes, what it refuses and in which words, and how it treats memory.

T tokens, H hidden, I intermediate, E experts, K experts per token, R = T*K routed rows.
"""

import os
import re
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch

from fastmoe_rs import _native

T, H, I, E, K = 4, 8, 6, 3, 2
R = T * K
NOT_DENSE = "wanted a dense tensor in CPU or CUDA memory"


def int32(*shape):
    return torch.zeros(shape, dtype=torch.int32)


def routed_rows():
    """A plan of ids (t + k) % E: offsets, gather, inverse."""
    ids_TK = (torch.arange(T)[:, None] + torch.arange(K)) % E
    offsets, gather, inverse = int32(E + 1), int32(R), int32(T, K)
    options = {"num_experts": E, "capacity": None, "drop": "position", "pad": False, "out_of_range": "error"}
    _native.plan(ids_TK, None, int32(E), offsets, gather, inverse, None, threads=1, **options)
    return {"offsets": offsets, "gather": gather, "inverse": inverse}


def layer():
    return {
        "x": torch.randn(T, H),
        "w1": torch.randn(E, 2 * I, H),
        "b1": torch.randn(E, 2 * I),
        "w2": torch.randn(E, H, I),
        "b2": torch.randn(E, H),
        "weights": torch.rand(T, K),
    }


NOT_APART = {"gather": None, "inverse": None}
MLP_OPTIONS = {"activation": "swiglu", "transposed": False, "interleaved": False}


def route():
    inputs = {"logits": torch.randn(T, E), "bias": torch.randn(E), "expert_scale": torch.rand(E)}
    outputs = {
        "ids": torch.zeros(T, K, dtype=torch.int64),
        "weights": torch.zeros(T, K),
        "scores": torch.zeros(T, E),
    }
    options = {
        "softcap": None,
        "score": "softmax",
        "order": "score_topk",
        "n_group": 1,
        "topk_group": 1,
        "group_score": "top2",
        "group_losers": "-inf",
        "renormalize": True,
        "renormalize_eps": 1e-20,
        "scale": 1.0,
    }
    return inputs, outputs, options


def route_backward():
    inputs, outputs, options = route()
    _native.route(**inputs, **outputs, **options, threads=1)
    inputs = {
        "logits": inputs["logits"],
        "expert_scale": inputs["expert_scale"],
        "ids": outputs["ids"],
        "scores": outputs["scores"],
        "grad_weights": torch.randn(T, K),
        "grad_scores": torch.randn(T, E),
    }
    rules = ("softcap", "score", "order", "renormalize", "renormalize_eps", "scale")
    outputs = {"grad_logits": torch.zeros(T, E), "grad_expert_scale": torch.zeros(E)}
    return inputs, outputs, {rule: options[rule] for rule in rules}


def plan():
    inputs = {"ids": torch.randint(E, (T, K)), "weights": torch.rand(T, K)}
    outputs = {
        "counts": int32(E),
        "offsets": int32(E + 1),
        "gather": int32(R),
        "inverse": int32(T, K),
        "sorted_weights": torch.zeros(R),
    }
    options = {"num_experts": E, "capacity": None, "drop": "position", "pad": False, "out_of_range": "error"}
    return inputs, outputs, options


def mlp_forward():
    outputs = {"out": torch.zeros(T, H), "hidden": torch.zeros(R, 2 * I)}
    return layer() | routed_rows(), outputs, MLP_OPTIONS | {"ids": None}


def mlp_forward_of_ids():
    inputs = layer() | {"ids": torch.randint(E, (T, K))}
    outputs = {"offsets": int32(2 * E + 1 + 2 * R), "out": torch.zeros(T, H), "hidden": torch.zeros(R, 2 * I)}
    return inputs, outputs, MLP_OPTIONS | NOT_APART


def mlp_backward():
    inputs = layer() | routed_rows() | {"grad_out": torch.randn(T, H), "hidden": torch.randn(R, 2 * I)}
    names = ("x", "weights", "w1", "b1", "w2", "b2")
    return inputs, {f"grad_{name}": torch.zeros_like(inputs[name]) for name in names}, MLP_OPTIONS


def mlp_backward_of_ids():
    inputs, outputs, options = mlp_backward()
    counts = inputs["offsets"].diff()
    packed = [counts, *(inputs.pop(name).flatten() for name in ("offsets", "gather", "inverse"))]
    return inputs | {"offsets": torch.cat(packed)}, outputs, options | NOT_APART


def grouped_mm():
    inputs = {
        "x": torch.randn(R, H),
        "w": torch.randn(E, I, H),
        "offsets": routed_rows()["offsets"],
        "bias": torch.randn(E, I),
    }
    return inputs, {"out": torch.zeros(R, I)}, {"transposed": False}


def grouped_mm_grad_weight():
    inputs = {"grad_out": torch.randn(R, I), "x": torch.randn(R, H), "offsets": routed_rows()["offsets"]}
    return inputs, {"grad_w": torch.zeros(E, I, H), "grad_bias": torch.zeros(E, I)}, {"transposed": False}


def permute():
    return {"x": torch.randn(T, H), "gather": routed_rows()["gather"]}, {"out": torch.zeros(R, H)}, {}


def unpermute():
    inputs = {"y": torch.randn(R, H), "inverse": routed_rows()["inverse"], "weights": torch.rand(T, K)}
    return inputs, {"out": torch.zeros(T, H)}, {}


def unpermute_backward():
    rows = routed_rows()
    inputs = {
        "grad_out": torch.randn(T, H),
        "y": torch.randn(R, H),
        "weights": torch.rand(T, K),
        "gather": rows["gather"],
        "inverse": rows["inverse"],
    }
    return inputs, {"grad_y": torch.zeros(R, H), "grad_weights": torch.zeros(T, K)}, {}


CASES = {
    case.__name__: case
    for case in (
        route,
        route_backward,
        plan,
        mlp_forward,
        mlp_forward_of_ids,
        mlp_backward,
        mlp_backward_of_ids,
        grouped_mm,
        grouped_mm_grad_weight,
        permute,
        unpermute,
        unpermute_backward,
    )
}
ARGUMENTS = [(name, argument) for name, case in CASES.items() for argument in (case()[0] | case()[1])]
OUTPUTS = [(name, argument) for name, case in CASES.items() for argument in case()[1]]


def function(name):
    return getattr(_native, name.removesuffix("_of_ids"))


def call(name, **changes):
    inputs, outputs, options = CASES[name]()
    return function(name)(**({"threads": 1} | inputs | outputs | options | changes))


def argument_of(name, argument):
    inputs, outputs, _ = CASES[name]()
    return (inputs | outputs)[argument]


@pytest.mark.parametrize("name", CASES)
def test_the_case_itself_is_accepted(name):
    assert call(name) is None


@pytest.mark.parametrize(("name", "argument"), ARGUMENTS)
class TestEveryTensor:
    def test_wrong_rank(self, name, argument):
        given = argument_of(name, argument)[None].contiguous()
        with pytest.raises(ValueError, match=rf"^{argument}: got shape \(1,.*, wanted \[.*\]"):
            call(name, **{argument: given})

    def test_wrong_shape(self, name, argument):
        given = argument_of(name, argument)
        given = given.new_zeros(*given.shape[:-1], given.shape[-1] + 1)
        with pytest.raises(ValueError, match=r"^\w+: got shape \([\d, ]+\), wanted \[.*\] = \([\d, ]+\)"):
            call(name, **{argument: given})

    @pytest.mark.parametrize("dtype", [torch.complex64, torch.int8, torch.bool])
    def test_wrong_dtype(self, name, argument, dtype):
        with pytest.raises(
            TypeError, match=rf"^{argument}: got dtype (complex64|int8|bool), wanted one that kernels have"
        ):
            call(name, **{argument: argument_of(name, argument).to(dtype)})

    def test_dtype_of_another_argument(self, name, argument):
        given = argument_of(name, argument)
        several = argument in {"ids", "logits"}
        other = torch.int16 if several else torch.float16
        with pytest.raises(TypeError, match=r"^\w+: got dtype \w+, wanted "):
            call(name, **{argument: given.to(other)})

    def test_other_device(self, name, argument):
        given = argument_of(name, argument).to("meta")
        with pytest.raises(ValueError, match=rf"^{argument}: got .* on device meta, {NOT_DENSE}"):
            call(name, **{argument: given})

    def test_sparse(self, name, argument):
        given = argument_of(name, argument).to_sparse()
        with pytest.raises(ValueError, match=rf"^{argument}: got a torch.sparse_coo Tensor .*, {NOT_DENSE}"):
            call(name, **{argument: given})

    def test_not_contiguous(self, name, argument):
        given = argument_of(name, argument).repeat_interleave(2, -1)[..., ::2]
        with pytest.raises(ValueError, match=rf"^{argument}: got strides .*, wanted a C-contiguous tensor"):
            call(name, **{argument: given})

    def test_not_contiguous_numpy(self, name, argument):
        given = argument_of(name, argument).numpy().repeat(2, -1)[..., ::2]
        with pytest.raises(ValueError, match=rf"^{argument}: got strides .*, wanted a C-contiguous tensor"):
            call(name, **{argument: given})

    def test_misaligned(self, name, argument):
        good = argument_of(name, argument).numpy()
        given = np.frombuffer(bytearray(good.nbytes + 1), np.uint8)[1:].view(good.dtype).reshape(good.shape)
        with pytest.raises(ValueError, match=rf"^{argument}: got a misaligned array, wanted"):
            call(name, **{argument: given})

    def test_foreign_byte_order(self, name, argument):
        good = argument_of(name, argument).numpy()
        given = good.astype(good.dtype.newbyteorder())
        with pytest.raises(TypeError, match=rf"^{argument}: got dtype \S+, wanted one that kernels have"):
            call(name, **{argument: given})

    def test_no_tensor(self, name, argument):
        given = argument_of(name, argument).tolist()
        with pytest.raises(TypeError, match=rf"^{argument}: got list, wanted a torch.Tensor or NumPy array"):
            call(name, **{argument: given})


@pytest.mark.parametrize(("name", "argument"), OUTPUTS)
class TestEveryOutput:
    def test_read_only(self, name, argument):
        given = argument_of(name, argument).numpy()
        given.flags.writeable = False
        with pytest.raises(ValueError, match=rf"^{argument}: got a read-only array, wanted"):
            call(name, **{argument: given})

    def test_requires_grad(self, name, argument):
        given = argument_of(name, argument)
        if not given.is_floating_point():
            with pytest.raises(RuntimeError, match="floating point"):
                given.requires_grad_()
            return
        with pytest.raises(ValueError, match=rf"^{argument}: got a tensor that requires grad, wanted"):
            call(name, **{argument: given.requires_grad_()})

    def test_memory_shared_with_another_argument(self, name, argument):
        inputs, outputs, _ = CASES[name]()
        given = (inputs | outputs)[argument]
        for other, tensor in (inputs | outputs).items():
            if other != argument:
                arena = torch.zeros(8 * (given.numel() + tensor.numel()), dtype=torch.uint8)
                shared = {key: overlay(arena, like) for key, like in ((argument, given), (other, tensor))}
                shared[other].copy_(tensor)
                pair = rf"^({argument}|{other}): got memory shared with .*, wanted memory of its own"
                with pytest.raises(ValueError, match=pair):
                    call(name, **shared)


def overlay(arena, like):
    return arena[: like.nbytes].view(like.dtype).view(like.shape)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("threads", [0, -1])
def test_threads(name, threads):
    with pytest.raises(ValueError, match=rf"^threads: got {threads}, wanted at least 1"):
        call(name, threads=threads)


@pytest.mark.parametrize("name", ["mlp_forward", "mlp_backward"])
def test_weights_of_the_other_layout_tell_the_remedy(name):
    w1, w2 = (argument_of(name, w).mT.contiguous() for w in ("w1", "w2"))
    message = (
        rf"^w1: got shape \({E}, {H}, {2 * I}\), wanted \[E, 2I, H\] = \({E}, {2 * I}, {H}\); "
        r"pass transposed=True for \[E, H, 2I\] weights$"
    )
    with pytest.raises(ValueError, match=message):
        call(name, w1=w1, w2=w2)
    call(name, w1=w1, w2=w2, transposed=True, **({} if name == "mlp_forward" else like_grads(w1, w2)))
    with pytest.raises(ValueError, match=r"^w1: .*; drop transposed=True for \[E, 2I, H\] weights$"):
        call(name, transposed=True)


def like_grads(w1, w2):
    return {"grad_w1": torch.zeros_like(w1), "grad_w2": torch.zeros_like(w2)}


def test_grouped_mm_of_the_other_layout():
    with pytest.raises(ValueError, match=r"^w: .*; pass transposed=True for \[E, K, N\] weights$"):
        call("grouped_mm", w=torch.zeros(E, H, I))


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("mlp_forward", {"activation": "swish"}, "^activation: got 'swish', wanted one of 'swiglu', "),
        (
            "mlp_forward",
            {"activation": "relu", "interleaved": True},
            r"^interleaved: got True, wanted False, because 'relu'",
        ),
        ("route", {"score": "tanh"}, "^score: got 'tanh', wanted one of 'softmax'"),
        ("route", {"order": "first"}, "^order: got 'first', wanted one of 'score_topk'"),
        ("route", {"group_score": "mean", "n_group": 2}, "^group_score: got 'mean', wanted one of 'top2'"),
        ("route", {"group_losers": "nan", "n_group": 2}, "^group_losers: got 'nan', wanted one of '-inf'"),
        ("route", {"n_group": 0}, "^n_group: got 0, wanted at least 1"),
        ("route", {"n_group": 64}, "^n_group: got 64, wanted a divisor of"),
        ("route", {"softcap": 0.0}, "^softcap: got 0, wanted a finite number of more than 0"),
        (
            "route",
            {"renormalize_eps": -1.0},
            "^renormalize_eps: got -1, wanted a finite number of at least 0",
        ),
        ("route_backward", {"score": "tanh"}, "^score: got 'tanh', wanted one of 'softmax'"),
        ("route_backward", {"order": "first"}, "^order: got 'first', wanted one of 'score_topk'"),
        ("route_backward", {"softcap": -1.0}, "^softcap: got -1, wanted a finite number of more than 0"),
        ("plan", {"drop": "some"}, "^drop: got 'some', wanted one of 'position'"),
        ("plan", {"out_of_range": "wrap"}, "^out_of_range: got 'wrap', wanted one of 'error'"),
        ("plan", {"capacity": -1}, "^capacity: got -1, wanted at least 0"),
        ("plan", {"num_experts": 0}, "^num_experts: got 0, wanted at least 1"),
        ("plan", {"pad": True}, "^pad: got True, wanted False without a capacity"),
        (
            "plan",
            {"drop": "score", "capacity": 1, "weights": None, "sorted_weights": None},
            r"^weights: got none, wanted ",
        ),
    ],
)
def test_bad_options(name, changes, message):
    with pytest.raises(ValueError, match=message):
        call(name, **changes)


def test_route_more_experts_than_there_are():
    outputs = {"ids": torch.zeros(T, E + 1, dtype=torch.int64), "weights": torch.zeros(T, E + 1)}
    with pytest.raises(ValueError, match=rf"^top_k: got {E + 1}, wanted 1 to {E}"):
        call("route", **outputs)


@pytest.mark.parametrize(
    ("name", "argument", "shape", "axis"),
    [
        ("route", "ids", (T, 0), "K"),
        ("route", "logits", (T, 0), "E"),
        ("route_backward", "ids", (T, 0), "K"),
        ("plan", "ids", (T, 0), "K"),
        ("mlp_forward", "x", (T, 0), "H"),
        ("mlp_forward", "weights", (T, 0), "K"),
        ("mlp_forward", "w1", (0, 2 * I, H), "E"),
        ("mlp_backward", "w2", (E, H, 0), "I"),
        ("grouped_mm", "w", (E, 0, H), "N"),
        ("grouped_mm_grad_weight", "x", (R, 0), "K"),
        ("permute", "x", (T, 0), "H"),
        ("unpermute", "inverse", (T, 0), "K"),
        ("unpermute_backward", "y", (R, 0), "H"),
    ],
)
def test_sizes_that_cannot_be_zero(name, argument, shape, axis):
    given = torch.zeros(shape, dtype=argument_of(name, argument).dtype)
    message = rf"^{argument}: got shape {re.escape(str(shape))}, wanted \[.*\] with {axis} >= 1"
    with pytest.raises(ValueError, match=message):
        call(name, **{argument: given})


@pytest.mark.parametrize("name", ["plan", "route_backward", "mlp_forward_of_ids"])
@pytest.mark.parametrize("bad", [-1, E, 2**32])
def test_ids_out_of_range(bad, name):
    ids = torch.zeros(T, K, dtype=torch.int64)
    ids[2, 1] = bad
    with pytest.raises(ValueError, match=rf"^ids\[2, 1\]: got {bad}, wanted "):
        call(name, ids=ids)


@pytest.mark.parametrize(
    ("argument", "index", "value"),
    [("gather", 3, T), ("gather", 3, -2), ("inverse", (1, 0), R), ("offsets", 1, R + 1), ("offsets", 0, 1)],
)
@pytest.mark.parametrize("name", ["mlp_forward", "mlp_backward"])
def test_plan_that_points_outside(name, argument, index, value):
    given = argument_of(name, argument)
    given[index] = value
    with pytest.raises(ValueError, match=rf"^{argument}\[.*{value}"):
        call(name, **{argument: given})


@pytest.mark.parametrize(
    ("part", "at", "value"), [("offsets", E, 1), ("gather", 2 * E + 1, T), ("inverse", 2 * E + 1 + R, R)]
)
def test_plan_in_one_tensor_that_points_outside(part, at, value):
    packed = argument_of("mlp_backward_of_ids", "offsets")
    packed[at] = value
    with pytest.raises(ValueError, match=rf"^{part}\[.*{value}"):
        call("mlp_backward_of_ids", offsets=packed)


def test_plan_of_ids_is_that_of_plan():
    inputs, made, options = mlp_forward_of_ids()
    _native.mlp_forward(**inputs, **made, **options, threads=1)
    _, plan_out, plan_options = plan()
    plan_out["sorted_weights"] = None
    _native.plan(inputs["ids"], None, **plan_out, **plan_options, threads=1)
    rows = [plan_out[name] for name in ("counts", "offsets", "gather", "inverse")]
    assert torch.equal(made["offsets"], torch.cat([row.flatten() for row in rows]))
    for other in ({"offsets": None}, {"ids": None} | {name: plan_out[name] for name in routed_rows()}):
        out = torch.zeros(T, H)
        call("mlp_forward_of_ids", **(inputs | {"out": out, "hidden": None} | other))
        assert torch.equal(out, made["out"])


@pytest.mark.parametrize("name", ["offsets", "gather", "inverse"])
def test_a_plan_lacks_nothing(name):
    with pytest.raises(TypeError, match=rf"^{name}: got None, wanted a torch.Tensor or NumPy array"):
        call("mlp_forward", **{name: None})


@pytest.mark.parametrize(
    ("name", "argument", "index", "value"),
    [
        ("permute", "gather", 0, T),
        ("permute", "gather", 0, -2),
        ("unpermute", "inverse", (0, 0), R),
        ("unpermute_backward", "gather", 0, T),
        ("unpermute_backward", "inverse", (0, 0), -2),
        ("grouped_mm", "offsets", E, R + 1),
        ("grouped_mm", "offsets", 1, -1),
        ("grouped_mm_grad_weight", "offsets", E, R + 1),
    ],
)
def test_rows_that_point_outside(name, argument, index, value):
    given = argument_of(name, argument)
    given[index] = value
    with pytest.raises(ValueError, match=rf"^{argument}\[.*{value}"):
        call(name, **{argument: given})


class Bare:
    """A tensor of a torch that has no DLPack exchange table."""

    def __init__(self, tensor):
        self._tensor = tensor

    def __getattr__(self, name):
        return getattr(self._tensor, name)


def arguments(name):
    torch.manual_seed(0)
    return CASES[name]()


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
    with pytest.raises(ValueError, match=rf"^x: got .* on device meta, {NOT_DENSE}"):
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


class TestPool:
    @pytest.fixture(autouse=True)
    def clean(self):
        _native.empty_cache()
        yield
        _native.empty_cache()

    @pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
    @pytest.mark.parametrize("shape", [(), (0,), (5, 0, 3), (1, 2, 3), (300, 400)])
    def test_tensor(self, shape, dtype):
        tensor = _native.empty(shape, dtype)
        assert isinstance(tensor, torch.Tensor)
        assert tensor.shape == shape
        assert tensor.dtype == getattr(torch, dtype)
        assert tensor.is_contiguous()
        assert not tensor.requires_grad
        assert torch.equal(tensor.fill_(2), torch.full(shape, 2, dtype=tensor.dtype))

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
    def test_like_another(self, dtype):
        like = torch.ones(3, 1, 5, dtype=dtype, requires_grad=True)
        tensor = _native.empty_like(like)
        assert (tensor.shape, tensor.stride(), tensor.dtype) == (like.shape, like.stride(), dtype)
        assert not tensor.requires_grad
        assert tensor.data_ptr() != like.data_ptr()
        with pytest.raises(TypeError, match="float"):
            _native.empty_like(torch.ones(3, dtype=torch.int32))

    def test_memory_comes_back(self):
        tensor = _native.empty((123, 457), "float32")
        used = _native.memory_stats()["used_bytes"]
        address, view = tensor.data_ptr(), tensor[1:]
        del tensor
        assert _native.memory_stats()["used_bytes"] == used, "a view keeps the memory"
        del view
        before = _native.memory_stats()
        assert before["used_bytes"] < used
        assert before["cached_bytes"] >= 123 * 457 * 4
        again = _native.empty((457, 123), "float32")
        after = _native.memory_stats()
        assert again.data_ptr() == address
        assert (after["hits"], after["misses"]) == (before["hits"] + 1, before["misses"])

    def test_empty_cache(self):
        _native.empty((1000, 1000), "float32")
        assert _native.memory_stats()["cached_bytes"] >= 4_000_000
        _native.empty_cache()
        assert _native.memory_stats()["cached_bytes"] == 0

    def test_a_block_that_became_too_small_is_replaced(self):
        _native.empty_cache()
        for numbers in (10_000_000, 10_500_000, 10_000_000, 1_000):
            _native.empty((numbers,), "float32")
        assert 42_000_000 <= _native.memory_stats()["cached_bytes"] < 1.1 * 42_000_000

    def test_dropped_on_another_thread(self):
        held = [_native.empty((1000,), "float32")]
        address = held[0].data_ptr()
        thread = threading.Thread(target=held.clear)
        thread.start()
        thread.join()
        assert _native.empty((1000,), "float32").data_ptr() == address

    @pytest.mark.parametrize("shape", [(-1,), (2**62, 8), (2**40, 2**40)])
    def test_bad_shape(self, shape):
        with pytest.raises(
            ValueError, match=r"^shape: got \[.*\], wanted sizes of at least 0 that fit in memory"
        ):
            _native.empty(shape, "float32")

    @pytest.mark.parametrize("dtype", ["int32", "float8", ""])
    def test_bad_dtype(self, dtype):
        with pytest.raises(ValueError, match=rf"^dtype: got '{dtype}', wanted 'float32', "):
            _native.empty((1,), dtype)

    def test_torch_without_exchange_table(self, tmp_path):
        (tmp_path / "torch.py").write_text(
            "class Tensor: pass\nfloat32 = 'f32'\ndef empty(shape, dtype): return 'empty', shape, dtype\n"
        )
        code = "from fastmoe_rs import _native; print(_native.empty((2, 3), 'float32'))"
        assert python(code, PYTHONPATH=str(tmp_path)) == "('empty', (2, 3), 'f32')"


def python(code, **environment):
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, check=False)
    return done.stdout.strip() if done.returncode == 0 else done.stderr.strip().splitlines()[-1]


def test_cpu_info():
    info = _native.cpu_info()
    assert info["isa"] in info["available"]
    assert "portable" in info["available"]
    assert set(info["kernels"]) == {"float32", "float64", "bfloat16", "float16"}
    assert info["threads_pool"] in {"openmp", "rayon"}


@pytest.mark.parametrize("isa", _native.cpu_info()["available"])
def test_forced_isa(isa):
    code = "from fastmoe_rs import _native; print(_native.cpu_info()['isa'])"
    assert python(code, FASTMOE_CPU_ISA=isa) == isa


@pytest.mark.cpu_only(reason="about the instruction set of the CPU")
@pytest.mark.parametrize(
    "use",
    [
        "_native.cpu_info()",
        "import numpy as np; x = np.ones((1, 1), np.float32); "
        "_native.permute(x, np.zeros(1, np.int32), x.copy(), threads=1)",
    ],
)
def test_unknown_isa(use):
    error = python(f"from fastmoe_rs import _native; {use}", FASTMOE_CPU_ISA="quantum")
    assert error.startswith("ValueError: FASTMOE_CPU_ISA: got 'quantum', wanted one of portable")


def test_version_is_that_of_the_package():
    from importlib.metadata import version

    assert _native.__version__ == version("fastmoe_rs")

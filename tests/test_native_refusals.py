"""What the native module refuses, and in which words."""

import re

import numpy as np
import pytest
import torch

from native_cases import CASES, E, H, I, K, R, T, argument_of, call, plan_in

ARGUMENTS = [(name, argument) for name, case in CASES.items() for argument in (case()[0] | case()[1])]
OUTPUTS = [(name, argument) for name, case in CASES.items() for argument in case()[1]]
NOT_DENSE = "wanted a dense tensor in CPU or CUDA memory"


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
    hidden = argument_of("mlp_backward_of_ids", "hidden")
    plan_in(hidden)[at] = value
    with pytest.raises(ValueError, match=rf"^{part}\[.*{value}"):
        call("mlp_backward_of_ids", hidden=hidden)


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

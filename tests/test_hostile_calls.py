"""The native module under calls that no honest caller makes: each ends in its result or in an exception."""

import gc
import os
import signal
import threading
import time
import weakref

import numpy as np
import pytest
import torch

from fastmoe_rs import _native
from moe_cases import EMULATED
from native_cases import CASES, H, K, R, T, arguments, call, function, int32, python, routed_rows

HUGE = 2**62
PAGE = os.sysconf("SC_PAGE_SIZE")
a_gpu_counts_less = pytest.mark.cpu_only(reason="sizes that a GPU's kernels cannot count are refused there")


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("threads", [2**61, 2**62, 2**63 - 1])
def test_any_number_of_threads(name, threads):
    inputs, expected, options = arguments(name)
    function(name)(**inputs, **expected, **options, threads=1)
    inputs, results, options = arguments(name)
    function(name)(**inputs, **results, **options, threads=threads)
    for key, tensor in expected.items():
        assert torch.equal(results[key], tensor), key


@pytest.mark.parametrize("threads", [2**63, -(2**63) - 1])
def test_no_number_of_threads(threads):
    with pytest.raises(OverflowError):
        call("permute", threads=threads)


@a_gpu_counts_less
def test_sizes_that_only_fit_because_there_is_nothing():
    call("permute", x=torch.zeros(0, HUGE), gather=int32(0), out=torch.zeros(0, HUGE))
    nothing = {"inverse": int32(0, K), "weights": torch.zeros(0, K)}
    call("unpermute", y=torch.zeros(0, HUGE), out=torch.zeros(0, HUGE), **nothing)
    rows = {name: torch.zeros(0, HUGE) for name in ("y", "grad_out", "grad_y")}
    call("unpermute_backward", gather=int32(0), grad_weights=torch.zeros(0, K), **rows, **nothing)


@a_gpu_counts_less
@pytest.mark.parametrize("top_k", [HUGE, 2**31])
def test_slots_that_only_fit_because_there_is_nothing(top_k):
    ids = torch.zeros(0, top_k, dtype=torch.int64)
    counts, offsets = int32(3), int32(4)
    call(
        "plan",
        ids=ids,
        weights=None,
        counts=counts,
        offsets=offsets,
        gather=int32(0),
        inverse=int32(0, top_k),
        sorted_weights=None,
    )
    assert not counts.any()
    assert not offsets.any()


def test_strides_that_bytes_cannot_count():
    x = torch.randn(1, H)
    given = x.as_strided((1, H), (HUGE, 1))
    out = torch.zeros(3, H)
    call("permute", x=given, gather=int32(3), out=out)
    assert torch.equal(out, x.expand(3, H))


def test_arrays_that_step_backwards_or_nowhere():
    for given in (np.zeros((T, H), np.float32)[::-1], np.broadcast_to(np.float32(1), (T, H))):
        with pytest.raises(ValueError, match=r"^x: got strides .*, wanted a C-contiguous tensor"):
            call("permute", x=given)


@pytest.mark.parametrize("strides", [(), (4 * H,), (4,)])
def test_an_array_with_fewer_strides_than_sizes(strides):
    class Array:
        __array_interface__ = np.zeros((T, H), np.float32).__array_interface__ | {"strides": strides}

    with pytest.raises(ValueError, match=r"^x: got strides .* wanted a C-contiguous tensor"):
        call("permute", x=Array())


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"tokens": HUGE}, r"^T \(tokens\): got 4611686018427387904, wanted at most 1073741824 on a GPU$"),
        ({"top_k": HUGE}, r"^T\*K \(routed rows\): got \d+, wanted at most"),
        ({"experts": 2**63 - 1}, r"^E \(experts\): got \d+, wanted at most"),
        ({"hidden": HUGE, "intermediate": HUGE}, r"^H \(hidden size\): got \d+, wanted at most"),
        ({"tokens": 2**30, "hidden": 2**27, "experts": 2**30}, r"^\w.*: got \d+, wanted at most"),
        ({"intermediate": 2**63 - 1}, r"^I \(intermediate size\): got \d+, wanted at most"),
        ({"tokens": 0}, "^tokens: got 0, wanted at least 1"),
        ({"math": "f8"}, "^math: got 'f8', wanted 'bf16', 'f16', 'f32' or 'tf32'"),
    ],
)
def test_launches_of_sizes_that_no_gpu_has(sizes, message):
    honest = {"tokens": 4, "hidden": 8, "intermediate": 8, "experts": 2, "top_k": 2}
    device = {"capability": (8, 0), "multiprocessors": 2**32 - 1, "shared_bytes": 0}
    options = {"math": "bf16", "gated": True, "bias": True, "train": True}
    assert _native.mlp_launches(**honest, **options, **device)
    with pytest.raises(ValueError, match=message):
        _native.mlp_launches(**(honest | options | device | sizes))


class TestMemory:
    def test_more_than_any_machine_has(self):
        before = _native.memory_stats()["used_bytes"]
        with pytest.raises(MemoryError, match=r"^out of memory: \d+ bytes are more than the system has left"):
            _native.empty([2**58], "float32")
        assert _native.memory_stats()["used_bytes"] == before

    def test_nothing_of_a_size_that_no_machine_has(self):
        for shape in [(0, 2**40), (0, 2**30, 2**30)]:
            assert _native.empty(shape, "float32").shape == shape
        with pytest.raises(
            ValueError, match=r"^shape: got .*, wanted sizes of at least 0 that fit in memory"
        ):
            _native.empty((0, HUGE, HUGE), "float32")

    @pytest.mark.cpu_only(reason="about the memory of the CPU backend")
    def test_a_call_that_runs_out_of_memory_raises_and_the_next_works(self):
        code = """
import os, resource, numpy as np
from fastmoe_rs import _native
x, w = np.ones((4096, 4096), np.float32), np.ones((1, 16, 4096), np.float32)
offsets, out = np.array([0, 4096], np.int32), np.zeros((4096, 16), np.float32)
call = lambda: _native.grouped_mm(x, w, offsets, None, out, transposed=False, threads=2)
call()
_native.empty_cache()
out[:] = 0
limits = resource.getrlimit(resource.RLIMIT_AS)
in_use = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (in_use + (32 << 20), limits[1]))
try:
    call()
except MemoryError as error:
    print(str(error).split(":")[0])
resource.setrlimit(resource.RLIMIT_AS, limits)
call()
print((out == 4096).all())
"""
        assert python(code) == "out of memory\nTrue"

    @pytest.mark.parametrize("given", ["2GB", "-1"])
    def test_a_limit_of_the_pool_that_is_no_number(self, given):
        code = "from fastmoe_rs import _native; _native.empty((1,), 'float32')"
        wanted = f"ValueError: FASTMOE_CACHE_MB: got '{given}', wanted a whole number of MiB"
        assert python(code, FASTMOE_CACHE_MB=given) == wanted

    def test_a_limit_of_the_pool(self):
        code = """
from fastmoe_rs import _native
held = [_native.empty((1 << 18,), "float32") for _ in range(5)]
held.clear()
print(_native.memory_stats()["cached_bytes"] >> 20)
"""
        assert python(code, FASTMOE_CACHE_MB="3") == "3"

    @pytest.mark.cpu_only(reason="takes minutes in an emulator")
    @pytest.mark.parametrize("name", CASES)
    def test_calls_leave_nothing_behind(self, name):
        inputs, outputs, options = arguments(name)

        def resident(calls):
            for _ in range(calls):
                function(name)(**inputs, **outputs, **options, threads=2)
            gc.collect()
            with open("/proc/self/statm") as statm:
                return int(statm.read().split()[1]) * PAGE

        before = resident(300)
        assert resident(1500) - before < 1 << 20

    def test_refusals_leave_nothing_behind(self):
        def refused():
            kind = type("Kind", (torch.Tensor,), {})
            given = torch.zeros(1).as_subclass(kind)
            with pytest.raises(ValueError, match=r"^x: got shape .*, wanted .T, H."):
                call("permute", x=given)
            return weakref.ref(kind)

        kinds = [refused() for _ in range(100)]
        gc.collect()
        assert sum(kind() is not None for kind in kinds) < 50


def test_several_threads_call_at_once():
    cases = {name: arguments(name) for name in CASES}
    expected = {}
    for name, (inputs, outputs, options) in cases.items():
        function(name)(**inputs, **outputs, **options, threads=1)
        expected[name] = {key: tensor.clone() for key, tensor in outputs.items()}
    wrong = []

    def work(threads):
        for _ in range(3 if EMULATED else 30):
            for name, (inputs, outputs, options) in cases.items():
                own = {key: torch.zeros_like(tensor) for key, tensor in outputs.items()}
                function(name)(**inputs, **own, **options, threads=threads)
                if any(not torch.equal(own[key], tensor) for key, tensor in expected[name].items()):
                    wrong.append((name, threads))

    workers = [threading.Thread(target=work, args=(threads,)) for threads in (1, 2, 3, 2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


@pytest.fixture
def interrupts():
    """Ctrl-C raises KeyboardInterrupt, also where the tests run in the background of a shell."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.cpu_only(reason="takes minutes in an emulator")
def test_an_interrupt_waits_for_the_call(interrupts):
    x, w = torch.randn(2048, 1024), torch.randn(1, 1024, 1024)
    offsets, out = torch.tensor([0, 2048], dtype=torch.int32), torch.full((2048, 1024), torch.nan)
    start = time.perf_counter()
    _native.grouped_mm(x, w, offsets, None, out, transposed=False, threads=2)
    seconds = time.perf_counter() - start
    want = out.clone()
    out.fill_(torch.nan)
    timer = threading.Timer(seconds / 4, signal.raise_signal, [signal.SIGINT])

    def interrupted():
        timer.start()
        _native.grouped_mm(x, w, offsets, None, out, transposed=False, threads=2)
        time.sleep(10)

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert torch.equal(out, want)


def test_outputs_that_no_call_wrote_stay():
    gather = routed_rows()["gather"]
    gather[0] = -2
    out = torch.full((R, H), 7.0)
    with pytest.raises(ValueError, match=r"^gather\[0\]"):
        call("permute", gather=gather, out=out)
    assert torch.equal(out, torch.full((R, H), 7.0))

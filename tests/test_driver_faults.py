"""What goes wrong between the library and a GPU ends in an exception with its remedy, and can be tried again.

A made-up libcuda stands for NVIDIA's driver up to the loading of kernels; what happens from the first launch
on needs the emulator, which `make test-emulated` has.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastmoe_rs import RoutingPlan, functional
from moe_cases import differentiable, mlp_case

SOURCE = Path(__file__).with_name("fake_libcuda.c")


@pytest.fixture(scope="session")
def fake_libcuda(tmp_path_factory):
    """Compiles the made-up driver with more options, and gives its folder."""

    def build(*options):
        folder = tmp_path_factory.mktemp("driver")
        command = ["gcc", "-shared", "-fPIC", *options, "-o", folder / "libcuda.so.1", SOURCE]
        subprocess.run(command, check=True)
        return folder

    return build


def load_cuda(folder, told="", device=0):
    """What `load_cuda` raises, and what it raises once the driver does all that it is asked for."""
    code = f"""
import os
from fastmoe_rs import RoutingPlan, _native
import numpy as np
for _ in range(2):
    try:
        _native.load_cuda({device})
        print("loaded")
    except Exception as error:
        print(type(error).__name__, error)
    os.environ["FAKE_CUDA"] = ""
RoutingPlan.from_ids(np.zeros((2, 1), np.int64), 1)
"""
    environment = {**os.environ, "LD_LIBRARY_PATH": str(folder), "FAKE_CUDA": told, "FASTMOE_BACKEND": ""}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    return first, second


@pytest.mark.cpu_only(reason="about the module that is released")
class TestLoading:
    """From the driver to loaded kernels."""

    def test_no_driver(self, tmp_path):
        (tmp_path / "libcuda.so.1").write_text("not a library")
        error, _ = load_cuda(tmp_path)
        assert re.match(
            r"RuntimeError CUDA: no NVIDIA driver on this machine \(.*\); install one, or keep", error
        )

    def test_driver_without_a_function(self, fake_libcuda):
        error, _ = load_cuda(fake_libcuda("-DOLD"))
        assert error == (
            "RuntimeError CUDA: the NVIDIA driver has no cuFuncLoad; driver 580 or newer is needed, "
            "please update it"
        )

    @pytest.mark.parametrize(
        ("told", "message"),
        [
            (
                "version=12040",
                r"the NVIDIA driver is too old .* supports CUDA 12.4, CUDA 13.0 is needed .*driver 580",
            ),
            (
                "cuInit=100",
                r"CUDA_ERROR_100 in cuInit: as told; python -m fastmoe_rs doctor examines the machine",
            ),
            ("devices=0", r"no device 0; this machine has 0"),
            (
                "capability=75",
                r"no kernels for a device of compute capability 7.5: .* from Ampere \(8.0\) on are",
            ),
        ],
    )
    def test_driver_that_cannot(self, fake_libcuda, told, message):
        error, later = load_cuda(fake_libcuda(), told)
        assert re.match(f"RuntimeError CUDA: {message}", error), error
        assert later != error  # that was tried anew

    def test_device_that_is_not_there(self, fake_libcuda):
        error, _ = load_cuda(fake_libcuda(), "devices=2", device=2)
        assert error == "RuntimeError CUDA: no device 2; this machine has 2"

    @pytest.mark.parametrize(
        ("told", "message"),
        [
            (
                "cuModuleLoadData=209",
                "RuntimeError CUDA: CUDA_ERROR_209 in cuModuleLoadData: the driver does not run",
            ),
            (
                "cuModuleLoadData=2",
                "OutOfMemoryError CUDA: out of memory in cuModuleLoadData; free tensors or make",
            ),
            (
                "cuModuleLoadData=900",
                "RuntimeError CUDA: cuModuleLoadData cannot be captured in a graph: call once",
            ),
            (
                "cuFuncLoad=700",
                "RuntimeError CUDA: CUDA_ERROR_700 in cuFuncLoad: a kernel failed on the device",
            ),
            (
                "cuDevicePrimaryCtxRetain=2",
                "OutOfMemoryError CUDA: out of memory in cuDevicePrimaryCtxRetain",
            ),
        ],
    )
    def test_kernels_that_do_not_load(self, cuda_images, fake_libcuda, told, message):
        error, later = load_cuda(fake_libcuda(), told)
        assert error.startswith(message)
        assert later == "loaded"

    @pytest.mark.parametrize(
        ("device", "before", "after"),
        [(0, 0, 1), (0, 1, 1), (0, 99, 99), (1, 0, 0), (1, 1, 1), (1, 2, 2)],
    )
    def test_a_thread_keeps_its_context(self, cuda_images, fake_libcuda, device, before, after):
        """That of device 0 is 1. A thread that has none is on device 0 for the CUDA runtime, and gets it."""
        code = f"""
import ctypes
from fastmoe_rs import _native
driver = ctypes.CDLL("libcuda.so.1")
driver.cuCtxSetCurrent(ctypes.c_void_p({before}))
_native.load_cuda({device})
current = ctypes.c_void_p()
driver.cuCtxGetCurrent(ctypes.byref(current))
print(current.value or 0)
"""
        variables = {"LD_LIBRARY_PATH": str(fake_libcuda()), "FAKE_CUDA": "devices=2", "FASTMOE_BACKEND": ""}
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **variables}
        )
        assert done.stdout == f"{after}\n", done.stderr


@pytest.mark.emulated_only(reason="what happens from the first launch on needs a device")
class TestRunning:
    """From the first launch on."""

    @pytest.fixture
    def fault(self, monkeypatch):
        """Makes a function of the driver return a status, or none."""

        def set_fault(call=None, status=0):
            if call:
                monkeypatch.setenv("FASTMOE_EMULATOR_FAULT", f"{call}={status}")
            else:
                monkeypatch.delenv("FASTMOE_EMULATOR_FAULT")

        return set_fault

    FAULTS = pytest.mark.parametrize(
        ("call", "status", "error", "message"),
        [
            (
                "cuLaunchKernel",
                2,
                torch.OutOfMemoryError,
                "CUDA: out of memory in cuLaunchKernel; free tensors or",
            ),
            (
                "cuLaunchKernel",
                701,
                RuntimeError,
                "CUDA: error 701 in cuLaunchKernel: asked for; python -m fastmoe_rs",
            ),
            (
                "cuLaunchKernel",
                719,
                RuntimeError,
                "CUDA: error 719 in cuLaunchKernel: a kernel failed on the device, "
                "which stays unusable until the process restarts",
            ),
            ("cuLaunchKernel", 900, RuntimeError, "CUDA: cuLaunchKernel cannot be captured in a graph"),
            (
                "cuStreamSynchronize",
                700,
                RuntimeError,
                "CUDA: error 700 in cuStreamSynchronize: a kernel failed",
            ),
        ],
    )

    @FAULTS
    def test_forward(self, fault, call, status, error, message):
        arguments, options = mlp_case(bias=True)
        expected = functional.moe_mlp(*arguments, **options)
        fault(call, status)
        for function in (
            lambda: functional.moe_mlp(*arguments, **options),
            lambda: RoutingPlan.from_ids(arguments[1], 5),
            lambda: functional.grouped_mm(arguments[0], arguments[3], torch.tensor([0, 3, 3, 8, 9, 13])),
        ):
            with pytest.raises(error, match=re.escape(message)):
                function()
        fault()
        assert torch.equal(functional.moe_mlp(*arguments, **options), expected)

    @FAULTS
    def test_backward(self, fault, call, status, error, message):
        arguments, options = mlp_case(bias=True)
        inputs = list(differentiable(arguments, options).values())
        out = functional.moe_mlp(*arguments, **options).sum()
        expected = torch.autograd.grad(out, inputs, retain_graph=True)
        fault(call, status)
        with pytest.raises(error, match=re.escape(message)):
            torch.autograd.grad(out, inputs, retain_graph=True)
        fault()
        for grad, want in zip(torch.autograd.grad(out, inputs), expected, strict=True):
            assert torch.equal(grad, want)

    def test_tensor_maps(self, fault):
        """Kernels of warpgroups have them: for bfloat16, with more than 16 rows an expert."""
        x, w = torch.randn(64, 64).bfloat16(), torch.randn(2, 512, 64).bfloat16()
        offsets = torch.tensor([0, 30, 64])
        expected = functional.grouped_mm(x, w, offsets)
        fault("cuTensorMapEncodeTiled", 1)
        with pytest.raises(RuntimeError, match=r"^CUDA: error 1 in cuTensorMapEncodeTiled: asked for"):
            functional.grouped_mm(x, w, offsets)
        fault()
        assert torch.equal(functional.grouped_mm(x, w, offsets), expected)

    def test_scratch_memory_that_torch_does_not_have(self):
        """On a GPU torch raises OutOfMemoryError here, on the CPU a RuntimeError of its own."""
        code = """
import re, resource
import torch
from fastmoe_rs import RoutingPlan, functional
x, w1, w2 = (torch.randn(s).bfloat16() for s in ((2**18, 1), (1, 8192, 1), (1, 1, 4096)))
weights, plan = torch.rand(2**18, 1), RoutingPlan.from_ids(torch.zeros(2**18, 1, dtype=torch.int64), 1)
used = int(re.search(r"VmSize:\\s+(\\d+)", open("/proc/self/status").read())[1]) << 10
resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30), -1))
try:
    functional.moe_mlp(x, None, weights, w1, w2, plan=plan)
except RuntimeError as error:
    print(error)
few = RoutingPlan.from_ids(torch.zeros(3, 1, dtype=torch.int64), 1)
print(functional.moe_mlp(x[:3], None, weights[:3], w1, w2, plan=few).isfinite().all().item())
"""
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        first, _, last = done.stdout.strip().partition("\n")
        assert f"tried to allocate {2 * 2**18 * (4096 + 1)} bytes" in first, done.stderr
        assert last == "True"

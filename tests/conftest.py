"""What every test shares: the same random numbers each time, and hypothesis without its clock."""

import os

import hypothesis
import pytest
import torch

import toolkit
from moe_cases import EMULATED

ALL_KERNELS = os.environ.get("FASTMOE_CUDA_ARCHS") == "all"

hypothesis.settings.register_profile("repeatable", deadline=None, derandomize=True, max_examples=60)
hypothesis.settings.load_profile("repeatable")


# Waiting threads of many small tests would fight for the cores; tests of threads ask for more.
torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    """Skip what `make test` or `make test-emulated` cannot run, for the reason that the test gives."""
    elsewhere = "emulated_only" if not EMULATED else "cpu_only"
    for item in items:
        for mark in item.iter_markers(elsewhere):
            item.add_marker(pytest.mark.skip(reason=f"{elsewhere}: {mark.kwargs['reason']}"))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def set_threads():
    """torch.set_num_threads for the length of a test."""
    yield torch.set_num_threads
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def cuda_tools():
    """nvcc, nvdisasm and the headers of CUTLASS."""
    for path in (toolkit.NVCC, toolkit.NVDISASM, toolkit.CUTLASS):
        if not path.exists():
            reason = f"{path} is missing: make toolchain"
            pytest.fail(reason) if ALL_KERNELS else pytest.skip(reason)


@pytest.fixture(scope="session")
def cuda_images(cuda_tools):
    """The kernels in machine code, for every target, as the sources are now."""
    if not ALL_KERNELS:
        pytest.skip("kernels of every target are checked by FASTMOE_CUDA_ARCHS=all make test")

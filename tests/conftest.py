"""What every test shares: the same random numbers each time, and hypothesis without its clock."""

import os

import hypothesis
import pytest
import torch

import nvidia

hypothesis.settings.register_profile("repeatable", deadline=None, derandomize=True, max_examples=60)
hypothesis.settings.load_profile("repeatable")


# Waiting threads of many small tests would fight for the cores; tests of threads ask for more.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def set_threads():
    """torch.set_num_threads for the length of a test."""
    yield torch.set_num_threads
    torch.set_num_threads(1)


def _demand(path, command):
    """Skips where something was not made, unless this run is to check all of the GPU code."""
    if not path.exists():
        reason = f"{path} is missing: {command}"
        pytest.fail(reason) if os.environ.get("FASTMOE_CUDA_ARCHS") == "all" else pytest.skip(reason)


@pytest.fixture(scope="session")
def cuda_tools():
    """nvcc, nvdisasm and the headers of CUTLASS."""
    for path in (nvidia.NVCC, nvidia.NVDISASM, nvidia.CUTLASS):
        _demand(path, "make toolchain")


@pytest.fixture(scope="session")
def cuda_images(cuda_tools):
    """The kernels in machine code, for every target."""
    _demand(nvidia.IMAGES, "make kernels")

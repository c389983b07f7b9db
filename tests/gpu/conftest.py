"""Tests on a GPU: `pytest tests/gpu`, or with `--device cpu --quick` a check of the tests themselves."""

import os

import pytest
import torch


def pytest_addoption(parser):
    group = parser.getgroup("gpu")
    group.addoption("--device", default="cuda", help="where the tests run (default: cuda)")
    group.addoption("--quick", action="store_true", help="small sizes only")


def pytest_report_header(config):
    if (device := config.option.device) == "cuda" and torch.cuda.is_available():
        return f"GPU: {torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}"
    return f"device: {device}"


def pytest_collection_modifyitems(config, items):
    device = config.option.device
    if device == "cuda" and not torch.cuda.is_available():
        skip = pytest.mark.skip(
            reason="no CUDA device on this machine; --device cpu --quick checks the tests"
        )
        for item in items:
            item.add_marker(skip)
    elif device != "cuda":
        skip = pytest.mark.skip(reason="about streams, graphs or memory of a CUDA device")
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(skip)


def pytest_configure(config):
    config.addinivalue_line("markers", "cuda: has a meaning on CUDA devices only")
    # Machines with a GPU bring a torch of their own, with warnings that say nothing about this library.
    config.addinivalue_line("filterwarnings", "default")
    if config.option.device == "cuda":
        torch.set_num_threads(len(os.sched_getaffinity(0)))  # the reference in float64 has large products


@pytest.fixture
def device(request):
    return request.config.option.device


@pytest.fixture
def quick(request):
    return request.config.option.quick


@pytest.fixture(autouse=True)
def _poisoned_memory(device):
    """Fills what the allocator will hand out next with NaN: an output that is not written shows."""
    largest = 26 if device == "cuda" else 18
    blocks = [torch.full((1 << power,), float("nan"), device=device) for power in range(6, largest)]
    del blocks

"""Tests on a GPU: `pytest tests/gpu`, or with `--device cpu --quick` a check of the tests themselves.

On a GPU every outcome is written to bench/results/DATE-GPU-tests.jsonl (or --record) as soon as it is known.
"""

import datetime
import json
import os
import re
import sys
from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).parents[2] / "bench"
NOW = datetime.datetime.now(datetime.timezone.utc)


def pytest_addoption(parser):
    group = parser.getgroup("gpu")
    group.addoption("--device", default="cuda", help="where the tests run (default: cuda)")
    group.addoption("--record", type=Path, help="where the outcomes are written")
    group.addoption("--quick", action="store_true", help="small sizes only")


def pytest_report_header(config):
    place = gpu_name(config.option.device) or config.option.device
    return f"device: {place}, torch {torch.__version__}, CUDA {torch.version.cuda}"


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
    name, path = gpu_name(config.option.device), config.option.record
    if name and path is None:
        label = re.sub("[^a-z0-9]+", "-", name.lower())
        path = BENCH / "results" / f"{NOW.date().isoformat()}-{label}-tests.jsonl"
    if path:
        config.pluginmanager.register(Record(path, config.option.device))
    if config.option.device == "cuda":
        torch.set_num_threads(len(os.sched_getaffinity(0)))  # the reference in float64 has large products


class Record:
    """A file of JSON lines: the machine, then the tests."""

    def __init__(self, path, device):
        sys.path.append(str(BENCH))
        from machine import commit, version

        packages = ("fastmoe_rs", "torch", "triton", "transformers")
        self.path = path
        about = {
            "kind": "machine",
            "date": NOW.isoformat(timespec="seconds"),
            "commit": commit(),
            "device": device,
        }
        about |= {"gpu": gpu_name(device), "cuda": torch.version.cuda}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(about | {"versions": {name: version(name) for name in packages}}) + "\n")

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or report.skipped or report.failed:
            why = (
                report.longreprtext.splitlines()[-1:]
                if report.failed
                else report.longrepr and report.longrepr[2]
            )
            entry = {
                "kind": "test",
                "name": report.nodeid,
                "outcome": report.outcome,
                "seconds": report.duration,
            }
            with self.path.open("a") as file:
                file.write(json.dumps(entry | ({"reason": why} if why else {})) + "\n")


def gpu_name(device):
    return torch.cuda.get_device_name() if device == "cuda" and torch.cuda.is_available() else None


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

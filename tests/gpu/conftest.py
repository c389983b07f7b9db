"""Tests on a GPU: `pytest tests/gpu`, or with `--device cpu --quick` a check of the tests themselves.

On a GPU every outcome is written to bench/results/DATE-GPU-tests.jsonl (or --record) as soon as it is known.
An error that leaves the device unusable ends the run with exit status 70; --go-on then does the other tests.
"""

import datetime
import faulthandler
import json
import sys
from pathlib import Path

import pytest
import torch

import fastmoe_rs

BENCH = Path(__file__).parents[2] / "bench"
PACKAGES = ("torch", "triton", "transformers", "numpy", "pytest")
DEVICE_LOST = 70
TEST_SECONDS = 150  # after which a test is taken to hang, and ends the run


def pytest_addoption(parser):
    group = parser.getgroup("gpu")
    group.addoption("--device", default="cuda", help="where the tests run (default: cuda)")
    group.addoption("--record", type=Path, help="where the outcomes are written")
    group.addoption("--go-on", action="store_true", help="leave out the tests in the --record, and add to it")
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
    if config.option.go_on:
        lines = map(json.loads, config.option.record.read_text().splitlines())
        done = {entry.get("name") for entry in lines}
        items[:] = [item for item in items if item.nodeid not in done]


def pytest_configure(config):
    sys.path += [str(BENCH), str(BENCH / "gpu")]
    from record import default_path

    config.addinivalue_line("markers", "cuda: has a meaning on CUDA devices only")
    config.addinivalue_line("markers", "programs: starts programs, which have limits of their own")
    # Machines with a GPU bring a torch of their own, with warnings that say nothing about this library.
    config.addinivalue_line("filterwarnings", "default")
    name, path = gpu_name(config.option.device), config.option.record
    if name and path is None:
        path = default_path(name, "-tests")
    if path:
        config.pluginmanager.register(Outcomes(path, config.option))


class Outcomes:
    """A record of the machine and the tests."""

    def __init__(self, path, options):
        from machine import commit, version
        from record import Record

        self.record = Record(path, keep=options.go_on)
        if options.go_on:
            return
        about = {
            "kind": "machine",
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "commit": commit(),
            "device": options.device,
            "gpu": gpu_name(options.device),
            "cuda": torch.version.cuda,
        }
        versions = {"fastmoe_rs": fastmoe_rs.__version__, **{name: version(name) for name in PACKAGES}}
        self.record.add(about | {"versions": versions})

    def pytest_runtest_logstart(self, nodeid):
        self.record.add({"kind": "start", "name": nodeid})

    def pytest_runtest_logreport(self, report):
        if report.when != "call" and report.passed:
            return
        entry = {
            "kind": "test",
            "name": report.nodeid,
            "outcome": report.outcome,
            "seconds": report.duration,
        }
        if report.skipped:
            entry["reason"] = report.longrepr[2]
        elif report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            entry["reason"] = crash.message if crash else report.longreprtext
        self.record.add(entry)
        if report.failed and device_is_lost():
            pytest.exit(f"nothing runs on the device after {report.nodeid}", returncode=DEVICE_LOST)


def device_is_lost():
    """Also after a capture that failed: torch then never again frees memory."""
    if torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except RuntimeError:
            return True
    return False


def gpu_name(device):
    return torch.cuda.get_device_name() if device == "cuda" and torch.cuda.is_available() else None


@pytest.fixture
def device(request):
    return request.config.option.device


@pytest.fixture
def quick(request):
    return request.config.option.quick


@pytest.fixture(autouse=True)
def _ends(request):
    if not request.node.get_closest_marker("programs"):
        faulthandler.dump_traceback_later(TEST_SECONDS, exit=True, file=sys.__stderr__)
    yield
    faulthandler.cancel_dump_traceback_later()


@pytest.fixture(autouse=True)
def _poisoned_memory(device):
    """Fills what the allocator will hand out next with NaN: an output that is not written shows."""
    largest = 26 if device == "cuda" else 18
    blocks = [torch.full((1 << power,), float("nan"), device=device) for power in range(6, largest)]
    del blocks

"""Programs around the library on a GPU: NVIDIA's checkers, the conformance of instructions, doctor, demo."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import conformance
import pytest

pytestmark = pytest.mark.programs
ROOT = Path(__file__).parents[2]
SANITIZER = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
SMALL_CASE = """
import sys; sys.path.insert(0, "tests/gpu")
import torch
from layers import layer
for dtype in (torch.bfloat16, torch.float32):
    for sizes in ((40, 64, 96, 4, 2), (21, 33, 17, 5, 2)):
        results = layer(sys.argv[1], *sizes, dtype=dtype).step()
        assert all(result.isfinite().all() for result in results)
"""


def run(*command, seconds=120, **environment):
    environment = {**os.environ, **environment}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds, env=environment)


@pytest.mark.cuda
@pytest.mark.skipif(SANITIZER is None, reason="compute-sanitizer is not on this machine")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_sanitizer_finds_nothing(device, tool):
    """Each tensor in an allocation of its own, so that an access beyond one is seen."""
    options = ["--tool", tool, "--error-exitcode", "9"]
    if tool == "memcheck":
        options += ["--report-api-errors", "no"]  # torch asks the driver for things that it may not have
    command = [SANITIZER, *options, sys.executable, "-c", SMALL_CASE, device]
    seconds = float(os.environ.get("FASTMOE_SANITIZER_SECONDS", 180))
    try:
        done = run(*command, seconds=seconds, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    except subprocess.TimeoutExpired:
        pytest.skip(f"{tool} was not done after {seconds:.0f} s; FASTMOE_SANITIZER_SECONDS gives it more")
    output = done.stdout + done.stderr
    if "Device not supported" in output:
        pytest.skip("compute-sanitizer does not support this device")
    assert done.returncode == 0, output[-3000:]
    assert re.search(r"SUMMARY: .*\b0 errors", output), output[-3000:]


@pytest.mark.cuda
def test_instructions_conform_to_their_emulation():
    if not conformance.is_built() and conformance.nvcc() is None:
        pytest.skip("it is not built, and there is no nvcc")
    done = run(sys.executable, "tests/gpu/conformance.py", "--seeds", "10")
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_small_case_of_the_sanitizer_runs(device):
    done = run(sys.executable, "-c", SMALL_CASE, device)
    assert done.returncode == 0, done.stderr


def test_doctor_is_content(device):
    done = run(sys.executable, "-m", "fastmoe_rs", "doctor", "--json")
    rows = {row["name"]: row for row in json.loads(done.stdout)["rows"]}
    assert done.returncode == 0, rows
    if device == "cuda":
        assert rows["gpu 0"]["status"] in ("green", "yellow")
        assert rows["self-test bfloat16 on cuda:0"]["status"] == "green"


def test_demo_trains(device, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("".join(f"line {i} of {i * i}\n" for i in range(1000)))
    options = [
        "--steps",
        "5",
        "--experts",
        "4",
        "--dtype",
        "bfloat16",
        "--text",
        text,
        "--out",
        tmp_path / "out",
    ]
    done = run(
        sys.executable, "-m", "fastmoe_rs", "demo", "--device", device, *map(str, options), seconds=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "out" / "demo.png").exists()

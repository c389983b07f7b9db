"""The tests and the benchmark of a GPU are sound programs: they run on the CPU, where there is no GPU."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).parents[1]
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")


def run(*command: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True)


def test_tests_of_a_gpu_pass_on_the_cpu(tmp_path: Path) -> None:
    path = tmp_path / "record.jsonl"
    options = ("--device", "cpu", "--quick", "--record", path)
    done = run("-m", "pytest", "-q", "tests/gpu/test_gpu_parity.py", *options)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
    machine, *tests = map(json.loads, path.read_text().splitlines())
    assert machine["device"] == "cpu"
    assert machine["versions"]["torch"]
    assert {test["outcome"] for test in tests} == {"passed", "skipped"}
    assert all(test["reason"] for test in tests if test["outcome"] == "skipped")


@no_gpu
def test_tests_of_a_gpu_are_skipped_with_the_reason() -> None:
    done = run("-m", "pytest", "-q", "tests/gpu")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no CUDA device on this machine" in done.stdout
    assert " passed" not in done.stdout


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The program bench/gpu/run.py as a module."""
    monkeypatch.syspath_prepend(ROOT / "bench")
    monkeypatch.syspath_prepend(ROOT / "bench/gpu")
    return importlib.import_module("run")


def test_benchmark_of_a_gpu_records_and_reports(bench: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "record.jsonl"
    assert bench.main(["--device", "cpu", "--quick", "--only", "train", "--out", str(path)]) == 0
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    assert [entry["kind"] for entry in entries] == ["machine", "ceilings", "routing", *["cell"] * 3]
    for cell in entries[3:]:
        assert len(cell["paths"]) == 7
        assert cell["floor_s"] > 0
        for name in ("fastmoe_rs", "torch_grouped"):
            found = cell["paths"][name]
            assert found["status"] == "ok"
            assert found["eager"]["median_s"] > 0
        assert all(path["status"] == "ok" or path["reason"] for path in cell["paths"].values())
    assert set(entries[3]["paths"]["torch_grouped"]["errors"]) == {"out", "x", "weights", "w1", "w2"}
    assert path.with_suffix(".svg").read_text().startswith("<svg")
    page = path.with_suffix(".md").read_text()
    assert "## tiny T32 train" in page
    assert "| torch_grouped |" in page


def test_benchmark_of_a_gpu_stops_in_time(bench: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "record.jsonl"
    assert bench.main(["--device", "cpu", "--quick", "--budget-seconds", "0", "--out", str(path)]) == 0
    left = [entry for entry in map(json.loads, path.read_text().splitlines()) if entry["kind"] == "left out"]
    assert len(left) == 6
    assert "the time was used up" in path.with_suffix(".md").read_text()


def test_wrong_answers_end_the_benchmark(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import peers

    right = peers.moe_mlp
    monkeypatch.setattr(peers, "moe_mlp", lambda *args, **options: right(*args, **options) * 1.1)
    path = tmp_path / "record.jsonl"
    assert bench.main(["--device", "cpu", "--quick", "--out", str(path)]) == 1
    assert "fastmoe_rs is wrong on tiny T32 forward" in capsys.readouterr().err
    assert json.loads(path.read_text().splitlines()[-1])["kind"] == "wrong"


def test_host_overhead_of_every_call_is_timed() -> None:
    """With the build of `make bench-host` or of `make test-emulated`."""
    built = [ROOT / "target" / name / "python" for name in ("host", "emulated")]
    found = next((path for path in built if path.exists()), None)
    if found is None or not (ROOT / "target/emulator/plain/libkernels.so").exists():
        pytest.skip("no build for the emulator: make emulated")
    done = run("bench/host_overhead.py", "--smoke", "--package", found)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 9
    assert lines[0].startswith("forward ")
    assert lines[0].endswith("us  goal 25")


@no_gpu
def test_benchmark_of_a_gpu_says_that_there_is_none(
    bench: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench.main([]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "no CUDA device" in line

"""The tests and the benchmark of a GPU are sound programs: they run on the CPU, where there is no GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")


def run(*command: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True)


def test_tests_of_a_gpu_pass_on_the_cpu() -> None:
    done = run("-m", "pytest", "-q", "tests/gpu/test_gpu_parity.py", "--device", "cpu", "--quick")
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


@no_gpu
def test_tests_of_a_gpu_are_skipped_with_the_reason() -> None:
    done = run("-m", "pytest", "-q", "tests/gpu")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no CUDA device on this machine" in done.stdout
    assert " passed" not in done.stdout


def test_benchmark_of_a_gpu_records_and_reports(tmp_path: Path) -> None:
    path = tmp_path / "record.jsonl"
    done = run("bench/gpu/run.py", "--device", "cpu", "--quick", "--only", "train", "--out", path)
    assert done.returncode == 0, done.stdout + done.stderr
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


def test_benchmark_of_a_gpu_stops_in_time(tmp_path: Path) -> None:
    path = tmp_path / "record.jsonl"
    done = run("bench/gpu/run.py", "--device", "cpu", "--quick", "--budget-seconds", 0, "--out", path)
    assert done.returncode == 0, done.stdout + done.stderr
    left = [entry for entry in map(json.loads, path.read_text().splitlines()) if entry["kind"] == "left out"]
    assert len(left) == 6
    assert "the time was used up" in path.with_suffix(".md").read_text()


def test_wrong_answers_end_the_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("bench", "bench/gpu"):
        monkeypatch.syspath_prepend(ROOT / folder)
    import measure
    import problems

    problem = problems.Problems("cpu").of(problems.cells(quick=True)[0])
    out = measure.Runner(measure.PATHS[0], problem).answer()["out"]
    assert measure.check_ours(problem, out) < measure.BOUND
    with pytest.raises(ArithmeticError, match="fastmoe_rs is wrong on tiny T32 forward"):
        measure.check_ours(problem, out * 1.1)


@no_gpu
def test_benchmark_of_a_gpu_says_that_there_is_none() -> None:
    done = run("bench/gpu/run.py")
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "no CUDA device" in line

"""The tests of a GPU are sound programs: they run on the CPU, where there is no GPU."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")


def run(*command: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True)


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_tests_of_a_gpu_pass_on_the_cpu(tmp_path: Path) -> None:
    path = tmp_path / "record.jsonl"
    tests = ("tests/gpu/test_gpu_parity.py", "tests/gpu/test_gpu_runtime.py")
    done = run("-m", "pytest", "-q", *tests, "--device", "cpu", "--quick", "--record", path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
    machine, *entries = lines_of(path)
    assert machine["device"] == "cpu"
    assert machine["versions"]["torch"]
    outcomes = [entry for entry in entries if entry["kind"] == "test"]
    assert {test["outcome"] for test in outcomes} == {"passed", "skipped"}
    assert all(test["reason"] for test in outcomes if test["outcome"] == "skipped")
    started = [entry["name"] for entry in entries if entry["kind"] == "start"]
    assert started == [test["name"] for test in outcomes]


def test_tests_go_on_after_one_that_ended_the_process(tmp_path: Path) -> None:
    path = tmp_path / "record.jsonl"
    crashed = {"kind": "start", "name": "tests/gpu/test_gpu_parity.py::test_nan_stays_with_its_token"}
    path.write_text(json.dumps(crashed) + "\n")
    options = ("--device", "cpu", "--record", path, "--go-on", "-k", "nan_stays or experts_without_tokens")
    done = run("-m", "pytest", "-q", "tests/gpu/test_gpu_parity.py", *options)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout
    assert len(lines_of(path)) == 3


def test_a_session_ends_in_time_with_what_it_has(tmp_path: Path) -> None:
    start = time.monotonic()
    options = ("--device", "cpu", "--quick", "--seconds", 12, "--out", tmp_path / "out")
    done = run("tests/gpu/session.py", *options)
    assert time.monotonic() - start < 12 + 30
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1].split() == ["tools", "no", "time", "left", "0", "s"]
    assert "self-test" in done.stdout or "status   -15" in done.stdout
    assert "== doctor" in (tmp_path / "out/log.txt").read_text()


def test_words_that_differ_on_a_gpu_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "tests/gpu")
    conformance = importlib.import_module("conformance")
    words = conformance.words_of_seed(0)
    emulated = bytearray(4 * conformance.OUT_WORDS)
    device = emulated[:]
    at = 4 * (7 * 128 + 105)
    emulated[at : at + 4], device[at : at + 4] = b"\xff\xff\xff\x7f", b"\x00\x20\xd6\x7f"
    assert conformance.differences("conversions", emulated, device) == [1001]
    text = conformance.described(1001, 128, words, emulated, device)
    x, y, z = (words[4 * i : 4 * i + 4][::-1].hex() for i in (105, 233, 361))
    values = "7fffffff emulated, 7fd62000 on the GPU"
    assert text == f"  word 1001, result 7 of thread 105: {values}; from {x} {y} {z}"
    assert conformance.differences("approximations", bytes(emulated), bytes(device)) == []
    device[:4] = b"\xff\xff\xff\x7f"
    assert conformance.differences("approximations", emulated, device) == [0]


def test_probes_behind_one_that_ends_the_context_run_in_a_process_of_their_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(ROOT / "tests/gpu")
    conformance = importlib.import_module("conformance")
    killers = {"boxes": "cuCtxSynchronize: CUDA error 715", "pairs": "cuCtxSynchronize: CUDA error 719"}

    class Emulator:
        def run(self, probe: str, words: bytes) -> bytes:
            return bytes(4 * conformance.OUT_WORDS)

        def threads(self, probe: str) -> int:
            return 128

    class Gpu:
        name, hopper, alive = "a GPU", True, True

        def run(self, probe: str, words: bytes) -> bytes:
            self.alive &= probe not in killers
            if not self.alive:
                raise conformance.CudaError(killers.get(probe, "cuMemcpyHtoD_v2: CUDA error 715"))
            return (b"\1" if probe == "arrivals" else b"\0").ljust(4 * conformance.OUT_WORDS, b"\0")

    def main(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["conformance.py", *arguments])
        return conformance.main()

    def in_a_process(command: list[str], **_: object) -> None:
        assert command[:3] == [sys.executable, conformance.__file__, "--seeds=2"]
        main(*command[2:])

    record = tmp_path / "record.json"
    monkeypatch.setattr(conformance, "RECORD", record)
    monkeypatch.setattr(conformance, "is_built", lambda: True)
    monkeypatch.setattr(conformance, "Emulator", Emulator)
    monkeypatch.setattr(conformance, "Gpu", Gpu)
    monkeypatch.setattr(conformance.subprocess, "run", in_a_process)
    assert main("--seeds", "2") == 1
    said = capsys.readouterr().out.splitlines()
    results = {line.split()[1].rstrip(":"): line for line in said if not line.startswith(" ")}
    assert list(results) == conformance.PROBES
    for probe, line in results.items():
        wanted = f"failed {probe}: {killers.get(probe)}" if probe in killers else f"equal {probe}"
        assert line == ("differs arrivals: 2 words" if probe == "arrivals" else wanted)
    killers.clear()
    assert main("--seeds", "2", "boxes") == 0
    assert not record.exists()  # neither of failures nor of a part
    monkeypatch.setattr(conformance, "PROBES", ["lanes", "boxes"])
    assert main("--seeds", "2") == 0
    assert record.exists()
    with pytest.raises(SystemExit):
        main("box")
    assert "no such probe: box; there are lanes, boxes" in capsys.readouterr().err


@no_gpu
def test_tests_of_a_gpu_are_skipped_with_the_reason() -> None:
    done = run("-m", "pytest", "-q", "tests/gpu")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no CUDA device on this machine" in done.stdout
    assert " passed" not in done.stdout


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

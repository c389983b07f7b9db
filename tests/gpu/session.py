"""All that a machine with a GPU can tell, by one command and in a given time: `python tests/gpu/session.py`.

The doctor, the conformance of instructions, the tests, the benchmark, and at last what may take long:
NVIDIA's checkers and the demo. All is in the folder --out as soon as it is known: log.txt, tests.jsonl,
conformance.json, and bench.jsonl with its page and its chart. Exit status 0 when all went well.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TESTS = ROOT / "tests/gpu"
DEVICE_LOST = 70  # exit status of tests after an error that only another process gets rid of
LAST_SECONDS = 90  # for what comes after the benchmark
REPORT_SECONDS = 30  # from the end of the benchmark's time to its end
LEAST_SECONDS = 5  # in which a step can tell anything
NOT_RUN = 75  # stands for the exit status of a step for which no time was left
TAIL = 2000  # characters of a step's output that are shown


class Session:
    """Steps in processes of their own, within a common time."""

    def __init__(self, out: Path, seconds: float) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.out, self.end = out, time.monotonic() + seconds
        self.done: list[tuple[str, int, float]] = []

    def left(self) -> float:
        return max(0.0, self.end - time.monotonic())

    def step(self, name: str, seconds: float, *arguments: object, **environment: str) -> int:
        """Runs Python for at most that long and returns its exit status. Nothing it started outlives it."""
        start, limit = time.monotonic(), min(seconds, self.left())
        if limit < LEAST_SECONDS:
            self.done.append((name, NOT_RUN, 0.0))
            return NOT_RUN
        print(f"== {name}, at most {limit:.0f} s", flush=True)
        folders = filter(None, [str(ROOT / "python"), os.environ.get("PYTHONPATH")])
        variables = {"PYTHONPATH": os.pathsep.join(folders), "PYTHONUNBUFFERED": "1", **environment}
        with (self.out / "log.txt").open("a+") as log:
            print(f"\n== {name}", file=log, flush=True)
            begin = log.tell()
            process = subprocess.Popen(
                [sys.executable, *map(str, arguments)],
                cwd=ROOT,
                env={**os.environ, **variables},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            status = self._wait(process, limit)
            log.seek(begin)
            print(log.read()[-TAIL:], flush=True)
        self.done.append((name, status, time.monotonic() - start))
        return status

    def _wait(self, process: subprocess.Popen[bytes], limit: float) -> int:
        try:
            return process.wait(limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGTERM)  # the benchmark still writes its report
            try:
                return process.wait(10)
            except subprocess.TimeoutExpired:
                return -signal.SIGKILL
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def tests(self, name: str, seconds: float, *arguments: object, **environment: str) -> None:
        """Runs tests; after one that ends the process or loses the device, the others in a new process."""
        end, record = time.monotonic() + seconds, self.out / "tests.jsonl"
        pytest = ("-m", "pytest", "-q", "-W", "default", "-p", "no:cacheprovider", "--capture=sys")
        pytest += ("--record", record)
        status = DEVICE_LOST
        while status == DEVICE_LOST or (status != NOT_RUN and ended_early(record)):
            go_on = ["--go-on"] * record.exists()
            status = self.step(name, end - time.monotonic(), *pytest, *arguments, *go_on, **environment)

    def summary(self) -> str:
        return "".join(
            f"{name:12} {'no time left' if status == NOT_RUN else f'status {status:5}'} {took:6.0f} s\n"
            for name, status, took in self.done
        )


def ended_early(record: Path) -> bool:
    """Whether the tests ended in one of them."""
    return record.exists() and json.loads(record.read_text().splitlines()[-1])["kind"] == "start"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "out/session", help="default: out/session")
    parser.add_argument("--seconds", type=float, default=560, help="for everything (default: 560)")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="small sizes; with --device cpu, a rehearsal")
    options = parser.parse_args()
    device = ["--device", options.device, *["--quick"] * options.quick]
    out = options.out.resolve()
    shutil.rmtree(out, ignore_errors=True)
    session = Session(out, options.seconds)
    session.step("doctor", 60, "-m", "fastmoe_rs", "doctor")
    conformance = ["--seeds", 20] if options.device == "cuda" else ["--state"]
    session.step("conformance", 60, TESTS / "conformance.py", *conformance)
    shutil.copy(TESTS / "conformance.json", out)
    session.tests("tests", 200, TESTS / "test_gpu_parity.py", TESTS / "test_gpu_runtime.py", *device)
    limit = session.left() - LAST_SECONDS
    bench = [*device, "--budget-seconds", limit - REPORT_SECONDS, "--out", out / "bench.jsonl"]
    session.step("benchmark", limit, ROOT / "bench/gpu/run.py", *bench)
    sanitizer = {"FASTMOE_SANITIZER_SECONDS": str(session.left() / 3)}
    session.tests("tools", session.left(), TESTS / "test_gpu_tools.py", *device, **sanitizer)
    print(session.summary(), end="")
    return int(any(status for _, status, _ in session.done))


if __name__ == "__main__":
    sys.exit(main())

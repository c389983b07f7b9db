"""The benchmark runs, checks its answers, records every path, and its report fills the README's section."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parent.parent / "bench"


def run(script: str, *arguments: object) -> str:
    command = [sys.executable, BENCH / script, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bench") / "smoke.json"
    run("run.py", "--smoke", "--threads", 1, "--out", path)
    return path


def test_run_records_every_path_of_every_cell(recorded: Path) -> None:
    record = json.loads(recorded.read_text())
    assert record["machine"]["isa"]
    assert len(record["cells"]) == 8
    assert record["left_out"] == []
    for cell in record["cells"]:
        assert len(cell["paths"]) == (9 if cell["mode"] == "train" else 8)
        assert cell["paths"]["fastmoe"]["status"] == "ok"
        for path in cell["paths"].values():
            assert path["status"] == "ok" or path["reason"]
    assert {result["work"] for result in record["routing"]} == {"softmax and top-k", "sort by expert"}
    assert len(record["overhead"]) == 2


def test_resume_adds_the_cells_that_are_missing(recorded: Path, tmp_path: Path) -> None:
    record = json.loads(recorded.read_text())
    missing = record["cells"].pop()["name"]
    record["left_out"] = [{"name": missing, "reason": "the budget was used up"}]
    path = tmp_path / "cut.json"
    path.write_text(json.dumps(record))
    run("run.py", "--smoke", "--threads", 1, "--resume", path)
    whole = json.loads(path.read_text())
    assert [cell["name"] for cell in whole["cells"]] == [cell["name"] for cell in record["cells"]] + [missing]
    assert whole["cells"][:-1] == record["cells"]
    assert (whole["left_out"], whole["routing"]) == ([], record["routing"])


def test_resume_refuses_the_record_of_another_commit(recorded: Path, tmp_path: Path) -> None:
    record = json.loads(recorded.read_text())
    record["machine"]["commit"] = "another"
    path = tmp_path / "other.json"
    path.write_text(json.dumps(record))
    command = [sys.executable, BENCH / "run.py", "--smoke", "--threads", "1", "--resume", path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode != 0
    assert "made with another commit" in done.stderr
    assert json.loads(path.read_text()) == record


def test_report_fills_the_marked_section_only(recorded: Path, tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- bench:start -->\nold\n<!-- bench:end -->\nafter\n")
    run("report.py", recorded, "--readme", readme)
    text = readme.read_text()
    assert "The same on other machines: [" in text
    assert "](" + os.path.relpath(BENCH / "results", tmp_path) in text
    assert text.startswith("before\n<!-- bench:start -->\n![")
    assert text.endswith("<!-- bench:end -->\nafter\n")
    assert "old" not in text
    assert "| forward, float32 |" in text
    assert recorded.with_suffix(".svg").read_text().startswith("<svg")
    assert "train-bfloat16-S-T8" in recorded.with_suffix(".md").read_text()


def test_bars_know_met_from_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCH)
    import bars

    def cell(ours_s: float) -> dict:
        paths = {
            name: {"status": "ok", "median_s": s} for name, s in (("fastmoe", ours_s), ("torch_loop", 3.0))
        }
        return {"mode": "forward", "dtype": "float32", "shape": "A", "tokens": 8, "paths": paths}

    bar = next(bar for bar in bars.AVX2 if bar.work == "fp32 forward, T 8-64")
    fast, slow = ({"cells": [cell(seconds)], "routing": []} for seconds in (1.0, 2.5))
    assert bars.outcome(bar, fast).met is True
    assert bars.outcome(bar, fast).mean == pytest.approx(3.0)
    assert bars.outcome(bar, slow).met is False
    assert bars.outcome(bar, {"cells": [], "routing": []}).met is None


def test_only_without_a_match_is_an_error(tmp_path: Path) -> None:
    command = [sys.executable, BENCH / "run.py", "--only", "no-such-cell", "--out", tmp_path / "x.json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "no-such-cell" in done.stderr

"""`python -m fastmoe_rs doctor` finds what is wrong and says what to do."""

import json
import os
import subprocess
import sys

import pytest

from fastmoe_rs import __version__, doctor, functional
from fastmoe_rs.cli import main

NAMES = [
    "version",
    "wheel",
    "torch",
    "cpu features",
    "cpu kernels",
    "threads",
    "dlpack table",
    "cuda",
    "transformers",
    "self-test float32",
    "self-test bfloat16",
]


def row(rows, name):
    return next(row for row in rows if row.name == name)


def test_json_has_every_row_and_a_healthy_machine_exits_with_0(capsys):
    status = main(["doctor", "--json"])
    diagnosis = json.loads(capsys.readouterr().out)
    assert status == 0
    assert diagnosis["ok"] is True
    assert [entry["name"] for entry in diagnosis["rows"]] == NAMES
    for entry in diagnosis["rows"]:
        assert set(entry) == {"name", "status", "value", "remedy"}
        assert entry["status"] in ("green", "yellow")
        assert entry["value"]
        assert bool(entry["remedy"]) == (entry["status"] != "green"), entry
    assert __version__ in diagnosis["rows"][0]["value"]


def test_text_has_every_row(capsys):
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name in NAMES:
        assert any(name in line for line in lines), name
    assert not any("\033" in line for line in lines), "no colours outside a terminal"


def test_wrong_results_are_red_with_a_remedy(monkeypatch, capsys):
    right = functional.moe_mlp
    monkeypatch.setattr(functional, "moe_mlp", lambda *inputs: right(*inputs) * 1.01)
    assert main(["doctor"]) == 1
    wrong = row(doctor.examine(), "self-test float32")
    assert wrong.status == "red"
    assert "FASTMOE_CPU_ISA=portable" in wrong.remedy
    assert wrong.remedy in capsys.readouterr().out


def test_unknown_instruction_set_is_red_with_a_remedy():
    environment = {**os.environ, "FASTMOE_CPU_ISA": "nonsense"}
    command = [sys.executable, "-m", "fastmoe_rs", "doctor", "--json"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 1, result.stderr
    rows = [doctor.Row(**entry) for entry in json.loads(result.stdout)["rows"]]
    kernels = row(rows, "cpu kernels")
    assert kernels.status == "red"
    assert "nonsense" in kernels.value
    assert "portable" in kernels.value, "the available ones are listed"
    assert "FASTMOE_CPU_ISA" in kernels.remedy
    assert [entry.name for entry in rows if entry.status == "red"] == ["cpu kernels"], (
        "one cause, one red row"
    )


def test_missing_torch_is_red_and_the_rest_still_runs(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    rows = doctor.examine()
    assert row(rows, "torch").status == "red"
    assert "pip install" in row(rows, "torch").remedy
    assert row(rows, "cpu features").status == "green"
    assert row(rows, "self-test float32").status == "yellow"


def test_old_torch_is_red(monkeypatch):
    monkeypatch.setattr("torch.__version__", "2.5.1+cpu")
    assert row(doctor.examine(), "torch").status == "red"


def test_too_many_threads_are_yellow(monkeypatch):
    monkeypatch.setattr(doctor, "usable_cpus", lambda: 0)
    threads = row(doctor.examine(), "threads")
    assert threads.status == "yellow"
    assert "set_num_threads" in threads.remedy


@pytest.mark.parametrize("version", ["4.57.6", None])
def test_missing_or_old_transformers_is_yellow(version, monkeypatch):
    def installed(name):
        if version is None:
            raise doctor.importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(doctor.importlib.metadata, "version", installed)
    found = doctor.check_transformers("transformers")
    assert found.status == "yellow"
    assert "pip install" in found.remedy


def test_a_check_that_breaks_is_a_red_row(monkeypatch):
    def broken(name):
        raise OSError("no such thing")

    monkeypatch.setattr(doctor, "check_dlpack", broken)
    found = row(doctor.examine(), "dlpack table")
    assert found.status == "red"
    assert "no such thing" in found.value
    assert found.remedy

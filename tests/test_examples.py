"""Every example runs, and what it prints is right."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import fastmoe_rs

pytest.importorskip("transformers", "5", reason="the examples are for transformers >= 5")

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def run(monkeypatch, capsys):
    """What an example prints, line by line."""
    monkeypatch.syspath_prepend(EXAMPLES)

    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        capsys.readouterr()
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        return capsys.readouterr().out.splitlines()

    return run


def numbers(line):
    return [float(number) for number in re.findall(r"-?\d+\.\d+(?:e[+-]\d+)?", line)]


def test_trainer(run, monkeypatch):
    pytest.importorskip("accelerate", reason="transformers' Trainer needs it")

    def losses():
        lines = [line for line in run("trainer") if line.startswith(("before", "after"))]
        return [numbers(line) for line in lines]

    before, after = losses()
    for next_byte, coefficient, auxiliary, loss in (before, after):
        assert auxiliary >= 1.9  # 2 experts per token, evenly spread, make 2
        assert loss == pytest.approx(next_byte + coefficient * auxiliary, abs=2e-4)
    assert after[0] < 0.8 * before[0]
    monkeypatch.setattr(fastmoe_rs, "accelerate", lambda model: model)
    theirs_before, theirs_after = losses()  # by transformers' own experts
    assert theirs_before == before
    assert theirs_after == pytest.approx(after, rel=0.01)


def test_lora(run):
    pytest.importorskip("peft", reason="trains adapters of PEFT")
    lines = run("lora")
    losses = [numbers(line)[0] for line in lines if line.startswith("step")]
    assert losses[-1] < losses[0] - 0.1
    moved = [numbers(line)[-1] for line in lines if "moved" in line]
    assert len(moved) == 8  # A and B of two weights in two layers
    assert min(moved) > 1e-3
    assert numbers(lines[-1])[0] < 1e-4


def losses_of_two_processes(name):
    """All that an example prints with two processes, and its losses beside those of one."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"}
    done = subprocess.run(
        [*command, EXAMPLES / f"{name}.py"], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    together, alone = (
        numbers(line) for line in done.stdout.splitlines() if "process" in line and ":" in line
    )
    assert together == pytest.approx(alone, abs=2e-4)
    assert len(alone) == 6
    assert alone[-1] < 0.8 * alone[0]
    return done.stdout


def test_fsdp():
    assert losses_of_two_processes("fsdp").count("holds 50% of the experts' weights") == 2


def test_expert_parallel():
    assert losses_of_two_processes("expert_parallel").count("holds 4 of 8 experts") == 2


def test_checkpointing(run):
    kept, same = run("checkpointing")
    without, with_it = numbers(kept)
    assert with_it < 0.5 * without
    assert same == "loss and gradients are the same to the bit: True"


def test_torch_compile(run):
    eager, compiled = (numbers(line) for line in run("torch_compile"))
    assert compiled == pytest.approx(eager, abs=2e-4)
    assert eager[-1] < eager[0] - 0.5


def test_generate(run):
    eager, ours, same = run("generate")
    tokens = eager.partition(": ")[2].split()
    assert tokens == ours.partition(": ")[2].split()
    assert len(set(tokens)) > 8
    assert same == "the tokens are the same: True"


def test_dense_vs_moe(run):
    dense, moe = (line.replace(",", "") for line in run("dense_vs_moe", "--steps", "30"))
    sizes = [[int(n) for n in re.findall(r"(\d+) (?:parameters|active)", line)] for line in (dense, moe)]
    assert sizes[1][1] == pytest.approx(sizes[0][1], rel=0.02)
    assert sizes[1][0] > 2 * sizes[0][0]
    for line in (dense, moe):
        assert numbers(line)[0] < 3.2  # from ln 256 = 5.5


def test_upcycle(run):
    dense, moe, untrained, distilled = (numbers(line)[0] for line in run("upcycle"))
    assert moe < dense
    assert distilled < untrained - 0.01


def test_readme_lists_every_example_and_each_is_tested():
    files = {path.stem for path in EXAMPLES.glob("*.py")} - {"tiny"}
    assert set(re.findall(r"^\| \[(\w+)\.py\]", (EXAMPLES / "README.md").read_text(), re.MULTILINE)) == files
    assert {name.removeprefix("test_") for name in globals() if name.startswith("test_")} >= files

"""The demo trains, survives being killed, compares, draws, and turns down what it cannot use."""

import io
import json
import signal
import struct
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from matplotlib.image import imread
from rich.console import Console
from safetensors import safe_open

from fastmoe_rs import cli
from fastmoe_rs.demo import BadArgument, Config, DemoError, compare, data
from fastmoe_rs.demo.checkpoint import Checkpoint
from fastmoe_rs.demo.run import run
from fastmoe_rs.demo.trainer import Trainer

SMALL = Config(
    steps=24,
    experts=4,
    hidden_size=16,
    intermediate_size=16,
    layers=2,
    heads=2,
    context=16,
    batch_size=8,
    learning_rate=0.02,
)
SAVE_EVERY = 5
KILLED_AT = 13


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("".join(f"line {i} of {i * i}\n" for i in range(1000)))
    return path


@pytest.fixture
def alone(monkeypatch):
    """Without the comparison, and on one thread, as in the process that is killed."""
    monkeypatch.setattr(compare, "unavailable", lambda: "not wanted here")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def demo(config, out, text):
    """Run the demo; returns what it printed."""
    console = Console(record=True, width=200, file=io.StringIO())
    run(config, out, text, SAVE_EVERY, console)
    return console.export_text()


def metrics(out):
    """The log without what depends on the clock."""
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in record.items() if key != "tokens_per_s"} for record in records]


def test_a_run_leaves_log_checkpoint_and_picture(tmp_path, text):
    out = tmp_path / "new" / "out"
    printed = demo(SMALL, out, text)

    log = metrics(out)
    assert [record["step"] for record in log] == list(range(1, SMALL.steps + 1))
    assert log[0]["loss"] == pytest.approx(5.545, abs=1e-3), "equal logits at first: ln 256"
    assert log[-1]["loss"] < 4
    assert log[-1]["validation_loss"] < 4
    load = torch.tensor(log[-1]["load"])
    assert load.shape == (SMALL.layers, SMALL.experts)
    torch.testing.assert_close(load.sum(dim=1), torch.ones(SMALL.layers))

    with safe_open(out / "checkpoint.safetensors", "pt") as file:
        assert json.loads(file.metadata()["fastmoe_rs.demo"])["state"]["step"] == SMALL.steps
        assert "model.blocks.0.moe.experts.w1" in file.keys()  # noqa: SIM118 - not a mapping
    width, height = png_size(out / "demo.png")
    assert width > 1000
    assert height > 600
    assert "times as fast as" in printed
    assert sorted(path.name for path in out.iterdir()) == [
        "checkpoint.safetensors",
        "demo.png",
        "metrics.jsonl",
    ]


def png_size(path):
    """Width and height, of a file that matplotlib can read back."""
    content = path.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", content[16:24])
    assert imread(path).shape[:2] == (height, width)
    return width, height


KILLED_RUN = f"""
import os, signal, sys
from pathlib import Path
import torch
from rich.console import Console
from fastmoe_rs.demo import Config, metrics
from fastmoe_rs.demo.run import run

append = metrics.MetricsLog.append

def killing(log, record):
    if record["step"] == {KILLED_AT}:
        log._file.write("{{")
        log._file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    append(log, record)

metrics.MetricsLog.append = killing
torch.set_num_threads(1)
run({SMALL!r}, Path(sys.argv[1]), Path(sys.argv[2]), {SAVE_EVERY}, Console())
"""


def test_a_killed_run_goes_on_as_if_nothing_had_happened(tmp_path, text, alone):
    demo(SMALL, tmp_path / "whole", text)

    killed = tmp_path / "killed"
    command = [sys.executable, "-c", KILLED_RUN, str(killed), str(text)]
    child = subprocess.run(command, capture_output=True, text=True)
    assert child.returncode == -signal.SIGKILL, child.stderr
    assert len((killed / "metrics.jsonl").read_text().splitlines()) == KILLED_AT
    assert "going on after step 10" in demo(SMALL, killed, text)

    assert metrics(killed) == metrics(tmp_path / "whole")
    checkpoints = []
    for folder in ("killed", "whole"):
        with safe_open(tmp_path / folder / "checkpoint.safetensors", "pt") as file:
            checkpoints.append({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    torch.testing.assert_close(*checkpoints, rtol=0, atol=0)


def test_a_kill_while_saving_leaves_the_old_checkpoint(tmp_path, text, monkeypatch):
    checkpoint = Checkpoint(tmp_path / "checkpoint.safetensors", SMALL, "digest")
    trainer = Trainer(SMALL)
    batch = torch.randint(256, (SMALL.batch_size, SMALL.context + 1))
    trainer.train(batch)
    checkpoint.save(trainer)
    trainer.train(batch)

    def killed(*paths):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", killed)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.save(trainer)
    again = Trainer(SMALL)
    checkpoint.restore(again)
    assert again.step == 1


def test_a_finished_run_is_kept(tmp_path, text, alone):
    demo(SMALL, tmp_path / "out", text)
    before = (tmp_path / "out" / "metrics.jsonl").read_bytes()
    assert "finished run" in demo(SMALL, tmp_path / "out", text)
    assert (tmp_path / "out" / "metrics.jsonl").read_bytes() == before


def test_a_run_with_other_settings_or_text_is_not_mixed_in(tmp_path, text, alone):
    out = tmp_path / "out"
    demo(SMALL, out, text)
    with pytest.raises(BadArgument, match="experts 4 instead of 8, seed 0 instead of 1"):
        demo(replace(SMALL, experts=8, seed=1), out, text)
    text.write_text(text.read_text() + "one more line\n")
    with pytest.raises(BadArgument, match="holds a run with another text"):
        demo(SMALL, out, text)


def test_a_checkpoint_that_cannot_be_written_ends_the_run(tmp_path):
    (tmp_path / "checkpoint.partial").mkdir()
    with pytest.raises(DemoError, match=r"checkpoint\.safetensors cannot be written: "):
        Checkpoint(tmp_path / "checkpoint.safetensors", SMALL, "").save(Trainer(SMALL))


def test_damaged_files_are_named(tmp_path, text, alone):
    out = tmp_path / "out"
    demo(SMALL, out, text)
    log = (out / "metrics.jsonl").read_text()
    (out / "metrics.jsonl").write_text(log[: len(log) // 2])
    with pytest.raises(DemoError, match=r"metrics\.jsonl does not hold the 24 steps"):
        demo(SMALL, out, text)
    content = (out / "checkpoint.safetensors").read_bytes()
    (out / "checkpoint.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(
        DemoError, match=r"checkpoint\.safetensors is not a checkpoint of the demo, or damaged"
    ):
        demo(SMALL, out, text)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_dtype_learns(dtype):
    trainer = Trainer(replace(SMALL, dtype=dtype, steps=40))
    batch = torch.arange(SMALL.context + 1).repeat(SMALL.batch_size, 1)
    losses = [trainer.train(batch).loss for _ in range(40)]
    assert losses[0] > 5
    assert losses[-1] < 1


def test_a_loss_that_is_no_number_ends_the_run():
    trainer = Trainer(SMALL)
    trainer.model.head.weight.data.fill_(torch.nan)
    with pytest.raises(DemoError, match="the loss became nan at step 1"):
        trainer.train(torch.zeros(1, 9, dtype=torch.long))


def test_every_path_of_transformers_agrees_with_ours():
    trainer = Trainer(SMALL)
    before = {name: value.clone() for name, value in trainer.tensors().items() if name != "batches"}
    result = compare.compare(trainer, torch.arange(5000, dtype=torch.uint8), steps=2)
    assert set(result.milliseconds) == {"fastmoe_rs", "grouped_mm", "batched_mm", "eager"}
    for path, losses in result.losses.items():
        assert losses == pytest.approx(result.losses["fastmoe_rs"], rel=1e-5), path
    assert result.losses["fastmoe_rs"][-1] < result.losses["fastmoe_rs"][0], "the compared steps train"
    assert result.speed_ratio > 0
    after = {name: value for name, value in trainer.tensors().items() if name != "batches"}
    torch.testing.assert_close(after, before, rtol=0, atol=0)


def test_a_path_that_would_need_too_much_memory_is_left_out(monkeypatch):
    monkeypatch.setattr(compare, "MAX_WEIGHT_COPIES", 0)
    result = compare.compare(Trainer(SMALL), torch.arange(5000, dtype=torch.uint8), steps=1)
    assert "batched_mm" not in result.milliseconds
    assert "GiB" in result.left_out["batched_mm"]


def test_without_transformers_the_comparison_is_left_out(tmp_path, text, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    printed = demo(SMALL, tmp_path / "out", text)
    assert "comparison left out: transformers is not installed" in printed
    assert png_size(tmp_path / "out" / "demo.png")


def test_text_of_a_folder(tmp_path):
    root = tmp_path / "root"
    (root / "b").mkdir(parents=True)
    (root / "b" / "late.txt").write_bytes(b"b" * 5000)
    (root / "a.txt").write_bytes(b"a" * 5000)
    (root / "c.bin").write_bytes(b"\0" * 5000)
    (root / ".hidden").write_bytes(b"h" * 5000)
    corpus = data.load(root, context=16)
    assert corpus.size == 10_000
    assert set(corpus.train.tolist()) == set(corpus.validation.tolist()) == set(b"ab")
    assert corpus.train[0] == ord("a")
    assert len(corpus.validation) == pytest.approx(corpus.size / data.VALIDATION_EVERY, rel=0.1)
    assert data.load(root, context=16).digest == corpus.digest


def test_the_standard_library_is_text():
    corpus = data.load(None, context=128)
    assert corpus.size > 1_000_000
    assert b"import" in bytes(corpus.train[:100_000].tolist())


BAD = {
    "--steps 0": "--steps: got '0', wanted a whole number from 1 on",
    "--steps many": "--steps: got 'many', wanted a whole number from 1 on",
    "--seed -1": "--seed",
    "--seed 9223372036854775808": "--seed: got '9223372036854775808', wanted a whole number from 0 to 92233",
    "--experts 4 --top-k 5": "--top-k: got 5, wanted at most --experts, 4",
    "--dtype int8": "--dtype",
    "--device cuda:99": f"--device: got 'cuda:99', wanted one of the {torch.cuda.device_count()} CUDA ",
    "--device cpu:1": "--device: got 'cpu:1', wanted cpu or cuda",
    "--device meta": "--device: got 'meta', wanted cpu or cuda",
    "--device toaster": "--device: got 'toaster', wanted cpu or cuda",
    "--text {tmp}/missing": "No such file or directory",
    "--text {tmp}/empty.txt": "--text: got 0 bytes of text in ",
    "--text {tmp}/short.txt": "/short.txt, wanted at least 2580",
    "--text {tmp}/folder": "--text: got 0 bytes of text in ",
    "--out {tmp}/short.txt": "--out",
    "--wrong": "--wrong",
}


@pytest.mark.parametrize("arguments", BAD)
def test_bad_arguments_get_one_line(arguments, tmp_path, capsys):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "short.txt").write_text("short")
    (tmp_path / "folder").mkdir()
    with pytest.raises(SystemExit) as exit:
        cli.main(["demo", "--out", str(tmp_path / "out"), *arguments.format(tmp=tmp_path).split()])
    complaint = capsys.readouterr().err
    assert exit.value.code == 2
    assert complaint.count("\n") == 1
    assert BAD[arguments] in complaint


def test_without_a_command_there_is_help(capsys):
    assert cli.main([]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("usage: python -m fastmoe_rs ")
    assert all(command in shown for command in ("demo", "doctor", "params", "convert"))


def test_a_reader_that_has_seen_enough_is_no_failure_to_tell(tmp_path):
    command = f"{sys.executable} -m fastmoe_rs params --json | head -c 1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("{", "")


@pytest.mark.parametrize("log", ["their notes\n", "[1]\n", '{"step": 7}\n'])
def test_files_of_others_are_left_alone(log, tmp_path, text):
    (tmp_path / "metrics.jsonl").write_text(log)
    with pytest.raises(BadArgument, match=r"metrics\.jsonl is no log of the demo; choose another folder"):
        demo(SMALL, tmp_path, text)
    assert (tmp_path / "metrics.jsonl").read_text() == log


def test_missing_extras_are_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "rich", None)
    assert cli.main(["demo"]) == 1
    complaint = capsys.readouterr().err
    assert "needs rich" in complaint
    assert "fastmoe_rs[demo]" in complaint


def test_the_command_line_reaches_the_run(tmp_path, text, capsys, alone):
    options = ["--steps", "2", "--experts", "3", "--top-k", "1", "--out", str(tmp_path), "--text", str(text)]
    assert cli.main(["demo", *options]) == 0
    assert "3 experts, 1 a token" in capsys.readouterr().out
    assert len(metrics(tmp_path)) == 2

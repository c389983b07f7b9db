"""The whole demo: train, or go on training, then compare, write some text and draw."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from rich.console import Console
from rich.text import Text

from . import compare, data, report
from .checkpoint import Checkpoint
from .config import CHECKPOINT, BadArgument, Config, DemoError
from .metrics import MetricsLog
from .progress import TrainingProgress, thousands
from .sample import continue_text, readable
from .trainer import Trainer

VALIDATIONS = 10
COMPARED_STEPS = 8
PROMPT_BYTES, SAMPLE_BYTES = 48, 320


def run(config: Config, out: Path, text: Path | None, save_every: int, console: Console) -> None:
    """Fill the folder `out` with metrics.jsonl, checkpoint.safetensors and demo.png, and tell `console`.

    Raises BadArgument for what cannot be used, DemoError for what went wrong on the way.
    """
    check_device(config.device)
    corpus = data.load(text, config.context)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadArgument(f"--out: {out} cannot be made: {error.strerror}") from None
    try:
        trainer = Trainer(config)
        checkpoint = Checkpoint(out / CHECKPOINT, config, corpus.digest)
        checkpoint.restore(trainer)
        introduce(trainer, corpus, out, console)
        log = MetricsLog(out / "metrics.jsonl", trainer.step)
        if trainer.step < config.steps:
            train(trainer, corpus, checkpoint, log, save_every, console)
        log.close()
        summarize(log, trainer, console)
        comparison = compare_paths(trainer, corpus, console)
        show_sample(trainer, corpus, console)
        report.draw(out / "demo.png", config, log.records, comparison)
    except OSError as error:
        raise DemoError(f"{error.filename or out}: {error.strerror}") from None
    console.print(f"\nloss curve and expert load: [bold]{out / 'demo.png'}[/]")


def check_device(name: str) -> None:
    """Raises BadArgument unless there is such a device."""
    try:
        device = torch.device(name)
    except RuntimeError:
        raise BadArgument(f"--device: got {name!r}, wanted cpu or cuda") from None
    if device.type not in ("cpu", "cuda") or (device.type == "cpu" and device.index):
        raise BadArgument(f"--device: got {name!r}, wanted cpu or cuda")
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        raise BadArgument(
            f"--device: got {name!r}, wanted one of the {count} CUDA devices that torch finds;"
            " `python -m fastmoe_rs doctor` tells more"
        )


def introduce(trainer: Trainer, corpus: data.Corpus, out: Path, console: Console) -> None:
    config = trainer.config
    parameters = sum(parameter.numel() for parameter in trainer.model.parameters()) / 1e6
    experts = f"{config.layers} layers of {config.experts} experts, {config.top_k} a token"
    batches = f"{config.steps} steps of {config.tokens_per_step} bytes"
    console.print("[bold]fastmoe_rs demo[/]")
    console.print(f"model: {parameters:.1f} million parameters, {experts}", highlight=False)
    console.print(f"text:  {corpus.name}, {corpus.size / 1e6:.1f} MB", highlight=False)
    place = f"{torch.get_num_threads()} threads"
    if trainer.device.type != "cpu":
        place = f"{config.device} ({torch.cuda.get_device_name(config.device)})"
    console.print(f"run:   {batches}, {config.dtype}, {place}", highlight=False)
    if trainer.step == config.steps:
        console.print(f"{out} holds the finished run; remove it or choose another --out to train anew")
    elif trainer.step:
        console.print(f"going on after step {trainer.step} of the run in {out}")


def train(
    trainer: Trainer,
    corpus: data.Corpus,
    checkpoint: Checkpoint,
    log: MetricsLog,
    save_every: int,
    console: Console,
) -> None:
    """Train up to the last step, logging every step and saving every `save_every` steps and at the end."""
    steps = trainer.config.steps
    validate_every = max(1, steps // VALIDATIONS)
    with TrainingProgress(console, steps, trainer.step) as progress:
        while trainer.step < steps:
            start = time.perf_counter()
            result = trainer.train(trainer.next_batch(corpus.train))
            speed = trainer.config.tokens_per_step / (time.perf_counter() - start)
            record = {"step": trainer.step, **result._asdict(), "tokens_per_s": round(speed)}
            last = trainer.step == steps
            if trainer.step % validate_every == 0 or last:
                record["validation_loss"] = trainer.validate(corpus.validation)
                console.print(
                    f"step {trainer.step:4d}  loss {result.loss:.3f}  "
                    f"validation {record['validation_loss']:.3f}  {thousands(speed)} tokens/s",
                    highlight=False,
                )
            log.append(record)
            progress.show(trainer.step, result.loss, speed, result.load)
            if trainer.step % save_every == 0 or last:
                log.sync()
                checkpoint.save(trainer)


def summarize(log: MetricsLog, trainer: Trainer, console: Console) -> None:
    first, last = log.records[0], log.records[-1]
    seconds = sum(trainer.config.tokens_per_step / record["tokens_per_s"] for record in log.records)
    console.print(
        f"\nloss [bold]{first['loss']:.3f} -> {last['loss']:.3f}[/] in {seconds:.0f} s "
        f"(validation {last['validation_loss']:.3f}, a blind guess 5.545)",
        highlight=False,
    )


def compare_paths(trainer: Trainer, corpus: data.Corpus, console: Console) -> compare.Comparison | None:
    reason = compare.unavailable()
    if reason:
        console.print(f"comparison left out: {reason}")
        return None
    with console.status("comparing with transformers' experts paths"):
        result = compare.compare(trainer, corpus.train, COMPARED_STEPS)
    console.print(f"\nthe same model, {result.steps} steps by turns, transformers {result.peer_version}:")
    for name, milliseconds in sorted(result.milliseconds.items(), key=lambda item: item[1]):
        console.print(f"  {name:<12}{milliseconds:8.1f} ms a step", highlight=False)
    for name, why in result.left_out.items():
        console.print(f"  {name:<12}left out: {why}", highlight=False)
    console.print(
        f"[bold]{result.speed_ratio:.2f} times[/] as fast as {result.best_peer}; "
        f"losses differ by at most {result.loss_difference:.0e}",
        highlight=False,
    )
    return result


def show_sample(trainer: Trainer, corpus: data.Corpus, console: Console) -> None:
    prompt = bytes(corpus.validation[:PROMPT_BYTES].tolist())
    with console.status("writing"):
        written = continue_text(trainer, prompt, SAMPLE_BYTES)
    console.print("\nwritten by the model after the beginning of the validation text:")
    console.print(Text.assemble((readable(prompt), "dim"), (readable(written), "green")), soft_wrap=True)

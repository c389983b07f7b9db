"""A training run on disk: one safetensors file that is either the old or the new one, never half of each."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .config import BadArgument, Config, DemoError
from .trainer import Trainer

METADATA_KEY = "fastmoe_rs.demo"


@dataclass(frozen=True)
class Checkpoint:
    """The file at `path`, for runs of `config` on the text of `text_digest` only."""

    path: Path
    config: Config
    text_digest: str

    def save(self, trainer: Trainer) -> None:
        """Replace the file by the state of `trainer`; a kill leaves the old file or the new one.

        Raises DemoError when it cannot be written: the disk is full, say.
        """
        record = {"run": self._run(), "state": trainer.numbers()}
        temporary = self.path.with_suffix(".partial")
        try:
            save_file(trainer.tensors(), temporary, {METADATA_KEY: json.dumps(record)})
        except SafetensorError as error:
            raise DemoError(f"{self.path} cannot be written: {error}") from None
        _flush(temporary)
        os.replace(temporary, self.path)
        _flush(self.path.parent)

    def restore(self, trainer: Trainer) -> None:
        """Put `trainer` where the file left off; without a file it stays at its first step.

        Raises BadArgument when the file belongs to other settings, DemoError when it is damaged.
        """
        if not self.path.exists():
            return
        try:
            with safe_open(self.path, "pt") as file:
                record = json.loads((file.metadata() or {})[METADATA_KEY])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        except (SafetensorError, KeyError, ValueError):
            raise DemoError(f"{self.path} is not a checkpoint of the demo, or damaged; remove it") from None
        self._check(record["run"])
        trainer.load(tensors, record["state"])

    def _run(self) -> dict[str, Any]:
        return {**asdict(self.config), "text": self.text_digest}

    def _check(self, saved: dict[str, Any]) -> None:
        wanted = self._run()
        differing = [key for key in wanted if saved.get(key) != wanted[key]]
        if differing:
            what = ", ".join(_difference(key, saved.get(key), wanted[key]) for key in differing)
            raise BadArgument(f"--out: {self.path.parent} holds a run with {what}; choose another folder")


def _difference(key: str, saved: object, wanted: object) -> str:
    return "another text" if key == "text" else f"{key} {saved} instead of {wanted}"


def _flush(path: Path) -> None:
    """Have the system write a file, or the names of a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

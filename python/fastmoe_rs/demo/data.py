"""The text that the demo learns: bytes, cut into a training and a validation part."""

from __future__ import annotations

import hashlib
import os
import platform
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .config import BadArgument

MAX_BYTES = 64 << 20
BLOCK_BYTES = 1 << 16
VALIDATION_EVERY = 20  # of this many blocks of text, one is kept for validation
SKIPPED_FOLDERS = {"__pycache__", "site-packages", "dist-packages", "test", "tests", "idle_test"}


@dataclass(frozen=True)
class Corpus:
    """A text as uint8 tensors; `digest` tells two texts apart."""

    name: str
    train: Tensor
    validation: Tensor
    digest: str

    @property
    def size(self) -> int:
        return len(self.train) + len(self.validation)


def load(path: Path | None, context: int) -> Corpus:
    """Read the file or folder `path`, or the source of Python's standard library when it is None.

    Raises BadArgument when the text is missing, unreadable or too short for windows of `context` bytes.
    """
    if path is None:
        name = f"standard library of Python {platform.python_version()}"
        files = _python_files(Path(sysconfig.get_path("stdlib")))
    else:
        name = str(path)
        files = _text_files(path) if path.is_dir() else iter([path])
    text = _read(files)
    wanted = VALIDATION_EVERY * (context + 1)
    if len(text) < wanted:
        raise BadArgument(f"--text: got {len(text)} bytes of text in {name}, wanted at least {wanted}")
    block_size = min(BLOCK_BYTES, len(text) // (10 * VALIDATION_EVERY))
    blocks = torch.frombuffer(text, dtype=torch.uint8).split(block_size)
    return Corpus(
        name=name,
        train=torch.cat([block for i, block in enumerate(blocks) if i % VALIDATION_EVERY]),
        validation=torch.cat(blocks[::VALIDATION_EVERY]),
        digest=hashlib.blake2b(text, digest_size=16).hexdigest(),
    )


def windows(text: Tensor, batch_size: int, context: int, generator: torch.Generator) -> Tensor:
    """Random pieces of `text` as int64 [batch_size, context + 1]: inputs and, one byte later, targets."""
    starts = torch.randint(len(text) - context, (batch_size, 1), generator=generator)
    return text[starts + torch.arange(context + 1)].long()


def _python_files(root: Path) -> Iterator[Path]:
    return (path for path in _walk(root, SKIPPED_FOLDERS) if path.suffix == ".py")


def _text_files(root: Path) -> Iterator[Path]:
    return _walk(root, {"__pycache__"})


def _walk(root: Path, skipped: set[str]) -> Iterator[Path]:
    """Files below `root` in an order that depends on nothing but their names; hidden ones are left out."""
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if name not in skipped and not name.startswith("."))
        for name in sorted(names):
            if not name.startswith("."):
                yield Path(folder, name)


def _read(files: Iterator[Path]) -> bytearray:
    """The first MAX_BYTES of the files, one after the other; a file with a NUL byte is left out."""
    text = bytearray()
    for path in files:
        try:
            with path.open("rb") as file:
                content = file.read(MAX_BYTES - len(text))
        except OSError as error:
            raise BadArgument(f"--text: {path} cannot be read: {error.strerror}") from None
        if 0 not in content:
            text += content
        if len(text) == MAX_BYTES:
            break
    return text

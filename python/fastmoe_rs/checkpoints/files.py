"""Safetensors files: read by slices, written piece by piece.

A file is the length of its header in 8 bytes, the header, JSON with dtype, shape and place of every tensor,
and the data without gaps. So the header can be written first, and data be made when it is their turn.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .layout import Spec

INDEX = "model.safetensors.index.json"
_COPIED_AT_ONCE = 1 << 24


@dataclass(frozen=True)
class Output:
    """A tensor to be written: its spec, with the dtype as safetensors spells it, size in bytes, and bytes."""

    name: str
    spec: Spec
    size: int
    chunks: Callable[[], Iterator[Any]]

    @property
    def element_size(self) -> int:
        return self.size // max(self.spec.elements, 1)


class Reader:
    """The tensors of a checkpoint: one file, or a folder with one or with an index.

    Attributes:
        specs: every tensor.
        metadata: that of the first file.

    Raises:
        ValueError: the files are damaged, or do not have the tensors that the index lists.
    """

    def __init__(self, path: Path) -> None:
        self.specs: dict[str, Spec] = {}
        self.metadata: dict[str, str] | None = None
        self._files: dict[str, Any] = {}
        self._places: dict[str, tuple[Path, int, int]] = {}
        listed = _listed(path)
        for file in sorted(set(listed.values())) if listed is not None else [_only_file(path)]:
            self._open(file)
        for name in {**(listed or {}), **self.specs}:
            if listed is not None and (name not in listed or name not in self.specs):
                where = "the index but in no file" if name in listed else "a file but not in the index"
                raise ValueError(f"{name}: in {where}")

    def _open(self, path: Path) -> None:
        try:
            file = safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path}: {error}") from error
        with open(path, "rb") as raw:
            length = int.from_bytes(raw.read(8), "little")
            header = json.loads(raw.read(length))
        metadata = header.pop("__metadata__", None)
        self.metadata = self.metadata or metadata
        for name, entry in header.items():
            if name in self.specs:
                raise ValueError(f"{name}: in two files, {path} and {self._places[name][0]}")
            start, end = entry["data_offsets"]
            self.specs[name] = Spec(entry["dtype"], tuple(entry["shape"]))
            self._places[name] = path, 8 + length + start, end - start
            self._files[name] = file

    def size(self, name: str) -> int:
        """In bytes."""
        return self._places[name][2]

    def read(self, name: str, expert: int | None) -> Tensor:
        """A tensor, or what a stack has for one expert."""
        tensor: Tensor = (
            self._files[name].get_tensor(name)
            if expert is None
            else self._files[name].get_slice(name)[expert]
        )
        return tensor

    def copied(self, name: str) -> Output:
        """The tensor as it is, byte for byte."""
        path, start, size = self._places[name]

        def chunks() -> Iterator[bytes]:
            with open(path, "rb") as file:
                file.seek(start)
                for left in range(size, 0, -_COPIED_AT_ONCE):
                    yield file.read(min(left, _COPIED_AT_ONCE))

        return Output(name, self.specs[name], size, chunks)


def data(tensor: Tensor) -> Any:
    """The bytes of a tensor in row-major order."""
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().data


def write_folder(
    folder: Path, outputs: Sequence[Output], metadata: Mapping[str, str] | None, max_shard_size: int
) -> list[str]:
    """Write files of at most that size (or of one tensor), and an index where there are several."""
    shards: list[list[Output]] = [[]]
    size = 0
    for output in outputs:
        size += output.size
        if shards[-1] and size > max_shard_size:
            shards.append([])
            size = output.size
        shards[-1].append(output)
    if len(shards) == 1:
        write_file(folder / "model.safetensors", outputs, metadata)
        return ["model.safetensors"]
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards, strict=True):
        write_file(folder / name, shard, metadata)
    places = {output.name: name for name, shard in zip(names, shards, strict=True) for output in shard}
    total = sum(output.size for output in outputs)
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    return names


def write_file(path: Path, outputs: Sequence[Output], metadata: Mapping[str, str] | None) -> None:
    """Write a new file.

    Raises:
        OSError: it cannot be written; `filename` says which, also where the disk is full.
        RuntimeError: the data of a tensor have another size than they should.
    """
    # Large elements first, as safetensors does, so that all are aligned.
    outputs = sorted(outputs, key=lambda output: output.element_size, reverse=True)
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for output in outputs:
        start, end = end, end + output.size
        dtype, shape = output.spec
        header[output.name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    try:
        with open(path, "xb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for output in outputs:
                written = sum(file.write(chunk) for chunk in output.chunks())
                if written != output.size:
                    raise RuntimeError(f"{output.name}: wrote {written} bytes, wanted {output.size}")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        if error.errno and not error.filename:
            error.filename = str(path)
        raise


def _listed(path: Path) -> dict[str, Path] | None:
    """The files of all tensors by the index of a folder; None without one."""
    if not (path / INDEX).exists():
        return None
    try:
        places = json.loads((path / INDEX).read_text())["weight_map"]
        return {name: path / file for name, file in places.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path / INDEX}: not an index of safetensors files: {error!r}") from error


def _only_file(path: Path) -> Path:
    if path.is_file():
        return path
    files = list(path.glob("*.safetensors"))
    if len(files) != 1:
        raise ValueError(
            f"{path}: got {len(files)} safetensors files and no {INDEX}, wanted a file, or a folder with one "
            "file or an index"
        )
    return files[0]

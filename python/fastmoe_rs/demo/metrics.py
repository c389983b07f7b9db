"""The log of a run: one JSON object a step, in a file that always agrees with the checkpoint."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from .config import BadArgument, DemoError


class MetricsLog:
    """The records of steps 1, 2, ... in `records` and, line by line, in the file at `path`.

    Opened at `step`, it forgets what an interrupted run logged after the checkpoint of that step. Raises
    DemoError when the file lacks a step up to that one, BadArgument when it is no such log at all.
    """

    def __init__(self, path: Path, step: int) -> None:
        lines = path.read_bytes().splitlines() if path.exists() else []
        first = _record(lines[0]) if lines else {"step": 1}
        if first.get("step") != 1:
            raise BadArgument(f"--out: {path} is no log of the demo; choose another folder")
        self.records: list[dict[str, Any]] = [_record(line) for line in lines[:step]]
        if [record.get("step") for record in self.records] != list(range(1, step + 1)):
            raise DemoError(f"{path} does not hold the {step} steps of the checkpoint beside it; remove both")
        temporary = path.with_suffix(".partial")
        temporary.write_text("".join(json.dumps(record) + "\n" for record in self.records))
        os.replace(temporary, path)
        self._file = path.open("a")

    def append(self, record: dict[str, Any]) -> None:
        self.records.append(record)
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def sync(self) -> None:
        """Bring what was appended to the disk: to be done before the checkpoint that counts on it."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def _record(line: bytes) -> dict[str, Any]:
    """What a line holds; nothing where it is no JSON object."""
    try:
        record = json.loads(line)
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}

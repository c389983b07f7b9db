"""Files of results: JSON lines, each on the disk before the next thing begins."""

from __future__ import annotations

import datetime
import json
import re
from pathlib import Path

RESULTS = Path(__file__).resolve().parents[1] / "results"


def default_path(place: str, kind: str = "") -> Path:
    """bench/results/DATE-PLACE.jsonl, or with a number where there is such a file."""
    label = re.sub(r"[^a-z0-9]+", "-", place.lower()).strip("-")
    stem = f"{datetime.datetime.now(datetime.timezone.utc).date().isoformat()}-{label}{kind}"
    numbered = (RESULTS / f"{stem}{number}.jsonl" for number in ("", *(f"-{n}" for n in range(2, 1000))))
    return next(path for path in numbered if not path.exists())


class Record:
    """A new file, or one that is gone on with."""

    def __init__(self, path: Path, *, keep: bool = False) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("a" if keep else "w").close()

    def add(self, entry: dict) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(entry) + "\n")

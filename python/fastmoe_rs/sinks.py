"""Where the records of `fastmoe_rs.watch` can go: JSON lines, TensorBoard, a picture.

A sink is a function of the step and of a record per layer, as `telemetry.Watch.record` gives them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .telemetry import Record

__all__ = ["Heatmap", "JsonLines", "TensorBoard", "draw_load"]

MAX_COLUMNS = 120  # of a heatmap; more steps than that are averaged


class JsonLines:
    """Appends a line {"step": ..., "layers": {name: record}} to a file for every step.

    Args:
        path: the file; it is made when missing, its folder is not.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def __call__(self, step: int, records: dict[str, Record]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, "layers": records}) + "\n")


class TensorBoard:
    """Writes every number of a record as the scalar moe/<number>/<layer>, and the busiest expert's load.

    Args:
        writer: a `SummaryWriter`, or the folder to make one for.
        experts: write the load of every expert too, as moe/load/<layer>/<expert>.

    Raises:
        ImportError: a folder is given and tensorboard is not installed.
    """

    def __init__(self, writer: Any, *, experts: bool = False) -> None:
        if isinstance(writer, (str, Path)):
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise ImportError("sinks.TensorBoard needs tensorboard: pip install tensorboard") from error
            writer = SummaryWriter(str(writer))
        self.writer, self.experts = writer, experts

    def __call__(self, step: int, records: dict[str, Record]) -> None:
        for layer, record in records.items():
            for name, value in record.items():
                if name == "load":
                    value = max(value)
                self.writer.add_scalar(f"moe/{name}/{layer}", value, step)
            for expert, share in enumerate(record["load"] if self.experts else ()):
                self.writer.add_scalar(f"moe/load/{layer}/{expert}", share, step)


class Heatmap:
    """Keeps the load of every expert, and draws it over layers and time.

    Args:
        path: the PNG that `save` writes, which needs matplotlib.

    Raises:
        ValueError: `save` is called before a record has come.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.steps: list[int] = []
        self.loads: dict[str, list[list[float]]] = {}

    def __call__(self, step: int, records: dict[str, Record]) -> None:
        self.steps.append(step)
        for layer, record in records.items():
            self.loads.setdefault(layer, []).append(record["load"])

    def save(self) -> None:
        """Draw what was seen so far.

        Raises:
            ImportError: matplotlib is not installed.
            ValueError: nothing was seen.
        """
        if not self.steps:
            raise ValueError("heatmap: got no records, wanted at least 1")
        from matplotlib.figure import Figure

        rows = sum(len(loads[0]) for loads in self.loads.values())
        figure = Figure(figsize=(11, min(2 + rows * 0.08, 40)), dpi=130, layout="constrained")
        draw_load(figure.add_subplot(), self.steps, list(self.loads), list(self.loads.values()))
        figure.savefig(self.path)


def draw_load(
    axes: Any, steps: Sequence[int], layers: Sequence[str], loads: Sequence[Sequence[Sequence[float]]]
) -> None:
    """Draw the load of every expert, a row for each, below those of the layer before, over the steps.

    Args:
        axes: of matplotlib.
        steps: when the loads were seen.
        layers: their names.
        loads: for each layer and step the share of each of its experts; layers may differ in experts.
    """
    import numpy as np

    sizes = [len(load[0]) for load in loads]
    even = [np.array(load).T * size for load, size in zip(loads, sizes, strict=True)]
    parts = np.array_split(np.concatenate(even), min(MAX_COLUMNS, len(steps)), axis=1)
    columns = np.stack([part.mean(axis=1) for part in parts], axis=1)
    edges = np.cumsum([0, *sizes])
    extent = (steps[0] - 1, steps[-1], edges[-1], 0)
    image = axes.imshow(
        columns, "RdBu_r", aspect="auto", vmin=0, vmax=2, interpolation="nearest", extent=extent
    )
    for edge in edges[1:-1]:
        axes.axhline(edge, color="black", linewidth=1.2)
    axes.set_yticks((edges[1:] + edges[:-1]) / 2)
    axes.set_yticklabels(layers)
    axes.tick_params(axis="y", length=0)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set(title="Load of the experts, a row for each", xlabel="step")
    bar = axes.figure.colorbar(image, ax=axes, pad=0.01, extend="max", ticks=(0, 1, 2))
    bar.ax.set_yticklabels(["idle", "even", "2×"])
    bar.outline.set_visible(False)

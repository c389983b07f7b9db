"""The picture of a run: loss, speed beside transformers, and the load of every expert over time."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..sinks import draw_load
from .compare import OURS, Comparison
from .config import Config

SMOOTHED_SHARE = 25  # a point of the smooth loss curve averages one part in so many of all steps
INK, MUTED, ACCENT, PEER = "#1f2933", "#7b8794", "#d9480f", "#adb5bd"
STYLE: Any = {
    "font.family": "sans-serif",
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
}


def draw(path: Path, config: Config, records: list[dict[str, Any]], comparison: Comparison | None) -> None:
    """Write the PNG of a run, given the records of metrics.jsonl."""
    with rc_context(STYLE):
        figure = Figure(figsize=(11, 8), dpi=130, layout="constrained")
        figure.suptitle(
            f"A language model of {config.layers} layers × {config.experts} experts, {config.top_k} a token, "
            f"trained with fastmoe_rs in {config.dtype}",
            fontsize=14,
            fontweight="bold",
        )
        halves = figure.add_gridspec(2, 1, height_ratios=(1, 1.2))
        upper = halves[0].subgridspec(1, 2, width_ratios=(2.4, 1))
        if comparison:
            draw_speed(figure.add_subplot(upper[1]), comparison)
        draw_loss(figure.add_subplot(upper[0] if comparison else upper[:]), records)
        layers = range(config.layers)
        loads = [[record["load"][layer] for record in records] for layer in layers]
        steps = [record["step"] for record in records]
        draw_load(figure.add_subplot(halves[1]), steps, [f"layer {layer}" for layer in layers], loads)
        figure.savefig(path)


def draw_loss(axes: Axes, records: list[dict[str, Any]]) -> None:
    steps = [record["step"] for record in records]
    losses = [record["loss"] for record in records]
    validated = [(entry["step"], entry["validation_loss"]) for entry in records if "validation_loss" in entry]
    axes.plot(steps, losses, color=ACCENT, alpha=0.25, linewidth=0.8)
    axes.plot(steps, smoothed(losses), color=ACCENT, linewidth=2, label="training")
    axes.plot(*zip(*validated, strict=True), "o", color=INK, markersize=4.5, label="validation")
    last_loss = validated[-1][1]
    axes.annotate(
        f"{last_loss:.2f}", validated[-1], (0, 9), textcoords="offset points", ha="center", weight="bold"
    )
    axes.set(title="Loss in nats a byte", xlabel="step", xlim=(0, steps[-1] * 1.03), ylim=(0, None))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y", color=PEER, alpha=0.4)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)


def draw_speed(axes: Axes, comparison: Comparison) -> None:
    slowest_first = sorted(comparison.milliseconds.items(), key=lambda item: -item[1])
    names, milliseconds = zip(*slowest_first, strict=True)
    colors = [ACCENT if name == OURS else PEER for name in names]
    bars = axes.barh(names, milliseconds, height=0.6, color=colors)
    axes.bar_label(bars, fmt="%.0f ms", padding=4)
    axes.set(
        title=f"{comparison.speed_ratio:.2f}× as fast as {comparison.best_peer}",
        xlim=(0, max(milliseconds) * 1.2),
        xlabel=f"a training step; transformers {comparison.peer_version}",
        xticks=[],
    )
    axes.tick_params(axis="y", length=0, labelcolor=INK)
    axes.spines[:].set_visible(False)


def smoothed(values: list[float]) -> list[float]:
    """The mean of every value and its neighbours."""
    reach = len(values) // SMOOTHED_SHARE // 2
    return [statistics.fmean(values[max(0, i - reach) : i + reach + 1]) for i in range(len(values))]

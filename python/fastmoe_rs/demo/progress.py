"""What the demo shows in the terminal while it trains."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

BARS = " ▁▂▃▄▅▆▇█"
WIDEST = 16


class TrainingProgress(Progress):
    """A progress bar with loss, tokens per second and the load of the experts."""

    def __init__(self, console: Console, steps: int, done: int) -> None:
        super().__init__(
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("loss [bold]{task.fields[loss]}[/]"),
            TextColumn("{task.fields[speed]} tokens/s"),
            TextColumn("load [cyan]{task.fields[load]}[/]"),
            TimeRemainingColumn(),
            console=console,
            expand=True,
        )
        self._bar = self.add_task("training", total=steps, completed=done, loss="-", speed="-", load="")

    def show(self, step: int, loss: float, tokens_per_s: float, load_LE: list[list[float]]) -> None:
        load = [sum(layer) / len(load_LE) for layer in zip(*load_LE, strict=True)]
        self.update(
            self._bar, completed=step, loss=f"{loss:.3f}", speed=thousands(tokens_per_s), load=sparkline(load)
        )


def sparkline(shares: Sequence[float]) -> str:
    """One character an expert, half high at an even share; of many experts the first ones."""
    even = 1 / len(shares)
    levels = (min(len(BARS) - 1, round(share / even * (len(BARS) - 1) / 2)) for share in shares[:WIDEST])
    return "".join(BARS[level] for level in levels) + ("…" if len(shares) > WIDEST else "")


def thousands(number: float) -> str:
    return f"{number / 1e3:.1f}k"

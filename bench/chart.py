"""The chart of a run as SVG: how many times faster than the best peer, on a logarithmic scale around 1."""

from __future__ import annotations

import math
from collections.abc import Iterator
from html import escape

from bars import ratio
from cells import DTYPES, PASSES

PANEL_WIDTH, PANEL_HEIGHT = 290, 170
LEFT, TOP, GAP_X, GAP_Y = 44, 64, 34, 62
COLORS = ("#4878d0", "#ee854a", "#6acc64")
TITLES = {"forward": "forward", "train": "forward + backward"}
STYLE = """
text { font: 12px system-ui, sans-serif; fill: #24292f }
.small { font-size: 10px } .value { font-size: 9px }
.title { font-size: 15px; font-weight: 600 } .panel { font-weight: 600 }
.grid { stroke: #8c959f; stroke-opacity: .3 } .one { stroke: #57606a; stroke-width: 1.5 }
@media (prefers-color-scheme: dark) { text { fill: #e6edf3 } .one { stroke: #9198a1 } }
"""


def times(value: float) -> str:
    return f"{value:.0f}" if value >= 9.95 else f"{value:.1f}"


def text(x: float, y: float, content: str, kind: str = "", anchor: str = "middle") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}" text-anchor="{anchor}">{escape(content)}</text>'


def rectangle(x: float, y: float, width: float, height: float, order: int) -> str:
    fill = COLORS[order % len(COLORS)]
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" fill="{fill}"/>'


def panel(
    cells: list[dict], shapes: list[str], left: float, top: float, low: int, high: int
) -> Iterator[str]:
    """Bars grouped by tokens, one for each shape, upward from 1 where ours is faster."""

    def height(value: float) -> float:
        return top + PANEL_HEIGHT * (high - math.log2(value)) / (high - low)

    yield text(left, top - 12, f"{TITLES[cells[0]['mode']]}, {cells[0]['dtype']}", "panel", "start")
    for power in range(low, high + 1):
        y = height(2**power)
        kind = "grid" if power else "one"
        yield f'<line class="{kind}" x1="{left}" x2="{left + PANEL_WIDTH}" y1="{y:.1f}" y2="{y:.1f}"/>'
        yield text(left - 6, y + 4, f"{2.0**power:g}×", "small", "end")
    tokens = sorted({cell["tokens"] for cell in cells})
    group = PANEL_WIDTH / len(tokens)
    width = min(0.8 * group / len(shapes), 24)
    for index, count in enumerate(tokens):
        middle = left + group * (index + 0.5)
        yield text(middle, top + PANEL_HEIGHT + 16, f"T {count}", "small")
        for cell in cells:
            value = ratio(cell)
            if cell["tokens"] != count or value is None:
                continue
            order = shapes.index(cell["shape"])
            x = middle + width * (order - len(shapes) / 2)
            y, tall = min(height(value), height(1)), abs(height(value) - height(1))
            yield rectangle(x, y, width - 1, tall, order)
            label = y - 3 if value >= 1 else y + tall + 10
            yield text(x + width / 2, label, times(value), "value")


def svg(run: dict) -> str:
    """The whole picture: one row for each pass, one column for each element type that was measured."""
    cells = [cell for cell in run["cells"] if ratio(cell)]
    shapes = sorted({cell["shape"] for cell in cells})
    dtypes = [dtype for dtype in DTYPES if any(cell["dtype"] == dtype for cell in cells)]
    modes = [mode for mode in PASSES if any(cell["mode"] == mode for cell in cells)]
    powers = [math.log2(ratio(cell) or 1) for cell in cells]
    low, high = math.floor(min([0.0, *powers])), math.ceil(max([1.0, *powers]) + 0.15)
    machine = run["machine"]
    width = max(LEFT + len(dtypes) * (PANEL_WIDTH + GAP_X), 640)
    parts = [
        text(12, 22, "Times faster than the best of torch and transformers", "title", "start"),
        text(12, 40, f"{machine['cpu']}, {machine['isa']}, {machine['threads']} threads", "small", "start"),
    ]
    for order, shape in enumerate(shapes):
        x = width - 90 * (len(shapes) - order)
        parts.append(rectangle(x, 31, 10, 10, order))
        parts.append(text(x + 15, 40, f"shape {shape}", "small", "start"))
    for row, mode in enumerate(modes):
        for column, dtype in enumerate(dtypes):
            chosen = [cell for cell in cells if (cell["mode"], cell["dtype"]) == (mode, dtype)]
            if chosen:
                left, top = LEFT + column * (PANEL_WIDTH + GAP_X), TOP + 20 + row * (PANEL_HEIGHT + GAP_Y)
                parts += panel(chosen, shapes, left, top, low, high)
    tall = TOP + len(modes) * (PANEL_HEIGHT + GAP_Y)
    size = f'viewBox="0 0 {width} {tall}" width="{width}" height="{tall}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size}>'
    return "\n".join([head, f"<style>{STYLE}</style>", *parts, "</svg>"]) + "\n"

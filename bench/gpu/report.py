"""A page of tables and a chart from a record of bench/gpu/run.py: `python bench/gpu/report.py RECORD.jsonl`.

Writes RECORD.md and RECORD.svg beside it, and with --readme FILE a table between that file's gpu marks. A bar
is the share of the floor's speed that a path reaches: 100% is what the ceilings measured in the same run
allow, by FLOPs or by bytes, whichever takes longer.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Iterator
from contextlib import suppress
from html import escape
from pathlib import Path

OURS = "fastmoe_rs"
COLORS = ("#d1242f", "#4878d0", "#6acc64", "#ee854a", "#956cb4", "#8c613c", "#82c6e2")
HOST_BOUND = 0.9  # the share of a time that the host took to launch it
NOISY = 0.04  # the range of the middle half of the times, as a share of their median, that is worth a word
LEFT, WIDTH, BAR = 300, 420, 11
STYLE = "text { font: 11px system-ui, sans-serif } .title { font-weight: 600; font-size: 13px }"


def seconds(path: dict) -> float | None:
    """The better of eager and graph."""
    times = [path[kind]["median_s"] for kind in ("eager", "graph") if "median_s" in path.get(kind, {})]
    return min(times, default=None)


def time_text(path: dict, kind: str) -> str:
    found = path.get(kind, {})
    if "median_s" not in found:
        return found.get("reason", "-")
    host = ", host-bound" if kind == "eager" and found["host_s"] > HOST_BOUND * found["median_s"] else ""
    spread = f" ±{found['noise'] / 2:.0%}" if found["noise"] > NOISY else ""
    return f"{1e3 * found['median_s']:.4g} ms{spread}, {found['tflops']:.4g} TFLOP/s{host}"


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return (
        "\n".join("| " + " | ".join(cell.replace("|", "/") for cell in line) + " |" for line in lines) + "\n"
    )


def page(entries: list[dict]) -> str:
    text = head(entries)
    for entry in of_kind(entries, "cell"):
        state = ", ".join(f"{value} {unit}" for unit, value in entry["state"].items())
        text += f"\n## {entry['name']}\n\nfloor {1e3 * entry['floor_s']:.4g} ms"
        text += (f"; right after the runs {state}" if state else "") + "\n\n" + cell_table(entry)
    routing = [
        [f"{entry['tokens']} x {entry['experts']}, K {entry['top_k']}"]
        + [f"{1e6 * entry['paths'][name]['median_s']:.4g} us" for name in (OURS, "torch")]
        for entry in of_kind(entries, "routing")
    ]
    if routing:
        text += "\n## Routing alone\n\n" + table(["tokens x experts", OURS, "torch"], routing)
    for kind, title in (("wrong", "Wrong"), ("lost", "Processes lost"), ("left out", "Left out")):
        rows = [[entry["name"], entry.get("doing", ""), entry["reason"]] for entry in of_kind(entries, kind)]
        if rows:
            text += f"\n## {title}\n\n" + table(["cell", "doing", "reason"], rows)
    return text


def of_kind(entries: list[dict], kind: str) -> list[dict]:
    return [entry for entry in entries if entry["kind"] == kind]


def place(entries: list[dict]) -> str:
    return next((entry["gpu"] or entry["cpu"] for entry in of_kind(entries, "machine")), "an unknown machine")


def head(entries: list[dict]) -> str:
    text = f"# The expert layer on {place(entries)}\n"
    for machine in of_kind(entries, "machine"):
        versions = ", ".join(f"{name} {found}" for name, found in machine["versions"].items() if found)
        text += f"\n{machine['date'][:10]}, CUDA {machine['cuda']}; {versions}; commit {machine['commit']}.\n"
        text += f"\n{machine['note']}\n" if "note" in machine else ""
    for rates in of_kind(entries, "ceilings"):
        text += (
            f"\nCeilings measured in this run: {rates['flops_per_s'] / 1e12:.4g} TFLOP/s of a bfloat16 "
            f"product, {rates['bytes_per_s'] / 1e12:.3g} TB/s of a copy. bfloat16; medians of runs by turns, "
            "each after the level-2 cache was overwritten; a graph holds a step for each of some batches. "
            "TFLOP/s count the products of the layer alone. Peers that tune themselves had a few "
            "configurations to choose from.\n"
        )
    return text


def cell_table(entry: dict) -> str:
    rows = []
    for name, path in entry["paths"].items():
        if path["status"] != "ok":
            rows.append([name, f"{path['status']}: {path.get('reason', path.get('errors'))}", "", "", ""])
            continue
        best = seconds(path)
        share = f"{entry['floor_s'] / best:.0%}" if best else "-"
        memory = f"{path['peak_bytes'] / 2**20:.0f} MiB" if "peak_bytes" in path else "-"
        rows.append([name, time_text(path, "eager"), time_text(path, "graph"), share, memory])
    return table(["path", "eager", "graph", "of the floor", "peak memory"], rows)


def bars(entries: list[dict]) -> Iterator[str]:
    """The lines of the chart: a group for each cell, a bar for each path."""
    y = 46
    for entry in entries:
        yield f'<text x="8" y="{y + 9}">{escape(entry["name"])}</text>'
        for order, (name, path) in enumerate(entry["paths"].items()):
            if (best := seconds(path)) is None:
                continue
            share = entry["floor_s"] / best
            length, color = WIDTH * min(share, 1.2), COLORS[order % len(COLORS)]
            yield f'<rect x="{LEFT}" y="{y}" width="{length:.1f}" height="{BAR - 2}" fill="{color}"/>'
            label = f"{name} {share:.0%}, {1e3 * best:.4g} ms"
            yield f'<text x="{LEFT + length + 4:.1f}" y="{y + 9}">{escape(label)}</text>'
            y += BAR
        y += BAR
    yield f'<line x1="{LEFT + WIDTH}" x2="{LEFT + WIDTH}" y1="36" y2="{y}" stroke="#57606a"/>'


def svg(entries: list[dict]) -> str:
    cells = of_kind(entries, "cell")
    lines = list(bars(cells))
    height = 70 + sum(
        BAR * (1 + sum(seconds(p) is not None for p in cell["paths"].values())) for cell in cells
    )
    title = f"Speed as a share of the floor, {place(entries)}, bfloat16"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{LEFT + WIDTH + 240}" height="{height}">'
        f'<style>{STYLE}</style><rect width="100%" height="100%" fill="white"/>'
        f'<text x="8" y="20" class="title">{escape(title)}</text>'
        f'<text x="{LEFT + WIDTH}" y="34" text-anchor="middle">floor</text>{"".join(lines)}</svg>\n'
    )


def read(path: Path) -> Iterator[dict]:
    """The entries of a record; a last line that was cut off is not one."""
    for line in path.read_text().splitlines():
        with suppress(json.JSONDecodeError):
            yield json.loads(line)


def summary(entries: list[dict], page_path: str) -> str:
    """A line for each layer: our times, and how many times as long the fastest other path took."""
    cells = [entry for entry in of_kind(entries, "cell") if entry["routing"] == "balanced"]
    columns = sorted({(entry["tokens"], entry["mode"]) for entry in cells})
    found = {(entry["shape"], entry["tokens"], entry["mode"]): entry["paths"] for entry in cells}

    def text(paths: dict[str, dict] | None) -> str:
        times = {name: taken for name, path in (paths or {}).items() if (taken := seconds(path))}
        ours = times.pop(OURS, None)
        if ours is None:
            return ""
        return f"{1e3 * ours:.3g} ms" + (f", {min(times.values()) / ours:.2f}x" if times else "")

    shapes = list(dict.fromkeys(entry["shape"] for entry in cells))
    rows = [[shape, *(text(found.get((shape, *column))) for column in columns)] for shape in shapes]
    others = {name for entry in cells for name, path in entry["paths"].items() if seconds(path)} - {OURS}
    machine = of_kind(entries, "machine")[0]
    names = ", ".join(f"`{name}`" for name in sorted(others))
    return (
        f"On {place(entries)} ({machine['date'][:10]}, torch {machine['versions']['torch']}, bfloat16): time "
        f"of a pass over T tokens, and how many times as long the fastest of {names} took. "
        f"[All numbers]({page_path}).\n\n"
        + table(["layer", *(f"{mode}, T {tokens}" for tokens, mode in columns)], rows)
    )


def others(entries: list[dict], page_path: str, known: set[str]) -> str:
    """A sentence on the paths of another record that the summary did not have."""
    ratios: dict[str, list[float]] = {}
    for cell in of_kind(entries, "cell"):
        times = {name: taken for name, path in cell["paths"].items() if (taken := seconds(path))}
        for name in times.keys() - known - {OURS}:
            ratios.setdefault(name, []).append(times[name] / times[OURS])
    parts = [f"`{name}` {min(found):.2f} to {max(found):.2f}" for name, found in sorted(ratios.items())]
    cells = ", ".join(cell["name"] for cell in of_kind(entries, "cell"))
    where = f"[on fewer layers]({page_path}) on {place(entries)} ({cells})"
    return f"\nTimes as long as ours {where}: {', '.join(parts)}.\n"


def fill(readme: Path, entries: list[dict], page_path: Path, beside: Path | None = None) -> None:
    """Puts the summary between the marks, and what `beside`, another record, has of other projects."""

    def relative(path: Path) -> str:
        return os.path.relpath(path.resolve(), readme.resolve().parent)

    text = summary(entries, relative(page_path))
    if beside:
        known = {
            name for cell in of_kind(entries, "cell") for name, path in cell["paths"].items() if seconds(path)
        }
        text += others([*read(beside)], relative(beside.with_suffix(".md")), known)
    section = f"<!-- gpu:start -->\n{text}<!-- gpu:end -->"
    old = readme.read_text()
    new, marks = re.subn(r"<!-- gpu:start -->.*?<!-- gpu:end -->", lambda _: section, old, flags=re.DOTALL)
    if not marks:
        sys.exit(f"{readme} has no <!-- gpu:start --> ... <!-- gpu:end -->")
    readme.write_text(new)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("record", type=Path)
    parser.add_argument("--readme", type=Path, help="a file with gpu marks")
    parser.add_argument(
        "--beside", type=Path, help="for the readme: a record with more peers on fewer layers"
    )
    options = parser.parse_args(argv)
    entries = [*read(options.record)]
    page_path = options.record.with_suffix(".md")
    page_path.write_text(page(entries))
    options.record.with_suffix(".svg").write_text(svg(entries))
    if options.readme:
        fill(options.readme, entries, page_path, options.beside)
    print(page_path)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

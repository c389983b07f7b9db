"""Turn a recorded run into a page of tables, a chart, and the section of the README.

python bench/report.py                   the newest full run in bench/results/
python bench/report.py RESULT.json       another one; writes RESULT.md and RESULT.svg beside it
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import chart
from bars import BARS, OURS, OURS_FRESH, geometric_mean, memory_rows, outcomes, ratio, slower_cells
from cells import DTYPES, PASSES, SHAPES

HERE = Path(__file__).parent
RESULTS = HERE / "results"
MARKED = re.compile(r"(<!-- bench:start -->\n).*?(<!-- bench:end -->)", re.DOTALL)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.0f}" if seconds >= 0.1 else f"{1e3 * seconds:.3g}"


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.0f}%"


def groups(run: dict) -> list[tuple[str, str, list[dict]]]:
    """Cells of each pass and element type that was measured."""
    chosen = (
        (mode, dtype, [c for c in run["cells"] if (c["mode"], c["dtype"]) == (mode, dtype)])
        for dtype in DTYPES
        for mode in PASSES
    )
    return [group for group in chosen if group[2]]


def shapes_of(cells: list[dict]) -> list[str]:
    return sorted({cell["shape"] for cell in cells})


def tokens_of(cells: list[dict]) -> list[int]:
    return sorted({cell["tokens"] for cell in cells})


def machine_line(run: dict) -> str:
    machine = run["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if version)
    held = f"; held to {machine['isa']} by {', '.join(machine['limits'])}" if machine["limits"] else ""
    return (
        f"{machine['cpu']}, instruction set {machine['isa']}{held}, {machine['threads']} threads of "
        f"{machine['cores']} cores, {machine['memory_gib']:.0f} GiB; {versions}; commit {machine['commit']}; "
        f"{machine['date'][:10]}."
    )


def summary_table(run: dict) -> str:
    """Geometric means over the shapes, the lowest shape in brackets."""
    tokens = tokens_of(run["cells"])
    rows = []
    for mode, dtype, cells in groups(run):
        shapes = shapes_of(cells)
        which = "" if shapes == shapes_of(run["cells"]) else f" (shape {', '.join(shapes)} only)"
        row = [f"{chart.TITLES[mode]}, {dtype}{which}"]
        for count in tokens:
            found = [
                value for cell in cells if cell["tokens"] == count and (value := ratio(cell)) is not None
            ]
            row.append(f"{geometric_mean(found):.2f} ({min(found):.2f})" if found else "-")
        rows.append(row)
    return table(["times faster than the best peer", *(f"T {count}" for count in tokens)], rows)


def cell_text(cell: dict | None) -> str:
    """Best peer's milliseconds, ours, and the ratio; in training with gradient memory reused / fresh."""
    if cell is None or cell["best_peer"] is None:
        return "-"
    own = [name for name in (OURS, OURS_FRESH) if cell["paths"].get(name, {}).get("status") == "ok"]
    times = " / ".join(milliseconds(cell["paths"][name]["median_s"]) for name in own)
    ratios = " / ".join(number(ratio(cell, name)) for name in own)
    best = cell["best_peer"]
    return f"{milliseconds(cell['paths'][best]['median_s'])} {best} → {times} (**{ratios}**)"


def cell_at(cells: list[dict], shape: str, tokens: int) -> dict | None:
    return next((cell for cell in cells if (cell["shape"], cell["tokens"]) == (shape, tokens)), None)


def best_tables(run: dict) -> Iterable[str]:
    for mode, dtype, cells in groups(run):
        shapes = shapes_of(cells)
        yield f"### {chart.TITLES[mode].capitalize()}, {dtype}"
        rows = [
            [str(count), *(cell_text(cell_at(cells, shape, count)) for shape in shapes)]
            for count in tokens_of(cells)
        ]
        yield table(["T", *shapes], rows)


def path_text(path: dict | None) -> str:
    if path is None:
        return "-"
    if path["status"] != "ok":
        return path["status"]
    return (
        f"{milliseconds(path['median_s'])} ±{percent(path['noise'])}"
        if len(path["samples_s"]) > 1
        else (f"{milliseconds(path['median_s'])}¹")
    )


def rate_columns(cell: dict) -> list[str]:
    rate = cell["paths"].get(OURS, {}).get("gflops")
    return [
        "-" if rate is None else f"{rate:.0f}",
        percent(cell.get("peak", {}).get("share")),
        percent(cell.get("read_share")),
    ]


def all_paths(results: list[dict], extra: bool) -> str:
    """Every path's median in ms; with `extra` our GFLOP/s and shares of the ceilings."""
    names = list(dict.fromkeys(name for result in results for name in result["paths"]))
    names.sort(key=lambda name: (name not in (OURS, OURS_FRESH), name))
    head = ["", *names, *(["GFLOP/s", "of peak", "of reads"] if extra else [])]
    rows = [
        [
            " ".join(filter(None, (result.get("work"), result["name"]))),
            *(path_text(result["paths"].get(name)) for name in names),
            *(rate_columns(result) if extra else []),
        ]
        for result in results
    ]
    return table(head, rows)


def bars_table(run: dict) -> str:
    isa = run["machine"]["isa"]
    if isa not in BARS:
        return f"No bars are set for {isa} beyond: nowhere slower than the best peer."
    marks = {True: "met", False: "**not met**", None: "not measured"}
    rows = [
        [
            found.bar.work,
            f"{found.bar.bar:g} ({found.bar.stretch:g})",
            f"{found.bar.floor:g}",
            number(found.mean),
            number(found.lowest),
            f"{found.measured} of {found.wanted}",
            marks[found.met],
        ]
        for found in outcomes(run)
    ]
    return table(["work", "bar (stretch)", "no cell below", "mean", "lowest", "cells", ""], rows)


def slower_text(run: dict) -> str:
    slower = slower_cells(run)
    if not slower:
        return "Nowhere slower than the best peer."
    return (
        "Slower than the best peer: "
        + "; ".join(f"{name} ({value:.2f}, {best})" for name, value, best in slower)
        + "."
    )


def memory_table(run: dict) -> str:
    rows = [
        [name, f"{own / 2**20:.0f}", f"{peer / 2**20:.0f} {best}", number(peer / own)]
        for name, own, best, peer in memory_rows(run)
    ]
    return (
        table(["forward + backward", "fastmoe MiB", "best peer MiB", "ratio"], rows)
        if rows
        else "Not measured."
    )


def reasons(run: dict) -> str:
    """Everything that was not timed, by reason."""
    found: dict[str, list[str]] = {}
    for cell in run["cells"]:
        for name, path in cell["paths"].items():
            if path["status"] != "ok" and not path["reason"].startswith("same as"):
                found.setdefault(f"{name}: {path['status']}", []).append(f"{cell['name']} ({path['reason']})")
    for cell in run["left_out"]:
        found.setdefault(f"not run: {cell['reason']}", []).append(cell["name"])
    return "\n".join(f"- {what}: {', '.join(where)}" for what, where in found.items()) or "Nothing."


def ceilings_text(run: dict) -> str:
    found = run["ceilings"]
    instructions = (
        ", ".join(f"{name} {rate:.0f}" for name, rate in found["instructions"].items()) or "not measured"
    )
    products = "; ".join(
        f"{dtype} " + ", ".join(f"{name} {rate:.0f}" for name, rate in rates.items())
        for dtype, rates in found["gemm"].items()
    )
    return (
        f"Multiply instructions back to back, GFLOP/s: {instructions}. Square matrix products of 2048, "
        f"GFLOP/s: {products}. Memory reads: {found['read_bytes_per_s'] / 1e9:.1f} GB/s at most before the "
        "first cell; shares of reads are of what they took in turn with the paths."
    )


def page(run: dict, picture: str) -> str:
    """The full report in Markdown."""
    shapes = "; ".join(
        f"{shape.name} H {shape.hidden}, I {shape.intermediate}, E {shape.experts}, K {shape.top_k}"
        for shape in SHAPES
    )
    sections = [
        "# Measurements",
        machine_line(run),
        f"Shapes: {shapes}. All paths take turns on the same tensors; times are medians in ms; ratios "
        "are best peer over fastmoe. In training every gradient is computed and then set to None: *fastmoe* "
        "finds its gradient memory again in the pool, *fastmoe_fresh* gives it back to the system each step.",
        f"![ratios]({picture})",
        "## Bars",
        bars_table(run),
        slower_text(run),
        "## Ceilings of this machine",
        ceilings_text(run),
        "## Best peer → fastmoe",
        *best_tables(run),
        "## Peak memory",
        memory_table(run),
        "## Routing and the cost of a call",
        all_paths([*run["routing"], *run["overhead"]], extra=False)
        if run["routing"] or run["overhead"]
        else "Not measured.",
        "## Every path",
        "Median ± interquartile range; ¹ a single call, of a path that was too slow to be the best.",
        *(all_paths(cells, extra=True) for _, _, cells in groups(run)),
        "## Not timed",
        reasons(run),
    ]
    return "\n\n".join(sections) + "\n"


def readme_section(run: dict, page_path: str, picture: str, others: dict[str, str]) -> str:
    """What the README says of a run; `others` are the pages of other machines' by their names."""
    machine = run["machine"]
    links = ", ".join(f"[{name}]({path})" for name, path in others.items())
    return "\n".join(
        [
            f"![Times faster than the best of torch and transformers]({picture})",
            "",
            summary_table(run),
            "",
            "Geometric mean over the layer shapes (lowest in brackets) against the best torch or "
            f"transformers path in the same run; {machine['cpu']}, {machine['isa']}, "
            f"{machine['threads']} threads. [All measurements]({page_path}).",
            *([f"The same on other machines: {links}."] if links else []),
            "",
        ]
    )


def full_runs() -> dict[Path, dict]:
    """The recorded runs of the full matrix, oldest first."""
    runs = {path: json.loads(path.read_text()) for path in RESULTS.glob("*.json")}
    full = [path for path, run in runs.items() if run["matrix"] == "full"]
    return {path: runs[path] for path in sorted(full, key=lambda path: runs[path]["machine"]["date"])}


def newest() -> Path:
    """The latest full run by all that its machine can do."""
    found = [path for path, run in full_runs().items() if not run["machine"]["limits"]]
    if not found:
        sys.exit(f"no recorded run of the full matrix in {RESULTS}: python bench/run.py makes one")
    return found[-1]


def pages_of_others(result: Path, base: Path) -> dict[str, str]:
    """The page of the latest full run of each CPU and instruction set other than those of `result`."""
    latest = {}
    for path, run in full_runs().items():
        latest[f"{run['machine']['cpu']}, {run['machine']['isa']}"] = path
    return {
        name: os.path.relpath(path.with_suffix(".md"), base)
        for name, path in latest.items()
        if path.resolve() != result.resolve()
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="bench/report.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("result", type=Path, nargs="?", help="a recorded run (default: the newest full one)")
    parser.add_argument(
        "--readme", type=Path, help="file to fill between the bench marks (default: README.md of a full run)"
    )
    options = parser.parse_args(argv)
    result = options.result or newest()
    run = json.loads(result.read_text())
    picture, text = result.with_suffix(".svg"), result.with_suffix(".md")
    picture.write_text(chart.svg(run))
    text.write_text(page(run, picture.name))
    print(f"{bars_table(run)}\n\n{slower_text(run)}\n{text}\n{picture}")
    readme = options.readme or (HERE.parent / "README.md" if options.result is None else None)
    if readme:
        old = readme.read_text()
        base = readme.resolve().parent
        section = readme_section(
            run,
            os.path.relpath(text.resolve(), base),
            os.path.relpath(picture.resolve(), base),
            pages_of_others(result, base),
        )
        new, filled = MARKED.subn(lambda marks: marks[1] + section + marks[2], old)
        if not filled:
            sys.exit(f"{readme} has no <!-- bench:start --> ... <!-- bench:end -->")
        readme.write_text(new)
        print(readme)
    return 0


if __name__ == "__main__":
    sys.exit(main())

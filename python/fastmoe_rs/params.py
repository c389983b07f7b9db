"""`python -m fastmoe_rs params`: the size of a model, beside that of a dense one that is as fast.

Active parameters are those that one token uses (`size.Count.active`), both embedding tables in full among
them. A published figure is held against that, or against what its publisher says to count: OpenAI leaves out
the table of input embeddings. Where a publisher says nothing, no definition is sought that fits.
"""

from __future__ import annotations

import json
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from .counting import count, read_config
from .size import BITS, Count

GIGA = 1e9
LEGEND = (
    "active: what a token uses, both embedding tables in full among it, unless its publisher says otherwise",
    "unconfirmed: the count is not within 1% of the published figure, or there is none: see `params NAME`",
)


class UnknownModel(ValueError):
    """Neither a configuration that can be read nor the name of a preset."""


@cache
def presets() -> dict[str, Any]:
    """Configurations and published figures by name. Each has `config` and `published`, where `definition` is
    what the publisher counts as active, if it says so. `unconfirmed` tells why a count does not `agree` with
    a figure, or that there is none."""
    return json.loads(resources.files(__package__).joinpath("presets.json").read_text())


def agree(figure: str, counted: int) -> bool:
    """Whether a count is within 1% of a published figure such as "12.9B"."""
    return abs(_difference(figure, counted)) <= 0.01


def load(model: str) -> tuple[str, dict[str, Any]]:
    """A name, and a dict with `config` and maybe more, for a path or for what identifies a preset.

    Args:
        model: a `config.json`, a folder that holds one, or the name of a preset; capitals, the owner before a
            "/" and what follows the beginning of the name do not matter.

    Raises:
        UnknownModel: it is none of these.
        ValueError: the file is no JSON object.
    """
    path = Path(model)
    if path.is_dir():
        path /= "config.json"
    if path.is_file():
        return str(path), {"config": read_config(path)}
    wanted = model.rpartition("/")[2].lower()
    matches = [name for name in presets() if wanted and name.lower().startswith(wanted)]
    exact = [name for name in matches if name.lower() == wanted]
    if len(exact or matches) != 1:
        if matches:
            raise UnknownModel(f"{model!r} could be {' or '.join(matches)}")
        raise UnknownModel(f"got {model!r}, wanted a config.json or one of {', '.join(presets())}")
    name = (exact or matches)[0]
    return name, presets()[name]


def active_as(published: dict[str, Any]) -> str:
    """The entry of `facts` that a published active figure stands for."""
    return "active_without_lookup" if published.get("active_without_lookup") else "active"


def facts(counted: Count, context: int, tokens: int) -> dict[str, Any]:
    """Everything the report says, as plain numbers: parameters, bytes, FLOPs."""
    active = counted.active - counted.lookup
    dense_bytes = {name: counted.active * bits / 8 for name, bits in BITS.items()}
    return {
        "model_type": counted.model_type,
        "experts": counted.experts,
        "top_k": counted.top_k,
        "parts": {
            name: {"total": part.total, "active": part.active}
            for name, part in counted.parts.items()
            if part.total
        },
        "total": counted.total,
        "active": counted.active,
        "active_without_lookup": active,
        "memory_bytes": {name: counted.memory(bits) for name, bits in BITS.items()},
        "per_token": {
            "context": context,
            "tokens_a_step": tokens,
            "forward_flops": counted.flops(context),
            "training_flops": 3 * counted.flops(context),
            "weight_bytes": {name: counted.weights_read(tokens, bits) for name, bits in BITS.items()},
            "cache_bytes_bf16": counted.cache_read(context),
        },
        "dense_of_equal_active_size": {
            "parameters": counted.active,
            "intermediate_size": counted.dense_intermediate,
            "memory_bytes": dense_bytes,
            "forward_flops_per_token": counted.flops(context),
            "weight_bytes_per_token": {name: active / tokens * bits / 8 for name, bits in BITS.items()},
        },
    }


def report(model: str, *, context: int = 0, tokens: int = 1, as_json: bool = False) -> str:
    """What the command prints.

    Args:
        model: see `load`.
        context: tokens that attention looks back on.
        tokens: tokens decoded in one step.
        as_json: one JSON object instead of a table.

    Raises:
        UnknownModel: see `load`.
        ValueError, KeyError: see `counting.count`.
    """
    name, entry = load(model)
    try:
        counted = count(entry["config"])
    except (AttributeError, TypeError) as error:  # a number or a list where something else was expected
        raise ValueError(f"{name} is no configuration that can be counted: {error}") from error
    numbers = facts(counted, context, tokens)
    published: dict[str, Any] = {key: entry[key] for key in ("published", "unconfirmed") if key in entry}
    if as_json:
        return json.dumps({"name": name, **numbers, **published}, indent=2)
    lines = [f"{name} ({counted.model_type})", *_table(numbers)]
    if published:
        lines += ["", f"published: {_published(published['published'], numbers)}"]
        defined = published["published"].get(
            "definition", "not defined by the source, so all that a token uses"
        )
        lines.append(f"counted as active: {defined}")
    if "unconfirmed" in published:
        lines.append(f"unconfirmed: {entry['unconfirmed']}")
    return "\n".join(lines)


def overview(*, as_json: bool = False) -> str:
    """The presets: what is counted, what is published and where.

    Args:
        as_json: one JSON object instead of a table.
    """
    found = {name: facts(count(entry["config"]), 0, 1) for name, entry in presets().items()}
    if as_json:
        shown = ("total", "active", "active_without_lookup")
        return json.dumps(
            {
                name: {key: found[name][key] for key in shown}
                | {key: entry[key] for key in ("published", "unconfirmed") if key in entry}
                for name, entry in presets().items()
            },
            indent=2,
        )
    lines = [f"{'billions of parameters':<26}{'all':>9}{'active':>9}   published"]
    for name, entry in presets().items():
        numbers = found[name]
        mark = "unconfirmed, " if "unconfirmed" in entry else ""
        lines.append(
            f"{name:<26}{numbers['total'] / GIGA:>9.2f}{numbers['active'] / GIGA:>9.2f}   "
            f"{mark}{_published(entry['published'], numbers)}"
        )
    lines += ["", *LEGEND]
    return "\n".join(lines)


def _table(numbers: dict[str, Any]) -> list[str]:
    token, dense = numbers["per_token"], numbers["dense_of_equal_active_size"]
    lines = ["", _row("parameters, billions", "all", "active for a token")]
    for part, of in numbers["parts"].items():
        if part == "routed experts":
            part += f", {numbers['top_k']} of {numbers['experts']}"
        lines.append(_row(f"  {part}", *(f"{value / GIGA:.3f}" for value in of.values())))
    lines.append(_row("  together", f"{numbers['total'] / GIGA:.2f}", f"{numbers['active'] / GIGA:.2f}"))
    without = numbers["active_without_lookup"]
    lines.append(_row("  without the table of input embeddings", "", f"{without / GIGA:.2f}"))

    lines += ["", _row("", "this model", "dense, equally active")]
    intermediate = f"{dense['intermediate_size']:,}"
    lines.append(
        _row("parameters, billions", f"{numbers['total'] / GIGA:.2f}", f"{dense['parameters'] / GIGA:.2f}")
    )
    lines.append(_row("intermediate size of the MLPs", "", intermediate))
    for dtype, size in numbers["memory_bytes"].items():
        lines.append(
            _row(
                f"weights in {dtype}, GB", f"{size / GIGA:.1f}", f"{dense['memory_bytes'][dtype] / GIGA:.1f}"
            )
        )
    context, tokens = token["context"], token["tokens_a_step"]
    forward = f"{token['forward_flops'] / GIGA:.1f}"
    training = f"{token['training_flops'] / GIGA:.1f}"
    lines.append(_row(f"GFLOPs a token, context {context}", forward, forward))
    lines.append(_row("  in training", training, training))
    for dtype, size in token["weight_bytes"].items():
        lines.append(
            _row(
                f"GB of {dtype} weights read a token, {tokens} a step",
                f"{size / GIGA:.2f}",
                f"{dense['weight_bytes_per_token'][dtype] / GIGA:.2f}",
            )
        )
    cache = f"{token['cache_bytes_bf16'] / GIGA:.3f}"
    lines.append(_row("GB of bf16 keys and values read a token", cache, cache))
    return lines


def _row(label: str, *values: str) -> str:
    return f"{label:<50}" + "".join(f"{value:>22}" for value in values)


def _published(figures: dict[str, Any], numbers: dict[str, Any]) -> str:
    """The figures of others, and by how much those of the configuration differ from them."""
    said = []
    for name, number, what in (("total", "total", "in all"), ("active", active_as(figures), "active")):
        if name in figures:
            counted = f"{_difference(figures[name], numbers[number]):+.1%}"
            if number == "active_without_lookup":
                counted = f"{numbers[number] / GIGA:.2f} without input embeddings, {counted}"
            said.append(f"{figures[name]} {what} (counted {counted})")
    return f"{', '.join(said)}: {figures['source']}"


def _difference(figure: str, counted: int) -> float:
    return counted / GIGA / float(figure.removesuffix("B")) - 1

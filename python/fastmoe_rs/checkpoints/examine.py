"""Whether a checkpoint has every tensor that its experts need, and which layout it has.

Legend: H hidden size, I intermediate size, E experts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from .layout import BIASES, LAYOUTS, MATRICES, Layer, Layout, Spec

# What is below a module called "experts".
_EXPERTS = re.compile(r"^((?:.*\.)?experts)\.(.+)$")
_NUMBER = re.compile(r"^\d+(?=\.)")


def prefix_of(name: str) -> str | None:
    """The prefix of a tensor of experts, which ends in "experts"; None for any other tensor."""
    match = _EXPERTS.match(name)
    return match[1] if match else None


def detect(specs: Mapping[str, Spec]) -> Layout:
    """The layout of a checkpoint, by names and shapes of its first layer of experts.

    Raises:
        ValueError: it cannot be told. Whether gate and up rows alternate shows nowhere, so that the layout of
            fused weights with biases has to be given.
    """
    prefix, names = next(iter(_groups(specs).items()))
    kinds = {_NUMBER.sub("{e}", name): f"{prefix}.{name}" for name in names}
    for name in ("per-expert", "mixtral", "fastmoe_rs"):
        if kinds.keys() & {*LAYOUTS[name].w1, *LAYOUTS[name].w2}:
            return LAYOUTS[name]
    fused, transposed = LAYOUTS["fused"], LAYOUTS["transposed"]
    if not kinds.keys() & {*fused.w1, *fused.w2}:
        raise ValueError(f"{prefix}: got {', '.join(names[:4])}, ..., wanted a known layout of experts")
    if kinds.keys() & {*fused.b1, *fused.b2}:
        raise ValueError(
            f"{prefix}: with biases, gate and up rows may alternate ('gpt-oss', 'interleaved') or not "
            "('transposed', 'fused'), and nothing shows which; the source layout has to be given"
        )
    w1, w2 = (specs[kinds[name]].shape if name in kinds else () for name in (*fused.w1, *fused.w2))
    turned = len(w1) == len(w2) == 3 and (w1[2], w1[1]) == (2 * w2[1], w2[2])
    return transposed if turned else fused


def examine(specs: Mapping[str, Spec], source: Layout, experts: int | None = None) -> list[Layer]:
    """The layers of experts of a checkpoint, of which every tensor is there and has the right shape.

    Args:
        specs: all tensors by name.
        source: the layout they must have.
        experts: E of every layer; None for that of the largest.

    Raises:
        ValueError: a tensor is missing, has another shape or dtype than its like, or belongs to no expert; or
            there are no experts.
    """
    groups = _groups(specs)
    if experts is None:
        experts = max(_experts(prefix, names, specs, source) for prefix, names in groups.items())
    return [_layer(prefix, names, specs, source, experts) for prefix, names in groups.items()]


def _groups(specs: Mapping[str, Spec]) -> dict[str, list[str]]:
    """Names of the tensors of experts, by prefix and without it."""
    groups: dict[str, list[str]] = {}
    for name in specs:
        if match := _EXPERTS.match(name):
            groups.setdefault(match[1], []).append(match[2])
    if not groups:
        raise ValueError("found no tensor whose name has a part 'experts'")
    return groups


def _experts(prefix: str, names: Sequence[str], specs: Mapping[str, Spec], source: Layout) -> int:
    if source.stacked:
        return _present(f"{prefix}.{source.w2[0]}", specs, 3).shape[0]
    return 1 + max((int(number[0]) for name in names if (number := _NUMBER.match(name))), default=0)


def _layer(
    prefix: str, names: Sequence[str], specs: Mapping[str, Spec], source: Layout, experts: int
) -> Layer:
    first = _present(f"{prefix}.{source.w2[0].format(e=0)}", specs, 2 + source.stacked)
    hidden, intermediate = reversed(first.shape[-2:]) if source.transposed else first.shape[-2:]
    layer = Layer(prefix, experts, hidden, intermediate, {})
    kinds = {_NUMBER.sub("{e}", name) for name in names}
    parts = MATRICES + BIASES if kinds & {*source.b1, *source.b2} else MATRICES
    known = set()
    for part in parts:
        for name, _, _, wanted in layer.tensors(source, part):
            spec = _present(name, specs)
            if spec.shape != wanted.shape:
                raise ValueError(f"{name}: got shape {list(spec.shape)}, wanted {list(wanted.shape)}")
            dtype = layer.dtypes.setdefault(part, spec.dtype)
            if spec.dtype != dtype:
                raise ValueError(f"{name}: got dtype {spec.dtype}, wanted {dtype} as its like")
            known.add(name)
    for name in (f"{prefix}.{name}" for name in names):
        if name not in known:
            raise ValueError(f"{name}: belongs to none of the {experts} experts, or not to this layout")
    return layer


def _present(name: str, specs: Mapping[str, Spec], dimensions: int | None = None) -> Spec:
    if name not in specs:
        raise ValueError(f"{name}: missing")
    if dimensions is not None and len(specs[name].shape) != dimensions:
        raise ValueError(f"{name}: got shape {list(specs[name].shape)}, wanted {dimensions} dimensions")
    return specs[name]

"""Checkpoints whose experts lie in memory in another way: converted from any layout to any other.

    per-expert   {e}.gate_proj.weight, {e}.up_proj.weight, {e}.down_proj.weight   Qwen, DeepSeek, OLMoE, GLM
    mixtral      {e}.w1.weight, {e}.w3.weight, {e}.w2.weight                      Mixtral, MiniMax
    fused        gate_up_proj [E, 2I, H], gate then up; down_proj [E, H, I]       transformers 5, in memory
    transposed   gate_up_proj [E, H, 2I], gate then up; down_proj [E, I, H]       Llama 4, Aria
    interleaved  gate_up_proj [E, 2I, H], gate and up alternating; down_proj [E, H, I]
    gpt-oss      transposed and interleaved                                       gpt-oss
    fastmoe_rs   w1, w2, as fused                                                 nn.MoE

These are names below a module called "experts". Biases are {e}.gate_proj.bias and so on,
gate_up_proj_bias [E, 2I] and down_proj_bias [E, H], or b1 and b2. All other names stay.

Legend: H hidden size, I intermediate size, E experts.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._wanted import whole
from ..counting import EXPERTS, read_config
from .examine import detect, examine, prefix_of
from .files import Output, Reader, data, write_file, write_folder
from .layout import LAYOUTS, Layer, Layout, Spec, converted, layout

__all__ = ["LAYOUTS", "Report", "convert_checkpoint", "convert_state_dict"]

# Weights in any form, which are converted or left behind.
_WEIGHTS = ("*.safetensors", "*.index.json", "*.bin", "*.pt", "*.pth", "*.gguf", "*.h5", "*.msgpack")


class Report(NamedTuple):
    """What `convert_checkpoint` did: the names of the layouts, layers, E, and the files written."""

    source: str
    target: str
    layers: int
    experts: int
    files: list[str]


def convert_state_dict(
    state_dict: Mapping[str, Tensor], to: str, *, source: str | None = None, experts: int | None = None
) -> dict[str, Tensor]:
    """A state dict whose experts have the layout `to`; other tensors are those given, not copies.

    Args:
        state_dict: tensors by name. No layer may lack a tensor of its experts.
        to: the name of the layout wanted.
        source: the name of the layout it has; None finds out.
        experts: E, the same in every layer; None for that of the largest layer.

    Raises:
        ValueError: an unknown or unclear layout; a tensor of experts is missing, has another shape or dtype
            than its like, or belongs to no expert. The message names the tensor.
    """
    specs = {name: Spec(tensor.dtype, tuple(tensor.shape)) for name, tensor in state_dict.items()}
    want = layout(to)
    have, layers = _layers(specs, source, experts)

    def read(name: str, expert: int | None) -> Tensor:
        return state_dict[name] if expert is None else state_dict[name][expert]

    out: dict[str, Tensor] = {}
    for name, layer in _in_order(specs, layers):
        if layer is None:
            out[name] = state_dict[name]
            continue
        for tensor in converted(layer, have, want, read):
            pieces = list(tensor.pieces())
            out[tensor.name] = torch.stack(pieces) if want.stacked else pieces[0].contiguous()
    return out


def convert_checkpoint(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    to: str,
    *,
    from_: str | None = None,
    experts: int | None = None,
    max_shard_size: int = 5_000_000_000,
) -> Report:
    """Write a safetensors checkpoint whose experts have the layout `to`, one expert's matrices at a time.

    Other tensors are copied byte for byte, as are the files of a folder that hold no weights (configuration,
    tokenizer). The target appears when it is complete, or not at all.

    Args:
        source: a safetensors file, or a folder with one or with `model.safetensors.index.json`.
        target: where to write: a file or a folder, as the source is, that does not exist.
        to: the name of the layout wanted.
        from_: the name of the layout that the source has; None finds out.
        experts: E; None takes it from the folder's `config.json`, or else from the largest layer.
        max_shard_size: bytes of tensors in a file of a folder; a larger tensor has a file of its own.

    Raises:
        FileNotFoundError: there is no source.
        FileExistsError: there is something at the target.
        ValueError: see `convert_state_dict`; or the files are damaged, or contradict their index.
    """
    source, target = Path(source), Path(target)
    want = layout(to)
    whole("max_shard_size", max_shard_size, least=1)
    if not source.exists():
        raise FileNotFoundError(f"{source}: there is no such file or folder")
    if os.path.lexists(target):
        raise FileExistsError(f"{target}: exists, wanted a new name")
    reader = Reader(source)
    have, layers = _layers(reader.specs, from_, experts or _configured(source))
    outputs: list[Output] = []
    for name, layer in _in_order(reader.specs, layers):
        if layer is None:
            outputs.append(reader.copied(name))
        else:
            outputs += _outputs(layer, have, want, reader)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as temporary:
        made = Path(temporary) / "converted"
        if source.is_dir():
            made.mkdir()
            for file in source.iterdir():
                if file.is_file() and not any(file.match(pattern) for pattern in _WEIGHTS):
                    shutil.copy2(file, made)
            files = write_folder(made, outputs, reader.metadata, max_shard_size)
        else:
            write_file(made, outputs, reader.metadata)
            files = [target.name]
        os.rename(made, target)
    return Report(_name(have), to, len(layers), layers[0].experts, files)


def _layers(specs: Mapping[str, Spec], source: str | None, experts: int | None) -> tuple[Layout, list[Layer]]:
    have = detect(specs) if source is None else layout(source)
    return have, examine(specs, have, experts)


def _in_order(specs: Mapping[str, Spec], layers: list[Layer]) -> Iterator[tuple[str, Layer | None]]:
    """All tensors that are not of experts, and each layer where its first tensor was."""
    left = {layer.prefix: layer for layer in layers}
    for name in specs:
        prefix = prefix_of(name)
        if prefix is None or prefix in left:
            yield name, None if prefix is None else left.pop(prefix)


def _outputs(layer: Layer, have: Layout, want: Layout, reader: Reader) -> Iterator[Output]:
    sizes = {}
    for part in layer.dtypes:
        name, _, _, spec = next(layer.tensors(have, part))
        sizes[part] = reader.size(name) // max(spec.elements, 1)
    for tensor in converted(layer, have, want, reader.read):

        def chunks(pieces: Callable[[], Iterator[Tensor]] = tensor.pieces) -> Iterator[Any]:
            return map(data, pieces())

        yield Output(tensor.name, tensor.spec, sizes[tensor.part] * tensor.spec.elements, chunks)


def _configured(source: Path) -> int | None:
    """E by the configuration beside the weights."""
    path = source / "config.json"
    if not path.is_file():
        return None
    config = read_config(path)
    for scope in (config, *(nested for nested in config.values() if isinstance(nested, dict))):
        for name in EXPERTS:
            if isinstance(scope.get(name), int):
                return scope[name]
    return None


def _name(layout: Layout) -> str:
    return next(name for name, known in LAYOUTS.items() if known is layout)

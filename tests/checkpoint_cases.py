"""Checkpoints of small models with experts: made, written out in every layout, read, compared."""

import itertools
import json

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

E, H, I = 3, 6, 4
PREFIX = "model.layers.{}.mlp.experts"


def per_expert(layers=(1,), experts=E, bias=False, dtype=torch.float32, hidden=H, intermediate=I):
    """A model whose experts have tensors of their own, between tensors of other kinds."""
    shapes = {"gate_proj": (intermediate, hidden), "up_proj": (intermediate, hidden)}
    shapes["down_proj"] = (hidden, intermediate)
    state = {"model.embed.weight": torch.randn(7, hidden), "model.step": torch.tensor(5)}
    for layer in layers:
        for e, (name, shape) in itertools.product(range(experts), shapes.items()):
            prefix = f"{PREFIX.format(layer)}.{e}.{name}"
            state[f"{prefix}.weight"] = torch.randn(shape).to(dtype)
            if bias:
                state[f"{prefix}.bias"] = torch.randn(shape[0]).to(dtype)
        state[f"model.layers.{layer}.mlp.gate.weight"] = torch.randn(experts, hidden).to(dtype)
        state[f"model.layers.{layer}.mlp.shared_experts.gate_proj.weight"] = torch.randn(2, hidden)
    return state


def written_out(state, to, layer=1, experts=E, bias=False):
    """The tensors of the experts of a layer in a layout, made number by number."""
    prefix = PREFIX.format(layer)

    def of(e, name, kind="weight"):
        return state[f"{prefix}.{e}.{name}.{kind}"]

    out = {}
    if to in ("per-expert", "mixtral"):
        names = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"} if to == "mixtral" else {}
        for e, name in itertools.product(range(experts), ("gate_proj", "up_proj", "down_proj")):
            for kind in ("weight", "bias") if bias else ("weight",):
                out[f"{prefix}.{e}.{names.get(name, name)}.{kind}"] = of(e, name, kind)
        return out
    for kind in ("weight", "bias") if bias else ("weight",):
        first, second = [], []
        for e in range(experts):
            gate, up, down = (of(e, name, kind) for name in ("gate_proj", "up_proj", "down_proj"))
            rows = [*gate, *up]
            if to in ("interleaved", "gpt-oss"):
                rows = [row for pair in zip(gate, up, strict=True) for row in pair]
            first.append(torch.stack(rows))
            second.append(down)
        first, second = torch.stack(first), torch.stack(second)
        if to in ("transposed", "gpt-oss") and kind == "weight":
            first, second = first.transpose(1, 2), second.transpose(1, 2)
        if to == "fastmoe_rs":
            names = ("w1", "w2") if kind == "weight" else ("b1", "b2")
        else:
            names = ("gate_up_proj", "down_proj")
            names = tuple(name + ("_bias" if kind == "bias" else "") for name in names)
        out |= {f"{prefix}.{names[0]}": first, f"{prefix}.{names[1]}": second}
    return out


def sharded(parent):
    """A folder of several shards, with other files beside them, and its tensors."""
    state = per_expert((0, 1, 3))
    names = sorted(state, key=lambda name: name[::-1])  # the tensors of an expert in different files
    folder = parent / "checkpoint"
    folder.mkdir()
    weight_map = {}
    for i in range(3):
        shard = {name: state[name] for name in names[i::3]}
        save_file(shard, folder / f"part-{i}.safetensors", {"format": "pt"})
        weight_map |= dict.fromkeys(shard, f"part-{i}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps({"text_config": {"num_experts": E}}))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "pytorch_model.bin").write_text("old weights")
    (folder / "original").mkdir()
    return folder, state


def load_all(folder):
    """By the index where there is one, each tensor from the file it names."""
    if not (folder / "model.safetensors.index.json").exists():
        return load_file(folder / "model.safetensors")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert {file.name for file in folder.glob("*.safetensors")} == set(index["weight_map"].values())
    state = {}
    for name, file in index["weight_map"].items():
        with safe_open(folder / file, "pt") as tensors:
            state[name] = tensors.get_tensor(name)
    size = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    assert index["metadata"]["total_size"] == size
    return state


def is_of_experts(name):
    return ".experts." in name


def same(state, wanted):
    assert state.keys() == wanted.keys()
    for name, tensor in state.items():
        assert tensor.dtype == wanted[name].dtype, name
        assert tensor.shape == wanted[name].shape, name
        assert (
            tensor.contiguous()
            .flatten()
            .view(torch.uint8)
            .equal(wanted[name].contiguous().flatten().view(torch.uint8))
        ), name

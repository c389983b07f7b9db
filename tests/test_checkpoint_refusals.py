"""Checkpoints that are not converted, and what the message names."""

import json

import pytest
import torch
from safetensors.torch import save_file

from checkpoint_cases import PREFIX, E, H, I, per_expert, sharded
from fastmoe_rs.checkpoints import convert_checkpoint, convert_state_dict


def broken(state, change):
    """A tensor of a state dict is dropped, added, or changed."""
    name, tensor = change(state)
    state = {**state, name: tensor}
    return {name: tensor for name, tensor in state.items() if tensor is not None}


def drop(name):
    return lambda state: (name, None)


def put(name, tensor):
    return lambda state: (name, tensor)


FIRST, SECOND = PREFIX.format(1), PREFIX.format(2)
REFUSED = {
    "middle": ("per-expert", drop(f"{FIRST}.1.up_proj.weight"), f"{FIRST}.1.up_proj.weight: missing"),
    "first": ("per-expert", drop(f"{FIRST}.0.down_proj.weight"), f"{FIRST}.0.down_proj.weight: missing"),
    "last": ("per-expert", drop(f"{SECOND}.2.gate_proj.weight"), f"{SECOND}.2.gate_proj.weight: missing"),
    "stack": ("fused", drop(f"{FIRST}.down_proj"), f"{FIRST}.down_proj: missing"),
    "extra": (
        "per-expert",
        put(f"{FIRST}.1.up_proj.weight_scale_inv", torch.ones(1, 1)),
        f"{FIRST}.1.up_proj.weight_scale_inv: belongs to none of the 3 experts",
    ),
    "extra expert": (
        "per-expert",
        put(f"{FIRST}.3.up_proj.weight", torch.ones(I, H)),
        f"{FIRST}.3.gate_proj.weight: missing",
    ),
    "extra beside a stack": (
        "transposed",
        put(f"{SECOND}.0.up_proj.weight", torch.ones(I, H)),
        f"{SECOND}.0.up_proj.weight",
    ),
    "shape": (
        "per-expert",
        put(f"{SECOND}.1.gate_proj.weight", torch.ones(I, H + 1)),
        rf"{SECOND}.1.gate_proj.weight: got shape \[4, 7\], wanted \[4, 6\]",
    ),
    "dimensions": (
        "mixtral",
        put(f"{FIRST}.0.w2.weight", torch.ones(H)),
        rf"{FIRST}.0.w2.weight: got shape \[6\], wanted 2 dimensions",
    ),
    "fewer experts": (
        "fused",
        put(f"{SECOND}.gate_up_proj", torch.ones(E - 1, 2 * I, H)),
        rf"{SECOND}.gate_up_proj: got shape \[2, 8, 6\], wanted \[3, 8, 6\]",
    ),
    "dtype": (
        "per-expert",
        put(f"{FIRST}.2.up_proj.weight", torch.ones(I, H).half()),
        f"{FIRST}.2.up_proj.weight: got dtype .*16, wanted .*32 as its like",
    ),
    "one bias": (
        "per-expert",
        put(f"{FIRST}.2.up_proj.bias", torch.ones(I)),
        f"{FIRST}.0.gate_proj.bias: missing",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_names_what_is_wrong(case, tmp_path):
    layout, change, message = REFUSED[case]
    state = broken(convert_state_dict(per_expert((1, 2)), layout), change)
    with pytest.raises(ValueError, match=message):
        convert_state_dict(state, "interleaved")
    (tmp_path / "in").mkdir()
    save_file(state, tmp_path / "in" / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(tmp_path / "in", tmp_path / "out", "interleaved")
    assert [file.name for file in tmp_path.iterdir()] == ["in"]


def test_the_configuration_knows_the_number_of_experts(tmp_path):
    """Without it, experts that are missing at the end of every layer would go unnoticed."""
    state = {name: tensor for name, tensor in per_expert().items() if f"{FIRST}.2." not in name}
    (tmp_path / "in").mkdir()
    save_file(state, tmp_path / "in" / "model.safetensors")
    (tmp_path / "in" / "config.json").write_text(json.dumps({"n_routed_experts": 3}))
    with pytest.raises(ValueError, match=f"{FIRST}.2.gate_proj.weight: missing"):
        convert_checkpoint(tmp_path / "in", tmp_path / "out", "fused")
    with pytest.raises(ValueError, match=f"{FIRST}.2.gate_proj.weight: missing"):
        convert_state_dict(state, "fused", experts=3)
    assert convert_checkpoint(tmp_path / "in", tmp_path / "out", "fused", experts=2).experts == 2


def test_unclear_layouts():
    state = convert_state_dict(per_expert(bias=True), "gpt-oss")
    with pytest.raises(ValueError, match="the source layout has to be given"):
        convert_state_dict(state, "fused")
    with pytest.raises(ValueError, match="wanted a known layout"):
        convert_state_dict({f"{FIRST}.gate_up_proj_blocks": torch.ones(1)}, "fused")
    with pytest.raises(ValueError, match="found no tensor whose name has a part 'experts'"):
        convert_state_dict({"model.embed.weight": torch.ones(1)}, "fused")
    with pytest.raises(ValueError, match="layout: got 'stacked', wanted one of 'per-expert', 'mixtral'"):
        convert_state_dict(state, "stacked")


def test_files_that_are_refused(tmp_path):
    source, _ = sharded(tmp_path)
    index = source / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    for change, message in (
        ({"lost": "part-0.safetensors"}, "lost: in the index but in no file"),
        ({"model.step": None}, "model.step: in a file but not in the index"),
        ({"lost": "part-9.safetensors"}, "part-9.safetensors"),
    ):
        changed = {name: file for name, file in (weight_map | change).items() if file}
        index.write_text(json.dumps({"weight_map": changed}))
        with pytest.raises(ValueError, match=message):
            convert_checkpoint(source, tmp_path / "out", "fused")
    index.write_text("[]")
    with pytest.raises(ValueError, match="not an index of safetensors files"):
        convert_checkpoint(source, tmp_path / "out", "fused")
    index.unlink()
    with pytest.raises(ValueError, match="got 3 safetensors files and no"):
        convert_checkpoint(source, tmp_path / "out", "fused")
    (tmp_path / "cut").write_bytes((source / "part-0.safetensors").read_bytes()[:-1])
    with pytest.raises(ValueError, match="cut"):
        convert_checkpoint(tmp_path / "cut", tmp_path / "out", "fused")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        convert_checkpoint(tmp_path / "nowhere", tmp_path / "out", "fused")
    with pytest.raises(FileExistsError, match="cut: exists"):
        convert_checkpoint(source, tmp_path / "cut", "fused")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["checkpoint", "cut"]


@pytest.mark.parametrize(
    ("config", "message"), [("[3]", "got a list, wanted a JSON object"), ("{", "not JSON")]
)
def test_a_configuration_that_is_none(config, message, tmp_path):
    source, _ = sharded(tmp_path)
    (source / "config.json").write_text(config)
    with pytest.raises(ValueError, match=rf"config\.json: {message}"):
        convert_checkpoint(source, tmp_path / "out", "fused")

"""Checkpoint conversion: every direction to the bit, streaming, and what it refuses."""

import errno
import gc
import itertools
import json
import shutil
import weakref

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fastmoe_rs import checkpoints, cli, functional, nn
from fastmoe_rs.checkpoints import LAYOUTS, convert_checkpoint, convert_state_dict, files
from moe_cases import WIDEST, assert_same

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


# Layouts


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("to", LAYOUTS)
def test_every_layout_by_its_definition(to, bias):
    state = per_expert(bias=bias)
    others = {name: tensor for name, tensor in state.items() if not is_of_experts(name)}
    converted = convert_state_dict(state, to)
    same(converted, others | written_out(state, to, bias=bias))
    for name, tensor in others.items():
        assert converted[name] is tensor


DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn, torch.int8]


@given(
    source=st.sampled_from(sorted(LAYOUTS)),
    to=st.sampled_from(sorted(LAYOUTS)),
    experts=st.integers(1, 12),
    hidden=st.integers(1, 5),
    intermediate=st.integers(1, 5),
    layers=st.integers(1, 3),
    bias=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    shard=st.integers(1, 2000),
)
def test_there_and_back_to_the_bit(
    tmp_path_factory, source, to, experts, hidden, intermediate, layers, bias, dtype, shard
):
    original = per_expert(range(layers), experts, bias, dtype, hidden, intermediate)
    state = convert_state_dict(original, source)
    folder = tmp_path_factory.mktemp("there_and_back")
    save_file(state, folder / "here")
    (folder / "shards").mkdir()
    shutil.copy(folder / "here", folder / "shards" / "model.safetensors")
    convert_checkpoint(folder / "here", folder / "there", to, from_=source)
    convert_checkpoint(folder / "shards", folder / "other", to, from_=source, max_shard_size=shard)
    convert_checkpoint(folder / "there", folder / "back", source, from_=to)
    wanted = convert_state_dict(state, to, source=source)
    same(load_file(folder / "there"), wanted)
    same(load_all(folder / "other"), wanted)
    same(load_file(folder / "back"), state)
    same(convert_state_dict(wanted, "per-expert", source=to), original)
    shutil.rmtree(folder)


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


def by_hand(x, ids, weights, state, bias):
    """Each token through the experts' own matrices."""
    y = torch.zeros_like(x)
    for t, k in itertools.product(range(len(x)), range(ids.shape[1])):
        prefix = f"{PREFIX.format(1)}.{ids[t, k]}"
        hidden = {
            name: F.linear(
                x[t], state[f"{prefix}.{name}.weight"], state[f"{prefix}.{name}.bias"] if bias else None
            )
            for name in ("gate_proj", "up_proj")
        }
        down = state[f"{prefix}.down_proj.weight"], state[f"{prefix}.down_proj.bias"] if bias else None
        y[t] += weights[t, k] * F.linear(F.silu(hidden["gate_proj"]) * hidden["up_proj"], *down)
    return y


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("to", sorted(name for name, layout in LAYOUTS.items() if layout.stacked))
def test_a_converted_layer_gives_the_same_output(to, bias, tmp_path):
    state = per_expert(bias=bias, dtype=WIDEST)
    save_file(state, tmp_path / "a.safetensors")
    convert_checkpoint(tmp_path / "a.safetensors", tmp_path / "b.safetensors", to)
    loaded = load_file(tmp_path / "b.safetensors")
    names = ("w1", "w2", "b1", "b2")
    if to != "fastmoe_rs":
        names = ("gate_up_proj", "down_proj", "gate_up_proj_bias", "down_proj_bias")
    w1, w2, b1, b2 = (loaded.get(f"{PREFIX.format(1)}.{name}") for name in names)
    x = torch.randn(10, H, dtype=WIDEST)
    ids, weights, _ = functional.route(torch.randn(10, E, dtype=WIDEST), 2)
    options = {"transposed": LAYOUTS[to].transposed, "interleaved": LAYOUTS[to].interleaved}
    y = functional.moe_mlp(x, ids, weights, w1, w2, b1=b1, b2=b2, **options)
    assert_same(y, by_hand(x, ids, weights, state, bias))
    convert_checkpoint(tmp_path / "b.safetensors", tmp_path / "c.safetensors", "per-expert", from_=to)
    back = load_file(tmp_path / "c.safetensors")
    same(back, state)
    assert_same(y, by_hand(x, ids, weights, back, bias))


@pytest.mark.parametrize(("family", "on_disk"), [("qwen3_moe", "per-expert"), ("mixtral", "mixtral")])
def test_checkpoints_of_transformers(family, on_disk, tmp_path):
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    config = transformers.AutoConfig.for_model(
        family,
        hidden_size=8,
        intermediate_size=12,
        moe_intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=4,
        vocab_size=20,
        num_experts=4,
        num_local_experts=4,
        num_experts_per_tok=2,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    model.save_pretrained(tmp_path / "disk")
    report = convert_checkpoint(tmp_path / "disk", tmp_path / "fused", "fused")
    assert report == (on_disk, "fused", 2, 4, ["model.safetensors"])
    experts = {name: tensor for name, tensor in model.state_dict().items() if is_of_experts(name)}
    fused = load_file(tmp_path / "fused" / "model.safetensors")
    assert {name.rpartition("experts.")[2] for name in experts} == {"gate_up_proj", "down_proj"}
    by_layer = {name.replace("block_sparse_moe", "mlp"): tensor for name, tensor in fused.items()}
    for name, tensor in experts.items():
        assert torch.equal(by_layer[name], tensor)
    convert_checkpoint(tmp_path / "fused", tmp_path / "back", on_disk)
    same(load_all(tmp_path / "back"), load_all(tmp_path / "disk"))
    ids = torch.arange(10)[None]
    for folder in ("fused", "back"):
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / folder).eval()
        assert torch.equal(again(ids).logits, model(ids).logits)


def test_into_our_module():
    moe = nn.MoE(H, I, E, 2, bias=True)
    state = {f"layer.{name}": tensor for name, tensor in moe.state_dict().items()}
    apart = convert_state_dict(state, "per-expert")
    assert torch.equal(apart["layer.experts.1.up_proj.weight"], moe.experts.w1[1, I:])
    same(convert_state_dict(apart, "fastmoe_rs"), state)


def test_gradients_pass():
    state = {name: t.requires_grad_() for name, t in per_expert().items() if t.is_floating_point()}
    fused = convert_state_dict(state, "gpt-oss")
    fused[f"{PREFIX.format(1)}.gate_up_proj"][1].sum().backward()
    assert (state[f"{PREFIX.format(1)}.1.up_proj.weight"].grad == 1).all()
    assert (state[f"{PREFIX.format(1)}.0.up_proj.weight"].grad == 0).all()


# Files


@pytest.fixture
def checkpoint(tmp_path):
    """A folder of several shards, with other files beside them."""
    state = per_expert((0, 1, 3))
    names = sorted(state, key=lambda name: name[::-1])  # the tensors of an expert in different files
    folder = tmp_path / "checkpoint"
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


def test_sharded_checkpoints(checkpoint, tmp_path):
    source, state = checkpoint
    report = convert_checkpoint(source, tmp_path / "out", "transposed", max_shard_size=700)
    assert len(report.files) > 3
    same(load_all(tmp_path / "out"), convert_state_dict(state, "transposed"))
    for file in report.files:
        with safe_open(tmp_path / "out" / file, "pt") as tensors:
            assert tensors.metadata() == {"format": "pt"}
            sizes = [tensors.get_tensor(name).nbytes for name in tensors.keys()]  # noqa: SIM118
        assert sum(sizes) <= 700 or len(sizes) == 1
    small = {file.name for file in (tmp_path / "out").iterdir()} - set(report.files)
    assert small == {"config.json", "tokenizer.json", "model.safetensors.index.json"}
    one = convert_checkpoint(source, tmp_path / "one", "transposed")
    assert one.files == ["model.safetensors"]
    same(load_all(tmp_path / "one"), load_all(tmp_path / "out"))


def test_other_tensors_are_copied_byte_for_byte(tmp_path):
    """Also NaN payloads and dtypes that torch does not have."""
    nan = torch.tensor([0x7FC00001, -1, 5], dtype=torch.int32).view(torch.float32)
    state = per_expert() | {"odd": nan, "flags": torch.tensor([True, False]), "none": torch.empty(0, 3)}
    save_file(state, tmp_path / "a")
    raw = bytearray((tmp_path / "a").read_bytes())
    raw[:] = raw.replace(b'"odd":{"dtype":"F32"', b'"odd":{"dtype":"U32"')
    (tmp_path / "a").write_bytes(raw)
    convert_checkpoint(tmp_path / "a", tmp_path / "b", "fused")
    with safe_open(tmp_path / "b", "pt") as tensors:
        assert tensors.get_slice("odd").get_dtype() == "U32"
        assert tensors.get_tensor("odd").view(torch.int32).tolist() == [0x7FC00001, -1, 5]
        assert tensors.get_tensor("flags").tolist() == [True, False]
        assert tensors.get_tensor("none").shape == (0, 3)


@pytest.mark.parametrize(("source", "to"), [("per-expert", "gpt-oss"), ("transposed", "mixtral")])
def test_one_expert_is_in_memory_at_a_time(source, to, tmp_path, monkeypatch):
    save_file(convert_state_dict(per_expert(experts=16), source), tmp_path / "a")
    live, most = 0, 0

    def died(size):
        nonlocal live
        live -= size

    def counted(tensor):
        nonlocal live, most
        live += tensor.nbytes
        most = max(most, live)
        weakref.finalize(tensor, died, tensor.nbytes)
        return tensor

    read, data = files.Reader.read, files.data
    monkeypatch.setattr(files.Reader, "read", lambda *args: counted(read(*args)))
    monkeypatch.setattr(checkpoints, "data", lambda tensor: data(counted(tensor)))
    gc.disable()
    try:
        convert_checkpoint(tmp_path / "a", tmp_path / "b", to)
    finally:
        gc.enable()
    one_expert = 4 * 3 * H * I
    assert 0 < most <= 2 * one_expert  # as it was and as it will be
    assert live <= one_expert


# What is refused


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


def test_files_that_are_refused(checkpoint, tmp_path):
    source, _ = checkpoint
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
def test_a_configuration_that_is_none(config, message, checkpoint, tmp_path):
    source, _ = checkpoint
    (source / "config.json").write_text(config)
    with pytest.raises(ValueError, match=rf"config\.json: {message}"):
        convert_checkpoint(source, tmp_path / "out", "fused")


def test_a_failure_while_writing_leaves_nothing(checkpoint, tmp_path, monkeypatch):
    source, _ = checkpoint
    left = iter(range(20))

    def data(tensor):
        if next(left, None) is None:
            raise OSError(errno.ENOSPC, "no space left on device")
        return files.data(tensor)

    monkeypatch.setattr(checkpoints, "data", data)
    with pytest.raises(OSError, match=r"no space left on device: .*model-0"):
        convert_checkpoint(source, tmp_path / "out", "mixtral", max_shard_size=500)
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint"]


# The command


def test_command(checkpoint, tmp_path, capsys):
    source, state = checkpoint
    assert tuple(LAYOUTS) == cli.LAYOUTS
    target = tmp_path / "out"
    arguments = ["convert", str(source), str(target), "--to", "fused", "--max-shard-size", "1KB"]
    assert cli.main(arguments) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("3 layers of 3 experts from 'per-expert' to 'fused': ")
    same(load_all(target), convert_state_dict(state, "fused"))
    assert cli.main(arguments) == 1
    assert f"fastmoe_rs convert: {target}: exists" in capsys.readouterr().err
    back = ["convert", str(target), str(tmp_path / "back"), "--to", "mixtral", "--from", "fused"]
    assert cli.main(back) == 0
    for wrong in (["--to", "flat"], ["--to", "fused", "--max-shard-size", "0GB"], []):
        with pytest.raises(SystemExit) as caught:
            cli.main([*arguments[:3], *wrong])
        assert caught.value.code == 2

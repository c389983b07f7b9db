"""Conversion of checkpoints: every direction to the bit, and layers that compute what they did."""

import itertools
import shutil

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from checkpoint_cases import PREFIX, E, H, I, is_of_experts, load_all, per_expert, same, written_out
from fastmoe_rs import functional, nn
from fastmoe_rs.checkpoints import LAYOUTS, convert_checkpoint, convert_state_dict
from moe_cases import WIDEST, assert_same


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

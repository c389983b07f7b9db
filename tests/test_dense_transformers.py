"""Dense models of transformers as Mixture-of-Experts ones of transformers, and back."""

import pytest
import torch

pytest.importorskip("transformers", "5", reason="converts models of transformers")

from transformers import AutoModelForCausalLM

import fastmoe_rs
from fastmoe_rs.distillation import distillation_loss
from fastmoe_rs.integrations.dense import dense_pretrained, upcycle_pretrained
from moe_cases import trains
from small_llama import evaluate, llama, train
from transformers_models import build, relative, tokens

FAMILIES = {"llama": "mixtral", "mistral": "mixtral", "qwen3": "qwen3_moe"}
BACK = {"mixtral": "mistral", "qwen3_moe": "qwen3"}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
def test_upcycled_model_gives_the_logits_of_the_dense_one_and_is_saved_and_loaded(family, tied, tmp_path):
    model = build(family, tie_word_embeddings=tied, head_dim=16)  # not 32 / 4
    expected = model(tokens()).logits
    moe = upcycle_pretrained(model, 6, 2)
    assert moe.config.model_type == FAMILIES[family]
    assert not moe.training
    assert relative(moe(tokens()).logits, expected) <= 2e-6
    moe.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert relative(fastmoe_rs.accelerate(loaded)(tokens()).logits, expected) <= 2e-6
    with torch.no_grad():
        for parameter in moe.parameters():
            parameter.zero_()
    assert torch.equal(model(tokens()).logits, expected)


@pytest.mark.parametrize("family", BACK)
@pytest.mark.parametrize("gather", [None, 2])
def test_merging_experts_undoes_upcycling(family, gather):
    dense = build(BACK[family], head_dim=16)
    moe = upcycle_pretrained(dense, 5, 2)
    watched = fastmoe_rs.watch(moe)
    moe(tokens())
    load = {name: stats.load for name, stats in watched.stats().items()}
    watched.close()
    again = dense_pretrained(moe, load, gather=gather)
    assert again.config.model_type == BACK[family]
    assert again.config.intermediate_size == 24 * (gather or 1)
    assert relative(again(tokens()).logits, dense(tokens()).logits) <= 2e-6


def test_experts_are_merged_by_the_load_of_their_block():
    moe = build("qwen3_moe")
    load = {f"model.layers.{i}.mlp": torch.eye(8)[3 + i] for i in range(2)}
    dense = dense_pretrained(moe, load)
    for i in range(2):
        gate_up = moe.model.layers[i].mlp.experts.gate_up_proj[3 + i]
        mlp = dense.model.layers[i].mlp
        assert torch.equal(torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]), gate_up)
        assert torch.equal(mlp.down_proj.weight, moe.model.layers[i].mlp.experts.down_proj[3 + i])


def test_dtype_is_kept_and_experts_are_drawn_from_a_seed():
    model = build("qwen3").bfloat16()

    def seeded():
        return upcycle_pretrained(model, 4, 2, redraw=0.5, generator=torch.Generator().manual_seed(1))

    moe, again = seeded().state_dict(), seeded().state_dict()
    assert {value.dtype for value in moe.values()} == {torch.bfloat16}
    assert all(torch.equal(moe[name], again[name]) for name in moe)
    experts = moe["model.layers.0.mlp.experts.down_proj"]
    assert not torch.equal(experts[0], experts[1])


@trains
def test_upcycled_then_distilled():
    dense = llama()
    train(dense, 40)
    dense_loss = evaluate(dense)
    moe = fastmoe_rs.accelerate(upcycle_pretrained(dense, 4, 2, redraw=0.3))
    train(moe, 80, seed=1)
    assert evaluate(moe) < 0.9 * dense_loss
    moe.requires_grad_(False)
    student = dense_pretrained(moe, gather=2)

    def loss(model, ids):
        return distillation_loss(model(ids).logits, moe(ids).logits)

    start = evaluate(student, loss)
    train(student, 40, loss, seed=2, learning_rate=3e-3)
    assert evaluate(student, loss) < 0.7 * start


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: upcycle_pretrained(build("qwen2"), 4, 2),
            "model: got model_type 'qwen2', wanted one of llama, mistral, qwen3",
        ),
        (
            lambda: dense_pretrained(build("olmoe")),
            "model: got model_type 'olmoe', wanted one of mixtral, qwen3_moe",
        ),
        (
            lambda: upcycle_pretrained(build("llama", attention_bias=True), 4, 2),
            r"model: got weights \['model.layers.0.self_attn.q_proj.bias'.*without a place",
        ),
        (
            lambda: upcycle_pretrained(build("qwen3", use_sliding_window=True), 4, 2),
            "model: got use_sliding_window=True",
        ),
        (lambda: upcycle_pretrained(build("llama"), 4, 5), "top_k: got 5, wanted 1 to 4"),
        (
            lambda: dense_pretrained(build("qwen3_moe", mlp_only_layers=[0])),
            "model: got a model with dense layers too",
        ),
        (
            lambda: dense_pretrained(build("mixtral"), {"model.layers.0.mlp": torch.ones(8)}),
            r"load: got blocks \['model.layers.0.mlp'\], wanted those of the model",
        ),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()

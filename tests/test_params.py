"""Counting parameters from configurations: against transformers' own modules, and the published figures."""

import json
import re

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Llama4ForConditionalGeneration,
    SwitchTransformersForConditionalGeneration,
)

from fastmoe_rs import cli, counting, params
from transformers_models import config

BIASED = {"attention_bias": True}
FAMILIES = [
    ("afmoe", BIASED),
    ("deepseek_v2", {}),
    ("deepseek_v2", BIASED | {"q_lora_rank": None, "n_shared_experts": 1}),
    ("deepseek_v3", {}),
    ("deepseek_v3", BIASED | {"tie_word_embeddings": True}),
    ("dots1", BIASED | {"n_shared_experts": 1}),
    ("exaone_moe", {}),
    ("flex_olmo", {}),
    ("glm4_moe", BIASED | {"use_qk_norm": True}),
    ("gpt_oss", {}),
    ("gpt_oss", {"attention_bias": False}),
    ("granitemoe", BIASED | {"tie_word_embeddings": True}),
    ("granitemoeshared", {"shared_intermediate_size": 20}),
    ("llama4_text", {"interleave_moe_layer_step": 2, "moe_layers": None, "num_hidden_layers": 4}),
    ("minimax_m2", {}),
    ("mixtral", {}),
    ("mixtral", {"head_dim": 20, "num_key_value_heads": 1, "tie_word_embeddings": True}),
    ("olmoe", BIASED),
    ("phimoe", BIASED | {"lm_head_bias": True}),
    ("qwen2_moe", {}),
    ("qwen3_moe", {"decoder_sparse_step": 2, "num_hidden_layers": 5, "mlp_only_layers": [3]}),
    ("solar_open", {}),
]


def modules_count(auto, configuration):
    with torch.device("meta"):
        model = auto(configuration)
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(("family", "options"), FAMILIES, ids=lambda value: str(value))
def test_counts_what_transformers_builds(family, options):
    shrunk = config(family, **options)
    counted = counting.count(shrunk.to_dict())
    assert counted.total == modules_count(AutoModelForCausalLM.from_config, shrunk)
    routed = counted.parts["routed experts"]
    assert routed.active * counted.experts == routed.total * counted.top_k
    assert counted.active == counted.total - routed.total + routed.active


def test_counts_dbrx():
    shrunk = AutoConfig.for_model(
        "dbrx",
        d_model=32,
        n_heads=4,
        n_layers=2,
        vocab_size=64,
        attn_config={"kv_n_heads": 2, "rope_theta": 1e4},
    )
    shrunk.ffn_config.ffn_hidden_size, shrunk.ffn_config.hidden_size = 24, 32
    assert counting.count(shrunk.to_dict()).total == modules_count(AutoModelForCausalLM.from_config, shrunk)


def test_counts_the_vision_tower_of_llama4():
    text = config("llama4_text").to_dict()
    vision = {
        "hidden_size": 16,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    sizes = {"projector_input_dim": 12, "projector_output_dim": 20, "vision_output_dim": 20}
    shrunk = AutoConfig.for_model("llama4", text_config=text, vision_config=vision | sizes)
    counted = counting.count(shrunk.to_dict())
    assert counted.total == modules_count(Llama4ForConditionalGeneration, shrunk)
    assert counted.parts["vision tower"].active == 0


def test_counts_switch_transformers():
    sizes = {"d_model": 16, "d_kv": 6, "d_ff": 20, "num_heads": 3, "num_experts": 4, "vocab_size": 40}
    layers = {"num_layers": 4, "num_sparse_encoder_layers": 2}
    layers |= {"num_decoder_layers": 6, "num_sparse_decoder_layers": 3}
    shrunk = AutoConfig.for_model("switch_transformers", **sizes, **layers, router_bias=True)
    counted = counting.count(shrunk.to_dict())
    assert counted.total == modules_count(SwitchTransformersForConditionalGeneration, shrunk)


@pytest.mark.parametrize("name", params.presets())
def test_presets_have_the_published_sizes(name):
    """Within 1%: the total always, the active figure unless it is marked."""
    entry = params.presets()[name]
    published, numbers = entry["published"], params.facts(counting.count(entry["config"]), 0, 1)
    assert params.agree(published["total"], numbers["total"])
    active = numbers[params.active_as(published)]
    agrees = "active" in published and params.agree(published["active"], active)
    assert agrees == ("unconfirmed" not in entry)
    if not agrees:
        reason = f"active parameters: the configuration gives {active / 1e9:.2f}B"
        assert entry["unconfirmed"].startswith(reason)


@pytest.mark.parametrize(
    ("figure", "counted", "agree"),
    [
        ("1.3B", 1_282_000_000, False),  # rounds to it, and is 1.4% off
        ("1.3B", 1_287_001_000, True),
        ("3.3B", 3_353_000_000, False),
        ("36.7B", 36_400_000_000, True),  # 0.8%
        ("37B", 37_369_000_000, True),
        ("37B", 37_371_000_000, False),
        ("400B", 404_000_001_000, False),
        ("400B", 401_600_000_000, True),
    ],
)
def test_when_a_count_agrees_with_a_figure(figure, counted, agree):
    assert params.agree(figure, counted) == agree


def test_flops_are_those_that_torch_counts():
    shrunk = config("mixtral", num_local_experts=2, num_experts_per_tok=2)
    model = AutoModelForCausalLM.from_config(
        shrunk, attn_implementation="eager", experts_implementation="eager"
    )
    with FlopCounterMode(display=False) as counter:
        model(torch.arange(3, 13)[None])
    # Every one of 10 tokens attends to all 10: masked scores are computed too.
    assert counter.get_total_flops() == 10 * counting.count(shrunk.to_dict()).flops(context=10)


def test_bytes_of_a_step():
    counted = counting.count(params.load("mixtral-8x7b")[1]["config"])
    read = counted.active - counted.lookup
    assert counted.weights_read() == pytest.approx(2 * read)
    assert counted.weights_read(10**6, bits=8) * 10**6 == pytest.approx(counted.total - counted.lookup)
    assert counted.memory(4) == counted.total / 2
    assert counted.cache_read(100) == 100 * 32 * 2 * 8 * 128 * 2
    assert counted.dense_intermediate == 2 * 14336


def test_the_command(tmp_path, capsys):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(params.presets()["OLMoE-1B-7B"]["config"]))
    assert cli.main(["params", str(tmp_path), "--json", "--context", "10", "--tokens", "4"]) == 0
    from_file = json.loads(capsys.readouterr().out)
    assert cli.main(["params", "allenai/olmoe-1b-7b", "--json", "--context", "10", "--tokens", "4"]) == 0
    from_name = json.loads(capsys.readouterr().out)
    assert from_file.pop("name") == str(path)
    assert from_name["published"]["total"] == "6.9B"
    assert from_file.items() <= from_name.items()
    assert from_file["parts"]["routed experts"] == {
        "total": 64 * 16 * 3 * 2048 * 1024,
        "active": 8 * 16 * 3 * 2048 * 1024,
    }
    assert cli.main(["params", "grok-1"]) == 0
    text = capsys.readouterr().out
    for words in (
        "routed experts, 2 of 8",
        "315.68",
        "314B in all (counted +0.5%): README.md of xai-org/grok-1",
        "counted as active: not defined by the source, so all that a token uses",
        "unconfirmed: active parameters",
        "dense, equally active",
    ):
        assert words in text


def test_the_command_tells_what_the_publisher_counts(capsys):
    assert cli.main(["params", "gpt-oss-120b"]) == 0
    text = capsys.readouterr().out
    assert "5.13B active (counted 5.13 without input embeddings, +0.1%): arXiv:2508.10925" in text
    assert "counted as active: with the output head, without input embeddings" in text


def test_the_command_without_a_model_lists_the_presets(capsys):
    assert cli.main(["params"]) == 0
    table, _, legend = capsys.readouterr().out.partition("\n\n")
    assert "active: what a token uses" in legend
    assert "unconfirmed: the count" in legend
    lines = table.splitlines()[1:]
    assert [line.split()[0] for line in lines] == list(params.presets())
    for line, entry in zip(lines, params.presets().values(), strict=True):
        assert entry["published"]["total"] in line
        assert line.endswith(entry["published"]["source"])
        assert ("unconfirmed" in line) == ("unconfirmed" in entry)
    assert cli.main(["params", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert listed["Mixtral-8x7B-v0.1"]["total"] == 46_702_792_704
    assert listed["Grok-1"]["unconfirmed"].startswith("active")


WANTED = """Mixtral-8x7B-v0.1 Mixtral-8x22B-v0.1 DeepSeek-V2 DeepSeek-V3 Llama-4-Scout-17B-16E
    Llama-4-Maverick-17B-128E Grok-1 Qwen3-30B-A3B OLMoE-1B-7B gpt-oss-120b Switch-Base-128"""


def test_presets_are_complete_and_name_their_sources():
    assert set(WANTED.split()) <= params.presets().keys()
    for name, entry in params.presets().items():
        assert entry["published"]["source"], name
        assert ("active" in entry["published"]) or ("unconfirmed" in entry), name


MIXTRAL = """"model_type": "mixtral", "hidden_size": 8, "num_hidden_layers": 1, "vocab_size": 9,
    "intermediate_size": 8, "num_attention_heads": 1"""


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "got .*nothing.*, wanted a config.json or one of Mixtral-8x7B-v0.1"),
        ("[1]", r"nothing\.json: got a list, wanted a JSON object"),
        ("{", r"nothing\.json: not JSON"),
        ('{"model_type": "bert"}', "model_type: got 'bert', wanted one of afmoe, dbrx"),
        (
            '{"model_type": "switch_transformers", "d_model": 8, "num_heads": 1, "d_ff": 8, '
            '"num_experts": 2, "d_kv": 8, "num_layers": 1, '
            '"num_decoder_layers": 1, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1, '
            '"vocab_size": 9, "tie_word_embeddings": false}',
            "tie_word_embeddings: got False, wanted True",
        ),
        ('{"model_type": "mixtral", "hidden_size": 8}', "the configuration has no num_hidden_layers"),
        ('{"model_type": "mixtral", "hidden_size": "8"}', "hidden_size: got '8', wanted a whole number"),
        ('{"model_type": "mixtral", "hidden_size": -8}', "hidden_size: got -8, wanted a whole number"),
        (f'{{{MIXTRAL}, "num_local_experts": 0, "num_experts_per_tok": 2}}', "per token: got 2 of 0, wanted"),
        (f'{{{MIXTRAL}, "num_local_experts": 2, "num_experts_per_tok": 4}}', "per token: got 4 of 2, wanted"),
        (
            f'{{{MIXTRAL}, "num_local_experts": 2, "num_experts_per_tok": 1, "head_dim": "8"}}',
            "nothing.json is no configuration that can be counted",
        ),
    ],
)
def test_what_cannot_be_counted(content, message, tmp_path, capsys):
    path = tmp_path / "nothing.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(SystemExit, match="2"):
        cli.main(["params", str(path)])
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(message, error)


def test_an_ambiguous_name():
    with pytest.raises(
        params.UnknownModel, match=r"'mixtral' could be Mixtral-8x7B-v0.1 or Mixtral-8x22B-v0.1"
    ):
        params.load("mixtral")

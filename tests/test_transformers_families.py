"""Every other family that transformers dispatches and that builds small: numbers and gradients of eager."""

import pytest

import fastmoe_rs

pytest.importorskip("transformers", "5", reason="the integration is for transformers >= 5")

from fastmoe_rs.integrations.transformers import NAME, fused_activation
from transformers_models import (
    assert_gradients,
    build,
    build_experts,
    gradients,
    relative,
    routed,
    run,
    tokens,
)

MODELS = [
    "afmoe",
    "aria_text",
    "axk1",
    "axk2",
    "bailing_hybrid",
    "beam",
    "cohere2_moe",
    "deepseek_v2",
    "deepseek_v32",
    "deepseek_v4",
    "dots3_note_text",
    "ernie4_5_moe",
    "exaone_moe",
    "flex_olmo",
    "flint",
    "gemma4_text",
    "glm4_moe",
    "glm4_moe_lite",
    "glm_moe_dsa",
    "granitemoe",
    "granitemoe_swa",
    "granitemoehybrid",
    "granitemoeshared",
    "hunyuan_v1_moe",
    "hy_v3",
    "hy_v4",
    "inkling_text",
    "jamba",
    "kolibri1",
    "laguna",
    "lfm2_moe",
    "mellum",
    "mimo_v2_flash",
    "minimax",
    "minimax_m2",
    "minimax_m3_vl_text",
    "mistral4",
    "mistral_large4_text",
    "muse_spark_text",
    "nemotron_h",
    "phimoe",
    "qwen2_moe",
    "qwen3_5_moe_text",
    "qwen3_next",
    "qwen3_vl_moe_text",
    "qwen4_exp_text",
    "solar_open",
    "zaya",
]


@pytest.mark.parametrize("family", MODELS)
def test_model_gives_the_output_and_gradients_of_eager(family):
    model, ids = build(family, scale=0.2), tokens((2, 7))
    expected = model(ids, use_cache=False)[0]
    expected_grads = gradients(expected.square().mean(), model)
    fastmoe_rs.accelerate(model)
    actual = model(ids, use_cache=False)[0]
    assert relative(actual, expected) <= 1e-5
    assert_gradients(gradients(actual.square().mean(), model), expected_grads, 1e-4)


# Experts modules that stand for a way to activate; None is the module's own Python code.
EXPERTS = [
    ("mixtral", {}, "swiglu"),
    ("mixtral", {"hidden_act": "swish"}, "swiglu"),
    ("mixtral", {"hidden_act": "gelu"}, "geglu"),
    ("mixtral", {"hidden_act": "gelu_new"}, "geglu_tanh"),
    ("mixtral", {"hidden_act": "relu"}, "reglu"),
    ("mixtral", {"hidden_act": "mish"}, None),
    ("gemma4_text", {}, "geglu_tanh"),
    ("kimi_linear", {}, "swiglu"),
    ("lfm2_moe", {}, "swiglu"),
    ("aria_text", {}, "swiglu"),
    ("nemotron_h", {}, "relu2"),
    ("nemotron_h", {"mlp_hidden_act": "silu"}, "silu"),
    ("nemotron_h", {"mlp_hidden_act": "gelu"}, "gelu"),
    ("nemotron_h", {"mlp_hidden_act": "relu"}, "relu"),
    ("nemotron_h", {"mlp_hidden_act": "tanh"}, None),
    ("gpt_oss", {}, "swiglu_oai"),
    ("openai_privacy_filter", {}, "swiglu_oai"),
    ("minimax_m3_vl_text", {}, "swiglu_oai"),
    ("minimax_m3_vl_text", {"swiglu_limit": 5.0}, None),
    ("deepseek_v4", {}, None),
    ("glm5_next_text", {"index_topk": 16, "qk_rope_head_dim": 0}, None),
    ("inkling2_text", {}, None),
    ("muse_spark_text", {}, None),
]


@pytest.mark.parametrize(("family", "overrides", "activation"), EXPERTS)
def test_activation_is_fused_when_known_and_right_when_not(family, overrides, activation):
    experts = build_experts(family, **overrides)
    assert fused_activation(experts) == activation
    x_TH, *routing = routed(experts)
    problem = (8 * x_TH, *routing)  # large enough to reach the clamps
    expected_TH, expected_grads = run(experts, "eager", *problem)
    out_TH, grads = run(experts, NAME, *problem)
    assert relative(out_TH, expected_TH) <= 2e-6
    assert_gradients(grads, expected_grads, 5e-6)

"""Every family of transformers that has a mixture of experts: the numbers and gradients of eager.

`FASTMOE_WRITE_MODELS=1 pytest tests/test_transformers_families.py` writes what it measures to docs/models.md.
"""

import copy
import os
import re
from pathlib import Path

import pytest
import torch

import fastmoe_rs

transformers = pytest.importorskip("transformers", "5", reason="the integration is for transformers >= 5")

from fastmoe_rs.integrations import adapters  # noqa: E402
from fastmoe_rs.integrations.swap import is_dispatched  # noqa: E402
from fastmoe_rs.integrations.transformers import NAME, fused_activation  # noqa: E402
from transformers_models import (  # noqa: E402
    arguments,
    assert_gradients,
    build,
    build_experts,
    gradients,
    relative,
    routed,
    run,
    served,
    tokens,
)

# fmt: off
DISPATCHED = [
    "afmoe", "aria_text", "axk1", "axk2", "bailing_hybrid", "beam", "cohere2_moe", "deepseek_ocr2_text",
    "deepseek_v2", "deepseek_v3", "deepseek_v32", "deepseek_v4", "diffusion_gemma_text", "dots1",
    "dots3_note_text", "ernie4_5_moe", "ernie4_5_vl_moe_text", "exaone_moe", "flex_olmo", "flint",
    "gemma4_text", "glm4_moe", "glm4_moe_lite", "glm4v_moe_text", "glm5_next_text", "glm_moe_dsa",
    "gpt_oss", "granitemoe", "granitemoe_swa", "granitemoehybrid", "granitemoeshared", "hunyuan_v1_moe",
    "hy_v3", "hy_v4", "hy_v4_vl_text", "inkling2_loop_text", "inkling2_text", "inkling_text", "jamba",
    "kimi_linear", "kolibri1", "laguna", "lara_mini", "lfm2_moe", "mellum", "mimo_v2_flash", "minimax",
    "minimax_m2", "minimax_m3_vl_text", "mistral4", "mistral_large4_text", "mixtral", "muse_spark_text",
    "nemotron_h", "olmoe", "openai_privacy_filter", "phimoe", "qwen2_moe", "qwen3_5_moe_text",
    "qwen3_moe", "qwen3_next", "qwen3_omni_moe_talker_text", "qwen3_omni_moe_text", "qwen3_vl_moe_text",
    "qwen4_exp_text", "solar_open", "unlimited_ocr_text", "zaya",
]
# fmt: on
ADAPTED = ["dbrx", "jetmoe", "llama4_text", "longcat_flash", "step3p5", "switch_transformers"]

# fp32 rounds to 2**-24. Eager and `grouped_mm` differ from each other by as much.
FP32_OUTPUT, FP32_GRADIENT = 1e-5, 1e-4
# Results, pre-activations and their gradients are rounded to 2**-9 (bf16) and 2**-12 (fp16) of their value.
HALF = {torch.bfloat16: 2**-6, torch.float16: 2**-9}
TABLE = Path(__file__).parents[1] / "docs" / "models.md"


def outcome(model):
    """Output, gradients by name, and the auxiliary loss with its gradients where there is one."""
    out = model(**arguments(model, tokens((2, 7))), use_cache=False)
    loss = out.get("loss")
    aux = [
        out[name]
        for name in ("aux_loss", "encoder_aux_loss", "decoder_aux_loss")
        if out.get(name) is not None
    ]
    aux_grads = None
    if aux:
        aux = torch.stack(aux).sum()
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        grads = torch.autograd.grad(aux, list(trained.values()), retain_graph=True, allow_unused=True)
        aux_grads = dict(zip(trained, grads, strict=True))
    output = out["logits"] if "logits" in out else out[0]
    grads = gradients(output.square().mean() if loss is None else loss, model)
    return output.detach(), grads, aux, aux_grads


def worst(actual, expected):
    """The largest difference of gradients, of those that eager has."""
    return max(relative(actual[name], grad) for name, grad in expected.items() if grad is not None)


@pytest.mark.parametrize("family", DISPATCHED + ADAPTED)
def test_model_gives_the_output_gradients_and_auxiliary_loss_of_eager(family, table):
    model = build(family, scale=0.2)
    expected, expected_grads, expected_aux, expected_aux_grads = outcome(model)
    fastmoe_rs.accelerate(model)
    output, grads, aux, aux_grads = outcome(model)
    assert relative(output, expected) <= FP32_OUTPUT
    assert_gradients(grads, expected_grads, FP32_GRADIENT)
    if expected_aux:
        assert relative(aux, expected_aux) <= FP32_OUTPUT
        assert_gradients(aux_grads, expected_aux_grads, FP32_GRADIENT)
    last = served(model)[-1]
    table[family] |= {
        "experts": f"`{type(last).__name__}`",
        "through": "ExpertsInterface" if is_dispatched(last) else "adapter",
        "activation": (fused_activation(last) or "its own") if is_dispatched(last) else "",
        "fp32 output": f"{relative(output, expected):.0e}",
        "fp32 gradients": f"{worst(grads, expected_grads):.0e}",
        "aux loss": f"{worst(aux_grads, expected_aux_grads):.0e}" if expected_aux else "",
    }


class FixedRouter(torch.nn.Module):
    """Llama 4's router, held to the scores of one call, a parameter: precisions share one routing."""

    def __init__(self, scores, logits):
        super().__init__()
        self.scores, self.logits = torch.nn.Parameter(scores.detach()), logits.detach()

    def forward(self, hidden_states):
        return self.scores, self.logits


@pytest.mark.parametrize("family", DISPATCHED + ADAPTED)
def test_experts_alone_in_half_precision_are_close_to_eager_in_fp64(family, table):
    model, calls = build(family, scale=0.2), []
    # Llama 4's experts of eager take other rows than ours: they are compared with the block around them.
    experts = served(model)[-2 if family == "llama4_text" else -1]
    experts.register_forward_pre_hook(lambda _, args: calls.append(args))
    model(**arguments(model, tokens((2, 7))), use_cache=False)
    experts._forward_pre_hooks.clear()
    if family == "llama4_text":
        experts.router = FixedRouter(*experts.router(calls[0][0].flatten(0, 1)))
    for dtype, bound in HALF.items():
        hidden_states, *routing = calls[0]
        hidden_states = hidden_states.detach().to(dtype)
        half = copy.deepcopy(experts).to(dtype)
        truth = copy.deepcopy(half).double()
        expected, expected_grads = call(truth, "eager", hidden_states.double(), *routing)
        for module in filter(adapters.is_adaptable, half.modules()):
            adapters.adapt(module)
        out, grads = call(half, NAME, hidden_states, *routing)
        assert out.dtype == dtype
        assert relative(out, expected) <= bound
        assert_gradients(grads, expected_grads, bound)
        error = max(relative(out, expected), worst(grads, expected_grads))
        table[family][str(dtype).removeprefix("torch.")] = f"{error:.0e}"


def call(experts, implementation, hidden_states, *routing):
    """Output of an experts module, and its gradients by name; routing weights in fp64 beside fp64 states."""
    if is_dispatched(experts):
        experts.config._experts_implementation = implementation
    inputs = {"hidden_states": hidden_states}
    for i, value in enumerate(routing):
        if torch.is_tensor(value) and value.is_floating_point():
            value = value.detach()
            value = value.double() if hidden_states.dtype == torch.float64 else value
        inputs[f"routing{i}"] = value
    for value in inputs.values():
        if torch.is_tensor(value) and value.is_floating_point():
            value.requires_grad_()
    out = experts(*inputs.values())
    out = out[0] if isinstance(out, tuple) else out
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).to(out.dtype)
    grads = gradients((out * upstream).sum(), experts)
    leaves = {name: v.grad for name, v in inputs.items() if torch.is_tensor(v) and v.is_floating_point()}
    return out.detach(), grads | leaves


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


# ---- the table of docs/models.md

COLUMNS = [
    "experts", "through", "activation", "fp32 output", "fp32 gradients", "aux loss", "bfloat16", "float16",
]  # fmt: skip
HEAD = """# Models

Every family of Hugging Face transformers {version} that has a mixture of experts, as a tiny random model,
against the family's own eager code. The numbers are largest differences in units of the largest expected
value:

- fp32: of the output (logits, or the last hidden states) and of the gradients of every parameter; bounds
  {output:.0e} and {gradient:.0e}.
- aux loss: of the gradients of the auxiliary loss, where the family has one.
- bfloat16, float16: of output and gradients of the experts alone (Llama 4: with its shared expert, behind a
  fixed routing), against eager in float64 with the same weights and states; bounds {bf16:.0e} and {fp16:.0e}.

`FASTMOE_WRITE_MODELS=1 pytest tests/test_transformers_families.py` writes this page.

"""
FOOT = """
Elsewhere:

- `nllb-moe`, through an adapter: transformers' own forward takes the mask of the first choice for expert ids,
  and so runs only experts 0 and 1. `tests/test_transformers_adapters.py` shows it, and compares ours with a
  hand-written top-2 layer.
- Grok-1 and Grok-2 are not in transformers: `fastmoe_rs.integrations.grok.GrokMoE` is their block.
  `tests/test_grok.py` holds its output and gradients against token-by-token code after the public sources.
- Experts in FP8 have a registry of their own in transformers; there fastmoe_rs raises an error that names the
  remedy, to load the checkpoint dequantized.
- `doge` is left alone: its experts are rows of two embeddings, so that there is no matrix product to group.
- `vitpose_backbone` is left alone: one expert serves a whole image, and the data set names it.
"""


@pytest.fixture(scope="module")
def table():
    """What the tests measure, by family and column; written to docs/models.md when asked for."""
    rows = {family: {} for family in DISPATCHED + ADAPTED}
    yield rows
    if os.environ.get("FASTMOE_WRITE_MODELS"):
        lines = ["| family | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
        for family, row in sorted(rows.items()):
            lines.append(f"| `{family}` | " + " | ".join(row.get(c, "") for c in COLUMNS) + " |")
        bounds = dict(zip(("bf16", "fp16"), HALF.values(), strict=True))
        head = HEAD.format(
            version=transformers.__version__, output=FP32_OUTPUT, gradient=FP32_GRADIENT, **bounds
        )
        TABLE.write_text(head + "\n".join(lines) + "\n" + FOOT)


def test_table_of_the_docs_lists_what_is_tested():
    text = TABLE.read_text()
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| `")]
    assert [row[0].strip("`") for row in rows] == sorted(DISPATCHED + ADAPTED)
    bounds = FP32_OUTPUT, FP32_GRADIENT, FP32_GRADIENT, *HALF.values()
    for row in rows:
        for column, cell, bound in zip(COLUMNS[3:], row[4:], bounds, strict=True):
            assert column == "aux loss" if not cell.strip() else float(cell) <= bound, row
    assert text.endswith(FOOT)


def test_no_decorated_family_is_forgotten():
    version = re.search(r"transformers ([\d.]+)", TABLE.read_text())[1]
    if version != transformers.__version__:
        pytest.skip(f"docs/models.md is about transformers {version}, this is {transformers.__version__}")
    sources = Path(transformers.__file__).parent.glob("models/*/modeling_*.py")
    decorated = {p.parent.name for p in sources if "@use_experts_implementation" in p.read_text()}
    configs = (transformers.CONFIG_MAPPING[family] for family in DISPATCHED)
    assert decorated == {config.__module__.split(".")[2] for config in configs}

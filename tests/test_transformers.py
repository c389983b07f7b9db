"""fastmoe_rs inside Hugging Face models: the eager model's numbers, gradients, tokens and adapters.

Legend: T tokens, H hidden size, E experts, K experts per token.
"""

import copy
import sys
import warnings

import pytest
import torch
from torch import nn

import fastmoe_rs

transformers = pytest.importorskip(
    "transformers", minversion="5", reason="the integration is for transformers >= 5"
)

from transformers.integrations.moe import ExpertsInterface  # noqa: E402

from fastmoe_rs.integrations import adapters, swap  # noqa: E402
from fastmoe_rs.integrations.transformers import NAME, fastmoe_experts  # noqa: E402
from transformers_models import (  # noqa: E402
    assert_gradients,
    build,
    build_experts,
    gradients,
    relative,
    routed,
    run,
    tokens,
)

FAMILIES = ("mixtral", "olmoe", "qwen3_moe", "deepseek_v3", "gpt_oss")
# Experts that differ: fused, transposed with biases, without a gate, own gate, own activation, output norm.
EXPERTS = ("mixtral", "gpt_oss", "nemotron_h", "deepseek_v4", "inkling2_text", "muse_spark_text")

# fp32 rounds to 2**-24 = 6e-8; sums of 20 to 60 terms in another order differ by a few dozen of that.
FP32_OUTPUT, FP32_GRADIENT = 2e-6, 5e-6


@pytest.mark.parametrize("family", FAMILIES)
def test_model_gives_the_logits_and_gradients_of_eager(family):
    model, ids = build(family), tokens()
    expected = model(ids, labels=ids)
    expected_grads = gradients(expected.loss, model)
    assert fastmoe_rs.accelerate(model) is model
    actual = model(ids, labels=ids)
    assert relative(actual.logits, expected.logits) <= FP32_OUTPUT
    assert all(grad is not None for grad in expected_grads.values())
    assert_gradients(gradients(actual.loss, model), expected_grads, FP32_GRADIENT)


@pytest.mark.parametrize("family", FAMILIES)
def test_generates_the_tokens_of_eager(family):
    model, ids = build(family), tokens((2, 5))
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected = model.generate(ids, **options)
    actual = fastmoe_rs.accelerate(model).generate(ids, **options)
    assert expected.shape == (2, 13)
    assert torch.equal(actual, expected)


def test_name_is_taken_at_construction_and_at_run_time(monkeypatch):
    calls = []

    def spy(self, *args):
        calls.append(type(self).__name__)
        return fastmoe_experts(self, *args)

    monkeypatch.setitem(ExpertsInterface._global_mapping, NAME, spy)
    model = build("mixtral", NAME)
    model(tokens())
    assert calls == ["MixtralExperts"] * 2  # one a layer
    model.set_experts_implementation("eager")
    model(tokens())
    assert len(calls) == 2
    model.set_experts_implementation(NAME)
    model(tokens())
    assert len(calls) == 4


def test_accelerate_reaches_models_inside_wrappers():
    wrapper = nn.ModuleDict({"teacher": build("olmoe"), "student": build("qwen3_moe")})
    fastmoe_rs.accelerate(wrapper)
    assert {model.config._experts_implementation for model in wrapper.values()} == {NAME}


# ---- the experts call alone


# The truth is eager in fp64 with the same half-precision weights. The pre-activation, its gradient and the
# results are rounded to the dtype: each by up to 2**-9 (bf16) or 2**-12 (fp16) of its value.
@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 2**-6), (torch.float16, 2**-9)], ids=str)
@pytest.mark.parametrize("family", EXPERTS)
def test_half_precision_experts_are_close_to_the_truth(family, dtype, bound):
    experts = build_experts(family).to(dtype)
    x_TH, ids_TK, weights_TK = routed(experts)
    x_TH = x_TH.to(dtype)
    out_TH, grads = run(experts, NAME, x_TH, ids_TK, weights_TK)  # routers hand over fp32 weights
    assert out_TH.dtype == dtype
    assert grads["top_k_weights"].dtype == torch.float32
    truth = copy.deepcopy(experts).double()
    expected_TH, expected_grads = run(truth, "eager", x_TH.double(), ids_TK, weights_TK.double())
    assert relative(out_TH, expected_TH) <= bound
    assert_gradients(grads, expected_grads, bound)


@pytest.mark.parametrize("family", EXPERTS)
def test_fp32_experts_serve_bf16_states(family):
    experts = build_experts(family)
    x_TH, ids_TK, weights_TK = routed(experts)
    x_TH = x_TH.bfloat16()
    out_TH, grads = run(experts, NAME, x_TH, ids_TK, weights_TK)
    assert out_TH.dtype == grads["hidden_states"].dtype == torch.bfloat16
    expected_TH, _ = run(experts, "eager", x_TH.float(), ids_TK, weights_TK)
    assert relative(out_TH, expected_TH) <= 2**-8  # one rounding, of the result


@pytest.mark.parametrize("family", EXPERTS)
def test_no_tokens(family):
    experts = build_experts(family)
    x_TH, ids_TK, weights_TK = routed(experts, T=0)
    out_TH, grads = run(experts, NAME, x_TH, ids_TK, weights_TK)
    assert out_TH.shape == x_TH.shape
    assert all(torch.count_nonzero(grads[name]) == 0 for name, _ in experts.named_parameters())


@pytest.mark.parametrize("family", EXPERTS)
def test_routes_to_other_ranks_add_nothing_and_get_no_gradient(family):
    experts = build_experts(family)
    x_TH, ids_TK, weights_TK = routed(experts, ids_below=experts.num_experts + 3)
    away_TK = ids_TK >= experts.num_experts
    assert away_TK.any()
    with pytest.raises(ValueError, match="ids"):
        run(experts, NAME, x_TH, ids_TK, weights_TK)
    experts._is_expert_parallel = True
    out_TH, grads = run(experts, NAME, x_TH, ids_TK, weights_TK)
    assert torch.count_nonzero(grads["top_k_weights"][away_TK]) == 0
    here_TK = ids_TK.clamp(max=experts.num_experts - 1)
    expected_TH, expected_grads = run(experts, "eager", x_TH, here_TK, weights_TK.masked_fill(away_TK, 0.0))
    expected_grads["top_k_weights"].masked_fill_(away_TK, 0.0)
    assert relative(out_TH, expected_TH) <= FP32_OUTPUT
    assert_gradients(grads, expected_grads, FP32_GRADIENT)


# ---- together with PEFT, torch.compile and the auxiliary loss


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_every_lora_adapter_of_the_experts_moves_as_in_eager(family):
    peft = pytest.importorskip("peft", reason="tests adapters of PEFT")
    options = peft.LoraConfig(r=2, target_parameters=["experts.gate_up_proj", "experts.down_proj"])

    def steps(swap_in):
        torch.manual_seed(0)
        model = swap_in(peft.get_peft_model(build(family), options))
        adapters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        start = {name: p.detach().clone() for name, p in adapters.items()}
        optimizer = torch.optim.SGD(adapters.values(), lr=0.5)
        for _ in range(2):  # the first step moves only B, because B starts as zeros
            optimizer.zero_grad()
            model(tokens(), labels=tokens()).loss.backward()
            optimizer.step()
        return model, {name: p.detach() - start[name] for name, p in adapters.items()}

    _, expected = steps(lambda model: model)
    model, actual = steps(fastmoe_rs.accelerate)
    assert model.config._experts_implementation == NAME
    assert len(actual) == 8  # A and B of two parameters in two layers
    for name, step in actual.items():
        assert step.abs().max() > 1e-6, name
        assert relative(step, expected[name]) <= 1e-4, name


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "deepseek_v4"])
def test_experts_compile_to_one_graph(family):
    experts = build_experts(family)
    problem = routed(experts)
    expected_TH, expected_grads = run(experts, NAME, *problem)
    compiled = torch.compile(experts, fullgraph=True, backend="aot_eager")
    out_TH, grads = run(compiled, NAME, *problem)
    assert relative(out_TH, expected_TH) <= FP32_OUTPUT
    assert_gradients(
        {name.removeprefix("_orig_mod."): g for name, g in grads.items()}, expected_grads, FP32_GRADIENT
    )


def test_block_compiles_to_one_graph_with_inductor():
    block = build("mixtral", NAME).model.layers[0].mlp
    x = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(4))
    expected = block(x)
    expected_grads = gradients(expected.square().sum(), block)
    actual = torch.compile(block, fullgraph=True)(x)
    assert relative(actual, expected) <= FP32_OUTPUT
    assert_gradients(gradients(actual.square().sum(), block), expected_grads, FP32_GRADIENT)


def test_checkpointed_activations_give_the_same_gradients():
    model, ids = build("mixtral").train(), tokens()
    expected_grads = gradients(model(ids, labels=ids).loss, model)
    fastmoe_rs.accelerate(model)
    model.gradient_checkpointing_enable()
    actual_grads = gradients(model(ids, labels=ids, use_cache=False).loss, model)
    assert_gradients(actual_grads, expected_grads, FP32_GRADIENT)


def test_autocast_trains_in_bf16():
    model, ids = build("mixtral"), tokens()
    expected = model(ids, labels=ids)
    expected_grads = gradients(expected.loss, model)
    fastmoe_rs.accelerate(model)
    with torch.autocast("cpu", torch.bfloat16):
        actual = model(ids, labels=ids)
    assert relative(actual.loss, expected.loss) <= 2**-8
    assert_gradients(gradients(actual.loss, model), expected_grads, 2**-4)


def test_auxiliary_loss_keeps_its_value_and_gradient():
    model, ids = build("mixtral", output_router_logits=True, router_aux_loss_coef=0.5), tokens()
    expected = model(ids, labels=ids)
    expected_grads = gradients(expected.aux_loss, model)
    fastmoe_rs.accelerate(model)
    actual = model(ids, labels=ids)
    assert relative(actual.aux_loss, expected.aux_loss) <= FP32_OUTPUT
    assert relative(actual.loss, expected.loss) <= FP32_OUTPUT
    assert_gradients(gradients(actual.aux_loss, model), expected_grads, FP32_GRADIENT)


# ---- and back


def served(model):
    """Whether fastmoe_rs computes anything in a model."""
    return NAME in implementations(model) or any(
        type(module).__module__ == adapters.__name__ for module in model.modules()
    )


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "llama4_text", "dbrx", "jetmoe"])
@pytest.mark.parametrize("copied", [lambda model: model, copy.deepcopy], ids=["same", "copy"])
def test_restore_undoes_accelerate(family, copied):
    model, ids = build(family), tokens()
    before, expected = implementations(model), model(ids).logits
    classes = [type(module) for module in model.modules()]
    fastmoe_rs.accelerate(fastmoe_rs.accelerate(model))
    assert served(model)
    model = copied(model)
    assert fastmoe_rs.restore(model) is model
    assert not served(model)
    assert implementations(model) == before
    assert [type(module) for module in model.modules()] == classes
    assert torch.equal(model(ids).logits, expected)
    assert served(fastmoe_rs.accelerate(model))


def test_restore_gives_back_the_implementation_of_each_model():
    teacher, student = build("olmoe", "batched_mm"), build("qwen3_moe", NAME)
    wrapper = nn.ModuleDict({"teacher": teacher, "student": student})
    fastmoe_rs.restore(fastmoe_rs.accelerate(wrapper))
    assert teacher.config._experts_implementation == "batched_mm"
    assert student.config._experts_implementation == "eager"
    teacher.set_experts_implementation("grouped_mm")  # what is not ours stays
    assert fastmoe_rs.restore(wrapper)["teacher"].config._experts_implementation == "grouped_mm"
    assert isinstance(fastmoe_rs.restore(nn.Linear(2, 2)), nn.Linear)
    with pytest.raises(TypeError, match=r"model: got dict, wanted a torch\.nn\.Module"):
        fastmoe_rs.restore({})


# ---- models that are left alone


def fp8():
    from transformers.integrations.finegrained_fp8 import replace_with_fp8_linear

    return replace_with_fp8_linear(build("mixtral"), quantization_config=transformers.FineGrainedFP8Config())


def mxfp4():
    from transformers.integrations.mxfp4 import Mxfp4GptOssExperts

    model = build("gpt_oss")
    model.is_quantized = True
    for layer in model.model.layers:
        layer.mlp.experts = Mxfp4GptOssExperts(model.config)
    return model


UNSERVED = {
    "plain": (lambda: nn.Linear(2, 2), "Linear .*holds no transformers model"),
    "dense": (lambda: build("llama"), "LlamaForCausalLM .*no mixture-of-experts layer"),
    "dense layers only": (
        lambda: build("qwen3_moe", mlp_only_layers=[0, 1]),
        "Qwen3MoeForCausalLM .*no mixture-of-experts layer",
    ),
    "fp8": (fp8, "MixtralForCausalLM .*FP8Experts holds torch.float8_e4m3fn"),
    "mxfp4": (mxfp4, "GptOssForCausalLM .*its experts are quantized"),
}


@pytest.mark.parametrize(("make", "reason"), UNSERVED.values(), ids=UNSERVED.keys())
def test_unserved_model_is_left_alone_with_the_reason(make, reason):
    model = make()
    before = implementations(model)
    with pytest.warns(UserWarning, match=f"fastmoe_rs leaves {reason}") as caught:
        assert fastmoe_rs.accelerate(model) is model
    assert len(caught) == 1
    assert implementations(model) == before


def implementations(model):
    return [m.config._experts_implementation for m in model.modules() if hasattr(m, "config")]


def test_family_without_dispatch_or_adapter_is_left_alone(monkeypatch):
    monkeypatch.setattr(adapters, "SINCE", "999")
    model = build("llama4_text")
    with pytest.warns(UserWarning, match="does not dispatch the experts of this family"):
        fastmoe_rs.accelerate(model)
    assert type(model.model.layers[0].feed_forward).__module__.startswith("transformers.")


def test_model_on_an_unserved_device_is_left_alone(monkeypatch):
    monkeypatch.setattr(swap, "DEVICES", ("cuda",))
    model = build("mixtral")
    with pytest.warns(UserWarning, match="MixtralExperts is on cpu"):
        fastmoe_rs.accelerate(model)
    assert model.config._experts_implementation == "eager"


def test_missing_transformers_is_named(monkeypatch):
    monkeypatch.delitem(sys.modules, "fastmoe_rs.integrations.transformers")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.warns(UserWarning, match=r"needs transformers >= 5: pip install"):
        fastmoe_rs.accelerate(nn.Linear(2, 2))


def test_served_model_gets_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fastmoe_rs.accelerate(build("mixtral"))


def test_accelerate_wants_a_module():
    with pytest.raises(TypeError, match=r"model: got dict, wanted a torch\.nn\.Module"):
        fastmoe_rs.accelerate({})

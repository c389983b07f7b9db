"""The adapters of families that transformers does not dispatch: loading, pickling, and NLLB-MoE's oracle.

Legend: T tokens, H hidden size, E experts.
"""

import copy
import pickle

import pytest
import torch

import fastmoe_rs

pytest.importorskip("transformers", "5.23", reason="the adapters are for transformers >= 5.23")

from transformers import AutoModel
from transformers.monkey_patching import unregister_patch_mapping

from fastmoe_rs.integrations import adapters
from fastmoe_rs.integrations.transformers import NAME
from moe_cases import needs_float64
from test_transformers import fp8
from transformers_models import (
    arguments,
    assert_gradients,
    build,
    gradients,
    randomise,
    relative,
    tokens,
)


def nllb():
    """A sparse layer of NLLB-MoE whose capacity drops some of the routes, and hidden states for it."""
    layer = build("nllb-moe", expert_capacity=8, moe_eval_capacity_token_fraction=0.3)
    layer = layer.model.encoder.layers[0].ffn
    return layer, torch.randn(2, 12, 32, generator=torch.Generator().manual_seed(4))


def top2(layer, x_TH, token_dropout=None):
    """GShard's top-2 layer, token by token; first choices take an expert's places before second ones.

    In training, `token_dropout` masks each expert's output; in evaluation outputs are scaled down instead.
    """
    probabilities_TE = torch.softmax(layer.router.classifier(x_TH), dim=-1)
    capacity = -(-3 * len(x_TH) // 10)
    choices = probabilities_TE.topk(2, dim=-1).indices.tolist()
    taken = [0] * layer.num_experts
    kept = [[], []]
    for k in range(2):
        for t, ids in enumerate(choices):
            if taken[ids[k]] < capacity:
                kept[k].append(t)
            taken[ids[k]] += 1
    assert len(kept[0]) + len(kept[1]) < 2 * len(x_TH), "the capacity drops something"
    rows = []
    for t, x_H in enumerate(x_TH):
        served = [choices[t][k] for k in range(2) if t in kept[k]]
        total = sum(probabilities_TE[t, e] for e in served)
        outputs = [layer.experts[f"expert_{e}"](x_H[None])[0] for e in served]
        outputs = outputs if token_dropout is None else map(token_dropout, outputs)
        weighted = [probabilities_TE[t, e] / total * y_H for e, y_H in zip(served, outputs, strict=True)]
        rows.append(sum(weighted, torch.zeros_like(x_H)))
    return torch.stack(rows) * (1 if token_dropout else 1 - layer.experts.moe_token_dropout)


def test_nllb_is_the_top2_layer_and_the_shipped_forward_is_not():
    layer, x = nllb()
    assert relative(layer(x), top2(layer, x.flatten(0, 1)).view_as(x)) > 0.1
    assert_top2(layer, x)


def assert_top2(layer, x, **options):
    """The adapted layer gives the output and every gradient of `top2`."""
    expected = top2(layer, x.flatten(0, 1), **options).view_as(x)
    expected_grads = gradients(expected.square().sum(), layer)
    adapters.adapt(layer)
    actual = layer(x)
    assert relative(actual, expected) <= 2e-6
    grads = gradients(actual.square().sum(), layer)
    trained = {name: grad for name, grad in expected_grads.items() if grad is not None}
    assert trained
    assert_gradients({name: grads[name] for name in trained}, trained, 1e-5)


def test_nllb_with_lora_on_its_linear_layers():
    peft = pytest.importorskip("peft", reason="tests adapters of PEFT")
    layer, x = nllb()
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["fc1", "fc2"]), layer)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)  # from zeros, which hide errors
    assert_top2(layer, x)


FUSED = {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
# Not DBRX: PEFT's wrapper of one of its three weights hides the other two from transformers' own code.
LORA = {
    "jetmoe": {"target_parameters": ["mlp.input_linear.weight", "mlp.output_linear.weight"]},
    "llama4_text": FUSED,
    "longcat_flash": FUSED,
    "step3p5": FUSED,
    "switch_transformers": {"target_modules": ["wi", "wo"]},
}


@pytest.mark.parametrize("family", LORA)
def test_lora_on_the_experts_has_the_gradients_of_eager(family):
    peft = pytest.importorskip("peft", reason="tests adapters of PEFT")
    model = peft.get_peft_model(build(family), peft.LoraConfig(r=2, **LORA[family]))
    randomise(model)  # B starts as zeros, which hides errors
    ids = tokens((4, 16))

    def outcome():
        out = model(**arguments(model.get_base_model(), ids))
        logits = out["logits"] if "logits" in out else out[0]
        return logits.detach(), gradients(logits.square().mean(), model)

    expected, expected_grads = outcome()
    fastmoe_rs.accelerate(model)
    actual, grads = outcome()
    assert any(type(module).__module__ == adapters.__name__ for module in model.modules())
    assert relative(actual, expected) <= 1e-5
    assert_gradients(grads, expected_grads, 1e-4)
    # Each adapter learns. Only Switch has some for each expert: those of an expert without a token do not.
    idle = [name for name, grad in grads.items() if not grad.any()]
    assert idle == [name for name, grad in expected_grads.items() if grad is None or not grad.any()]
    assert len(idle) < (len(grads) / 2 if family == "switch_transformers" else 1)


class EveryThird(torch.nn.Module):
    """A dropout of every third column, the same for every row, so that the order of rows does not matter."""

    def __init__(self):
        super().__init__()
        self.p = 1 / 3

    def forward(self, h):
        keep = torch.arange(h.shape[-1]) % 3 > 0
        return h * keep / (1 - self.p)


def test_nllb_drops_out_activations_and_expert_outputs_in_training():
    layer, x = nllb()
    for mlp in layer.experts.values():
        if hasattr(mlp, "dropout"):
            mlp.dropout = EveryThird()
    layer.experts.token_dropout = EveryThird()
    layer.train()
    assert_top2(layer, x, token_dropout=layer.experts.token_dropout)


def switch(**options):
    """The experts of Switch Transformers, and arguments whose last two tokens the capacity dropped."""
    experts = build("switch_transformers", **options).encoder.block[1].layer[-1].mlp.experts
    generator = torch.Generator().manual_seed(5)
    selected = torch.nn.functional.one_hot(torch.randint(0, 8, (12, 1), generator=generator), 8)
    selected[10:] = 0
    return experts, (
        torch.randn(12, 32, generator=generator),
        selected,
        torch.rand(12, 1, generator=generator),
    )


def test_switch_drops_out_activations_in_training():
    experts, inputs = switch()
    for mlp in experts.values():
        mlp.dropout = EveryThird()
    experts.train()
    expected = experts(*inputs)
    expected_grads = gradients(expected.square().sum(), experts)
    adapters.adapt(experts)
    actual = experts(*inputs)
    assert relative(actual, expected) <= 2e-6
    grads = gradients(actual.square().sum(), experts)
    trained = {name: grad for name, grad in expected_grads.items() if grad is not None}
    assert_gradients({name: grads[name] for name in trained}, trained, 1e-5)


@torch.no_grad()
def test_random_dropout_of_switch_is_unbiased_and_ends_with_training():
    experts, inputs = switch(dropout_rate=0.3)
    expected = experts(*inputs)
    adapters.adapt(experts)
    assert relative(experts(*inputs), expected) <= 2e-6
    experts.train()
    draws = torch.stack([experts(*inputs) for _ in range(400)])
    assert not torch.equal(draws[0], draws[1])
    error = (draws.mean(0) - expected).abs()
    assert (error <= 5 * draws.std(0) / 20 + 1e-6).all()
    assert (draws.std(0)[:10] > 0).all()  # none is left out


@needs_float64
@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 2**-6), (torch.float16, 2**-9)], ids=str)
def test_nllb_in_half_precision_is_close_to_fp64(dtype, bound):
    layer, x = nllb()
    half = copy.deepcopy(layer).to(dtype)
    truth = copy.deepcopy(half).double()
    adapters.adapt(half)
    adapters.adapt(truth)
    assert relative(half(x.to(dtype)), truth(x.to(dtype).double())) <= bound


def test_registered_adapters_serve_models_that_are_built_afterwards():
    model = build("llama4_text")
    adapters.register_adapters()
    try:
        built = build("llama4_text")
    finally:
        unregister_patch_mapping(list(adapters.ADAPTERS))
    served = [m for m in built.modules() if type(m).__module__ == adapters.__name__]
    assert len(served) == 4  # block and experts of two layers
    assert built.state_dict().keys() == model.state_dict().keys()
    assert relative(built(tokens()).logits, model(tokens()).logits) <= 2e-6


def test_adapted_switch_saves_loads_and_pickles(tmp_path):
    model = build("switch_transformers")
    expected = model(tokens(), decoder_input_ids=tokens()).logits
    keys = list(model.state_dict())
    fastmoe_rs.accelerate(fastmoe_rs.accelerate(model))
    assert list(model.state_dict()) == keys
    model.save_pretrained(tmp_path)
    for again in (pickle.loads(pickle.dumps(model)), type(model).from_pretrained(tmp_path).eval()):
        assert relative(again(tokens(), decoder_input_ids=tokens()).logits, expected) <= 2e-6
    assert isinstance(AutoModel.from_pretrained(tmp_path), torch.nn.Module)


def test_fp8_experts_name_the_remedy():
    model = fp8()
    model.set_experts_implementation(NAME)
    experts = model.model.layers[0].mlp.experts
    with pytest.raises(NotImplementedError, match=r"dequantize=True"):
        experts(torch.zeros(1, 32), torch.zeros(1, 1, dtype=torch.long), torch.ones(1, 1))

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
from test_transformers import fp8
from transformers_models import assert_gradients, build, gradients, relative, tokens


def nllb():
    """A sparse layer of NLLB-MoE whose capacity drops some of the routes, and hidden states for it."""
    layer = build("nllb-moe", expert_capacity=8, moe_eval_capacity_token_fraction=0.3)
    layer = layer.model.encoder.layers[0].ffn
    return layer, torch.randn(2, 12, 32, generator=torch.Generator().manual_seed(4))


def top2(layer, x_TH):
    """GShard's top-2 layer, token by token; first choices take an expert's places before second ones."""
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
        outputs = [
            probabilities_TE[t, e] / total * layer.experts[f"expert_{e}"](x_H[None])[0] for e in served
        ]
        rows.append(sum(outputs, torch.zeros_like(x_H)))
    return torch.stack(rows) * (1 - layer.experts.moe_token_dropout)


def test_nllb_is_the_top2_layer_and_the_shipped_forward_is_not():
    layer, x = nllb()
    expected = top2(layer, x.flatten(0, 1)).view_as(x)
    expected_grads = gradients(expected.square().sum(), layer)
    assert relative(layer(x), expected) > 0.1
    adapters.adapt(layer)
    actual = layer(x)
    assert relative(actual, expected) <= 2e-6
    grads = gradients(actual.square().sum(), layer)
    trained = {name: grad for name, grad in expected_grads.items() if grad is not None}
    assert_gradients({name: grads[name] for name in trained}, trained, 1e-5)


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

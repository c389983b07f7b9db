"""Tiny random transformers models and experts modules, and how their numbers are compared."""

import importlib
import inspect

import pytest
import torch
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
)

from fastmoe_rs.integrations import adapters
from fastmoe_rs.integrations.swap import is_dispatched

AUTO_CLASSES = (AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModel)

# Each family takes those of these sizes that its configuration has.
SIZES = {
    "hidden_size": 32,
    "moe_hidden_size": 32,
    "intermediate_size": 24,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 16,
    "num_hidden_layers": 2,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "linear_head_dim": 8,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "index_topk": 4,
    "index_n_heads": 2,
    "index_head_dim": 16,
    "sliding_window": 8,
    "vocab_size": 64,
    "max_position_embeddings": 64,
    "num_local_experts": 8,
    "num_experts": 8,
    "n_routed_experts": 8,
    "moe_num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_k": 2,
    "n_group": 2,
    "topk_group": 1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
OVERRIDES = {
    "bailing_hybrid": {"n_group": 2, "topk_group": 2},
    "beam": {"mlp_layer_types": ["sparse", "sparse"]},
    "dbrx": {
        "d_model": 32,
        "n_heads": 4,
        "n_layers": 2,
        "max_seq_len": 64,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 24, "moe_num_experts": 8, "moe_top_k": 2},
        "rope_parameters": ROPE,
    },
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse"]},
    "deepseek_v4": {"num_hash_layers": 1},
    "diffusion_gemma_text": {"top_k_experts": 2, "global_head_dim": 8},
    "dots1": {"n_shared_experts": 1},
    "ernie4_5_vl_moe_text": {
        "moe_intermediate_size": [24, 16],
        "rope_parameters": ROPE | {"mrope_section": [1, 1, 2]},
    },
    "flint": {"mlp_only_layers": []},
    "gemma4_text": {
        "enable_moe_block": True,
        "top_k_experts": 2,
        "global_head_dim": 8,
        "hidden_size_per_layer_input": 0,
        "vocab_size_per_layer_input": 64,
        "num_kv_shared_layers": 0,
    },
    "glm4v_moe_text": {"rope_parameters": ROPE | {"mrope_section": [2, 1, 1], "partial_rotary_factor": 1.0}},
    "glm5_next_text": {"index_topk": 16, "qk_rope_head_dim": 0, "mlp_layer_types": ["dense", "sparse"]},
    "granitemoehybrid": {"mamba_n_heads": 4, "mamba_d_head": 16, "layer_types": ["attention", "attention"]},
    "hunyuan_v1_moe": {"moe_topk": 2},
    "hy_v4_vl_text": {"rope_parameters": ROPE | {"mrope_section": [2, 1, 1]}},
    "inkling2_loop_text": {
        "n_layers_per_attn_res_block": 1,
        "loop_layer_index_start": 1,
        "loop_layer_index_end": 2,
        "loop_num_passes": 2,
        "loop_gate_rank": 4,
    },
    "jetmoe": {"kv_channels": 8},
    "lfm2_moe": {"layer_types": ["full_attention", "full_attention"]},
    "llama4_text": {"intermediate_size_mlp": 24},
    "longcat_flash": {
        "num_layers": 2,
        "moe_topk": 3,
        "zero_expert_num": 4,
        "ffn_hidden_size": 24,
        "expert_ffn_hidden_size": 24,
    },
    "mistral4": {"head_dim": 16},
    "nllb-moe": {
        "d_model": 32,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_sparse_step": 1,
        "decoder_sparse_step": 2,
        "encoder_ffn_dim": 24,
        "decoder_ffn_dim": 24,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
    },
    "qwen3_omni_moe_talker_text": {"shared_expert_intermediate_size": 16},
    "step3p5": {
        "mlp_layer_types": ["sparse", "sparse"],
        "share_expert_dim": 16,
        "swiglu_limits": [0.5, 0.0],
        "num_sliding_attention_heads": 4,
    },
    "switch_transformers": {
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 24,
        "num_layers": 2,
        "num_decoder_layers": 2,
        "num_sparse_encoder_layers": 1,
        "num_sparse_decoder_layers": 1,
        "num_heads": 4,
        "expert_capacity": 2,
    },
    "zaya": {"num_experts_per_tok": 1},
}


def config(family, **overrides):
    """The configuration of a family, shrunk; skips the test where transformers is too old for the family."""
    if family not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {family}")
    known = AutoConfig.for_model(family).to_dict()
    sizes = {name: size for name, size in SIZES.items() if name in known}
    if "kv_lora_rank" in known:  # multi-head latent attention has no groups of queries
        sizes["num_key_value_heads"] = sizes["num_attention_heads"]
    return AutoConfig.for_model(family, **sizes | OVERRIDES.get(family, {}) | overrides)


def randomise(module, scale=0.3):
    """Every parameter, selection bias and hash table drawn anew: many start as zeros, which hides errors."""
    generator = torch.Generator().manual_seed(0)
    buffers = dict(module.named_buffers())
    floats = dict(module.named_parameters()) | {name: b for name, b in buffers.items() if "bias" in name}
    with torch.no_grad():
        for tensor in floats.values():
            tensor.copy_(torch.empty(tensor.shape).uniform_(-scale, scale, generator=generator))
        for tensor in (b for name, b in buffers.items() if name.endswith("tid2eid")):
            tensor.copy_(torch.randint(0, SIZES["num_local_experts"], tensor.shape, generator=generator))
    return module


def build(family, implementation="eager", *, scale=0.3, **overrides):
    """A model in evaluation mode, with a language modelling head where the family has one."""
    shrunk = config(family, **overrides)
    mapped = [auto for auto in AUTO_CLASSES if type(shrunk) in auto._model_mapping]
    make = mapped[0].from_config if mapped else text_model(shrunk)._from_config
    return randomise(make(shrunk, experts_implementation=implementation), scale).eval()


def modeling(shrunk):
    """The module that holds the models of a configuration."""
    return importlib.import_module(type(shrunk).__module__.replace("configuration_", "modeling_"))


def text_model(shrunk):
    """The model of a configuration that the auto classes do not list."""
    names = [name for name in vars(modeling(shrunk)) if name.endswith("Model") and "PreTrained" not in name]
    classes = [getattr(modeling(shrunk), name) for name in names]
    return next(c for c in classes if getattr(c, "config_class", None) is type(shrunk))


def build_experts(family, **overrides):
    """The experts module of a family alone."""
    shrunk = config(family, **overrides)
    experts = next(
        c for n, c in vars(modeling(shrunk)).items() if n.endswith("Experts") and hasattr(c, "_apply_gate")
    )
    return randomise(experts(shrunk))


def served(model):
    """The modules whose forward fastmoe_rs computes, once the model is accelerated."""
    return [m for m in model.modules() if is_dispatched(m) or adapters.is_adaptable(m)]


def tokens(shape=(2, 9)):
    """Token ids, none of them a special one."""
    return torch.randint(3, 64, shape, generator=torch.Generator().manual_seed(1))


def arguments(model, ids):
    """Keyword arguments of a model for token ids, labels and router logits included where it takes them."""
    known = inspect.signature(model.forward).parameters
    options = {"labels": ids, "output_router_logits": True, "decoder_input_ids": ids}
    options = {name: value for name, value in options.items() if name in known}
    if "moe_mm_token_type_ids" in known:  # every second token takes the vision experts
        options["moe_mm_token_type_ids"] = torch.arange(ids.numel()).view_as(ids) % 2
    if hasattr(model, "codec_embedding"):
        return options | {"inputs_embeds": model.codec_embedding(ids)}
    return options | {"input_ids": ids}


def routed(experts, T=40, K=3, ids_below=None):
    """Hidden states, expert ids (repeated in some rows) and routing weights for an experts module."""
    generator = torch.Generator().manual_seed(2)
    H = experts.down_proj.shape[2 if experts.is_transposed else 1]
    x_TH = torch.randn(T, H, generator=generator)
    ids_TK = torch.randint(0, ids_below or experts.num_experts, (T, K), generator=generator)
    return x_TH, ids_TK, torch.rand(T, K, generator=generator)


def run(experts, implementation, x_TH, ids_TK, weights_TK):
    """Output of one experts call, and its gradients by name."""
    experts.config._experts_implementation = implementation
    x_TH, weights_TK = x_TH.clone().requires_grad_(), weights_TK.clone().requires_grad_()
    out_TH = experts(x_TH, ids_TK, weights_TK)
    upstream_TH = torch.randn(out_TH.shape, generator=torch.Generator().manual_seed(3)).to(out_TH.dtype)
    grads = gradients((out_TH * upstream_TH).sum(), experts)
    return out_TH.detach(), grads | {"hidden_states": x_TH.grad, "top_k_weights": weights_TK.grad}


def gradients(loss, module):
    """Gradient of `loss` in every trainable parameter."""
    module.zero_grad()
    loss.backward()
    return {name: p.grad for name, p in module.named_parameters() if p.requires_grad}


def relative(actual, expected):
    """Largest difference in units of the largest expected value."""
    return ((actual.double() - expected.double()).abs().max() / expected.abs().max().clamp(min=1e-30)).item()


def assert_gradients(actual, expected, bound):
    """Every gradient that is expected is there, within `bound` of the largest expected value."""
    assert actual.keys() == expected.keys()
    errors = {name: relative(actual[name], grad) for name, grad in expected.items() if grad is not None}
    assert max(errors.values()) <= bound, {name: error for name, error in errors.items() if error > bound}

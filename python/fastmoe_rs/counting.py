"""The parameters of a Mixture-of-Experts model, counted from the numbers of its configuration alone.

Legend: H hidden size, I intermediate size, E experts, K experts per token, L layers.

What is counted: every parameter of the language model, embeddings, norms, biases and routers included, and
the vision tower of Llama 4. What is not: buffers (the selection bias of DeepSeek-V3's router), and the layers
that predict further tokens (MTP), which the published figures leave out too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .size import Count, Part

__all__ = ["EXPERTS", "count", "read_config"]

# The names that families have for the same number; the first one there counts.
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_TOP_K = ("num_experts_per_tok", "moe_top_k")
_EXPERT_SIZE = ("moe_intermediate_size", "intermediate_size")
_SHARED = ("n_shared_experts", "num_shared_experts")


@dataclass(frozen=True)
class _Family:
    """How a family differs from Mixtral; names are fields of its configuration."""

    norms: int = 2  # of size H, a layer
    norm_bias: bool = False
    qk_norm: str = ""  # "head": one of the size of a head each for queries and keys, "all": of all heads
    bias: str = ""  # field that tells whether the attention's projections have biases
    out_bias: bool = True  # whether that holds for the output projection too
    sinks: bool = False  # a number a head
    attention_gate: bool = False  # a projection as large as that of the queries
    expert_bias: bool = False  # of the router too
    selection_bias: bool = False  # as a parameter
    shared_gate: bool = False
    defaults: Mapping[str, Any] = field(default_factory=dict)


_FAMILIES = {
    "afmoe": _Family(
        norms=4,
        qk_norm="head",
        bias="attention_bias",
        attention_gate=True,
        selection_bias=True,
        defaults={"num_dense_layers": 1},
    ),
    "dbrx": _Family(),
    "deepseek_v2": _Family(bias="attention_bias"),
    "deepseek_v3": _Family(bias="attention_bias", defaults={"first_k_dense_replace": 3}),
    "dots1": _Family(qk_norm="head", bias="attention_bias"),
    "exaone_moe": _Family(qk_norm="head", defaults={"first_k_dense_replace": 1}),
    "flex_olmo": _Family(qk_norm="all", bias="attention_bias"),
    "glm4_moe": _Family(bias="attention_bias", out_bias=False, defaults={"first_k_dense_replace": 1}),
    "gpt_oss": _Family(
        bias="attention_bias", sinks=True, expert_bias=True, defaults={"attention_bias": True}
    ),
    "granitemoe": _Family(bias="attention_bias"),
    "granitemoeshared": _Family(bias="attention_bias"),
    "grok-1": _Family(norms=4),
    "llama4_text": _Family(bias="attention_bias"),
    "minimax_m2": _Family(qk_norm="all"),
    "mixtral": _Family(),
    "olmoe": _Family(qk_norm="all", bias="attention_bias"),
    "phimoe": _Family(norm_bias=True, bias="attention_bias"),
    "qwen2_moe": _Family(bias="qkv_bias", out_bias=False, shared_gate=True, defaults={"qkv_bias": True}),
    "qwen3_moe": _Family(qk_norm="head", bias="attention_bias"),
    "solar_open": _Family(bias="attention_bias"),
}
_SAME = {"kimi_k2": "deepseek_v3"}


def read_config(path: Path) -> dict[str, Any]:
    """What a `config.json` holds.

    Raises:
        ValueError: it is no JSON object.
    """
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path}: got a {type(config).__name__}, wanted a JSON object")
    return config


def count(config: Mapping[str, Any]) -> Count:
    """Count the parameters of the model that a configuration describes.

    Args:
        config: the content of a `config.json` in the words of Hugging Face transformers.

    Raises:
        ValueError: the family (`model_type`) is not one that this function knows, a size is no whole number,
            or a Switch Transformer has separate input and output embeddings.
        KeyError: the configuration lacks a number that the family needs.
    """
    kind = _SAME.get(config.get("model_type", ""), config.get("model_type", ""))
    if kind == "switch_transformers":
        return _count_switch(config)
    if kind == "llama4":
        return _with_vision(count({**config["text_config"], "model_type": "llama4_text"}), config)
    if kind not in _FAMILIES:
        known = ", ".join(sorted([*_FAMILIES, *_SAME, "llama4", "switch_transformers"]))
        raise ValueError(f"model_type: got {config.get('model_type')!r}, wanted one of {known}")
    if kind == "dbrx":
        config = _plain_dbrx(config)
    return _count_decoder(kind, _FAMILIES[kind], {**_FAMILIES[kind].defaults, **_present(config)})


def _count_decoder(kind: str, family: _Family, config: Mapping[str, Any]) -> Count:
    H, L, vocabulary = (_get(config, name) for name in ("hidden_size", "num_hidden_layers", "vocab_size"))
    E, K, I = _get(config, *EXPERTS), _get(config, *_TOP_K), _get(config, *_EXPERT_SIZE)
    if not 1 <= K <= E:
        raise ValueError(f"experts per token: got {K} of {E}, wanted at least 1 and at most all of them")
    sparse = _sparse_layers(config, L)
    attention, cache, attention_flops = _attention(family, config)

    biases = 2 * I + H if family.expert_bias else 0
    expert = _dense(3 * H * I, biases)
    routed = Part(E * expert.total, K * expert.active, K * expert.multiplied)
    router = _dense(H * E, E * (family.expert_bias + family.selection_bias))
    shared_size = _shared_size(kind, config, I)
    shared = _dense(3 * H * shared_size) + _dense(H if family.shared_gate else 0)
    mlp_size = config.get("intermediate_size_mlp") or config.get("intermediate_size", 0)
    norm = H * (2 if family.norm_bias else 1)
    tied = config.get("tie_word_embeddings", False)
    table = vocabulary * H

    parts = {
        "embedding": Part(table, table, 0),
        "attention": attention * L,
        "routed experts": routed * sparse,
        "shared experts": shared * sparse,
        "dense MLPs": _dense(3 * H * mlp_size) * (L - sparse),
        "routers": router * sparse,
        "norms": _dense(0, norm * (family.norms * L + 1)),
        "output head": Part(0, 0, table)
        if tied
        else _dense(table, vocabulary if config.get("lm_head_bias") else 0),
    }
    return Count(
        kind,
        parts,
        E,
        K,
        lookup=0 if tied else table,
        cache=cache * L,
        attention_flops=attention_flops * L,
        dense_intermediate=_dense_intermediate(parts, 3 * H * L),
    )


def _attention(family: _Family, config: Mapping[str, Any]) -> tuple[Part, int, int]:
    """Parameters of a layer's attention, numbers it keeps per token, FLOPs per token of the context."""
    H, heads = _get(config, "hidden_size"), _get(config, "num_attention_heads")
    bias = bool(config.get(family.bias, False))
    if "kv_lora_rank" in config:  # multi-head latent attention, DeepSeek-V2 (arXiv:2405.04434, section 2.1)
        latent, rope = config["kv_lora_rank"], _get(config, "qk_rope_head_dim")
        nope, value, q_latent = (
            _get(config, "qk_nope_head_dim"),
            _get(config, "v_head_dim"),
            config.get("q_lora_rank"),
        )
        queries = heads * (nope + rope)
        weights = H * (latent + rope) + latent * heads * (nope + value) + heads * value * H
        weights += (H + queries) * q_latent if q_latent else H * queries
        others = latent + (q_latent or 0)  # norms
        others += bias * (latent + rope + H + (q_latent or 0))
        return _dense(weights, others), latent + rope, 2 * heads * (nope + rope + value)
    D = config.get("head_dim") or H // heads
    queries, keys = heads * D, config.get("num_key_value_heads", heads) * D
    weights = H * (queries + 2 * keys) + queries * H + (H * queries if family.attention_gate else 0)
    qk_norm = "head" if config.get("use_qk_norm") and config["model_type"] == "glm4_moe" else family.qk_norm
    others = {"": 0, "head": 2 * D, "all": queries + keys}[qk_norm]
    others += bias * (queries + 2 * keys + (H if family.out_bias else 0)) + heads * family.sinks
    return _dense(weights, others), 2 * keys, 4 * queries


def _sparse_layers(config: Mapping[str, Any], layers: int) -> int:
    """How many layers have experts."""
    if "mlp_layer_types" in config:
        return config["mlp_layer_types"].count("sparse")
    if "moe_layers" in config:
        return len(config["moe_layers"])
    if "interleave_moe_layer_step" in config:
        return layers // config["interleave_moe_layer_step"]
    step, dense = config.get("decoder_sparse_step", 1), config.get("mlp_only_layers", ())
    first = config.get("first_k_dense_replace", config.get("num_dense_layers", 0))
    return sum((layer + 1) % step == 0 and layer not in dense for layer in range(first, layers))


def _shared_size(kind: str, config: Mapping[str, Any], expert_size: int) -> int:
    """The I of all shared experts of a layer together."""
    if kind == "llama4_text":
        return expert_size
    for name in ("shared_expert_intermediate_size", "shared_intermediate_size"):
        if name in config:
            return config[name]
    return next((config[name] for name in _SHARED if name in config), 0) * expert_size


def _count_switch(config: Mapping[str, Any]) -> Count:
    """Switch Transformers, T5 with experts; a token is one of the source and one of the target together."""
    H, heads, I = (_get(config, name) for name in ("d_model", "num_heads", "d_ff"))
    E, inner = _get(config, "num_experts"), heads * _get(config, "d_kv")
    encoder, decoder = _get(config, "num_layers"), _get(config, "num_decoder_layers")
    sparse = _get(config, "num_sparse_encoder_layers") + _get(config, "num_sparse_decoder_layers")
    L, table = encoder + decoder, _get(config, "vocab_size") * H
    positions = config.get("relative_attention_num_buckets", 32) * heads
    mlp, attentions = 2 * H * I, L + decoder
    if not config.get("tie_word_embeddings", True):
        raise ValueError("tie_word_embeddings: got False, wanted True for switch_transformers")
    parts = {
        "embedding": Part(table, table, 0),
        "attention": _dense(4 * H * inner) * attentions + _dense(0, 2 * positions),
        "routed experts": Part(E * mlp, mlp, mlp) * sparse,
        "dense MLPs": _dense(mlp) * (L - sparse),
        "routers": _dense(H * E, E if config.get("router_bias") else 0) * sparse,
        "norms": _dense(0, H * (attentions + L + 2)),
        "output head": Part(0, 0, table),
    }
    return Count(
        "switch_transformers",
        parts,
        E,
        1,
        lookup=0,
        cache=4 * inner * decoder,
        attention_flops=4 * inner * attentions,
        dense_intermediate=_dense_intermediate(parts, 2 * H * L),
    )


def _with_vision(text: Count, config: Mapping[str, Any]) -> Count:
    """Llama 4 with its vision tower, which no token of a text uses."""
    vision = config["vision_config"]
    H, I, layers, image, patch, wide, out, seen = (
        _get(vision, name)
        for name in (
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "image_size",
            "patch_size",
            "projector_input_dim",
            "projector_output_dim",
            "vision_output_dim",
        )
    )
    layer = 4 * (H * H + H) + 2 * H * I + I + H + 4 * H
    positions = (image // patch) ** 2 + 1
    total = (
        vision.get("num_channels", 3) * patch * patch * H
        + (1 + positions + 4) * H
        + layers * layer
        + I * wide
        + out * out
        + seen * _get(config["text_config"], "hidden_size")
    )
    parts = {**text.parts, "vision tower": Part(total, 0, 0)}
    return Count(**{**vars(text), "model_type": "llama4", "parts": parts})


def _plain_dbrx(config: Mapping[str, Any]) -> dict[str, Any]:
    attention, experts = config["attn_config"], config["ffn_config"]
    return {
        "model_type": "dbrx",
        "hidden_size": _get(config, "d_model"),
        "num_hidden_layers": _get(config, "n_layers"),
        "num_attention_heads": _get(config, "n_heads"),
        "num_key_value_heads": _get(attention, "kv_n_heads"),
        "vocab_size": _get(config, "vocab_size"),
        "intermediate_size": _get(experts, "ffn_hidden_size"),
        "moe_num_experts": _get(experts, "moe_num_experts"),
        "moe_top_k": _get(experts, "moe_top_k"),
        "tie_word_embeddings": config.get("tie_word_embeddings", False),
    }


def _dense(weights: int, others: int = 0) -> Part:
    """Weights that every token is multiplied by, and other parameters that it uses."""
    return Part(weights + others, weights + others, weights)


def _dense_intermediate(parts: Mapping[str, Part], weights_per_unit: int) -> int:
    mlps = ("routed experts", "shared experts", "dense MLPs")
    return round(sum(parts[name].multiplied for name in mlps if name in parts) / weights_per_unit)


def _present(config: Mapping[str, Any]) -> dict[str, Any]:
    """The entries that say something: None stands for a default."""
    return {name: value for name, value in config.items() if value is not None}


def _get(config: Mapping[str, Any], *names: str) -> Any:
    for name in names:
        value = config.get(name)
        if value is not None:
            if type(value) is not int or value < 0:
                raise ValueError(f"{name}: got {value!r}, wanted a whole number")
            return value
    raise KeyError(f"the configuration has no {' nor '.join(names)}")

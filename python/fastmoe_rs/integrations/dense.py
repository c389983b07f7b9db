"""Dense language models of transformers as Mixture-of-Experts ones of transformers, and back.

`fastmoe_rs.upcycling.upcycle_model` puts `nn.MoE` layers into any model; these functions give models of
another family of transformers, which `save_pretrained` and `from_pretrained` know.

Legend: H hidden size, I intermediate size, E experts, K experts per token.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from .. import _check
from ..distillation import merge_weights
from ..layers import hf_routers
from ..upcycling import copy_experts, dense_mlp, is_dense_mlp

__all__ = ["dense_pretrained", "upcycle_pretrained"]

# Families that differ in nothing but their MLPs.
_SPARSE = {"llama": "mixtral", "mistral": "mixtral", "qwen3": "qwen3_moe"}
_DENSE = {"mixtral": "mistral", "qwen3_moe": "qwen3"}


def upcycle_pretrained(
    model: PreTrainedModel,
    num_experts: int,
    top_k: int,
    *,
    noise: float = 0.0,
    redraw: float = 0.0,
    router_std: float = 0.02,
    generator: torch.Generator | None = None,
) -> PreTrainedModel:
    """A Mixtral made of a Llama or Mistral, a Qwen3-MoE of a Qwen3; without noise the logits are the same.

    Args:
        model: a causal language model of these families. It is left as it is; nothing is shared with it.
        num_experts, top_k: E and K.
        noise, redraw, router_std, generator: see `fastmoe_rs.upcycling.upcycle`.

    Raises:
        ValueError: `model` is of another family, or has weights that have no place in the other one (biases),
            or windows of attention that the other one would lay out in another way.
    """
    _check.top_k(top_k, num_experts)
    size = model.config.intermediate_size
    config = _converted(
        model,
        _SPARSE,
        num_local_experts=num_experts,
        num_experts=num_experts,
        num_experts_per_tok=top_k,
        moe_intermediate_size=size,
        norm_topk_prob=True,
    )
    state = model.state_dict()
    for name in [name for name, module in model.named_modules() if is_dense_mlp(module)]:
        mlp = dense_mlp(model.get_submodule(name))
        w1, w2 = copy_experts(mlp, num_experts, noise=noise, redraw=redraw, generator=generator)
        router = w1.new_empty(num_experts, w1.shape[2]).normal_(std=router_std, generator=generator)
        _replace(state, name, {"gate.weight": router, "experts.gate_up_proj": w1, "experts.down_proj": w2})
    return _built(model, config, state)


def dense_pretrained(
    model: PreTrainedModel, load: Mapping[str, Tensor] | None = None, *, gather: int | None = None
) -> PreTrainedModel:
    """A Mistral made of a Mixtral, a Qwen3 of a Qwen3-MoE, for a student to start from.

    Args:
        model: a causal language model of these families. It is left as it is; nothing is shared with it.
        load: [E] by the name of the block, as `fastmoe_rs.watch(model).stats()` counts it; None counts all
            experts alike.
        gather: see `fastmoe_rs.distillation.merge_experts`.

    Raises:
        ValueError: `model` is of another family, or has dense layers too, whose intermediate size would be
            another one, or `load` lacks a block; and see `merge_experts`.
    """
    if getattr(model.config, "mlp_only_layers", None) or getattr(model.config, "decoder_sparse_step", 1) > 1:
        _check.wanted("model", "a model with dense layers too", "one whose layers are all sparse")
    if model.config.model_type not in _DENSE:
        _unknown(model, _DENSE)
    blocks = list(hf_routers(model))
    if load is not None and load.keys() != set(blocks):
        _check.wanted("load", f"blocks {sorted(load)}", f"those of the model, {sorted(blocks)}")
    state = model.state_dict()
    size = 0
    for name in blocks:
        w1, w2 = (state[f"{name}.experts.{weight}"] for weight in ("gate_up_proj", "down_proj"))
        first, second = merge_weights(w1, w2, None if load is None else load[name], gather)
        gate, up = first.chunk(2)
        size = second.shape[1]
        weights = {"gate_proj.weight": gate, "up_proj.weight": up, "down_proj.weight": second}
        _replace(state, name, weights)
    return _built(model, _converted(model, _DENSE, intermediate_size=size), state)


def _converted(model: PreTrainedModel, families: Mapping[str, str], **sizes: Any) -> Any:
    """The configuration of a model's counterpart: what both know stays, `sizes` are those that it knows."""
    given = model.config.to_dict()
    if given["model_type"] not in families:
        _unknown(model, families)
    if given.get("use_sliding_window"):
        _check.wanted("model", "use_sliding_window=True", "one without, as its counterpart has other windows")
    family = families[given["model_type"]]
    known = AutoConfig.for_model(family).to_dict()
    own = {"model_type", "architectures", "transformers_version", "layer_types"}
    options = {name: value for name, value in (given | sizes).items() if name in known and name not in own}
    # Qwen3-MoE takes it without naming it among its fields.
    options["head_dim"] = given.get("head_dim") or given["hidden_size"] // given["num_attention_heads"]
    return AutoConfig.for_model(family, **options)


def _replace(state: dict[str, Tensor], module: str, weights: Mapping[str, Tensor]) -> None:
    """Put other weights in the place of those of a module."""
    for name in [name for name in state if name.startswith(f"{module}.")]:
        del state[name]
    state |= {f"{module}.{name}": weight for name, weight in weights.items()}


def _built(model: PreTrainedModel, config: Any, state: Mapping[str, Tensor]) -> PreTrainedModel:
    with torch.device(model.device):
        built = AutoModelForCausalLM.from_config(config, dtype=model.dtype)
    missing, unexpected = built.load_state_dict(state, strict=False)
    if missing or unexpected:
        given = f"weights {unexpected} without a place" if unexpected else f"no weights {missing}"
        _check.wanted("model", given, f"those of {config.model_type}")
    built.generation_config = copy.deepcopy(model.generation_config)
    return built.train(model.training)


def _unknown(model: PreTrainedModel, families: Mapping[str, str]) -> None:
    _check.wanted("model", f"model_type {model.config.model_type!r}", f"one of {', '.join(families)}")

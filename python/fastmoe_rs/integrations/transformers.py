"""The experts implementation "fastmoe_rs" of Hugging Face transformers (>= 5).

Importing this module registers it, for every family decorated with `use_experts_implementation`:

    import fastmoe_rs.integrations.transformers
    model = AutoModelForCausalLM.from_pretrained(name, experts_implementation="fastmoe_rs")
    model.set_experts_implementation("fastmoe_rs")  # or at run time

Legend: T tokens, H hidden size, I intermediate size, E experts of this rank, K experts per token, R = T*K.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import RoutingPlan, functional
from .swap import NAME

try:
    from transformers import activations as hf
    from transformers.integrations.moe import ExpertsInterface
except ImportError as error:
    raise ImportError(
        "fastmoe_rs.integrations.transformers needs transformers >= 5: pip install 'fastmoe_rs[transformers]'"
    ) from error

# transformers has several spellings of one function; those that differ only by rounding share a name here.
_ACTIVATIONS: dict[object, str] = {
    hf.SiLUActivation: "silu",
    nn.SiLU: "silu",
    F.silu: "silu",
    hf.GELUActivation: "gelu",
    F.gelu: "gelu",
    hf.GELUTanh: "gelu_tanh",
    hf.NewGELUActivation: "gelu_tanh",
    nn.ReLU: "relu",
    F.relu: "relu",
    torch.relu: "relu",
    hf.ReLUSquaredActivation: "relu2",
}
_GATED = {"silu": "swiglu", "gelu": "geglu", "gelu_tanh": "geglu_tanh", "relu": "reglu"}
# Gates that are the clamped SwiGLU of GPT-OSS when the two attributes named here hold its alpha and limit.
_CLAMPED_GATES = {
    "GptOssExperts._apply_gate": ("alpha", "limit"),
    "OpenAIPrivacyFilterExperts._apply_gate": ("alpha", "limit"),
    "MiniMaxM3VLExperts._apply_gate": ("swiglu_alpha", "swiglu_limit"),
}
_GPT_OSS_CLAMP = (1.702, 7.0)


def fastmoe_experts(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Forward of a decorated transformers experts module; the contract is that of `ExpertsInterface`.

    Args:
        self: the experts module.
        hidden_states: [T, H].
        top_k_index: int64 [T, K]. Ids >= E (routes to other ranks) are dropped when the module is expert
            parallel: they add nothing to the output and get a zero routing-weight gradient.
        top_k_weights: [T, K], of any floating dtype.

    Returns:
        [T, H] in the dtype of `hidden_states`; the sum over K is accumulated in fp32 (fp64 for fp64).

    Raises:
        ValueError: an id lies outside [0, E) and the module is not expert parallel.

    Weights, biases and sizes are read from `self` on every call, because PEFT and tensor parallelism put
    other tensors behind the attributes; each is read once, because reading recomputes a parametrized one.
    A flag that an early transformers 5 does not set yet gets the value that holds for all its families.
    """
    has_gate = getattr(self, "has_gate", True)
    up = "gate_up_proj" if has_gate else "up_proj"
    w1, w2 = getattr(self, up), self.down_proj
    b1, b2 = (getattr(self, up + "_bias"), self.down_proj_bias) if self.has_bias else (None, None)
    out_of_range = "drop" if getattr(self, "_is_expert_parallel", True) else "error"
    return experts_mlp(
        hidden_states,
        RoutingPlan.from_ids(top_k_index, w1.shape[0], out_of_range=out_of_range),
        top_k_weights,
        w1,
        w2,
        fused_activation(self) or (self._apply_gate if has_gate else self.act_fn),
        b1=b1,
        b2=b2,
        transposed=self.is_transposed,
        interleaved=not getattr(self, "is_concatenated", True),
        norm=self.post_expert_norm if getattr(self, "has_post_expert_norm", False) else None,
    )


def experts_mlp(
    hidden_states: Tensor,
    plan: RoutingPlan,
    weights_TK: Tensor,
    w1: Tensor,
    w2: Tensor,
    activation: str | Callable[[Tensor], Tensor],
    *,
    b1: Tensor | None = None,
    b2: Tensor | None = None,
    transposed: bool = False,
    interleaved: bool = False,
    norm: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """`functional.moe_mlp` for hidden states of any float dtype, and around the Python code of a model.

    Args:
        hidden_states: [T, H].
        activation: a name, for the fused MLP; or a function [R, 2I] to [R, I] ([R, I] to [R, I]), with which
            it is grouped matrix products around that function.
        norm: a function [R, H] to [R, H] of each expert's output, with a function as activation only.

    Returns:
        [T, H] in the dtype of `hidden_states`.
    """
    x_TH = hidden_states.to(w1.dtype)
    if isinstance(activation, str):
        out_TH = functional.moe_mlp(
            x_TH,
            None,
            weights_TK,
            w1,
            w2,
            b1=b1,
            b2=b2,
            activation=activation,
            transposed=transposed,
            interleaved=interleaved,
            plan=plan,
        )
        return out_TH.to(hidden_states.dtype)
    if transposed:
        w1, w2 = w1.transpose(1, 2), w2.transpose(1, 2)
    h_RI = activation(functional.grouped_mm(functional.permute(x_TH, plan), w1, plan.offsets, bias=b1))
    y_RH = functional.grouped_mm(h_RI, w2, plan.offsets, bias=b2)
    y_RH = y_RH if norm is None else norm(y_RH)
    return functional.unpermute(y_RH, plan, weights_TK).to(hidden_states.dtype)


def gated(act_fn: Callable[[Tensor], Tensor]) -> str | Callable[[Tensor], Tensor]:
    """The activation act_fn(gate) * up of `experts_mlp`: its name where it can be fused."""

    def gate_up(h_RI: Tensor) -> Tensor:
        gate, up = h_RI.chunk(2, dim=-1)
        return act_fn(gate) * up

    return _GATED.get(ungated_name(act_fn) or "") or gate_up


def fused_activation(experts: Any) -> str | None:
    """The activation of `functional.moe_mlp` that computes what `experts` does between its two projections.

    None when only the module's own Python code knows: an unknown activation, a gate overridden in an unknown
    way, or a norm of each expert's output.
    """
    if getattr(experts, "has_post_expert_norm", False):
        return None
    activation = ungated_name(experts.act_fn) if hasattr(experts, "act_fn") else None
    if not getattr(experts, "has_gate", True):
        return activation
    gate = type(experts)._apply_gate
    concatenated = getattr(experts, "is_concatenated", None)
    if gate.__qualname__ == "_default_apply_gate":
        # It splits its input in halves, whatever layout is declared.
        return _GATED.get(activation or "") if concatenated is not False else None
    # Where no layout is declared, only the gate itself knows it.
    if gate.__module__.startswith("transformers.") and concatenated is not None:
        clamp = tuple(getattr(experts, name) for name in _CLAMPED_GATES.get(gate.__qualname__, ()))
        return "swiglu_oai" if clamp == _GPT_OSS_CLAMP else None
    return None


def ungated_name(act_fn: Callable[[Tensor], Tensor]) -> str | None:
    """The name by which `functional.moe_mlp` knows an activation; None where it does not."""
    if type(act_fn) is nn.GELU:
        return "gelu" if act_fn.approximate == "none" else "gelu_tanh"
    return _ACTIVATIONS.get(type(act_fn) if isinstance(act_fn, nn.Module) else act_fn)


ExpertsInterface.register(NAME, fastmoe_experts)


def fp8_experts(self: Any, *args: Any) -> Tensor:
    """Raises NotImplementedError: they round activations to FP8 too, for which there are no kernels here."""
    raise NotImplementedError(
        f"fastmoe_rs does not compute {type(self).__name__} in float8: load the checkpoint with "
        "quantization_config=FineGrainedFP8Config(dequantize=True), or use "
        "experts_implementation='grouped_mm'"
    )


try:
    from transformers.integrations.finegrained_fp8 import FP8ExpertsInterface
except ImportError:  # releases that have no such registry
    pass
else:
    FP8ExpertsInterface.register(NAME, fp8_experts)

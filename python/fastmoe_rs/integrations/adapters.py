"""Forwards for the families of transformers whose experts its `ExpertsInterface` does not reach.

`accelerate` gives them to an existing model; `register_adapters` to every model that is built from then on.
Each is the forward of one class of transformers, on the parameters of that class: state dicts stay as they
are, and so do the routers, which go on being called as modules.

Legend: T tokens, H hidden size, I intermediate size, E experts, K experts per token, R = T*K.
"""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Callable
from itertools import accumulate
from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import Tensor, nn

from .. import RoutingPlan, functional
from .transformers import experts_mlp, gated, ungated_name


def llama4_moe(self: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
    """Llama 4 weighs the input of an expert, not its output: every route is a row of its own, unweighted."""
    x_TH = hidden_states.reshape(-1, self.hidden_dim)
    scores_TE, logits_TE = self.router(x_TH)
    weights_TK, ids_TK = scores_TE.topk(self.top_k, dim=1)
    x_RH = (x_TH[:, None] * weights_TK[:, :, None]).flatten(0, 1)
    y_TH = self.experts(x_RH, ids_TK.reshape(-1, 1)).view(*ids_TK.shape, -1).sum(1)
    return self.shared_expert(x_TH) + y_TH, logits_TE


def llama4_experts(self: Any, x_RH: Tensor, ids_R1: Tensor) -> Tensor:
    plan = RoutingPlan.from_ids(ids_R1, self.gate_up_proj.shape[0])
    ones_R1 = torch.ones(ids_R1.shape, device=x_RH.device)
    weights = self.gate_up_proj, self.down_proj
    return experts_mlp(x_RH, plan, ones_R1, *weights, gated(self.act_fn), transposed=True)


def dbrx_experts(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Gate, up and down are [E * I, H] each: apart, because a fused product would copy them together."""
    mlp = self.mlp
    gate, up, down = (w.view(self.num_experts, -1, self.hidden_size) for w in (mlp.w1, mlp.v1, mlp.w2))
    plan = RoutingPlan.from_ids(top_k_index, self.num_experts)
    x_RH = functional.permute(hidden_states.reshape(-1, self.hidden_size), plan)
    gate_RI, up_RI = (functional.grouped_mm(x_RH, w, plan.offsets) for w in (gate, up))
    h_RI = mlp.activation_fn(gate_RI) * up_RI
    y_RH = functional.grouped_mm(h_RI, down.transpose(1, 2), plan.offsets)
    return functional.unpermute(y_RH, plan, top_k_weights).view_as(hidden_states)


def jetmoe_parallel_experts(self: Any, inputs: Tensor, expert_size: list[int]) -> Tensor:
    """The one matrix product that mixtures of MLPs and of attention heads are made of."""
    offsets_E1 = torch.tensor([0, *accumulate(expert_size)], dtype=torch.int32, device=inputs.device)
    return functional.grouped_mm(inputs, self.weight, offsets_E1)


def longcat_experts(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Experts from E on are zero-computation experts (arXiv:2509.01322): they give the token itself."""
    experts = self.num_routed_experts
    plan = RoutingPlan.from_ids(top_k_index, experts, out_of_range="drop")
    weights = self.gate_up_proj[:experts], self.down_proj
    routed_TH = experts_mlp(hidden_states, plan, top_k_weights, *weights, gated(self.act_fn))
    identity_T1 = (top_k_weights * (top_k_index >= experts)).sum(1, keepdim=True)
    return routed_TH + (hidden_states * identity_T1).to(hidden_states.dtype)


def step3p7_experts(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """SwiGLU, clamped after its activation in the layers that have a limit."""
    plan = RoutingPlan.from_ids(top_k_index, self.gate_up_proj.shape[0], out_of_range="drop")
    activation = gated(self.act_fn) if math.isinf(self.limit) else self._apply_gate
    return experts_mlp(hidden_states, plan, top_k_weights, self.gate_up_proj, self.down_proj, activation)


def switch_experts(
    self: Any, hidden_states: Tensor, selected_experts: Tensor, routing_weights: Tensor
) -> Tensor:
    """`selected_experts` is one-hot, [T, 1, E], and all zeros where the capacity dropped the token."""
    dropped_T1 = ~selected_experts.any(-1)
    ids_T1 = selected_experts.argmax(-1).masked_fill(dropped_T1, self.num_experts)
    return _module_dict(self, hidden_states, ids_T1, routing_weights, "wi", "wo")


def nllb_sparse_mlp(self: Any, hidden_states: Tensor, padding_mask: Tensor | None = None) -> Tensor:
    """Both experts of a token, weighed by the router's gates [T, E]: 0 where the capacity dropped it.

    This is GShard's top-2 layer (arXiv:2006.16668), with which NLLB was trained (arXiv:2207.04672, 6.2).
    transformers (5.24 and before) takes the 0/1 mask of the first choice for expert ids, so that it runs
    experts 0 and 1 for every token; where outputs differ from its own, these are the right ones.
    """
    x_TH = hidden_states.reshape(-1, hidden_states.shape[-1])
    _, gates_TE, _ = self.router(x_TH, padding_mask)
    weights_TK, ids_TK = gates_TE.topk(2, dim=1)
    experts = self.experts
    ids_TK = ids_TK.masked_fill(weights_TK == 0, experts.num_experts)
    if self.training:
        out_TH = _module_dict(experts, x_TH, ids_TK, weights_TK, "fc1", "fc2", experts.token_dropout)
    else:
        out_TH = _module_dict(experts, x_TH, ids_TK, weights_TK, "fc1", "fc2") * (
            1 - experts.moe_token_dropout
        )
    return out_TH.view_as(hidden_states)


# Class of transformers -> its family, and its forward.
ADAPTERS: dict[str, tuple[str, Callable[..., Any]]] = {
    "Llama4TextMoe": ("llama4", llama4_moe),
    "Llama4TextExperts": ("llama4", llama4_experts),
    "DbrxExperts": ("dbrx", dbrx_experts),
    "JetMoeParallelExperts": ("jetmoe", jetmoe_parallel_experts),
    "LongcatFlashExperts": ("longcat_flash", longcat_experts),
    "Step3p7Experts": ("step3p7", step3p7_experts),
    "SwitchTransformersExperts": ("switch_transformers", switch_experts),
    "NllbMoeSparseMLP": ("nllb_moe", nllb_sparse_mlp),
}
# Before it, some of the classes above had other names and arguments.
SINCE = "5.23"
_LINEARS = {"SwitchTransformersExperts": ("wi", "wo"), "NllbMoeExperts": ("fc1", "fc2")}


@functools.cache
def adapter(name: str) -> type[nn.Module]:
    """The subclass of the transformers class `name` that has our forward.

    Raises:
        ImportError: transformers is older than 5.23, or has no such family.
    """
    if Version(transformers.__version__) < Version(SINCE):
        raise ImportError(
            f"{name} is adapted from transformers {SINCE} on, this is {transformers.__version__}"
        )
    family, forward = ADAPTERS[name]
    original = getattr(importlib.import_module(f"transformers.models.{family}.modeling_{family}"), name)
    return type(name, (original,), {"forward": forward, "__module__": __name__, "__doc__": forward.__doc__})


def __getattr__(name: str) -> Any:
    """`adapters.Llama4TextMoe`, as pickle looks classes up."""
    if name not in ADAPTERS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return adapter(name)


def register_adapters() -> None:
    """Make transformers build the families of `ADAPTERS` with fastmoe_rs.

    Holds for every model that `from_pretrained` or `from_config` builds afterwards, in this process.
    `accelerate` does the same for one model.

    Raises:
        ImportError: transformers is older than 5.23.
    """
    from transformers.monkey_patching import register_patch_mapping

    register_patch_mapping({name: adapter(name) for name in ADAPTERS}, overwrite=True)


def is_adaptable(module: nn.Module) -> bool:
    """Whether `adapt` serves the module, or has done so already."""
    name = type(module).__name__
    return (
        name in ADAPTERS
        and Version(transformers.__version__) >= Version(SINCE)
        and issubclass(type(module), adapter(name).__bases__)
    )


def adapt(module: nn.Module) -> None:
    """Give a module for which `is_adaptable` holds our forward, in place."""
    module.__class__ = adapter(type(module).__name__)
    experts = getattr(module, "experts", module)
    for name in _LINEARS.get(type(experts).__name__, ()):
        _lay_out([getattr(mlp, name) for mlp in _mlps(experts)])


def _module_dict(
    experts: Any,
    x_TH: Tensor,
    ids_TK: Tensor,
    weights_TK: Tensor,
    first: str,
    second: str,
    norm: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """The MLP of an `nn.ModuleDict` of experts with two linear layers each; id E drops a route.

    Where PEFT or a quantization has put other modules in their place, every expert is called on its rows.
    """
    mlps = _mlps(experts)
    linears = [getattr(mlp, name) for name in (first, second) for mlp in mlps]
    plan = RoutingPlan.from_ids(ids_TK, len(mlps), out_of_range="drop")
    if any(type(linear) is not nn.Linear for linear in linears):
        counts = plan.counts.tolist()
        x_RH = functional.permute(x_TH, plan)
        routed_RH, unused_RH = x_RH.tensor_split([sum(counts)])
        y_RH = torch.cat([mlp(rows) for mlp, rows in zip(mlps, routed_RH.split(counts), strict=True)])
        y_RH = torch.cat([y_RH if norm is None else norm(y_RH), unused_RH])
        return functional.unpermute(y_RH, plan, weights_TK).to(x_TH.dtype)
    (w1, b1), (w2, b2) = _stacked(linears[: len(mlps)]), _stacked(linears[len(mlps) :])
    act, dropout = mlps[0].act, mlps[0].dropout
    random = norm is not None or (dropout.training and dropout.p > 0)
    activation = None if random else ungated_name(act)
    return experts_mlp(
        x_TH, plan, weights_TK, w1, w2, activation or (lambda h: dropout(act(h))), b1=b1, b2=b2, norm=norm
    )


def _mlps(experts: Any) -> list[Any]:
    return [experts[f"expert_{e}"] for e in range(experts.num_experts)]


def _stacked(linears: list[nn.Linear]) -> tuple[Tensor, Tensor | None]:
    biases: list[Tensor] = [linear.bias for linear in linears if linear.bias is not None]
    return _Stack.apply(*(linear.weight for linear in linears)), torch.stack(biases) if biases else None


class _Stack(torch.autograd.Function):
    """torch.stack, without the copy where the tensors already lie one after another in one storage."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)  # so that autograd notices one that is changed before backward
        first = tensors[0]
        start, storage = first.storage_offset(), first.untyped_storage().data_ptr()
        if all(
            t.is_contiguous()
            and t.untyped_storage().data_ptr() == storage
            and t.storage_offset() == start + i * first.numel()
            for i, t in enumerate(tensors)
        ):
            return first.as_strided((len(tensors), *first.shape), (first.numel(), *first.stride()))
        return torch.stack(tensors)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        _ = ctx.saved_tensors
        return gradient.unbind(0)


def _lay_out(linears: list[Any]) -> None:
    """Move the weights of equal linear layers into one storage, for `_Stack`."""
    if any(type(linear) is not nn.Linear or linear.weight.is_meta for linear in linears):
        return
    together = torch.stack([linear.weight.data for linear in linears])
    for linear, weight in zip(linears, together, strict=True):
        linear.weight.data = weight

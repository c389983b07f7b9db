import torch
from plain import mlp

from ..enums import ActivationType


def moe_general_routing_inputs(
    x,
    router_scores,
    token_indices,
    expert_indices,
    w1,
    b1,
    w2,
    b2,
    E,
    stream_id,
    activation_type,
    is_inference_mode_enabled=False,
    concat_layout=False,
):
    """w1 (2I, H, E) with rows of gate and up in turn, w2 (H, I, E), both of stride order (2, 0, 1);
    token_indices sorted. Returns the output and the number of rows of each expert."""
    assert activation_type is ActivationType.SWIGLU
    assert is_inference_mode_enabled != torch.is_grad_enabled()
    assert token_indices.dtype == expert_indices.dtype == torch.int32
    assert torch.equal(token_indices, token_indices.sort().values)
    weights_E = [weight.permute(2, 0, 1) for weight in (w1, w2)]
    assert all(weight.is_contiguous() and len(weight) == E for weight in weights_E)
    gate, up = weights_E[0][:, ::2], weights_E[0][:, 1::2]
    y = mlp(x[token_indices], expert_indices, gate, up, weights_E[1])
    weighted = (y.float() * router_scores[:, None]).to(x.dtype)
    return torch.zeros_like(x).index_add(0, token_indices, weighted), expert_indices.bincount(minlength=E)

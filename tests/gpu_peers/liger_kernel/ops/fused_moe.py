import torch
from plain import mlp


class LigerFusedMoEFunction:
    @staticmethod
    def apply(x, gate_up_proj, down_proj, top_k_index, top_k_weights):
        """x (T, H), gate_up_proj (E, 2I, H), down_proj (E, H, I), top_k_index (T, K) int32, top_k_weights."""
        tokens, top_k = top_k_index.shape
        assert top_k_index.dtype == torch.int32
        gate, up = gate_up_proj.chunk(2, dim=1)
        y = mlp(x.repeat_interleave(top_k, 0), top_k_index.flatten(), gate, up, down_proj)
        return (y.view(tokens, top_k, -1).float() * top_k_weights[..., None]).sum(1).to(x.dtype)

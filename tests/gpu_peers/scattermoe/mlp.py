import torch
from plain import mlp
from torch import nn


class ParallelExperts(nn.Module):
    def __init__(self, num_experts, input_size, output_size):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, output_size, input_size))


class GLUMLP(nn.Module):
    def __init__(self, input_size, hidden_size, num_experts, top_k, bias=False, activation=None):
        super().__init__()
        assert isinstance(activation, nn.SiLU)
        self.experts = ParallelExperts(num_experts, input_size, 2 * hidden_size)
        self.output_experts = ParallelExperts(num_experts, hidden_size, input_size)
        self.top_k = top_k

    def forward(self, x, expert_p, expert_idxs):
        """x (T, H), expert_p (T, K) in the dtype of x, expert_idxs (T, K)."""
        assert expert_p.dtype == x.dtype
        up, gate = self.experts.weight.chunk(2, dim=1)
        rows = x.repeat_interleave(self.top_k, 0)
        y = mlp(rows, expert_idxs.flatten(), gate, up, self.output_experts.weight)
        return (expert_p.unsqueeze(1) @ y.view(*expert_p.shape, -1)).squeeze(1)

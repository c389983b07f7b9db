"""Every router as a module of nn.MoE, to be put to tests."""

import torch

from fastmoe_rs import nn
from moe_cases import WIDEST, by_dense_weights, dense

T, H, I, E = 24, 8, 5, 6
TOKENS = torch.arange(T) % 7
ROUTERS = {
    "groups": lambda **o: nn.Router(
        H, E, 2, score="sigmoid", n_group=3, topk_group=2, selection_bias=True, renormalize=True, **o
    ),
    "gemma": lambda **o: nn.Router(H, E, 2, expert_scale=True, bias=True, softcap=5.0, **o),
    "switch": lambda **o: nn.CapacityRouter(H, E, 1, capacity_factor=0.75, jitter=0.1, **o),
    "capacity": lambda **o: nn.CapacityRouter(
        H, E, 2, capacity_factor=0.75, queue="score", group_size=12, **o
    ),
    "gshard": lambda **o: nn.GShardRouter(H, E, **o),
    "gshard_sampling": lambda **o: nn.GShardRouter(H, E, second="sampling", capacity_factor=0.5, **o),
    "noisy": lambda **o: nn.NoisyTopKRouter(H, E, 2, **o),
    "expert_choice": lambda **o: nn.ExpertChoiceRouter(H, E, capacity_factor=1.5, **o),
    "sinkhorn": lambda **o: nn.SinkhornRouter(H, E, 2, iterations=10, **o),
    "hash": lambda **o: nn.HashRouter(H, E, 2, vocab_size=7, renormalize=True, **o),
    "logit_noise": lambda **o: nn.Router(H, E, 2, logit_noise=0.5, **o),
    "shared": lambda **o: nn.SharedRouter(H, E, 2, num_shared=2, scale=8.0, selection_bias=True, **o),
    "sparsemixer": lambda **o: nn.SparseMixerRouter(H, E, 2, nearness=5.0, **o),
    "rounding": lambda **o: nn.TokenRoundingRouter(H, E, 2, score="sigmoid", tile=4, **o),
}


def build(name, **options):
    router = ROUTERS[name](**options)
    moe = nn.MoE(H, I, E, router=router, **options)
    if moe.experts.w1.is_meta:
        return moe
    with torch.no_grad():
        for tensor in (*moe.parameters(), *moe.buffers()):
            if tensor.is_floating_point():
                tensor.normal_()
    return moe


def inputs(name):
    return {"token_ids": TOKENS} if name == "hash" else {}


def all_experts(moe, x, ids, weights):
    return by_dense_weights(x, dense(ids, weights.to(x.dtype), E), moe.experts.w1, moe.experts.w2)


def assert_close(actual, expected):
    """Near by element; in float32, the most that an emulated GPU has, in units of the largest one."""
    largest = 1 if torch.float64 == WIDEST else expected.abs().max().clamp(min=1)
    torch.testing.assert_close(actual / largest, expected / largest)

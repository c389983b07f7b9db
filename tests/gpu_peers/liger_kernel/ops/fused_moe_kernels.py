"""Kernels that tune themselves, as Triton's do: `configs` are what they choose from."""

from types import SimpleNamespace


def _config(stages, warps=4, **sizes):
    return SimpleNamespace(kwargs=sizes, num_stages=stages, num_warps=warps)


_fused_up_proj_swiglu_kernel = SimpleNamespace(
    configs=[
        _config(stages, BLOCK_N=columns, BLOCK_K=depth)
        for columns in (64, 128)
        for depth in (32, 64)
        for stages in (2, 3, 4, 5)
    ]
)
_token_gather_weighted_sum_kernel = SimpleNamespace(
    configs=[
        _config(4, warps, BLOCK_H=columns, BLOCK_K=rows)
        for columns in (64, 128, 256, 512)
        for rows in (1, 2, 4, 8, 16)
        for warps in (4, 8)
    ]
)
_moe_bwd_dW1_kernel = SimpleNamespace(
    configs=[
        _config(2, BLOCK_M=rows, BLOCK_N=columns, BLOCK_K=depth)
        for rows in (64, 128)
        for columns in (64, 128)
        for depth in (16, 32)
    ]
)

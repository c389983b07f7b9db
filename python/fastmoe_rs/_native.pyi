"""The native module: every function computes into tensors that its caller allocated.

T tokens, H hidden, I intermediate, E experts, K experts per token, R = T*K routed rows, C capacity.

Tensors are torch CPU tensors or NumPy arrays, C-contiguous; outputs are writable, do not require grad, and
share no memory with any other argument. float means float32, float64, bfloat16 or float16; wide means float64
where the other tensors are float64, else float32. `gather` has R entries, or E*C in a padded plan. `threads`
>= 1 is the most threads to use. The GIL is released during the work: as with torch's own operators, other
threads must leave the tensors of a call alone until it returns.

Every function raises TypeError for an object or dtype that it does not take, ValueError for a wrong shape,
value or place in memory, both naming the argument, what was given and what was wanted; ValueError when
FASTMOE_CPU_ISA names no instruction set of this machine or FASTMOE_CACHE_MB is no number; and MemoryError
where the system has no memory left, with anything in the outputs.
"""

from collections.abc import Sequence
from typing import Any, Final, Literal, TypeAlias, TypedDict

import numpy as np
import numpy.typing as npt
import torch

_Tensor: TypeAlias = torch.Tensor | npt.NDArray[np.generic[Any]]
_Drop: TypeAlias = Literal["position", "score"]
_Order: TypeAlias = Literal["score_topk", "topk_score"]
_OutOfRange: TypeAlias = Literal["error", "drop"]
_GroupLosers: TypeAlias = Literal["-inf", "zero"]
_GroupScore: TypeAlias = Literal["top2", "max"]
_Score: TypeAlias = Literal["softmax", "sigmoid", "sqrt_softplus"]
_DType: TypeAlias = Literal["float32", "float64", "bfloat16", "float16"]

class _CpuInfo(TypedDict):
    arch: str
    features: list[str]
    isa: str
    available: list[str]
    kernels: dict[str, str]
    threads_pool: Literal["openmp", "rayon"]

class _Kernel(TypedDict):
    name: str
    threads: int
    shared_bytes: int
    registers: int

class _Image(TypedDict):
    family: str
    arch: str
    bytes: int
    kernels: list[_Kernel]

class _Device(TypedDict):
    name: str
    capability: tuple[int, int]
    multiprocessors: int
    shared_bytes: int

class _CudaInfo(TypedDict):
    version: tuple[int, int]
    devices: list[_Device]

class _Launch(TypedDict):
    kernel: str
    blocks: int
    memory: list[tuple[str, int, Literal["read", "write", "read_write"]]]

class _MemoryStats(TypedDict):
    cached_bytes: int
    used_bytes: int
    hits: int
    misses: int

__all__ = [
    "__version__",
    "cpu_info",
    "cuda_info",
    "empty",
    "empty_cache",
    "empty_like",
    "grouped_mm",
    "grouped_mm_grad_weight",
    "images",
    "load_cuda",
    "memory_stats",
    "mlp_backward",
    "mlp_forward",
    "mlp_launches",
    "permute",
    "plan",
    "route",
    "route_backward",
    "unpermute",
    "unpermute_backward",
]

__version__: Final[str]

def route(
    logits: _Tensor,
    bias: _Tensor | None,
    expert_scale: _Tensor | None,
    ids: _Tensor,
    weights: _Tensor,
    scores: _Tensor,
    *,
    softcap: float | None,
    score: _Score,
    order: _Order,
    n_group: int,
    topk_group: int,
    group_score: _GroupScore,
    group_losers: _GroupLosers,
    renormalize: bool,
    renormalize_eps: float,
    scale: float,
    threads: int,
) -> None:
    """From float logits [T, E], wide bias and expert_scale [E]: ids int64 [T, K], wide weights [T, K] and
    scores [T, E].

    Experts of a token come in falling order of score (plus bias, which enters the selection only), ties by
    rising id, NaN last; with n_group > 1 from the topk_group best groups of neighbours alone.
    """

def route_backward(
    logits: _Tensor,
    expert_scale: _Tensor | None,
    ids: _Tensor,
    scores: _Tensor,
    grad_weights: _Tensor | None,
    grad_scores: _Tensor | None,
    grad_logits: _Tensor,
    grad_expert_scale: _Tensor | None,
    *,
    softcap: float | None,
    score: _Score,
    order: _Order,
    renormalize: bool,
    renormalize_eps: float,
    scale: float,
    threads: int,
) -> None:
    """Gradients of route, from what it was given and what it returned; grad_logits is like logits.

    Gradients of weights and scores that are None are zeros; grad_expert_scale, wide [E], is None where it is
    not wanted.
    """

def plan(
    ids: _Tensor,
    weights: _Tensor | None,
    counts: _Tensor,
    offsets: _Tensor,
    gather: _Tensor,
    inverse: _Tensor,
    sorted_weights: _Tensor | None,
    *,
    num_experts: int,
    capacity: int | None,
    drop: _Drop,
    pad: bool,
    out_of_range: _OutOfRange,
    threads: int,
) -> None:
    """Stable sort of the routed rows by expert, from ids [T, K] int64 or int32.

    counts [E], offsets [E+1], gather [R or E*C] (token of each sorted row, -1 where unused) and inverse
    [T, K] (sorted row of each token and slot, -1 where dropped) are int32. weights [T, K] are float32 or
    float64, and sorted_weights, as long as gather, is like them.
    """

def mlp_forward(
    x: _Tensor,
    w1: _Tensor,
    b1: _Tensor | None,
    w2: _Tensor,
    b2: _Tensor | None,
    weights: _Tensor,
    ids: _Tensor | None,
    offsets: _Tensor | None,
    gather: _Tensor | None,
    inverse: _Tensor | None,
    out: _Tensor,
    hidden: _Tensor | None,
    activation: str,
    transposed: bool,
    interleaved: bool,
    threads: int,
    w1_scales: _Tensor | None = None,
    w2_scales: _Tensor | None = None,
) -> None:
    """out[t] = sum of weights[t, k] * (act(x[t] @ w1[e].T + b1[e]) @ w2[e].T + b2[e]), e the expert of t, k.

    x and out [T, H], w1 [E, 2I, H] (gate rows, then up rows; alternating when interleaved; [E, I, H] where
    the activation is ungated), b1 [E, 2I], w2 [E, H, I], b2 [E, H], all of one float type; transposed: w1
    [E, H, 2I] and w2 [E, I, H]. weights [T, K] wide. hidden [len(gather), 2I] receives the pre-activation,
    for mlp_backward.

    The plan is offsets, gather and inverse. With ids [T, K], int64 or int32, it is made of them instead,
    without a capacity, and these are None. hidden is then flat and receives the plan too: behind the R * 2I
    elements of the pre-activation it has 2(2E + 1 + 2R) + 1 more, and in them, from a multiple of 4 bytes on,
    int32 counts, offsets, gather and inverse, one after the other.

    A weight that comes with scales is quantized, in numbers code * scale: uint8 codes [E, N, D/32, 16],
    two E2M1 a byte, with E8M0 scales uint8 [E, N, D/32]; or uint8 codes E4M3 [E, N, D] with scales float32
    [E, ceil(N/128), ceil(D/128)]. Not transposed, and on CPUs only.
    """

def mlp_backward(
    grad_out: _Tensor,
    x: _Tensor,
    w1: _Tensor,
    b1: _Tensor | None,
    w2: _Tensor,
    b2: _Tensor | None,
    weights: _Tensor,
    hidden: _Tensor,
    offsets: _Tensor | None,
    gather: _Tensor | None,
    inverse: _Tensor | None,
    grad_x: _Tensor | None,
    grad_weights: _Tensor | None,
    grad_w1: _Tensor | None,
    grad_b1: _Tensor | None,
    grad_w2: _Tensor | None,
    grad_b2: _Tensor | None,
    activation: str,
    transposed: bool,
    interleaved: bool,
    threads: int,
    add_w1: bool = False,
    add_w2: bool = False,
    w1_scales: _Tensor | None = None,
    w2_scales: _Tensor | None = None,
) -> None:
    """Gradients of mlp_forward; each is like its tensor, and None where it is not wanted and not computed.

    Without offsets, gather and inverse the plan is that which mlp_forward made of ids, in hidden.
    Quantized weights come as there, without grad_w1 and grad_w2.
    add_w1, add_w2: grad_w1, grad_w2 are added to, and may be wide; experts without rows leave them be.
    """

def grouped_mm(
    x: _Tensor,
    w: _Tensor,
    offsets: _Tensor,
    bias: _Tensor | None,
    out: _Tensor,
    *,
    transposed: bool,
    threads: int,
) -> None:
    """out[r] = x[r] @ w[e].T + bias[e] for rows offsets[e] to offsets[e+1], 0 for rows after the last.

    x [R, K], w [E, N, K] (transposed: [E, K, N]), offsets int32 [E+1], bias [E, N], out [R, N].
    """

def grouped_mm_grad_weight(
    grad_out: _Tensor,
    x: _Tensor,
    offsets: _Tensor,
    grad_w: _Tensor,
    grad_bias: _Tensor | None,
    *,
    transposed: bool,
    threads: int,
    add_w: bool = False,
) -> None:
    """grad_w[e] = grad_out[rows of e].T @ x[rows of e], and grad_bias[e] the sum of those rows of grad_out.

    grad_out [R, N], x [R, K], grad_w [E, N, K] (transposed: [E, K, N]), grad_bias [E, N].
    add_w: grad_w is added to, and may be wide.
    """

def permute(x: _Tensor, gather: _Tensor, out: _Tensor, *, threads: int) -> None:
    """out[r] = x[gather[r]], and 0 where gather is -1; x [T, H], gather int32 [R], out [R, H]."""

def unpermute(y: _Tensor, inverse: _Tensor, weights: _Tensor | None, out: _Tensor, *, threads: int) -> None:
    """out[t] = sum over k of weights[t, k] * y[inverse[t, k]] without dropped slots; weights None are ones.

    y [R, H], inverse int32 [T, K], weights wide [T, K], out [T, H].
    """

def unpermute_backward(
    grad_out: _Tensor,
    y: _Tensor,
    weights: _Tensor | None,
    gather: _Tensor,
    inverse: _Tensor,
    grad_y: _Tensor | None,
    grad_weights: _Tensor | None,
    *,
    threads: int,
) -> None:
    """Gradients of unpermute: grad_y [R, H], 0 in unused rows; grad_weights wide [T, K], 0 where dropped."""

def empty(shape: Sequence[int], dtype: _DType, *, unwritten: bool = False) -> torch.Tensor:
    """An uninitialised tensor from a pool that takes the memory back when torch lets go of it.

    With `unwritten` nobody may write to it before it is handed to the kernel that writes the gradient of a
    weight, which need not write zeros then where the memory is new.

    Without a DLPack exchange table in torch it is a plain torch.empty. ImportError without torch.
    """

def empty_like(tensor: torch.Tensor, *, unwritten: bool = False) -> torch.Tensor:
    """The same, of the shape and the float dtype of another tensor."""

def empty_cache() -> None:
    """Gives the pool's waiting memory back to the system."""

def memory_stats() -> _MemoryStats:
    """The pool's counters: bytes waiting and in use, requests served from it (hits) or not (misses)."""

def cpu_info() -> _CpuInfo:
    """Architecture, features, the instruction set in use and those that may be forced, kernels."""

def images(capability: tuple[int, int] | None = None) -> list[_Image]:
    """The compiled CUDA kernels of this build by family, or those that a device of a compute capability runs.

    `arch` is their target: "80", "90a", "100f", "120f" or "ptx"; `bytes` what they take in the module.
    """

def cuda_info() -> _CudaInfo:
    """The CUDA version that the driver supports, and its devices; `shared_bytes` a block can have at most.

    RuntimeError where there is no driver, or where it is too old for the images; the message has the remedy.
    """

def mlp_launches(
    tokens: int,
    hidden: int,
    intermediate: int,
    experts: int,
    top_k: int,
    *,
    math: Literal["bf16", "f16", "f32", "tf32"],
    gated: bool,
    bias: bool,
    train: bool,
    capability: tuple[int, int],
    multiprocessors: int,
    shared_bytes: int,
) -> list[_Launch]:
    """What the expert MLP with its plan would launch on a GPU that need not be there.

    Forward and, for `train`, backward. Each launch has its kernel, the blocks of its grid, and all the memory
    that it is given: name, bytes, use.
    """

def load_cuda(device: int) -> None:
    """Load the kernels for a CUDA device, as the first call on it does; RuntimeError says why it cannot."""

"""The paths that are timed beside each other: ours, torch's, and other projects' where they are installed.

A path is `make(problem) -> call, parameters`: `call(batch)` returns [T, H], differentiable in x, weights and
the parameters, which are w1 and w2 of the problem, or a peer's own copies in the layout that it wants.
`Unavailable` says why there is none. Folders of FASTMOE_BENCH_PEERS (as in PATH) are searched for peers too.
"""

from __future__ import annotations

import functools
import importlib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from baselines import transformers_paths
from problems import Batch, Problem
from torch import Tensor
from torch.nn import Parameter
from torch.nn import functional as F

from fastmoe_rs.functional import moe_mlp

Made = tuple[Callable[[Batch], Tensor], tuple[Parameter, Parameter]]
OURS = "fastmoe_rs"
sys.path += filter(None, os.environ.get("FASTMOE_BENCH_PEERS", "").split(os.pathsep))


class Unavailable(Exception):
    """Why a path cannot be timed here."""


@dataclass(frozen=True)
class Path:
    name: str
    make: Callable[[Problem], Made]


def ours(problem: Problem) -> Made:
    activation = "swiglu" if problem.cell.shape.gated else "relu"

    def call(batch: Batch) -> Tensor:
        return moe_mlp(batch.x, batch.ids, batch.weights, problem.w1, problem.w2, activation=activation)

    return call, (problem.w1, problem.w2)


def torch_grouped(problem: Problem) -> Made:
    """Sort, gather, grouped_mm, activation, grouped_mm, weighted index_add; never waits for the device."""
    grouped_mm = getattr(F, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)
    if grouped_mm is None:
        raise Unavailable(f"torch {torch.__version__} has no grouped_mm")
    shape = problem.cell.shape

    def call(batch: Batch) -> Tensor:
        flat = batch.ids.reshape(-1)
        order = flat.argsort(stable=True)
        counts, ones = flat.new_zeros(shape.experts), torch.ones_like(flat)
        ends = counts.scatter_add_(0, flat, ones).cumsum(0, dtype=torch.int32)
        tokens = order // shape.top_k
        hidden = grouped_mm(batch.x[tokens], problem.w1.mT, offs=ends)
        if shape.gated:
            gate, up = hidden.chunk(2, dim=-1)
            activated = F.silu(gate) * up
        else:
            activated = hidden.relu()
        y = grouped_mm(activated, problem.w2.mT, offs=ends)
        y = y * batch.weights.reshape(-1)[order, None].to(y.dtype)
        return torch.zeros_like(batch.x).index_add(0, tokens, y)

    return call, (problem.w1, problem.w2)


def gated_only(problem: Problem) -> None:
    if not problem.cell.shape.gated:
        raise Unavailable("gated activations only")


def library(name: str) -> Any:
    if isinstance(found := imported(name), Exception):
        raise Unavailable(f"{type(found).__name__}: {found}"[:200])
    return found


@functools.cache
def imported(name: str) -> Any:
    """A module, or why there is none: an import that fails may take seconds, in each cell."""
    try:
        return importlib.import_module(name)
    except Exception as error:  # what a foreign library raises when it does not fit is its own
        return error


def transformers(implementation: str) -> Callable[[Problem], Made]:
    def make(problem: Problem) -> Made:
        gated_only(problem)
        if not transformers_paths.AVAILABLE:
            raise Unavailable("transformers >= 5 is not installed")
        layer = problem.cell.layer
        copies = 2 * layer.tokens * layer.top_k * layer.expert_parameters * (3 if problem.cell.train else 1)
        if implementation == "batched_mm" and copies > memory(problem) / 2:
            raise Unavailable(f"would copy {copies / 2**30:.0f} GiB of weights")
        experts = transformers_paths.maker(implementation)(problem.w1, problem.w2)
        return lambda batch: experts(batch.x, batch.ids, batch.weights), (problem.w1, problem.w2)

    return make


def memory(problem: Problem) -> float:
    device = problem.w1.device
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 1 << 30


def copied(problem: Problem) -> tuple[Tensor, Tensor]:
    """The weights, for a peer that wants them in another layout."""
    w1, w2 = problem.w1.detach(), problem.w2.detach()
    if w1.is_cuda:
        torch.cuda.empty_cache()
        needed = (w1.nbytes + w2.nbytes) * (3 if problem.cell.train else 1)  # with gradients, eager and graph
        free = torch.cuda.mem_get_info(w1.device)[0]
        if needed > free:
            raise Unavailable(
                f"needs {needed / 2**30:.0f} GiB for its copy of the weights, {free / 2**30:.0f} are free"
            )
    return w1, w2


def liger(problem: Problem) -> Made:
    gated_only(problem)
    function = library("liger_kernel.ops.fused_moe").LigerFusedMoEFunction
    few_configurations(library("liger_kernel.ops.fused_moe_kernels"), liger_tile)

    def call(batch: Batch) -> Tensor:
        return function.apply(batch.x, problem.w1, problem.w2, batch.ids_int32, batch.weights)

    return call, (problem.w1, problem.w2)


# Of the hundreds of tiles that Liger would compile and time for each layer, in about two minutes a layer.
LIGER_TILES = (
    {"BLOCK_N": 128, "BLOCK_K": 64},
    {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 32},
    {"BLOCK_H": 512, "BLOCK_K": 4},
    {"BLOCK_H": 512, "BLOCK_K": 8},
)


def liger_tile(configuration: Any) -> bool:
    """Tiles of products with 4 and 8 warps, those of the sum over a token's rows, bound by memory, with 4."""
    if "BLOCK_H" in configuration.kwargs and configuration.num_warps != 4:
        return False
    stages = 2 if "BLOCK_M" in configuration.kwargs else 4
    return configuration.kwargs in LIGER_TILES and configuration.num_stages == stages


def few_configurations(module: object, wanted: Callable[[Any], bool]) -> None:
    """Leaves kernels that tune themselves the wanted configurations; all by FASTMOE_BENCH_TUNE=all."""
    if os.environ.get("FASTMOE_BENCH_TUNE") == "all":
        return
    for kernel in vars(module).values():
        if isinstance(configurations := getattr(kernel, "configs", None), list):
            kernel.configs = [*filter(wanted, configurations)] or configurations


def scattermoe(problem: Problem) -> Made:
    gated_only(problem)
    make = library("scattermoe.mlp").GLUMLP
    w1, w2 = copied(problem)
    shape = problem.cell.shape
    sizes = shape.hidden, shape.intermediate, shape.experts, shape.top_k
    with torch.device("meta"):
        module = make(*sizes, activation=torch.nn.SiLU())
    gate, up = w1.chunk(2, dim=1)
    module.experts.weight = Parameter(torch.cat((up, gate), 1))  # it has the gate in the second half
    module.output_experts.weight = Parameter(w2)
    parameters = module.experts.weight, module.output_experts.weight
    return lambda batch: module(batch.x, batch.weights.to(batch.x.dtype), batch.ids), parameters


def sonicmoe(problem: Problem) -> Made:
    """The layer from given routing, where the release has it."""
    gated_only(problem)
    functional = library("sonicmoe.functional")
    layer = getattr(functional, "moe_general_routing_inputs", None)
    if layer is None:
        raise Unavailable("this release of sonicmoe has no function for routing that is given")
    activation = library("sonicmoe.enums").ActivationType.SWIGLU
    few_configurations(library("quack.gemm_interface"), hopper_tile)
    few_configurations(library("sonicmoe.functional.reduction_over_k_gather"), gather_tile)
    w1, w2 = copied(problem)
    gate, up = w1.chunk(2, dim=1)
    w1 = Parameter(torch.stack((gate, up), 2).flatten(1, 2))  # rows of gate and up in turn
    w2 = Parameter(w2)
    shape = problem.cell.shape
    rows = torch.arange(problem.cell.tokens * shape.top_k, device=w1.device, dtype=torch.int32)
    tokens = rows // shape.top_k

    def call(batch: Batch) -> Tensor:
        routing = batch.weights.reshape(-1), tokens, batch.ids_int32.reshape(-1)
        weights = w1.permute(1, 2, 0), None, w2.permute(1, 2, 0), None
        stream = torch.cuda.current_stream().cuda_stream if batch.x.is_cuda else 0
        inference = not problem.cell.train
        return layer(batch.x, *routing, *weights, shape.experts, stream, activation, inference)[0]

    return call, (w1, w2)


SONIC_GATHERS = (
    {"BLOCK_H": 512, "BLOCK_K": 8},
    {"BLOCK_H": 1024, "BLOCK_K": 2},
    {"BLOCK_H": 1024, "BLOCK_K": 4},
    {"BLOCK_H": 2048, "BLOCK_K": 1},
)


def gather_tile(configuration: Any) -> bool:
    """Of the tiles that SonicMoE sums a token's rows by, one of each kind."""
    return configuration.num_warps == 4 and configuration.kwargs in SONIC_GATHERS


def hopper_tile(configuration: Any) -> bool:
    """Of the tiles that SonicMoE's products try on compute capability 9.0, those of its paper."""
    tile = configuration.kwargs["config"]
    sizes, cluster = (tile.tile_m, tile.tile_n, tile.pingpong), (tile.cluster_m, tile.cluster_n)
    best = (128, 256, False), (128, 192, True), (128, 128, True)
    return tile.device_capacity != 9 or (sizes in best and cluster == (2, 1) and not tile.swap_ab)


PATHS = (
    Path(OURS, ours),
    Path("torch_grouped", torch_grouped),
    Path("transformers_grouped", transformers("grouped_mm")),
    Path("transformers_batched", transformers("batched_mm")),
    Path("liger", liger),
    Path("scattermoe", scattermoe),
    Path("sonicmoe", sonicmoe),
)

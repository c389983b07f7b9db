"""The paths that are timed beside each other: ours, torch's, and other projects' where they are installed.

A path is `make(problem) -> call, parameters`: `call(batch)` returns [T, H], differentiable in x, weights and
the parameters, which are w1 and w2 of the problem, or a peer's own copies in the layout that it wants.
`Unavailable` says why there is none. Folders of FASTMOE_BENCH_PEERS (as in PATH) are searched for peers too.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass

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


def library(name: str) -> object:
    try:
        return importlib.import_module(name)
    except Exception as error:  # what a foreign library raises when it does not fit is its own
        raise Unavailable(f"{type(error).__name__}: {error}"[:200]) from None


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


def liger(problem: Problem) -> Made:
    gated_only(problem)
    function = library("liger_kernel.ops.fused_moe").LigerFusedMoEFunction

    def call(batch: Batch) -> Tensor:
        return function.apply(batch.x, problem.w1, problem.w2, batch.ids.int(), batch.weights)

    return call, (problem.w1, problem.w2)


def scattermoe(problem: Problem) -> Made:
    gated_only(problem)
    shape = problem.cell.shape
    sizes = shape.hidden, shape.intermediate, shape.experts, shape.top_k
    with torch.device("meta"):
        module = library("scattermoe.mlp").GLUMLP(*sizes, activation=torch.nn.SiLU())
    gate, up = problem.w1.detach().chunk(2, dim=1)
    module.experts.weight = Parameter(torch.cat((up, gate), 1))  # it has the gate in the second half
    module.output_experts.weight = Parameter(problem.w2.detach().clone())
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
    gate, up = problem.w1.detach().chunk(2, dim=1)
    w1 = Parameter(torch.stack((gate, up), 2).flatten(1, 2))  # rows of gate and up in turn
    w2 = Parameter(problem.w2.detach().clone())
    experts, top_k = problem.cell.shape.experts, problem.cell.shape.top_k

    def call(batch: Batch) -> Tensor:
        tokens = torch.arange(len(batch.x), device=batch.x.device, dtype=torch.int32).repeat_interleave(top_k)
        routing = batch.weights.reshape(-1), tokens, batch.ids.reshape(-1).int()
        weights = w1.permute(1, 2, 0), None, w2.permute(1, 2, 0), None
        stream = torch.cuda.current_stream().cuda_stream
        inference = not problem.cell.train
        return layer(batch.x, *routing, *weights, experts, stream, activation, inference)[0]

    return call, (w1, w2)


PATHS = (
    Path(OURS, ours),
    Path("torch_grouped", torch_grouped),
    Path("transformers_grouped", transformers("grouped_mm")),
    Path("transformers_batched", transformers("batched_mm")),
    Path("liger", liger),
    Path("scattermoe", scattermoe),
    Path("sonicmoe", sonicmoe),
)

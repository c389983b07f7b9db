"""Expert parallelism: every rank holds a share of the experts, and rows travel to those that they chose.

Each rank has tokens of its own, as in data parallelism; their number may differ and be 0. The routed rows,
sorted by expert and so by rank too, go to the ranks of their experts, and what comes back is weighed and
summed at home; gradients go the other ways. Dropped rows are not sent. That is four exchanges
(`all_to_all_single`) a layer in a training step, one more of counts, and three more where activation
checkpointing repeats the forward.

- Every rank of the group takes part in every forward and backward, in the same order, also without tokens.
  An exception on one rank leaves the others waiting until their group's timeout, as with any collective.
- The host has to know how many rows come: on a GPU each forward waits for the device once, but not with a
  `capacity`, for which rows travel in buffers of fixed size.
- An expert gets the rows that it would get in one process from the tokens of all ranks, rank after rank, in
  the same order. The same routing gives the same bits, outputs and the gradients of tokens and experts, from
  run to run, and on CPUs for any number of ranks but one, whose kernel sums over K as it computes. On a GPU
  the tile, and with it the last bits, may follow from how many rows and experts a rank has.
- `torch.compile` calls the experts uncompiled, after a graph break; with fullgraph=True it raises.
"""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from . import _check
from ._distributed import agree, all_reduced, place
from .experts import Experts
from .nn import moe_layers
from .parallel_experts import ExpertParallel, described

__all__ = ["ExpertParallel", "clip_grad_norm_", "full_state_dict", "shard_experts"]


def shard_experts(
    model: nn.Module,
    group: dist.ProcessGroup | None = None,
    *,
    capacity: int | None = None,
    gradients: str = "mean",
) -> nn.Module:
    """Keep this rank's share of the experts of every `nn.MoE` in a model, in place.

    Call it on the module that is wrapped in DistributedDataParallel afterwards, which then leaves the experts
    alone, and before making an optimizer. Layers that share their experts still do.

    Args:
        model: the same model on every rank of the group.
        group: see `ExpertParallel`.
        capacity: see `ExpertParallel`.
        gradients: see `ExpertParallel`.

    Returns:
        The model.

    Raises:
        RuntimeError: torch.distributed is not initialized.
        ValueError: as `ExpertParallel`, and where the model has no `nn.MoE`, or other ones on another rank.
        TypeError: `model` is no module, or a layer has other experts than `nn.Experts`.
    """
    place(group)
    layers = moe_layers(model) if isinstance(model, nn.Module) else {}
    kinds = {name: described(moe.experts) for name, moe in layers.items()}
    agree("model", f"layers {kinds}", group)
    _check.module("model", model)
    if not layers:
        _check.wanted("model", type(model).__name__, "a module with nn.MoE layers")
    for name, moe in layers.items():
        if type(moe.experts) is not Experts:
            given = f"{type(moe.experts).__name__} in {name or 'it'}"
            _check.wanted("model", given, "layers with nn.Experts", TypeError)
    for moe in layers.values():
        whole = moe.experts
        if type(whole) is not Experts:
            continue  # shared with a layer before
        share = ExpertParallel(whole, group, capacity=capacity, gradients=gradients)
        for other in layers.values():
            if other.experts is whole:
                other.experts = share
    ignored = {*getattr(model, "_ddp_params_and_buffers_to_ignore", ())}
    for path, share in _parallel(model).items():
        ignored |= {f"{path}.{name}" for name, _ in share.named_parameters()}
    # Not public, but what DistributedDataParallel reads in every release, and documented there.
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ignored)
    return model


def full_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of the model with all experts; all ranks call it together.

    `load_state_dict` takes it for the model as it was before `shard_experts`, and after, on any number of
    ranks. `model.state_dict()` has the experts of this rank only.

    Args:
        model: a model after `shard_experts`, or within DistributedDataParallel.

    Returns:
        The state dict on rank 0 of each layer's group; without the experts on the others.
    """
    layers = _parallel(model)
    state = model.state_dict()
    for path, share in layers.items():
        for name, weight in share.named_parameters():
            key = f"{path}.{name}" if path else name
            mine = state[key].flatten(1)
            sizes = share.shares if share.rank == 0 else [0] * len(share.shares)
            whole = mine.new_empty(sum(sizes), mine.shape[1])
            to_rank_0 = [len(mine), *[0] * (len(sizes) - 1)]
            dist.all_to_all_single(whole, mine, sizes, to_rank_0, group=share.group)
            if share.rank == 0:
                state[key] = whole.unflatten(1, weight.shape[1:])
            else:
                del state[key]
    return state


def clip_grad_norm_(model: nn.Module, max_norm: float, group: dist.ProcessGroup | None = None) -> Tensor:
    """`torch.nn.utils.clip_grad_norm_` with the experts of all ranks in the norm; all ranks call it together.

    torch's own would scale by another norm on every rank, and the copies of a router would drift apart.
    Not for models within FSDP2.

    Args:
        model: a model after `shard_experts`, or within DistributedDataParallel. Without shared-out experts
            ranks need not call together.
        max_norm: the gradients are scaled down to this 2-norm where theirs is larger.
        group: the one of its experts.

    Returns:
        The norm before, a scalar.
    """
    apart = {weight for share in _parallel(model).values() for weight in share.parameters()}
    learning = [weight for weight in model.parameters() if weight.grad is not None]

    def squared_norm(local: bool) -> Tensor:
        grads = [w.grad for w in learning if w.grad is not None and (w in apart) is local]
        return get_total_norm(grads).to(next(model.parameters()).device).square()

    squares = squared_norm(local=False)
    if apart:
        squares = squares + all_reduced(squared_norm(local=True), True if group is None else group)
    clip_grads_with_norm_(learning, max_norm, squares.sqrt())
    return squares.sqrt()


def _parallel(model: nn.Module) -> dict[str, ExpertParallel]:
    _check.module("model", model)
    return {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, ExpertParallel)
    }

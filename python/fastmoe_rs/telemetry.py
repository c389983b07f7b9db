"""What the experts of a model do while it trains, counted on its device without waiting for it.

    watched = fastmoe_rs.watch(model)
    for step, batch in enumerate(batches):
        with watched.masked(batch.attention_mask):
            loss = model(...)
        loss.backward()
        optimizer.step()
        if step % 100 == 0:
            watched.log(step, JsonLines("routing.jsonl"))

Counters add up over forwards, so micro-batches of a step count together; the forwards that activation
checkpointing repeats in the backward do not count.

Legend: T tokens, E experts, K experts per token, R = T*K routed rows.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn

from .load import bins, counted

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = [
    "Counters",
    "ExpertCollapseWarning",
    "Stats",
    "Watch",
    "collapse",
    "load",
    "load_entropy",
    "max_vio",
    "watch",
]

Record: TypeAlias = dict[str, Any]
Sink: TypeAlias = Callable[[int, dict[str, Record]], None]

# A load this uneven, seen over this many routes per expert, is no accident of sampling.
_SURE_ROUTES = 100
_STARVED_SHARE, _COLLAPSED_ENTROPY = 0.01, 0.5


class ExpertCollapseWarning(UserWarning):
    """Some experts of a layer get almost no tokens."""


@dataclass(frozen=True)
class Stats:
    """How a layer routed the tokens of one or more forwards; tensors on its device.

    Attributes:
        routes: int64 [E], routes that asked for an expert, dropped ones included.
        tokens: int64 scalar, tokens that count.
        dropped: float32 scalar, the share of the routes that a capacity dropped.
        router_entropy: float32 scalar, mean over tokens of the entropy of the softmax of the logits, over
            ln E: 1 undecided, 0 sure.
        logit_norm: float32 scalar, mean over tokens of the Euclidean norm of the logits.
    """

    routes: Tensor
    tokens: Tensor
    dropped: Tensor
    router_entropy: Tensor
    logit_norm: Tensor

    @property
    def load(self) -> Tensor:
        """float32 [E], the share of the routes that asked for an expert; sums to 1."""
        return load(self.routes)

    @property
    def max_vio(self) -> Tensor:
        """float32 scalar, see `max_vio`."""
        return max_vio(self.load)

    @property
    def load_entropy(self) -> Tensor:
        """float32 scalar, see `load_entropy`."""
        return load_entropy(self.load)

    @property
    def dead(self) -> Tensor:
        """int64 scalar, experts that no token asked for."""
        return (self.routes == 0).sum()


def load(routes_E: Tensor) -> Tensor:
    """float32 [E], the share of each expert in `routes_E`; zeros when there are none."""
    return routes_E / routes_E.sum().clamp(min=1)


def max_vio(load_E: Tensor) -> Tensor:
    """float32 scalar, the largest load over the mean load, minus 1 (MaxVio, arXiv:2408.15664, eq. 4)."""
    return load_E.max() * len(load_E) - 1


def load_entropy(load_E: Tensor) -> Tensor:
    """float32 scalar, the entropy of the load over that of an even load: 1 even, 0 all on one of several
    experts; the load of a single expert is even."""
    experts = len(load_E)
    return torch.special.entr(load_E).sum() / math.log(experts) if experts > 1 else load_E.sum()


class Counters:
    """The sums behind the `Stats` of one layer.

    Args:
        num_experts: E.
        device: where the layer is.

    Attributes:
        mask: which tokens count, see `Watch.masked`; None for all.
    """

    def __init__(self, num_experts: int, device: torch.device) -> None:
        # The last entry takes ids outside [0, E), which stand for experts of other ranks.
        self.routes = torch.zeros(num_experts + 1, dtype=torch.int64, device=device)
        self.counts = torch.zeros(2, dtype=torch.int64, device=device)  # tokens, dropped routes
        self.sums = torch.zeros(2, dtype=torch.float32, device=device)  # entropies, norms
        self.mask: Tensor | None = None

    @torch.no_grad()
    def add(self, ids_TK: Tensor, logits_TE: Tensor, dropped_TK: Tensor | None = None) -> None:
        """Count a forward, unless it is the one that a backward repeats.

        Raises:
            ValueError: the mask has not one element for each token.
        """
        if recomputing():
            return
        counts_T = counted(ids_TK, self.mask)
        counts_TK = counts_T[:, None].expand(ids_TK.shape)
        bins_TK = bins(ids_TK, len(self.routes) - 1)
        self.routes.scatter_add_(0, bins_TK.reshape(-1), counts_TK.reshape(-1))
        tokens = counts_T.sum()
        dropped = torch.zeros_like(tokens) if dropped_TK is None else (counts_TK * dropped_TK).sum()
        self.counts.add_(torch.stack((tokens, dropped)))
        logits_TE = logits_TE.float()
        entropy_T = torch.special.entr(logits_TE.softmax(-1)).sum(-1)
        both_2T = torch.stack((entropy_T, logits_TE.norm(dim=-1)))
        self.sums.add_(torch.where(counts_T != 0, both_2T, 0.0).sum(1))

    def stats(self) -> Stats:
        """What was counted since the last reset."""
        routes, (tokens, dropped) = self.routes[:-1].clone(), self.counts.clone()
        entropy, norm = self.sums / tokens.clamp(min=1)
        return Stats(
            routes=routes,
            tokens=tokens,
            dropped=dropped / routes.sum().clamp(min=1),
            router_entropy=entropy / math.log(max(len(routes), 2)),
            logit_norm=norm,
        )

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """All sums, to be added up over ranks or set to zero."""
        return self.routes, self.counts, self.sums


class Watch:
    """The counters of all layers of a model; made by `watch`.

    Args:
        counters: by the name of the layer.
        release: called by `close`.
    """

    def __init__(self, counters: dict[str, Counters], release: Callable[[], None]) -> None:
        self.counters = counters
        self._release = release
        self._warned: set[str] = set()

    def close(self) -> None:
        """Stop counting; what was counted can still be read."""
        self._release()

    def stats(self) -> dict[str, Stats]:
        """What each layer did since the last reset; nothing waits for the device."""
        return {name: counters.stats() for name, counters in self.counters.items()}

    def reset(self) -> None:
        """Start anew."""
        for tensor in self._tensors():
            tensor.zero_()

    @contextmanager
    def masked(self, mask: Tensor | None) -> Iterator[None]:
        """Within the block, tokens count where `mask` is not 0.

        Args:
            mask: [B, S] or any shape of T elements, as `attention_mask` is for training; None counts all.
        """
        for counters in self.counters.values():
            counters.mask = mask
        try:
            yield
        finally:
            for counters in self.counters.values():
                counters.mask = None

    def all_reduce(self, group: ProcessGroup | None = None) -> None:
        """Add up the counters of all ranks, each of which then has the sum: to be done once before `log`."""
        for tensor in self._tensors():
            torch.distributed.all_reduce(tensor, group=group)

    def record(self) -> dict[str, Record]:
        """The statistics of each layer as numbers ready for JSON; waits for the device once."""
        names = ("max_vio", "load_entropy", "router_entropy", "dropped", "logit_norm", "dead", "tokens")
        columns = [
            torch.cat([stats.load.double(), torch.stack([getattr(stats, name).double() for name in names])])
            for stats in self.stats().values()
        ]
        values = iter(torch.cat([column.to(columns[0].device) for column in columns]).tolist())
        records = {}
        for name, column in zip(self.counters, columns, strict=True):
            record: Record = {"load": [next(values) for _ in range(len(column) - len(names))]}
            record |= {name: next(values) for name in names}
            records[name] = record | {"dead": int(record["dead"]), "tokens": int(record["tokens"])}
        return records

    def log(self, step: int, *sinks: Sink) -> dict[str, Record]:
        """Give the record to every sink, warn once of each layer that collapses, start anew.

        Args:
            step: the training step.
            sinks: functions of the step and of what `record` gives, as in `fastmoe_rs.sinks`.

        Warns:
            ExpertCollapseWarning: see `collapse`.
        """
        records = self.record()
        for sink in sinks:
            sink(step, records)
        for name, record in records.items():
            reason = collapse(record)
            if reason and name not in self._warned:
                warnings.warn(f"step {step}, layer {name!r}: {reason}", ExpertCollapseWarning, stacklevel=2)
            (self._warned.add if reason else self._warned.discard)(name)
        self.reset()
        return records

    def _tensors(self) -> Iterator[Tensor]:
        for counters in self.counters.values():
            yield from counters.tensors()


def watch(model: nn.Module) -> Watch:
    """Count how the Mixture-of-Experts layers of a model route, until `close` of what this returns is called.

    Args:
        model: a module with `nn.MoE` layers, or a transformers (>= 5) model. Move it to its device first, and
            watch it before compiling.

    Raises:
        TypeError: `model` is no module.
        ValueError: it has no Mixture-of-Experts layer, or a `nn.MoE` that is watched already.
    """
    from . import layers
    from .nn import moe_layers

    routers = layers.routers(model)
    ours = moe_layers(model)
    if watched := [name for name, moe in ours.items() if moe.counters is not None]:
        raise ValueError(f"model: {watched[0]!r} is watched already, close that watch first")
    theirs = {name: router for name, router in routers.items() if name not in ours}
    counters = {}
    for name, router in routers.items():
        if name in ours:
            device = next(ours[name].parameters()).device
            counters[name] = ours[name].counters = Counters(ours[name].num_experts, device)
        else:
            weight = [parameter for parameter in router.parameters() if parameter.ndim == 2][-1]
            counters[name] = Counters(weight.shape[0], weight.device)
    end = layers.observe(theirs, lambda name, *routed: counters[name].add(*routed))

    def release() -> None:
        end()
        for moe in ours.values():
            moe.counters = None

    return Watch(counters, release)


def collapse(record: Record) -> str | None:
    """Why the experts of a layer count as collapsed, and the remedy; None when they do not, or too few routes
    were seen to tell.

    Args:
        record: the record of a layer, see `Watch.record`.
    """
    shares, experts = record["load"], len(record["load"])
    starved = sum(share * experts < _STARVED_SHARE for share in shares)
    # K is at least 1, so this many routes were seen at least.
    sure = record["tokens"] >= _SURE_ROUTES * experts
    if not sure or (not starved and record["load_entropy"] >= _COLLAPSED_ENTROPY):
        return None
    return (
        f"{starved} of {experts} experts get less than {_STARVED_SHARE:.0%} of an even share of the tokens, "
        f"the busiest {record['max_vio'] + 1:.1f} times an even share; the logits have norm "
        f"{record['logit_norm']:.1f}. Remedy: add or raise losses.load_balancing_loss, balance by the "
        "router's selection_bias, or lower its learning rate; add losses.router_z_loss where the norm grows."
    )


def recomputing() -> bool:
    """Whether a backward is running: a forward then is one that activation checkpointing repeats."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1

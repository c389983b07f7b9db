"""RoutingPlan: which row of which expert every routed token goes to.

Legend: T tokens, E experts, K experts per token, R = T*K routed rows, C capacity of an expert.
Row i = t*K + k of the flat order becomes row `inverse[t, k]` of the sorted order, grouped by expert.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import sys
from dataclasses import dataclass
from typing import Any, TypeAlias

from . import _native
from ._wanted import one_of, wanted, whole

Array: TypeAlias = Any  # a torch.Tensor or a numpy.ndarray, the same throughout a plan

_TENSORS = ("ids", "counts", "offsets", "gather", "inverse", "weights")
_NUMBERS = ("num_experts", "capacity")


@dataclass(frozen=True, eq=False, repr=False)
class RoutingPlan:
    """The routed rows of a batch, sorted by expert; made by `RoutingPlan.from_ids`.

    Its arrays are torch tensors or NumPy arrays, as the ids were; ids of another library with DLPack, such as
    CuPy, become torch tensors on the same device. A plan is a torch pytree, can be pickled, copied and moved,
    and can be kept to route a later forward the same way (`nn.MoE(...)(x, plan=plan)`): gradients then flow
    through the live logits, only the choice of experts is the recorded one.

    Attributes:
        ids: [T, K] the expert ids that the plan was made of.
        counts: int32 [E], rows kept per expert.
        offsets: int32 [E + 1]; expert e owns the sorted rows offsets[e] to offsets[e + 1].
        gather: int32 [R] (padded: [E * C]; trimmed: fewer); the token that feeds each sorted row, -1 where a
            row is unused.
        inverse: int32 [T, K]; the sorted row of routed row (t, k), -1 where it was dropped.
        weights: float32 or float64, as long as `gather`: the routing weights in sorted order, detached, 0 in
            unused rows. None when none were given.
        num_experts: E.
        capacity: C, or None when no expert drops a row.
    """

    ids: Array
    counts: Array
    offsets: Array
    gather: Array
    inverse: Array
    weights: Array | None
    num_experts: int
    capacity: int | None = None

    @property
    def tokens(self) -> int:
        """T."""
        return self.inverse.shape[0]

    @property
    def top_k(self) -> int:
        """K."""
        return self.inverse.shape[1]

    @staticmethod
    def from_ids(
        ids_TK: Array,
        num_experts: int,
        *,
        weights: Array | None = None,
        capacity: int | None = None,
        drop: str = "position",
        pad: bool = False,
        out_of_range: str = "error",
    ) -> RoutingPlan:
        """Sort routed rows by expert, stably: the rows of an expert stay in the order of their tokens.

        Args:
            ids_TK: int64 or int32 [T, K] expert ids, of torch, NumPy or a library with DLPack. An id may
                occur twice in a row.
            num_experts: E.
            weights: float [T, K] routing weights, sorted along with the rows.
            capacity: most rows that an expert takes; the others are dropped. None takes all.
            drop: which rows a full expert keeps: "position" the first ones, "score" those of highest weight
                (ties: the first ones). Kept rows stay in the order of their tokens.
            pad: every expert owns exactly `capacity` rows, the last of them unused when it has fewer.
            out_of_range: what an id outside [0, E) does: "error" raises, "drop" drops its row. On a GPU, for
                which nobody waits, "error" drops it too, unless the environment sets FASTMOE_CHECK=1.

        Raises:
            ValueError: a wrong shape, an id out of range, a negative capacity, an unknown option, or an
                option without what it needs (drop="score" without weights, pad without capacity).
            TypeError: a wrong dtype or type.
        """
        ids_TK, weights = _of_torch(ids_TK), _of_torch(weights)
        ids_TK, weights = _checked(ids_TK, num_experts, weights, capacity, drop, pad, out_of_range)
        if _is_numpy(ids_TK):
            return _plan_numpy(ids_TK, num_experts, weights, capacity, drop, pad, out_of_range)
        from . import ops

        sorted_ = ops.plan(ids_TK, weights, num_experts, capacity, drop, pad, out_of_range)
        counts, offsets, gather, inverse, sorted_weights = sorted_
        if weights is None:
            sorted_weights = None
        return RoutingPlan(ids_TK, counts, offsets, gather, inverse, sorted_weights, num_experts, capacity)

    def trimmed(self, rows: int) -> RoutingPlan:
        """The plan with its first `rows` sorted rows only, for a caller who knows that no more are in use.

        Experts that choose their tokens route few of the T * E pairs that ids [T, E] have room for; computing
        with a trimmed plan takes no memory for the rest. Cutting off rows in use raises ValueError where the
        plan is used.
        """
        whole("rows", rows, least=0)
        weights = None if self.weights is None else self.weights[:rows]
        return dataclasses.replace(self, gather=self.gather[:rows], weights=weights)

    def to(self, device: Any, *, non_blocking: bool = False) -> RoutingPlan:
        """The plan on a torch device; NumPy arrays become tensors."""
        moved: dict[str, Any] = {}
        for name in _TENSORS:
            array = getattr(self, name)
            moved[name] = None if array is None else _as_tensor(array).to(device, non_blocking=non_blocking)
        return dataclasses.replace(self, **moved)

    def state_dict(self) -> dict[str, Any]:
        """Tensors and numbers by name, to save the plan; `from_state_dict` makes it again."""
        return {name: getattr(self, name) for name in (*_TENSORS, *_NUMBERS)}

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> RoutingPlan:
        """The plan of which `state` is the `state_dict`.

        Raises:
            ValueError: an entry is missing or unknown.
        """
        if state.keys() != {*_TENSORS, *_NUMBERS}:
            wanted("state", f"entries {sorted(state)}", str(sorted((*_TENSORS, *_NUMBERS))))
        return cls(**state)

    def __repr__(self) -> str:
        return (
            f"RoutingPlan(tokens={self.tokens}, top_k={self.top_k}, num_experts={self.num_experts}, "
            f"capacity={self.capacity})"
        )


def _is_numpy(array: object) -> bool:
    return type(array).__module__ == "numpy"


def _of_torch(array: Array) -> Array:
    """A tensor over the memory of an array of another library than torch and NumPy."""
    if _is_numpy(array) or hasattr(array, "detach") or not hasattr(array, "__dlpack__"):
        return array
    from torch.utils.dlpack import from_dlpack

    return from_dlpack(array)


def _dtype(array: Array) -> str:
    return str(array.dtype).removeprefix("torch.")


def _checked(
    ids: Array,
    num_experts: int,
    weights: Array | None,
    capacity: int | None,
    drop: str,
    pad: bool,
    out_of_range: str,
) -> tuple[Array, Array | None]:
    """ids and weights as the kernels want them, once every argument makes sense."""
    for name, array in (("ids", ids), ("weights", weights)):
        if not hasattr(array, "dtype") and (name == "ids" or array is not None):
            wanted(name, type(array).__name__, "a torch tensor or a NumPy array", TypeError)
    if _dtype(ids) not in ("int64", "int32"):
        wanted("ids", f"dtype {_dtype(ids)}", "int64 or int32", TypeError)
    if ids.ndim != 2 or ids.shape[1] == 0:
        wanted("ids", f"shape {tuple(ids.shape)}", "[T, K] with K >= 1")
    whole("num_experts", num_experts, least=1)
    if capacity is not None:
        whole("capacity", capacity, least=0)
    one_of("drop", drop, ("position", "score"))
    one_of("out_of_range", out_of_range, ("error", "drop"))
    if drop == "score" and weights is None:
        wanted("weights", None, "the routing weights [T, K] that drop='score' compares")
    if pad and capacity is None:
        wanted("capacity", None, "the rows per expert that pad=True fills up to")
    if weights is None:
        return _dense(ids, None), None
    if weights.shape != ids.shape:
        wanted("weights", f"shape {tuple(weights.shape)}", f"that of ids, {tuple(ids.shape)}")
    if _is_numpy(ids) != _is_numpy(weights):
        given = "a NumPy array beside torch ids" if _is_numpy(weights) else "a torch tensor beside NumPy ids"
        wanted("weights", given, "the same kind", TypeError)
    if "float" not in _dtype(weights):
        wanted("weights", f"dtype {_dtype(weights)}", "a float dtype", TypeError)
    if not _is_numpy(ids) and ids.device != weights.device:
        wanted("weights", f"a tensor on {weights.device}", f"one on {ids.device}, where ids is")
    return _dense(ids, None), _dense(weights, "float64" if _dtype(weights) == "float64" else "float32")


def _dense(array: Array, dtype: str | None) -> Array:
    """The array in row-major order, detached, in `dtype` when one is named."""
    if _is_numpy(array):
        import numpy as np

        return np.ascontiguousarray(array, dtype=dtype)
    import torch

    array = array.detach()
    return (array.to(getattr(torch, dtype)) if dtype else array).contiguous()


def _plan_numpy(
    ids: Array,
    num_experts: int,
    weights: Array | None,
    capacity: int | None,
    drop: str,
    pad: bool,
    out_of_range: str,
) -> RoutingPlan:
    import numpy as np

    counts = np.empty(num_experts, np.int32)
    offsets = np.empty(num_experts + 1, np.int32)
    gather = np.empty(num_experts * capacity if pad and capacity is not None else ids.size, np.int32)
    inverse = np.empty(ids.shape, np.int32)
    sorted_weights = None if weights is None else np.empty(gather.shape, weights.dtype)
    torch = sys.modules.get("torch")
    options: dict[str, Any] = {
        "num_experts": num_experts,
        "capacity": capacity,
        "drop": drop,
        "pad": pad,
        "out_of_range": out_of_range,
        "threads": torch.get_num_threads() if torch else os.cpu_count() or 1,
    }
    _native.plan(ids, weights, counts, offsets, gather, inverse, sorted_weights, **options)
    return RoutingPlan(ids, counts, offsets, gather, inverse, sorted_weights, num_experts, capacity)


def _as_tensor(array: Array) -> Array:
    import torch

    return torch.as_tensor(array)


def _flatten(plan: RoutingPlan) -> tuple[list[Any], tuple[Any, ...]]:
    return [getattr(plan, name) for name in _TENSORS], tuple(getattr(plan, name) for name in _NUMBERS)


def _unflatten(tensors: Any, numbers: tuple[Any, ...]) -> RoutingPlan:
    return RoutingPlan(*tensors, *numbers)


if importlib.util.find_spec("torch"):
    from torch.utils import _pytree

    _pytree.register_pytree_node(
        RoutingPlan, _flatten, _unflatten, serialized_type_name="fastmoe_rs.RoutingPlan"
    )

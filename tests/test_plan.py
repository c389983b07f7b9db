"""RoutingPlan: equal to the reference to the last index, and a good citizen of torch and Python."""

import copy
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils import _pytree

from fastmoe_rs import RoutingPlan, functional, reference
from moe_cases import WIDEST

ARRAYS = ("ids", "counts", "offsets", "gather", "inverse", "weights")


def assert_same_plan(actual, expected):
    for name in ARRAYS:
        a, b = getattr(actual, name), getattr(expected, name)
        assert (a is None) == (b is None), name
        if a is not None:
            a, b = torch.as_tensor(a), torch.as_tensor(b)
            assert a.dtype == b.dtype, name
            assert torch.equal(a, b), f"{name}: {a} is not {b}"
    assert (actual.num_experts, actual.capacity) == (expected.num_experts, expected.capacity)


@st.composite
def plans(draw):
    """Arguments of from_ids, small and nasty: ties, duplicates, empty experts, no tokens, ids outside."""
    experts, tokens, top_k = draw(st.integers(1, 9)), draw(st.integers(0, 12)), draw(st.integers(1, 4))
    out_of_range = draw(st.sampled_from(["error", "drop"]))
    span = (0, experts - 1) if out_of_range == "error" else (-2, experts + 1)
    dtype = draw(st.sampled_from([torch.int64, torch.int32]))
    rows = draw(st.lists(st.integers(*span), min_size=tokens * top_k, max_size=tokens * top_k))
    ids = torch.tensor(rows, dtype=dtype).view(tokens, top_k)
    levels = draw(st.lists(st.integers(-3, 3), min_size=ids.numel(), max_size=ids.numel()))
    wide = draw(st.sampled_from([torch.float32, WIDEST]))
    weights = draw(st.sampled_from([None, torch.tensor(levels, dtype=wide).view(ids.shape)]))
    capacity = draw(st.sampled_from([None, 0, 1, 2, 5]))
    drop = "position" if weights is None else draw(st.sampled_from(["position", "score"]))
    pad = capacity is not None and draw(st.booleans())
    return (
        ids,
        experts,
        {
            "weights": weights,
            "capacity": capacity,
            "drop": drop,
            "pad": pad,
            "out_of_range": out_of_range,
        },
    )


@given(plans())
def test_equals_the_reference(arguments):
    ids, experts, options = arguments
    assert_same_plan(RoutingPlan.from_ids(ids, experts, **options), reference.plan(ids, experts, **options))


@given(plans())
def test_numpy_gives_the_same_plan(arguments):
    ids, experts, options = arguments
    arrays = options | {"weights": None if options["weights"] is None else options["weights"].numpy()}
    plan = RoutingPlan.from_ids(ids.numpy(), experts, **arrays)
    assert isinstance(plan.gather, np.ndarray)
    assert_same_plan(plan, RoutingPlan.from_ids(ids, experts, **options))


@given(plans())
def test_gather_and_inverse_undo_each_other(arguments):
    ids, experts, options = arguments
    plan = RoutingPlan.from_ids(ids, experts, **options)
    kept = plan.inverse >= 0
    assert int(kept.sum()) == int(plan.counts.sum()) == int((plan.gather >= 0).sum())
    token, _ = kept.nonzero(as_tuple=True)
    rows = plan.inverse[kept].long()
    assert torch.equal(plan.gather[rows].long(), token)
    owner = torch.searchsorted(plan.offsets.long(), rows, right=True) - 1
    if options["capacity"] != 0:
        assert torch.equal(owner, ids[kept].long())


def test_large_enough_for_every_thread_equals_the_reference(set_threads):
    set_threads(3)
    ids = torch.randint(0, 64, (20_000, 4))
    weights = torch.rand(ids.shape)
    for options in ({}, {"capacity": 900}, {"capacity": 900, "drop": "score", "pad": True}):
        plan = RoutingPlan.from_ids(ids, 64, weights=weights, **options)
        assert_same_plan(plan, reference.plan(ids, 64, weights=weights, **options))


def test_accepts_strided_ids_and_any_float_weights():
    ids = torch.randint(0, 4, (2, 9)).T
    weights = torch.rand(9, 2).bfloat16()
    plan = RoutingPlan.from_ids(ids, 4, weights=weights)
    assert_same_plan(plan, reference.plan(ids.contiguous(), 4, weights=weights.float()))
    array = np.asfortranarray(ids.numpy())
    assert_same_plan(RoutingPlan.from_ids(array, 4), reference.plan(ids, 4))


def a_plan():
    return RoutingPlan.from_ids(torch.randint(0, 4, (6, 2)), 4, weights=torch.rand(6, 2), capacity=2)


@pytest.mark.parametrize(
    "copy_of",
    [
        lambda plan: pickle.loads(pickle.dumps(plan)),
        copy.deepcopy,
        copy.copy,
        lambda plan: plan.to("cpu"),
        lambda plan: RoutingPlan.from_state_dict(plan.state_dict()),
        lambda plan: _pytree.tree_map(lambda tensor: tensor.clone(), plan),
    ],
)
def test_copies(copy_of):
    plan = a_plan()
    assert_same_plan(copy_of(plan), plan)


def test_is_a_pytree():
    plan = a_plan()
    leaves, spec = _pytree.tree_flatten({"plan": plan})
    assert {id(leaf) for leaf in leaves} == {id(getattr(plan, name)) for name in ARRAYS}
    assert_same_plan(_pytree.tree_unflatten(leaves, spec)["plan"], plan)
    assert plan.to("meta").gather.is_meta


def test_numpy_plan_moves_to_torch():
    ids = np.array([[0, 1], [1, 0]])
    plan = RoutingPlan.from_ids(ids, 2).to("cpu")
    assert_same_plan(plan, RoutingPlan.from_ids(torch.from_numpy(ids), 2))
    x = torch.randn(2, 3)
    assert torch.equal(functional.permute(x, plan), x[[0, 1, 0, 1]])


def test_weights_carry_no_gradient_and_ids_are_not_copied():
    ids, weights = torch.zeros(3, 1, dtype=torch.int64), torch.rand(3, 1, requires_grad=True)
    plan = RoutingPlan.from_ids(ids, 1, weights=weights)
    assert not plan.weights.requires_grad
    assert plan.ids.data_ptr() == ids.data_ptr()


def test_repr_and_sizes():
    plan = a_plan()
    assert (plan.tokens, plan.top_k) == (6, 2)
    assert repr(plan) == "RoutingPlan(tokens=6, top_k=2, num_experts=4, capacity=2)"


def test_state_dict_must_be_complete():
    state = a_plan().state_dict()
    del state["inverse"]
    with pytest.raises(ValueError, match="inverse"):
        RoutingPlan.from_state_dict(state)


FORKS = """
import os, signal
import numpy as np
import torch
from fastmoe_rs import RoutingPlan, functional

torch.set_num_threads(2)
ids = np.random.default_rng(0).integers(0, 64, (50_000, 2))
layer = torch.randn(64, 16), torch.arange(64)[:, None] % 4, torch.rand(64, 1)
layer += torch.randn(4, 24, 16), torch.randn(4, 16, 12)

def work():
    return RoutingPlan.from_ids(ids, 64).inverse, functional.moe_mlp(*layer).numpy()

def child(generations):
    signal.alarm(20)
    same = all(map(np.array_equal, work(), expected))
    if generations and same:
        same = forked(generations - 1)
    os._exit(0 if same else 1)

def forked(generations):
    process = os.fork()
    if not process:
        child(generations)
    return os.waitpid(process, 0)[1] == 0

expected = work()
assert forked(1) and forked(0), "a child hangs or differs"
assert all(map(np.array_equal, work(), expected))
"""


def test_a_forked_process_has_threads_of_its_own():
    on_the_cpu = {**os.environ, "FASTMOE_BACKEND": ""}
    subprocess.run([sys.executable, "-c", FORKS], env=on_the_cpu, check=True, timeout=120)

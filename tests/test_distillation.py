"""Mixture-of-Experts models to dense ones: what a student starts from, and the loss that it learns by.

Legend: H hidden size, I intermediate size, E experts, V vocabulary.
"""

import copy

import pytest
import torch
import torch.nn.functional as F

from fastmoe_rs import nn, watch
from fastmoe_rs.distillation import dense_student, distillation_loss, merge_experts
from fastmoe_rs.integrations.grok import GrokMoE
from fastmoe_rs.upcycling import upcycle
from moe_cases import WIDEST, assert_same, trains

SHARED = [None, 10]


def layer(shared=None, activation="swiglu", **options):
    return nn.MoE(
        16,
        24,
        5,
        2,
        activation=activation,
        shared_intermediate_size=shared,
        dtype=WIDEST,
        **options,
    )


def expert(moe, e):
    """One expert as an MLP of its own."""
    dense = nn.SharedExpert(16, 24, activation=moe.experts.activation, dtype=WIDEST)
    dense.w1.data, dense.w2.data = moe.experts.w1.data[e], moe.experts.w2.data[e]
    return dense


def test_merging_undoes_upcycling():
    dense = nn.SharedExpert(16, 24)
    merged = merge_experts(upcycle(dense, 4, 2), torch.tensor([0.5, 0.3, 0.2, 0.0]))
    torch.testing.assert_close(merged.w1, dense.w1)
    torch.testing.assert_close(merged.w2, dense.w2)


@pytest.mark.parametrize("shared", SHARED)
def test_average_weighs_experts_by_their_load(shared):
    moe, load = layer(shared), torch.tensor([3.0, 0.0, 1.0, 0.0, 0.0])  # need not sum to 1
    x = torch.randn(7, 16, dtype=WIDEST)
    mean = expert(moe, 0)
    mean.w1.data = 0.75 * moe.experts.w1[0] + 0.25 * moe.experts.w1[2]
    mean.w2.data = 0.75 * moe.experts.w2[0] + 0.25 * moe.experts.w2[2]
    assert_same(merge_experts(moe, load)(x), mean(x) + (moe.shared(x) if shared else 0))
    equal = merge_experts(moe)
    assert_same(equal.w1[:24], moe.experts.w1[:, :24].mean(0))
    assert_same(merge_experts(moe, torch.zeros(5)).w1, equal.w1)  # nothing was routed


@pytest.mark.parametrize("shared", SHARED)
@pytest.mark.parametrize("activation", ["swiglu", "relu2"])
def test_gathered_experts_lie_side_by_side_scaled_by_their_share(activation, shared):
    moe, load = layer(shared, activation), torch.tensor([0.1, 0.4, 0.0, 0.3, 0.2])
    x = torch.randn(7, 16, dtype=WIDEST)
    dense = merge_experts(moe, load, gather=3)
    assert dense.w2.shape == (16, 3 * 24 + (shared or 0))
    expected = (0.4 * expert(moe, 1)(x) + 0.3 * expert(moe, 3)(x) + 0.2 * expert(moe, 4)(x)) / 0.9
    torch.testing.assert_close(dense(x), expected + (moe.shared(x) if shared else 0))


def test_scale_of_the_router_is_kept():
    dense, x = nn.SharedExpert(16, 24), torch.randn(7, 16)
    moe = upcycle(dense, 4, 2, scale=2.5)
    torch.testing.assert_close(moe(x), 2.5 * dense(x))
    for gather in (None, 3):
        torch.testing.assert_close(merge_experts(moe, gather=gather)(x), moe(x))


def test_student_replaces_every_layer_of_a_copy():
    model = torch.nn.Sequential(layer(), torch.nn.Tanh(), layer(shared=10)).eval()
    before = copy.deepcopy(model.state_dict())
    watched = watch(model)
    model(torch.randn(50, 16, dtype=WIDEST))
    load = {name: stats.load for name, stats in watched.stats().items()}
    watched.close()
    student = dense_student(model, load, gather=2)
    assert [type(module).__name__ for module in student] == ["SharedExpert", "Tanh", "SharedExpert"]
    assert student[2].w2.shape == (16, 58)
    assert not student[0].training
    expected = merge_experts(model[0], load["0"], gather=2)
    assert torch.equal(student[0].w2, expected.w2)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    student[2].w1.data.zero_()
    assert (model[2].shared.w1 != 0).any()


# ---- the loss


def by_hand(student, teacher, temperature, mask):
    """Token by token, in Python."""
    total, count = 0.0, 0
    for mine, its, counts in zip(student.flatten(0, -2), teacher.flatten(0, -2), mask.flatten(), strict=True):
        if counts:
            p, q = F.softmax(its / temperature, -1), F.softmax(mine / temperature, -1)
            total += temperature**2 * sum(p[v] * (p[v].log() - q[v].log()) for v in range(len(p)) if p[v] > 0)
            count += 1
    return total / max(count, 1)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_loss_is_the_divergence_of_the_tokens_that_count(temperature):
    student, teacher = torch.randn(2, 2, 3, 7, dtype=torch.float64)
    teacher[0, 0, 3] = -torch.inf
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    actual = distillation_loss(student, teacher, temperature=temperature, mask=mask)
    torch.testing.assert_close(actual, by_hand(student, teacher, temperature, mask))
    everywhere = distillation_loss(student, teacher, temperature=temperature)
    torch.testing.assert_close(everywhere, by_hand(student, teacher, temperature, torch.ones(2, 3)))


def test_loss_of_hidden_states_is_relative_to_the_size_of_the_teachers():
    logits, mask = torch.randn(2, 3, 7, dtype=torch.float64), torch.tensor([[1, 1, 0], [1, 0, 0]])
    mine, its = torch.randn(2, 2, 2, 3, 5, dtype=torch.float64)
    expected = sum(
        (a - b)[mask.bool()].square().mean() / b[mask.bool()].square().mean()
        for a, b in zip(mine, its, strict=True)
    )
    actual = distillation_loss(
        logits,
        logits,
        mask=mask,
        student_hidden=tuple(mine),
        teacher_hidden=tuple(its),
        hidden_weight=0.5,
    )
    torch.testing.assert_close(actual, 0.5 * expected / 2)


def test_gradients_reach_the_student_only():
    student, hidden = torch.randn(3, 7, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    teacher, its = torch.randn(3, 7, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    teacher[1, 2] = -torch.inf
    mask = torch.tensor([1, 1, 0])

    def loss(student, hidden):
        options = {"student_hidden": [hidden], "teacher_hidden": [its], "temperature": 2.0, "mask": mask}
        return distillation_loss(student, teacher, **options)

    inputs = student.requires_grad_(), hidden.requires_grad_()
    assert torch.autograd.gradcheck(loss, inputs)
    teacher.requires_grad_()
    its.requires_grad_()
    loss(*inputs).backward()
    assert teacher.grad is None
    assert its.grad is None
    assert (student.grad[2] == 0).all()


def test_loss_of_half_precision_logits_is_computed_in_float32():
    student, teacher = torch.randn(2, 9, 300).bfloat16()
    loss = distillation_loss(student, teacher)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(
        loss.double(), distillation_loss(student.double(), teacher.double()), rtol=1e-5, atol=0
    )


def test_nothing_waits_for_the_device():
    """Meta tensors have no values to wait for."""
    moe = layer(shared=10, device="meta")
    assert merge_experts(moe, torch.ones(5, device="meta")).w2.shape == (16, 34)
    assert merge_experts(moe, torch.ones(5, device="meta"), gather=2).w2.shape == (16, 58)
    logits, hidden = torch.randn(2, 7, device="meta", requires_grad=True), torch.randn(2, 5, device="meta")
    options = {"student_hidden": [hidden], "teacher_hidden": [hidden], "mask": hidden[:, 0]}
    distillation_loss(logits, logits, **options).backward()
    assert logits.grad.is_meta


def test_padding_may_hold_anything():
    student, teacher, mine, its = torch.randn(4, 3, 7)
    options = {"student_hidden": [mine], "teacher_hidden": [its]}
    wanted = distillation_loss(student[:2], teacher[:2], student_hidden=[mine[:2]], teacher_hidden=[its[:2]])
    student[2], teacher[2], mine[2], its[2] = torch.nan, -torch.inf, torch.inf, torch.nan
    loss = distillation_loss(student.requires_grad_(), teacher, mask=torch.tensor([2, 1, 0]), **options)
    loss.backward()
    torch.testing.assert_close(loss, wanted)
    assert student.grad[:2].any()
    assert (student.grad[2] == 0).all()


def test_no_token_counts():
    logits = torch.randn(2, 7, requires_grad=True)
    loss = distillation_loss(logits, torch.randn(2, 7), mask=torch.zeros(2))
    loss.backward()
    assert loss == 0
    assert (logits.grad == 0).all()


@trains
def test_student_learns_to_follow_the_teacher():
    pytest.importorskip("transformers", "5", reason="trains a small Llama")
    from fastmoe_rs.upcycling import upcycle_model
    from small_llama import batches, evaluate, llama, train

    teacher = llama()
    upcycle_model(teacher, 4, 2, redraw=0.5)
    train(teacher, 60)
    teacher.requires_grad_(False)
    watched = watch(teacher)
    for ids in batches(4):
        teacher(ids)
    load = {name: stats.load for name, stats in watched.stats().items()}
    watched.close()
    student = dense_student(teacher, load, gather=2).requires_grad_(True)

    def loss(model, ids):
        mine, its = (m(ids, output_hidden_states=True, use_cache=False) for m in (model, teacher))
        return distillation_loss(
            mine.logits,
            its.logits,
            temperature=2.0,
            student_hidden=mine.hidden_states,
            teacher_hidden=its.hidden_states,
            hidden_weight=0.1,
        )

    start, start_bytes = evaluate(student, loss), evaluate(student)
    train(student, 60, loss, seed=1, learning_rate=3e-3)
    assert evaluate(student, loss) < 0.7 * start
    assert evaluate(student) < start_bytes


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: merge_experts(layer(), torch.ones(4)), r"load: got shape \(4,\), wanted \[E\] = \(5,\)"),
        (lambda: merge_experts(layer(), gather=0), "gather: got 0, wanted None or 1 to 5"),
        (lambda: merge_experts(layer(), gather=6), "gather: got 6, wanted None or 1 to 5"),
        (lambda: merge_experts(layer(bias=True)), "moe: got experts with biases, wanted experts without"),
        (
            lambda: merge_experts(layer(8, shared_gate=True)),
            "moe: got a shared expert that is weighed, or identity experts",
        ),
        (lambda: merge_experts(layer(identity_experts=2)), "moe: got a shared expert that is weighed, or"),
        (lambda: merge_experts(GrokMoE(16, 24)), "moe: got GrokMoE, whose forward is its own"),
        (lambda: dense_student(torch.nn.Linear(2, 2)), "model: got Linear without nn.MoE layers"),
        (
            lambda: dense_student(torch.nn.Sequential(layer()), {"1": torch.ones(5)}),
            r"load: got layers \['1'\], wanted those of the model, \['0'\]",
        ),
        (
            lambda: distillation_loss(torch.ones(2, 3), torch.ones(2, 4)),
            r"teacher_logits: got shape \(2, 4\), wanted the student's \(2, 3\)",
        ),
        (
            lambda: distillation_loss(torch.ones(2, 3), torch.ones(2, 3), temperature=0.0),
            r"temperature: got 0\.0, wanted more than 0",
        ),
        (
            lambda: distillation_loss(torch.ones(2, 3), torch.ones(2, 3), mask=torch.ones(3)),
            r"mask: got shape \(3,\), wanted \(2,\)",
        ),
        (
            lambda: distillation_loss(torch.ones(2, 3), torch.ones(2, 3), student_hidden=[torch.ones(2, 3)]),
            "student_hidden: got 1 tensors, wanted 0",
        ),
        (
            lambda: distillation_loss(
                torch.ones(2, 3),
                torch.ones(2, 3),
                student_hidden=[torch.ones(2, 3)],
                teacher_hidden=[torch.ones(2, 5)],
            ),
            r"teacher_hidden: got shape \(2, 5\), wanted the student's \(2, 3\)",
        ),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()

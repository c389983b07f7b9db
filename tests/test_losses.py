"""Auxiliary losses: each against its definition written out slowly; padding, shares of a step, ranks."""

import pytest
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F

from fastmoe_rs import functional, losses, routing
from moe_cases import WIDEST, needs_float64


def double(*shape, dtype=torch.float64):
    return (2 * torch.randn(*shape, dtype=torch.float64)).to(dtype).requires_grad_()


def written_out(logits, picks, real=None, score="softmax"):
    """Sum over experts of f_e * P_e, token by token; picks is a list of expert ids for each token."""
    tokens, experts = logits.shape
    real = [t for t in range(tokens) if real is None or real[t]]
    loss = torch.zeros((), dtype=torch.float64)
    for e in range(experts):
        f, p = 0, torch.zeros((), dtype=torch.float64)
        for t in real:
            scores = {
                "softmax": logits[t].exp(),
                "sigmoid": 1 / (1 + (-logits[t]).exp()),
                "sqrt_softplus": (1 + logits[t].exp()).log().sqrt(),
            }[score]
            f += list(picks[t]).count(e)
            p = p + scores[e] / scores.sum()
        loss = loss + (f / len(real)) * (p / len(real)) if real else loss
    return loss


def best(logits, k):
    return [row.argsort(descending=True)[:k].tolist() for row in logits]


def coefficient_of_variation(values):
    mean = sum(values) / len(values)
    return (sum((v - mean) ** 2 for v in values) / len(values)).sqrt() / mean


def same(loss, wanted, *inputs):
    """The same value and the same gradients."""
    torch.testing.assert_close(loss, wanted)
    grads, wanted = (torch.autograd.grad(value, inputs, retain_graph=True) for value in (loss, wanted))
    torch.testing.assert_close(grads, wanted)


# Definitions


def test_load_balancing_is_top_k_when_even_and_grows_with_imbalance():
    even = torch.eye(4).repeat(3, 1) * 1e-6  # every expert is the best of three tokens
    torch.testing.assert_close(losses.load_balancing_loss(even, 1), torch.tensor(1.0))
    one_sided = torch.tensor([[20.0, 0, 0, 0]]).repeat(12, 1)
    torch.testing.assert_close(losses.load_balancing_loss(one_sided, 1), torch.tensor(4.0))


def test_load_balancing():
    logits = double(7, 5)
    same(losses.load_balancing_loss(logits, 2), 5 * written_out(logits, best(logits, 2)), logits)
    ids = torch.tensor([[0, 4], [1, 1], [-1, 2], [5, 3], [0, 4], [2**40, -(2**40)], [3, 0]])
    for same_ids in (ids, ids.T.contiguous().T):
        loss = losses.load_balancing_loss(logits, 2, ids_TK=same_ids)
        same(loss, 5 * written_out(logits, ids.tolist()), logits)


@pytest.mark.parametrize("masked", [False, True])
def test_load_balancing_is_that_of_transformers(masked):
    mixtral = pytest.importorskip("transformers.models.mixtral.modeling_mixtral", reason="needs transformers")
    layers = tuple(double(12, 6) for _ in range(3))
    mask = (torch.rand(2, 6) > 0.3).long() if masked else None
    same(
        losses.load_balancing_loss(layers, 2, mask=mask),
        mixtral.load_balancing_loss_func(layers, 6, 2, mask).double(),
        *layers,
    )


def test_switch():
    logits = double(8, 5)
    same(losses.switch_loss(logits), 5 * written_out(logits, best(logits, 1)), logits)
    halves = [5 * written_out(half, best(half, 1)) for half in logits.split(4)]
    same(losses.switch_loss(logits, group_size=4), (halves[0] + halves[1]) / 2, logits)


def test_switch_is_that_of_transformers():
    module = pytest.importorskip(
        "transformers.models.switch_transformers.modeling_switch_transformers", reason="needs transformers"
    )
    logits = double(3 * 8, 5)
    probabilities = logits.softmax(-1).view(3, 8, 5)
    wanted = module.load_balancing_loss_func(probabilities, probabilities.argmax(-1))
    same(losses.switch_loss(logits, group_size=8), wanted, logits)
    same(losses.router_z_loss(logits), module.router_z_loss_func(logits.view(3, 8, 5)), logits)


def test_gshard():
    logits = double(8, 5)
    same(losses.gshard_loss(logits), written_out(logits, best(logits, 1)) / 5, logits)
    torch.testing.assert_close(25 * losses.gshard_loss(logits), losses.switch_loss(logits))
    quarters = [written_out(part, best(part, 1)) / 5 for part in logits.split(2)]
    same(losses.gshard_loss(logits, group_size=2), sum(quarters) / 4, logits)


@pytest.mark.parametrize("score", ["sigmoid", "softmax", "sqrt_softplus"])
def test_sequence_wise(score):
    logits = double(3 * 4, 6)
    sequences = [6 / 2 * written_out(part, best(part, 2), score=score) for part in logits.split(4)]
    same(losses.sequence_balance_loss(logits, 2, 4, score=score), sum(sequences) / 3, logits)
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]])
    parts = [
        6 / 2 * written_out(part, best(part, 2), real, score)
        for part, real in zip(logits.split(4), mask.tolist(), strict=True)
    ]
    padded = losses.sequence_balance_loss(logits, 2, 4, score=score, mask=mask)
    same(padded, (3 * parts[0] + parts[1]) / 4, logits)


def test_sequence_wise_loss_survives_scores_that_underflow():
    logits = torch.tensor([[-200.0, -201.0], [-300.0, -300.0]])
    for score in ("sigmoid", "sqrt_softplus"):
        assert losses.sequence_balance_loss(logits, 1, 2, score=score).isfinite()


def test_importance():
    logits = double(9, 5, dtype=WIDEST)
    ids, weights, _ = functional.route(logits, 2, order="topk_score")
    importance = [weights[ids == e].sum() for e in range(5)]
    wanted = coefficient_of_variation(importance) ** 2
    same(losses.importance_loss(ids, weights, 5), wanted, logits)
    gone = ids.clone()
    gone[0] = torch.tensor([-1, 5])
    importance = [weights[gone == e].sum() for e in range(5)]
    same(losses.importance_loss(gone, weights, 5), coefficient_of_variation(importance) ** 2, logits)
    assert losses.importance_loss(torch.arange(4)[:, None], torch.ones(4, 1), 4) == 0


def test_load_with_the_smooth_estimator():
    """Eq. 8 to 11 of the paper: P(x, i) is the chance of being among the K best with new noise of its own."""
    clean, raw = double(9, 5, dtype=WIDEST), double(9, 5, dtype=WIDEST)
    routed = routing.noisy_top_k_route(clean, raw, 2, seed=3)
    noisy = clean + routing.normal(clean, seed=3) * (F.softplus(raw) + 1e-2)
    load = []
    for e in range(5):
        total = 0
        for t in range(9):
            others = sorted((noisy[t, j] for j in range(5) if j != e), reverse=True)
            normal = torch.distributions.Normal(0.0, 1.0)
            total = total + normal.cdf((clean[t, e] - others[1]) / (F.softplus(raw[t, e]) + 1e-2))
        load.append(total)
    same(losses.load_loss(routed.load), coefficient_of_variation(load) ** 2, clean, raw)


def test_z_loss():
    logits = double(7, 5)
    same(losses.router_z_loss(logits), sum(row.exp().sum().log() ** 2 for row in logits) / 7, logits)
    torch.testing.assert_close(losses.router_z_loss([logits[:3], logits[3:]]), losses.router_z_loss(logits))


# All of them, as functions of logits [T, E] and of the options that they share

LOSSES = {
    "hf": lambda x, **o: losses.load_balancing_loss(x, 2, **o),
    "global_batch": lambda x, **o: losses.global_batch_loss(x, 2, group=None, **o)[0],
    "switch": losses.switch_loss,
    "gshard": losses.gshard_loss,
    "sequence": lambda x, **o: losses.sequence_balance_loss(x, 2, len(x) or 1, **o),
    "importance": lambda x, **o: losses.importance_loss(*functional.route(x, 2)[:2], x.shape[1], **o),
    "load": lambda x, **o: losses.load_loss(routing.noisy_top_k_route(x, x.flip(1), 2, seed=1).load, **o),
    "z": losses.router_z_loss,
}
ROUTED = ("importance", "load")  # these run a router, the others are torch's sums alone
MEANS = sorted(LOSSES.keys() - {*ROUTED})


@pytest.mark.parametrize("name", [*MEANS, *(pytest.param(name, marks=needs_float64) for name in ROUTED)])
def test_gradcheck(name):
    logits, mask = double(6, 4), torch.tensor([1, 1, 0, 1, 1, 0])
    assert torch.autograd.gradcheck(lambda x: LOSSES[name](x, mask=mask), logits)
    assert torch.autograd.gradcheck(LOSSES[name], logits)


@pytest.mark.parametrize("name", LOSSES)
def test_padding_counts_nowhere(name):
    logits = torch.randn(6, 5)
    mask = torch.tensor([1] * 6 + [0] * 4)
    padded = torch.cat([logits, torch.full((4, 5), 100.0)]).requires_grad_()
    loss = LOSSES[name](padded, mask=mask.view(2, 5))
    torch.testing.assert_close(loss, LOSSES[name](logits))
    (grad,) = torch.autograd.grad(loss, padded)
    assert (grad[6:] == 0).all()
    assert (grad[:6] != 0).any()
    assert LOSSES[name](padded, mask=torch.zeros(10)) == 0
    assert LOSSES[name](padded[:0]) == 0


@pytest.mark.parametrize("name", MEANS)
def test_padding_may_hold_anything(name):
    logits = torch.randn(6, 5)
    garbage = torch.tensor([[torch.nan], [torch.inf], [-torch.inf]]).expand(3, 5)
    padded = torch.cat([logits, garbage]).requires_grad_()
    loss = LOSSES[name](padded, mask=torch.arange(9) < 6)
    torch.testing.assert_close(loss, LOSSES[name](logits))
    (grad,) = torch.autograd.grad(loss, padded)
    assert grad.isfinite().all()


@pytest.mark.parametrize("name", LOSSES)
def test_losses_of_half_precision_logits_are_float32(name):
    logits = torch.randn(8, 4).bfloat16()
    loss = LOSSES[name](logits)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, LOSSES[name](logits.float()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_nothing_waits_for_the_device(name):
    """A meta tensor has no value: whatever reads one, as a copy to the host does, fails."""
    logits = torch.empty(8, 4, device="meta", requires_grad=True)
    loss = LOSSES[name](logits, mask=torch.empty(8, device="meta"))
    assert loss.is_meta
    loss.backward()


@pytest.mark.parametrize("name", LOSSES)
def test_compiles_without_a_graph_break(name):
    torch._dynamo.reset()
    logits, mask = torch.randn(8, 4, requires_grad=True), torch.tensor([1, 1, 1, 0, 1, 1, 1, 1])
    compiled = torch.compile(LOSSES[name], fullgraph=True, backend="aot_eager")
    loss, wanted = compiled(logits, mask=mask), LOSSES[name](logits, mask=mask)
    torch.testing.assert_close(loss, wanted)
    torch.testing.assert_close(*(torch.autograd.grad(value, logits) for value in (loss, wanted)))


# Shares of a step, global batches


@pytest.mark.parametrize("name", MEANS)
def test_shares_of_micro_batches_add_up(name):
    """The mean over the tokens of a step, whatever their division into micro-batches."""
    parts = [torch.randn(size, 5) for size in (2, 5, 3)]
    shares = [LOSSES[name](part, tokens=10) for part in parts]
    wanted = sum(len(part) * LOSSES[name](part) for part in parts) / 10
    torch.testing.assert_close(sum(shares), wanted)
    torch.testing.assert_close(LOSSES[name](parts[0], tokens=torch.tensor(10)), shares[0])


def test_global_batch_over_micro_batches():
    logits = double(12, 5)
    mask = torch.tensor([1, 1, 0, 1] * 3)
    total = torch.zeros((), dtype=torch.float64)
    load = None
    for part, real in zip(logits.split(4), mask.split(4), strict=True):
        loss, load = losses.global_batch_loss(part, 2, mask=real, group=None, before=load)
        total = total + loss
    wanted = 0
    for end in (4, 8, 12):  # f of all so far, P of the last four
        seen = [t for t in range(end) if mask[t]]
        last = [t for t in range(end - 4, end) if mask[t]]
        f = torch.bincount(logits[seen].topk(2).indices.flatten(), minlength=5).double() / len(seen)
        wanted = wanted + 5 * (f * logits[last].softmax(1).mean(0)).sum()
    same(total, wanted, logits)
    assert load.tokens.tolist() == [9]
    assert load.routes.sum() == 18


def test_load_balancing_by_a_given_load():
    logits, others = double(6, 5), torch.randn(20, 5, dtype=torch.float64)
    load = losses.Load.of(others.topk(2).indices, 5)
    f = torch.bincount(others.topk(2).indices.flatten(), minlength=5).double() / 20
    same(losses.load_balancing_loss(logits, 2, load=load), 5 * (f * logits.softmax(1).mean(0)).sum(), logits)


def test_counts_are_exact_where_floats_are_not():
    many = losses.Load(torch.tensor([[2**24, 2**24]]), torch.tensor([2**25]))
    one = losses.Load.of(torch.zeros(1, 1, dtype=torch.int64), 2)
    assert (many + one).routes.tolist() == [[2**24 + 1, 2**24]]


def step_of_rank(rank, rendezvous, results):
    torch.distributed.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=2)
    logits, mask = global_batch()
    mine, real = logits.detach().chunk(2)[rank].requires_grad_(), mask.chunk(2)[rank]
    ids, weights, _ = functional.route(mine, 2)
    bias = torch.zeros(5)
    counts = torch.bincount(ids.flatten(), minlength=5)
    routing.update_selection_bias(bias, counts, rate=0.5, group=True)
    out = {"bias": bias}
    # Data parallelism takes the mean of gradients: every rank divides by the mean number of tokens.
    share = {"mask": real, "tokens": global_batch()[1].sum() / 2}
    for name, loss in {
        "global_batch": losses.global_batch_loss(mine, 2, **share)[0],
        "importance": losses.importance_loss(ids, weights, 5, mask=real, group=True),
        "load": losses.load_loss(mine.exp(), mask=real, group=torch.distributed.group.WORLD),
    }.items():
        (grad,) = torch.autograd.grad(loss, mine)
        out[name] = loss.detach(), grad
    results[rank] = out
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def global_batch():
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(12, 5, dtype=WIDEST, generator=generator)
    return logits.requires_grad_(), torch.tensor([1, 1, 1, 1, 1, 1, 1, 0, 0, 1, 0, 0])


def test_two_ranks_have_the_gradients_of_one(tmp_path):
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(step_of_rank, args=(f"file://{tmp_path}/rendezvous", results), nprocs=2)
        ranks = [results[0], results[1]]
    logits, mask = global_batch()
    ids, weights, _ = functional.route(logits, 2)
    wanted = {
        "global_batch": losses.load_balancing_loss(logits, 2, mask=mask),
        "importance": losses.importance_loss(ids, weights, 5, mask=mask),
        "load": losses.load_loss(logits.exp(), mask=mask),
    }
    for name, loss in wanted.items():
        values, grads = zip(*(rank[name] for rank in ranks), strict=True)
        torch.testing.assert_close(sum(values) / 2, loss)
        (grad,) = torch.autograd.grad(loss, logits, retain_graph=True)
        torch.testing.assert_close(torch.cat(grads) / 2, grad)
    bias = torch.zeros(5)
    routing.update_selection_bias(bias, torch.bincount(ids.flatten(), minlength=5), rate=0.5)
    assert bias.any()
    for rank in ranks:
        assert torch.equal(rank["bias"], bias)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: losses.router_z_loss(torch.randn(4, 2), mask=torch.ones(3)),
            r"mask: got shape \(3,\), wanted 4 elements",
        ),
        (lambda: losses.router_z_loss(torch.randn(4)), r"logits: got shape \(4,\), wanted \[T, E\]"),
        (lambda: losses.router_z_loss([torch.randn(4, 2), torch.randn(4, 3)]), r"logits: got shape \(4, 3\)"),
        (lambda: losses.load_balancing_loss([], 1), "logits: got no layers"),
        (lambda: losses.load_balancing_loss(torch.randn(4, 2), 3), "top_k: got 3, wanted 1 to 2"),
        (
            lambda: losses.load_balancing_loss([torch.randn(4, 2)] * 2, 1, ids_TK=torch.zeros(4, 1).long()),
            "ids: got 1 layers, wanted as many as logits, 2",
        ),
        (
            lambda: losses.load_balancing_loss(torch.randn(4, 3), 2, ids_TK=torch.zeros(4, 1).long()),
            r"ids: got shape \(4, 1\), wanted \[T, K\] = \(4, 2\)",
        ),
        (lambda: losses.switch_loss(torch.randn(4, 2), tokens=0), "tokens: got 0, wanted more than 0"),
        (lambda: losses.switch_loss(torch.randn(4, 2), group_size=3), "group_size: got 3, wanted a divisor"),
        (
            lambda: losses.sequence_balance_loss(torch.randn(4, 2), 1, 3),
            "sequence_length: got 3, wanted a divisor of 4, the number of tokens",
        ),
        (lambda: losses.sequence_balance_loss(torch.randn(4, 2), 1, 2, score="tanh"), "score: got 'tanh'"),
        (
            lambda: losses.global_batch_loss(torch.randn(4, 2), 1),
            "group: got True, wanted None, as torch.distributed is not initialized",
        ),
        (lambda: losses.Load.of(torch.zeros(4, 2).long(), 0), "num_experts: got 0, wanted at least 1"),
        (lambda: losses.load_loss(torch.randn(4)), r"load: got shape \(4,\), wanted \[T, E\]"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_wrong_types():
    with pytest.raises(TypeError, match="logits: got list, wanted a torch tensor"):
        losses.router_z_loss([[1.0, 2.0]])
    with pytest.raises(TypeError, match=r"logits: got dtype torch.int64, wanted float32"):
        losses.router_z_loss(torch.zeros(4, 2).long())
    with pytest.raises(TypeError, match=r"load: got dtype torch.int64, wanted float32"):
        losses.load_loss(torch.zeros(4, 2).long())
    with pytest.raises(TypeError, match=r"weights: got dtype torch.int64, wanted float32"):
        losses.importance_loss(torch.zeros(4, 2).long(), torch.zeros(4, 2).long(), 3)
    with pytest.raises(TypeError, match=r"ids: got dtype torch.float32, wanted int64 or int32"):
        losses.load_balancing_loss(torch.randn(4, 3), 2, ids_TK=torch.zeros(4, 2))
    with pytest.raises(TypeError, match=r"mask: got list, wanted a torch tensor"):
        losses.switch_loss(torch.randn(4, 2), mask=[1, 1, 0, 0])

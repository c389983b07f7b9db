"""Auxiliary losses: the formulas, padding, pooling, gradients."""

import pytest
import torch

from fastmoe_rs import losses


def test_load_balancing_is_top_k_when_even_and_grows_with_imbalance():
    even = torch.eye(4).repeat(3, 1) * 1e-6  # every expert is the best of three tokens
    torch.testing.assert_close(losses.load_balancing_loss(even, 1), torch.tensor(1.0))
    one_sided = torch.tensor([[20.0, 0, 0, 0]]).repeat(12, 1)
    torch.testing.assert_close(losses.load_balancing_loss(one_sided, 1), torch.tensor(4.0))


def test_load_balancing_by_its_formula():
    logits = torch.randn(7, 5, dtype=torch.float64)
    fraction = torch.zeros(5, dtype=torch.float64)
    for row in logits.topk(2).indices:
        fraction[row] += 1 / 7
    expected = 5 * (fraction * logits.softmax(1).mean(0)).sum()
    torch.testing.assert_close(losses.load_balancing_loss(logits, 2), expected)
    ids = torch.randint(0, 5, (7, 2))
    fraction = torch.bincount(ids.flatten(), minlength=5) / 7
    expected = 5 * (fraction * logits.softmax(1).mean(0)).sum()
    torch.testing.assert_close(losses.load_balancing_loss(logits, 2, ids_TK=ids), expected)


@pytest.mark.parametrize("masked", [False, True])
def test_load_balancing_is_that_of_transformers(masked):
    mixtral = pytest.importorskip("transformers.models.mixtral.modeling_mixtral", reason="needs transformers")
    layers = tuple(torch.randn(12, 6) for _ in range(3))
    mask = (torch.rand(2, 6) > 0.3).long() if masked else None
    expected = mixtral.load_balancing_loss_func(layers, 6, 2, mask)
    torch.testing.assert_close(losses.load_balancing_loss(layers, 2, mask=mask), expected)


def test_z_loss_by_its_formula():
    logits = torch.randn(7, 5)
    expected = logits.exp().sum(1).log().square().mean()
    torch.testing.assert_close(losses.router_z_loss(logits), expected)
    torch.testing.assert_close(losses.router_z_loss([logits[:3], logits[3:]]), expected)


def test_padding_counts_nowhere():
    logits, padding = torch.randn(6, 5), torch.randn(4, 5) * 100
    mask = torch.tensor([1] * 6 + [0] * 4)
    padded = torch.cat([logits, padding])
    for loss in (lambda x, **o: losses.load_balancing_loss(x, 2, **o), losses.router_z_loss):
        torch.testing.assert_close(loss(padded, mask=mask), loss(logits))
        assert loss(padded, mask=torch.zeros(10)) == 0
        assert loss(padded[:0]) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_give_a_float32_loss(dtype):
    logits = torch.randn(8, 4).to(dtype)
    for loss in (lambda x: losses.load_balancing_loss(x, 2), losses.router_z_loss):
        assert loss(logits).dtype == torch.float32
        torch.testing.assert_close(loss(logits), loss(logits.float()))


def test_gradcheck():
    logits = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    ids, mask = torch.randint(0, 4, (5, 2)), torch.tensor([1, 1, 0, 1, 1])
    assert torch.autograd.gradcheck(lambda x: losses.load_balancing_loss(x, 2, ids_TK=ids, mask=mask), logits)
    assert torch.autograd.gradcheck(lambda x: losses.router_z_loss(x, mask=mask), logits)


def test_bad_input():
    with pytest.raises(ValueError, match=r"mask: got shape \(3,\), wanted 4 elements"):
        losses.router_z_loss(torch.randn(4, 2), mask=torch.ones(3))
    with pytest.raises(ValueError, match="logits: got no layers"):
        losses.load_balancing_loss([], 1)
    with pytest.raises(ValueError, match="top_k: got 3, wanted 1 to 2"):
        losses.load_balancing_loss(torch.randn(4, 2), 3)
    with pytest.raises(ValueError, match="ids: got 1 layers, wanted as many as logits, 2"):
        losses.load_balancing_loss([torch.randn(4, 2)] * 2, 1, ids_TK=torch.zeros(4, 1, dtype=torch.long))

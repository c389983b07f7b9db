"""Options of routers: followed by the choice and by its replay, or refused."""

import pytest
import torch

from fastmoe_rs import nn
from moe_cases import WIDEST
from router_cases import ROUTERS, TOKENS, E, H, I, T, build, inputs

WEIGHING = {
    "score": "sqrt_softplus",
    "order": "topk_score",
    "scale": 3.0,
    "softcap": 0.1,
    "expert_scale": True,
}


@pytest.mark.filterwarnings("ignore:MoE. with top_k=1")
@pytest.mark.parametrize("name", ROUTERS)
def test_options_are_followed_by_the_choice_and_its_replay_or_refused(name):
    x, refused = torch.randn(T, H, dtype=WIDEST), {}

    def layer(**options):
        moe = nn.MoE(H, I, E, router=ROUTERS[name](**options), dtype=WIDEST).to(WIDEST)
        moe.router.seed = 1
        torch.manual_seed(3)
        with torch.no_grad():
            for tensor in (*moe.parameters(), *moe.buffers()):
                if tensor.is_floating_point():
                    tensor.normal_()
        return moe

    plain = layer()
    renormalizes = plain.router.options.get("renormalize", False)
    _, without = plain(x, return_stats=True, **inputs(name))
    for option, value in (WEIGHING | {"renormalize": not renormalizes}).items():
        try:
            moe = layer(**{option: value})
        except (TypeError, ValueError) as error:
            refused[option] = str(error)
            continue
        y, stats = moe(x, return_stats=True, **inputs(name))
        assert not torch.equal(stats.router.weights, without.router.weights), option
        torch.testing.assert_close(moe(x, plan=stats.plan, **inputs(name)), y)
    assert all(option in message for option, message in refused.items())


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: nn.MoE(H, I, E), ValueError, "top_k: got None, wanted K, or a router"),
        (
            lambda: nn.MoE(H, I, E, 2, router=nn.Router(H, E, 2), score="sigmoid"),
            ValueError,
            "router: got a router and top_k, score, wanted one or the other",
        ),
        (lambda: nn.MoE(H, I, E, 2, shared_gate=True), ValueError, "shared_gate: got True"),
        (lambda: nn.MoE(H, I, E, 2, identity_experts=-1), ValueError, "identity_experts: got -1"),
        (lambda: nn.MoE(H, I, E, 2, identity_experts=1.0), TypeError, "identity_experts: got 1.0"),
        (lambda: nn.MoE(H, I, E, 2, scores="sigmoid"), TypeError, "scores"),
        (lambda: nn.Router(H, E, 2, n_group=4), ValueError, "n_group: got 4, wanted a divisor of 6"),
        (
            lambda: nn.CapacityRouter(H, E, 2, capacity_factor=0.0),
            ValueError,
            "capacity_factor: got 0.0, wanted a finite number of more than 0",
        ),
        (
            lambda: nn.CapacityRouter(H, E, 2, capacity_factor=1.0, queue="fair"),
            ValueError,
            "queue: got 'fair'",
        ),
        (
            lambda: nn.CapacityRouter(H, E, 2, capacity_factor=1.0, group_size=0),
            ValueError,
            "group_size: got 0",
        ),
        (lambda: nn.Router(H, E, 2, logit_noise=-1.0), ValueError, "logit_noise: got -1.0, wanted a finite"),
        (lambda: nn.SharedRouter(H, E, 2, num_shared=0), ValueError, "num_shared: got 0"),
        (lambda: nn.GShardRouter(H, E, second="third"), ValueError, "second: got 'third'"),
        (lambda: nn.TokenRoundingRouter(H, E, 2, tile=0), ValueError, "tile: got 0"),
        (lambda: nn.TokenRoundingRouter(H, E, 2, rounding="even"), ValueError, "rounding: got 'even'"),
        (
            lambda: nn.TokenRoundingRouter(H, E, 2, renormalize=True),
            ValueError,
            "renormalize: got True, wanted only options that this router has: score, softcap, ",
        ),
        (lambda: nn.ProductKeyRouter(H, 6, 2), ValueError, "num_experts: got 6, wanted a square number"),
        (lambda: nn.ProductKeyRouter(H, -4, 2), ValueError, "num_experts: got -4, wanted a square number"),
        (lambda: nn.ProductKeyRouter(H, 9, 10), ValueError, "top_k: got 10, wanted 1 to 9"),
        (
            lambda: nn.ProductKeyRouter(H, 9, 2, selection_bias=True),
            ValueError,
            "selection_bias: got True, wanted only options that this router has: score, renormalize, scale, ",
        ),
        (lambda: nn.HashRouter(H, E, 2, vocab_size=0), ValueError, "vocab_size: got 0"),
        (
            lambda: build("hash")(torch.randn(3, H), token_ids=TOKENS),
            ValueError,
            "token_ids: got shape .*, wanted 3 elements",
        ),
        (lambda: build("hash")(torch.randn(3, H)), TypeError, "token_ids"),
    ],
)
def test_bad_options(call, error, message):
    with pytest.raises(error, match=message):
        call()

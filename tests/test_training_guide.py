"""What docs/training.md says about this library.

Legend: T tokens, H hidden size, I intermediate size, E experts, K experts per token.
"""

import re
from pathlib import Path

import pytest
import torch

from fastmoe_rs import losses, nn, watch
from fastmoe_rs.nn import MoE, Router

GUIDE = (Path(__file__).parents[1] / "docs" / "training.md").read_text()


def trained_on_clusters(coefficient=0.0, rate=0.0):
    """The record of a layer of 8 experts, K = 1, over the last of 150 steps on 16 clusters of tokens."""
    centers, maps = torch.randn(16, 16), torch.randn(16, 16, 16) / 4
    by_bias = {"score": "sigmoid", "selection_bias": True} if rate else {}
    moe = MoE(16, 16, 8, 1, **by_bias)
    optimizer, watched = torch.optim.AdamW(moe.parameters(), lr=1e-2), watch(moe)
    for step in range(150):
        cluster = torch.randint(16, (256,))
        x = centers[cluster] + 0.3 * torch.randn(256, 16) + 1.0
        y, stats = moe(x, return_stats=True)
        loss = (y - torch.einsum("th,thi->ti", x, maps[cluster])).square().mean()
        (loss + coefficient * losses.load_balancing_loss(stats.router.logits, 1)).backward()
        optimizer.step()
        optimizer.zero_grad()
        if rate:
            moe.router.balance(stats.routes, rate=rate)
        if step < 130:
            watched.reset()
    return watched.record()[""]


@pytest.mark.parametrize("coefficient", [0.0, 0.01])
@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_few_experts_are_left_without_balance(seed, coefficient):
    torch.manual_seed(seed)
    record = trained_on_clusters(coefficient)
    assert 4 <= record["dead"] <= 6
    assert record["load_entropy"] < 0.6


@pytest.mark.parametrize("remedy", [{"coefficient": 0.1}, {"rate": 1e-2}])
@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_either_remedy_keeps_all(remedy, seed):
    torch.manual_seed(seed)
    record = trained_on_clusters(**remedy)
    assert record["dead"] == 0
    assert record["load_entropy"] > 0.98


@pytest.mark.parametrize("options", [{"renormalize": True}, {"order": "topk_score"}])
def test_nothing_brings_back_an_expert_without_tokens(options):
    moe, x = MoE(16, 12, 4, 2, **options), torch.rand(20, 16)
    with torch.no_grad():
        moe.router.weight[3] = -1
    moe(x).square().sum().backward()
    assert not moe.experts.w1.grad[3].any()
    assert not moe.experts.w2.grad[3].any()
    gradients = moe.router.weight.grad.abs().amax(1)
    assert gradients[3] < 1e-5 * gradients[:3].min()


@pytest.mark.parametrize("options", [{"renormalize": True}, {"order": "topk_score"}])
def test_one_expert_whose_weight_is_always_1_is_warned_of(options):
    with pytest.warns(UserWarning, match="top_k=1 these options make every routing weight 1"):
        moe = MoE(16, 12, 4, 1, **options)
    moe(torch.randn(20, 16)).square().sum().backward()
    assert moe.router.weight.grad.abs().max() < 1e-6
    for good in ({}, {"order": "topk_score", "score": "sigmoid"}):  # warnings are errors
        moe = MoE(16, 12, 4, 1, **good)
        moe(torch.randn(20, 16)).square().sum().backward()
        assert moe.router.weight.grad.abs().max() > 1e-4


@pytest.mark.parametrize(
    "router",
    [
        lambda **o: Router(16, 6, 2, bias=True, **o),
        lambda **o: nn.NoisyTopKRouter(16, 6, 2, **o),
        lambda **o: nn.SharedRouter(16, 6, 2, **o),
    ],
)
def test_a_router_in_float32_routes_in_float32(router):
    moe = MoE(16, 12, 6, router=router(dtype=torch.bfloat16), dtype=torch.bfloat16)
    moe.router.float()
    x = torch.randn(9, 16, dtype=torch.bfloat16)
    y, stats = moe(x, return_stats=True)
    assert y.dtype == torch.bfloat16
    assert stats.router.logits.dtype == torch.float32
    expected = x.float() @ moe.router.weight.T
    torch.testing.assert_close(stats.router.logits, expected)
    y.float().sum().backward()
    assert moe.router.weight.grad.dtype == torch.float32


def test_autocast_reaches_logits_and_not_weights():
    moe = MoE(16, 12, 6, 2)
    with torch.autocast("cpu", torch.bfloat16):
        _, stats = moe(torch.randn(9, 16), return_stats=True)
    assert stats.router.logits.dtype == torch.bfloat16
    assert stats.router.scores.dtype == stats.router.weights.dtype == torch.float32


def test_under_a_capacity_a_token_depends_on_those_beside_it():
    moe, x = MoE(16, 12, 4, 2, capacity_factor=0.5), torch.randn(40, 16)
    assert not torch.allclose(moe(x)[20:], moe(x[20:]))
    moe.capacity_factor = None
    torch.testing.assert_close(moe(x)[20:], moe(x[20:]))


def test_expert_choice_sees_later_tokens():
    moe, x = MoE(16, 12, 4, router=nn.ExpertChoiceRouter(16, 4, capacity_factor=1.0)), torch.randn(40, 16)
    assert not torch.allclose(moe(x)[:20], moe(torch.cat([x[:20], 9 * x[20:]]))[:20])
    plain = MoE(16, 12, 4, 2)
    torch.testing.assert_close(plain(x)[:20], plain(torch.cat([x[:20], 9 * x[20:]]))[:20])


def test_weight_decay_and_momentum_move_what_a_hook_has_frozen():
    for options, moves in (({"weight_decay": 0.0}, False), ({"weight_decay": 0.1}, True)):
        moe = MoE(16, 12, 4, 2)
        moe.experts.w1.register_hook(torch.zeros_like)
        optimizer, before = torch.optim.AdamW(moe.parameters(), **options), moe.experts.w1.detach().clone()
        moe(torch.randn(20, 16)).sum().backward()
        optimizer.step()
        assert torch.equal(moe.experts.w1, before) != moves


# ---- the table of families, against transformers

ROWS = re.findall(r"^\| `(\w+)` \| (\d+), (\d+) \| `(.+)` \| (loss, ([\d.]+)|bias) \|$", GUIDE, re.MULTILINE)


def test_the_table_is_found():
    assert len(ROWS) == 7


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_the_layer_of_a_family(row):
    transformers = pytest.importorskip("transformers", "5", reason="needs transformers 5")
    from transformers_models import build, relative

    family, experts, top_k, layer, balance, coefficient = row
    default = transformers.AutoConfig.for_model(family)
    given = default.to_dict()
    assert top_k == str(default.num_experts_per_tok)
    assert experts in {str(given[name]) for name in given if name.endswith("_experts")}
    assert not default.output_router_logits
    assert balance == "bias" or given["router_aux_loss_coef"] == float(coefficient)

    E, K = 32, int(top_k)
    names = dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts"), E)
    groups = {name: given[name] for name in ("n_group", "topk_group") if name in given}
    normed = {"norm_topk_prob": True} if family == "qwen3_moe" else {}
    sizes = {name: value for name, value in (names | groups | normed).items() if name in given}
    block = build(family, num_experts_per_tok=K, **sizes).model.layers[-1].mlp
    theirs = block.state_dict()
    shared = next((f"{name}." for name in ("shared_expert", "shared_experts") if hasattr(block, name)), "")
    S = len(theirs[f"{shared}up_proj.weight"]) if shared else None
    H, width = block.experts.down_proj.shape[1:]
    if family == "gpt_oss":
        H, width = width, H
    ours = eval(layer, {"MoE": MoE, "Router": Router, "H": H, "I": width, "E": E, "K": K, "S": S})
    ours.load_state_dict(_ours(theirs, shared, interleaved=family == "gpt_oss"))

    x = torch.randn(3, 7, H)
    y = block(x)
    y = y[0] if isinstance(y, tuple) else y
    assert relative(ours(x), y) <= 2e-6


def _ours(theirs, shared, interleaved):
    """The parameters of a block of transformers by the names of `MoE`."""
    router = next(name for name in theirs if name in ("gate.weight", "router.weight")).partition(".")[0]
    w1, w2 = theirs["experts.gate_up_proj"], theirs["experts.down_proj"]
    state = {"router.weight": theirs[f"{router}.weight"]}
    if interleaved:
        b1 = theirs["experts.gate_up_proj_bias"]
        state |= {"router.bias": theirs["router.bias"], "experts.b2": theirs["experts.down_proj_bias"]}
        state["experts.b1"] = torch.cat([b1[:, ::2], b1[:, 1::2]], 1)
        w1, w2 = w1.mT, w2.mT
        w1 = torch.cat([w1[:, ::2], w1[:, 1::2]], 1)
    state |= {"experts.w1": w1, "experts.w2": w2}
    if shared:
        gate, up, down = (theirs[f"{shared}{name}_proj.weight"] for name in ("gate", "up", "down"))
        state |= {"shared.w1": torch.cat([gate, up]), "shared.w2": down}
    if "shared_expert_gate.weight" in theirs:
        state["shared_gate.weight"] = theirs["shared_expert_gate.weight"]
    if "gate.e_score_correction_bias" in theirs:
        state["router.selection_bias"] = theirs["gate.e_score_correction_bias"]
    return state

"""route against the routers of transformers: the same experts, weights and gradients."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from fastmoe_rs import functional

pytest.importorskip("transformers", minversion="5", reason="needs transformers 5")

E, H, K, T = 16, 12, 4, 40


def router(family, name, **config):
    module = __import__(f"transformers.models.{family}.modeling_{family}", fromlist=[name])
    numbers = {"num_experts": E, "num_local_experts": E, "n_routed_experts": E, "hidden_size": H}
    config = SimpleNamespace(num_experts_per_tok=K, top_k_experts=K, **numbers, **config)
    built = getattr(module, name)(config)
    for tensor in (*built.parameters(), *built.buffers()):
        torch.nn.init.normal_(tensor, std=0.5)
    return built


def case(family, name, config, picks=(1, 2), **options):
    """A router class, its config, where its weights and ids are in what it returns, and our options."""
    name_of_case = "-".join(map(str, (family, *config.values())))
    return pytest.param(family, name, config, picks, options, id=name_of_case)


GROUPS = {"n_group": 4, "topk_group": 2}
SCALED = {"routed_scaling_factor": 2.5}
DEEPSEEK_V3 = {"score": "sigmoid", "renormalize": True, "scale": 2.5, **GROUPS}
CASES = [
    case("mixtral", "MixtralTopKRouter", {"router_jitter_noise": 0.0}, renormalize=True),
    case("olmoe", "OlmoeTopKRouter", {"norm_topk_prob": False}),
    case("qwen3_moe", "Qwen3MoeTopKRouter", {"norm_topk_prob": True}, renormalize=True, renormalize_eps=0.0),
    case("deepseek_v2", "DeepseekV2TopkRouter", {"topk_method": "greedy", **SCALED, **GROUPS}, scale=2.5),
    case(
        "deepseek_v2",
        "DeepseekV2TopkRouter",
        {"topk_method": "group_limited_greedy", **SCALED, **GROUPS},
        scale=2.5,
        group_score="max",
        group_losers="zero",
        **GROUPS,
    ),
    case("deepseek_v3", "DeepseekV3TopkRouter", {"norm_topk_prob": True, **SCALED, **GROUPS}, **DEEPSEEK_V3),
    case("glm4_moe", "Glm4MoeTopkRouter", {"norm_topk_prob": True, **SCALED, **GROUPS}, **DEEPSEEK_V3),
    case(
        "axk2",
        "AXK2TopkRouter",
        {"norm_topk_prob": True, **SCALED, **GROUPS},
        group_losers="zero",
        **DEEPSEEK_V3,
    ),
    case(
        "mistral4",
        "Mistral4TopkRouter",
        {"norm_topk_prob": True, **SCALED, **GROUPS},
        renormalize=True,
        scale=2.5,
        group_losers="zero",
        **GROUPS,
    ),
    case(
        "deepseek_v4",
        "DeepseekV4TopKRouter",
        {"scoring_func": "sqrtsoftplus", **SCALED},
        score="sqrt_softplus",
        renormalize=True,
        scale=2.5,
    ),
    case(
        "laguna",
        "LagunaTopKRouter",
        {"moe_router_logit_softcapping": 1.5},
        score="sigmoid",
        softcap=1.5,
        renormalize=True,
        renormalize_eps=0.0,
    ),
    case(
        "kolibri1",
        "Kolibri1TopKRouter",
        {"norm_topk_prob": True},
        score="sigmoid",
        order="topk_score",
        renormalize=True,
        renormalize_eps=0.0,
    ),
    case(
        "muse_spark",
        "MuseSparkTopkRouter",
        {"output_multiplier": 1.0, **SCALED},
        score="sigmoid",
        renormalize=True,
        renormalize_eps=1e-15,
        scale=2.5,
    ),
    case(
        "cohere2_moe",
        "Cohere2MoeTopKRouter",
        {"expert_selection_fn": "softmax", "norm_topk_prob": False},
        order="topk_score",
    ),
    case(
        "ernie4_5_moe",
        "Ernie4_5_MoeTopKRouter",
        {"moe_norm_min": 1e-12, "moe_num_experts": E},
        renormalize=True,
        renormalize_eps=1e-12,
    ),
    case("longcat_flash", "LongcatFlashTopkRouter", {"zero_expert_num": 4, **SCALED}, scale=2.5),
]


@pytest.mark.parametrize(("family", "name", "config", "picks", "options"), CASES)
def test_is_the_router_of(family, name, config, picks, options):
    module = router(family, name, **config)
    x = torch.randn(T, H)
    out = module(x)
    theirs, their_ids = out[picks[0]], out[picks[1]]
    weight = next(parameter for key, parameter in module.named_parameters() if key.endswith("weight"))
    bias = [tensor for key, tensor in module.named_buffers() if "bias" in key]
    bias += [tensor for key, tensor in module.named_parameters() if "correction_bias" in key]
    bias = bias[0].reshape(-1) if bias else None
    ids, weights, _ = functional.route(F.linear(x, weight), K, bias=bias, **options)

    # Models without sorted top-k return the experts of a token in any order.
    (ids, order), (their_ids, their_order) = ids.sort(1), their_ids.sort(1)
    assert torch.equal(ids, their_ids)
    weights, theirs = weights.gather(1, order), theirs.gather(1, their_order)
    torch.testing.assert_close(weights, theirs, rtol=2e-5, atol=1e-6)
    direction = torch.randn_like(weights)
    (grad,) = torch.autograd.grad(weights, weight, direction)
    (wanted,) = torch.autograd.grad(theirs, weight, direction)
    torch.testing.assert_close(grad, wanted, rtol=1e-4, atol=1e-5)


def test_gemma4_scales_every_expert():
    module = router("gemma4", "Gemma4TextRouter", rms_norm_eps=1e-6)
    logits = []
    module.proj.register_forward_hook(lambda module, args, out: logits.append(out))
    _, theirs, their_ids = module(torch.randn(T, H))
    ids, weights, _ = functional.route(
        logits[0], K, renormalize=True, renormalize_eps=0.0, expert_scale=module.per_expert_scale
    )
    assert torch.equal(ids, their_ids)
    torch.testing.assert_close(weights, theirs)
    direction = torch.randn_like(weights)
    ours, wanted = (
        torch.autograd.grad(out, (module.proj.weight, module.per_expert_scale), direction, retain_graph=True)
        for out in (weights, theirs)
    )
    for grad, want in zip(ours, wanted, strict=True):
        torch.testing.assert_close(grad, want, rtol=1e-4, atol=1e-5)

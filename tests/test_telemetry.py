"""What is counted of the routing: by layer, over forwards, under checkpointing, masks and compilation."""

import json
import math
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model

from fastmoe_rs import ExpertCollapseWarning, losses, nn, sinks, watch
from fastmoe_rs.integrations.swap import is_dispatched
from moe_cases import Stack
from transformers_models import build, tokens


def stack(use_reentrant=None, **options):
    return Stack(16, 12, 6, 2, use_reentrant=use_reentrant, **options)


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    for name, stats in expected.items():
        for field in ("routes", "tokens", "dropped", "router_entropy", "logit_norm"):
            torch.testing.assert_close(getattr(actual[name], field), getattr(stats, field))


def test_counts_what_the_routers_did():
    moe, x = nn.MoE(16, 12, 6, 2, capacity_factor=1.0), torch.randn(50, 16)
    watched = watch(moe)
    for part in (x[:20], x[20:]):
        moe(part)
    _, whole = moe(x, return_stats=True)
    watched.reset()
    kept = [moe(part, return_stats=True)[1] for part in (x[:20], x[20:])]
    stats = moe.stats()
    assert torch.equal(stats.routes, torch.bincount(whole.router.ids.flatten(), minlength=6))
    torch.testing.assert_close(stats.load, whole.load)
    torch.testing.assert_close(stats.max_vio, whole.max_vio)
    torch.testing.assert_close(stats.load_entropy, whole.load_entropy)
    dropped = sum(2 * part.plan.tokens * part.dropped for part in kept) / 100
    assert dropped > 0
    torch.testing.assert_close(stats.dropped, dropped)
    logits = whole.router.logits
    entropy = torch.distributions.Categorical(logits=logits).entropy().mean() / math.log(6)
    torch.testing.assert_close(stats.router_entropy, entropy)
    torch.testing.assert_close(stats.logit_norm, logits.norm(dim=1).mean())
    assert stats.tokens == 50
    assert stats.dead == (stats.routes == 0).sum()


def test_padding_does_not_count():
    model, x = stack(), torch.randn(3, 8, 16)
    mask = torch.arange(8) < torch.tensor([[8], [5], [1]])
    watched = watch(model)
    model(x[mask])
    expected = watched.stats()
    watched.reset()
    with watched.masked(mask.long()):
        model(torch.where(mask[..., None], x, torch.nan))
    assert_same(watched.stats(), expected)
    assert watched.stats()["layers.0"].tokens == 14
    with (
        watched.masked(mask[:2]),
        pytest.raises(ValueError, match=r"mask: got shape \(2, 8\), wanted 24 elements"),
    ):
        model(x)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_counts_once_over_micro_batches(use_reentrant):
    model, x = stack(), torch.randn(12, 16, requires_grad=True)
    watched = watch(model)
    model(x)
    expected = watched.stats()
    watched.reset()
    model.use_reentrant = use_reentrant
    for part in x.split(4):
        model(part).square().sum().backward()
    assert_same(watched.stats(), expected)
    assert (model.layers[0].router.weight.grad != 0).any()


def test_statistics_do_not_read_the_device():
    """A meta tensor has no value: whatever reads one, as a copy to the host does, fails."""
    model = stack(device="meta", capacity_factor=1.0)
    watched = watch(model)
    with watched.masked(torch.ones(7, device="meta")):
        model(torch.empty(7, 16, device="meta"))
    stats = watched.stats()["layers.1"]
    for value in (stats.load, stats.max_vio, stats.load_entropy, stats.dead, stats.dropped, stats.tokens):
        assert value.is_meta
    watched.reset()


@pytest.mark.parametrize("use_reentrant", [None, False], ids=["plain", "checkpointed"])
def test_compiled_in_one_graph(use_reentrant):
    """Also layers that are watched once they were compiled, and that the backward recomputes."""
    torch._dynamo.reset()
    model, x = stack(use_reentrant), torch.randn(30, 16)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled(x)
    watched = watch(model)
    model(x)
    expected = watched.stats()
    watched.reset()
    compiled(x).sum().backward()
    assert_same(watched.stats(), expected)


def test_gradients_and_outputs_stay_the_same_to_the_bit():
    model, x = stack(), torch.randn(30, 16)
    model(x).sum().backward()
    expected = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    watched = watch(model)
    model(x).sum().backward()
    assert all(torch.equal(p.grad, want) for p, want in zip(model.parameters(), expected, strict=True))
    watched.close()
    with pytest.raises(RuntimeError, match=r"nothing was counted, call fastmoe_rs\.watch"):
        model.layers[0].stats()


def experts_seen(model):
    """ids that reach each experts module of a transformers model, in order."""
    seen = []
    for module in model.modules():
        if is_dispatched(module):
            module.register_forward_pre_hook(lambda module, args: seen.append(args[1]))
    return seen


@pytest.mark.parametrize(
    "family", ["mixtral", "deepseek_v3", "gpt_oss", "qwen2_moe", "gemma4_text", "hunyuan_v1_moe"]
)
def test_transformers_models(family):
    model = build(family)
    seen, watched = experts_seen(model), watch(model)
    with torch.no_grad():
        model(tokens())
    assert len(seen) == len(watched.counters)
    for ids, stats in zip(seen, watched.stats().values(), strict=True):
        assert torch.equal(stats.routes, torch.bincount(ids.flatten(), minlength=8))
        assert stats.tokens == 18
        assert stats.logit_norm > 0
    watched.close()
    with torch.no_grad():
        model(tokens())
    assert next(iter(watched.stats().values())).tokens == 18


def test_transformers_model_with_adapters_and_checkpointing():
    model = build("mixtral")
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    model = get_peft_model(model, LoraConfig(r=2, target_modules=[], target_parameters=targets))
    watched = watch(model)
    model.eval()(tokens())
    expected = watched.stats()
    watched.reset()
    model.train().gradient_checkpointing_enable()
    model.enable_input_require_grads()
    with watched.masked(torch.ones(2, 9)):
        output = model(tokens(), labels=tokens())
    output.loss.backward()
    assert list(expected) == [f"base_model.model.model.layers.{layer}.mlp" for layer in range(2)]
    assert_same(watched.stats(), expected)


def test_routes_to_other_ranks_count_nowhere():
    watched = watch(nn.MoE(16, 12, 6, 2))
    counters = watched.counters[""]
    counters.add(torch.tensor([[0, 6], [-1, 5]]), torch.zeros(2, 6))
    assert counters.stats().routes.tolist() == [1, 0, 0, 0, 0, 1]


def test_nothing_to_watch():
    with pytest.raises(ValueError, match="model: got Linear without a Mixture-of-Experts layer"):
        watch(torch.nn.Linear(2, 2))


def test_collapse_is_told_once_with_its_remedy():
    model, x = stack(), torch.randn(700, 16)
    watched = watch(model)
    with torch.no_grad():
        model.layers[1].router.weight.zero_()  # of equal logits, the first two win
    model(x)
    with pytest.warns(
        ExpertCollapseWarning, match=r"step 3, layer 'layers.1': 4 of 6 experts .*load_balancing_loss"
    ):
        watched.log(3)
    model(x)
    watched.log(4)  # warnings are errors
    assert {"load_balancing_loss", "router_z_loss"} <= {*losses.__all__}, "what the remedy names is there"


def test_a_single_expert_has_not_collapsed():
    moe = nn.MoE(16, 12, 1, 1)
    watched = watch(moe)
    _, stats = moe(torch.randn(200, 16), return_stats=True)
    assert stats.load_entropy == 1
    record = watched.log(1)[""]  # warnings are errors
    assert (record["load"], record["load_entropy"], record["max_vio"]) == ([1.0], 1.0, 0.0)


def test_few_tokens_are_no_collapse():
    model = stack()
    watched = watch(model)
    with torch.no_grad():
        model.layers[0].router.weight.zero_()
    model(torch.rand(99, 16))
    assert watched.log(1)["layers.0"]["dead"] == 4
    assert watched.stats()["layers.0"].tokens == 0


class Writer:
    def __init__(self):
        self.scalars = {}

    def add_scalar(self, name, value, step):
        self.scalars[name, step] = value


def test_sinks(tmp_path):
    model = stack()
    watched, writer = watch(model), Writer()
    heatmap = sinks.Heatmap(tmp_path / "load.png")
    lines = sinks.JsonLines(tmp_path / "routing.jsonl")
    for step in (10, 20):
        model(torch.randn(40, 16))
        records = watched.log(step, lines, sinks.TensorBoard(writer, experts=True), heatmap)
    logged = [json.loads(line) for line in lines.path.read_text().splitlines()]
    assert [entry["step"] for entry in logged] == [10, 20]
    assert logged[1]["layers"] == records
    assert sum(records["layers.0"]["load"]) == pytest.approx(1)
    assert writer.scalars["moe/max_vio/layers.1", 20] == records["layers.1"]["max_vio"]
    assert writer.scalars["moe/load/layers.1", 20] == max(records["layers.1"]["load"])
    by_expert = [writer.scalars[f"moe/load/layers.1/{expert}", 20] for expert in range(6)]
    assert by_expert == records["layers.1"]["load"]
    plain = Writer()
    sinks.TensorBoard(plain)(20, records)
    assert ("moe/load/layers.1/0", 20) not in plain.scalars
    heatmap.save()
    assert heatmap.path.read_bytes().startswith(b"\x89PNG")


def test_sinks_say_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match="pip install tensorboard"):
        sinks.TensorBoard(tmp_path)
    with pytest.raises(ValueError, match="heatmap: got no records"):
        sinks.Heatmap(tmp_path / "x.png").save()


def test_what_cannot_be_watched():
    model = stack()
    first = watch(model)
    with pytest.raises(ValueError, match=r"'layers\.0' is watched already, close that watch first"):
        watch(model)
    model(torch.randn(5, 16))
    assert first.record()["layers.0"]["tokens"] == 5
    first.close()
    watch(model).close()

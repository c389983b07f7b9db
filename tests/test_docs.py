"""The code of the README and of docs/ runs, block after block of a page, and the links lead somewhere."""

import re
import shlex
import sys
import types
from pathlib import Path

import pytest
import torch

import fastmoe_rs
from fastmoe_rs import cli, nn

pytest.importorskip("transformers", "5.23", reason="the pages are about transformers >= 5.23")

from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from transformers.monkey_patching import unregister_patch_mapping

from fastmoe_rs.integrations import adapters
from transformers_models import build

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    path
    for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("examples/*.md"))
    if path.name != "CHANGELOG.md"
)
MODELS = {"allenai/OLMoE-1B-7B-0924": "olmoe", "Qwen/Qwen3-0.6B": "qwen3"}


def blocks(page, language):
    """The code of a page, each block at the lines where it stands, so that a traceback shows them."""
    text = page.read_text()
    for found in re.finditer(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        yield "\n" * text.count("\n", 0, found.start(1)) + found[1]


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run all Python blocks of a page in one namespace, in an empty folder, and return the namespace."""
    monkeypatch.chdir(tmp_path)
    load = AutoModelForCausalLM.from_pretrained

    def from_pretrained(name, **options):
        if name in MODELS:
            build(MODELS[name]).save_pretrained("hub")
        return load("hub" if name in MODELS else name, **options)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", from_pretrained)

    def run(page, **names):
        for code in blocks(ROOT / page, "python"):
            exec(compile(code, ROOT / page, "exec"), names)
        return names

    yield run
    unregister_patch_mapping([name for name in adapters.ADAPTERS if name in patched()])


def patched():
    from transformers.monkey_patching import get_patch_mapping

    return get_patch_mapping()


def test_readme(run):
    names = run("README.md", model=build("mixtral"))
    assert names["moe"].experts.w1.grad.abs().sum() > 0
    assert names["y"].shape == (64, 256)
    assert names["model"].config.model_type == "olmoe"
    assert names["model"].config._experts_implementation == "fastmoe_rs"
    assert fastmoe_rs.restore(names["model"]).config._experts_implementation != "fastmoe_rs"


def test_routing(run):
    names = run("docs/routing.md", x=torch.randn(2, 8, 512), attention_mask=torch.ones(2, 8))
    names["loss"].backward()
    assert names["model"].router.weight.grad.abs().sum() > 0
    assert names["moe"].router.selection_bias.abs().max() == pytest.approx(1e-3)


def test_a_router_of_your_own_is_trained_watched_and_replayed(run):
    names = run("docs/routing.md", x=torch.randn(2, 8, 512), attention_mask=torch.ones(2, 8))
    for router in (names["CosineRouter"](32, 8, 2), names["ExploringRouter"](32, 8, 2)):
        model = torch.nn.Sequential(nn.MoE(32, 16, 8, router=router))
        watched, x = fastmoe_rs.watch(model), torch.randn(40, 32)
        with fastmoe_rs.record_routing(model) as recorded:
            y = model(x)
        y.square().sum().backward()
        assert all(parameter.grad.abs().sum() > 0 for parameter in router.parameters())
        with fastmoe_rs.replay_routing(model, recorded):
            torch.testing.assert_close(model(x), y)
        assert watched.stats()["0"].routes.sum() == 2 * 40 * 2
    model.eval()
    assert torch.equal(model(x), model(x))


def test_integrations(run):
    names = run("docs/integrations.md")
    assert names["model"].config._experts_implementation == "fastmoe_rs"
    assert set(patched()) >= set(adapters.ADAPTERS)
    assert names["moe"].config.model_type == "qwen3_moe"
    assert names["student"].config.model_type == "qwen3"
    assert names["student"].config.intermediate_size == 2 * names["dense"].config.intermediate_size


def test_quantization(run):
    names = run("docs/quantization.md")
    assert names["x"].grad.abs().sum() > 0
    assert names["y"].shape == (16, 256)


@pytest.mark.filterwarnings("ignore::fastmoe_rs.ExpertCollapseWarning")
def test_training(run, monkeypatch, capsys):
    pytest.importorskip("accelerate", reason="transformers' Trainer needs it")
    written = {}

    class SummaryWriter:
        def __init__(self, folder):
            assert folder == "runs/moe"

        def add_scalar(self, name, value, step):
            written[name, step] = value

    stub = types.ModuleType("torch.utils.tensorboard")
    stub.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", stub)

    dataset = [{"input_ids": ids, "labels": ids} for ids in torch.randint(3, 64, (8, 12))]
    arguments = TrainingArguments(
        "out",
        max_steps=3,
        save_steps=2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        per_device_train_batch_size=2,
    )
    trainer = Trainer(build("qwen3_moe").train(), arguments, train_dataset=dataset)
    trainer.train()
    batches = [torch.randint(256, (2, 4, 16)).unbind() for _ in range(10)]
    deepseek = build("deepseek_v3").train()
    bias = deepseek.model.layers[1].mlp.gate.e_score_correction_bias
    bias_before = bias.clone()
    names = run(
        "docs/training.md",
        batches=batches,
        deepseek=deepseek,
        batches_of_ids=torch.randint(3, 64, (3, 2, 9)),
        answers=torch.randint(3, 64, (2, 9)),
        sampler=build("qwen3_moe"),
        learner=build("qwen3_moe"),
        arguments=arguments,
        dataset=dataset,
    )
    assert sum(written[f"moe/load/1.1/{expert}", 9] for expert in range(8)) == pytest.approx(1)
    assert written["moe/max_vio/1.1", 9] >= 0
    assert (bias - bias_before).abs().max() == pytest.approx(3e-3, rel=0.5)
    assert names["learner"].model.layers[0].mlp.gate.weight.grad.abs().sum() > 0
    # The model that was resumed is the one that was trained in one go.
    trained, resumed = (model.state_dict() for model in (trainer.model, names["model"]))
    assert all(torch.allclose(resumed[name], value, atol=1e-6) for name, value in trained.items())
    some = names["moe"]
    before = some.experts.w1.detach().clone()
    some(names["x"]).square().mean().backward()
    names["optimizer"].step()
    moved = (some.experts.w1 != before).flatten(1).any(1)
    assert moved.nonzero().flatten().tolist() == [2, 5]


def test_expert_parallel(run, tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1
    )
    try:
        names = run("docs/expert_parallel.md", batches_of_this_rank=torch.randn(2, 6, 64))
        model, large, x = names["model"], names["large"], torch.randn(6, 64)
        assert torch.equal(large(x), model(x))
        assert names["state"].keys() == model.state_dict().keys()
    finally:
        torch.distributed.destroy_process_group()


def test_commands(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    build("olmoe").save_pretrained("olmoe")
    build("gpt_oss").save_pretrained("gpt-oss")
    lines = [line for code in blocks(ROOT / "docs/integrations.md", "sh") for line in code.splitlines()]
    commands = [shlex.split(line)[3:] for line in lines if line.startswith("python -m fastmoe_rs")]
    assert len(commands) == 2
    for command in commands:
        assert not cli.main(command)
        assert (tmp_path / command[2] / "config.json").exists()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        target, _, heading = link.partition("#")
        if not target.startswith(("http:", "https:")):
            file = page.parent / target if target else page
            assert file.exists(), link
            assert not heading or heading in headings(file), link


def headings(page):
    """The names by which headings are linked to."""
    lines = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in lines}

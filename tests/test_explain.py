"""`python -m fastmoe_rs doctor --explain` reckons with the launches of a GPU that is not there."""

import json
from dataclasses import replace

import pytest

from fastmoe_rs import _native, gpus
from fastmoe_rs.cli import main
from fastmoe_rs.explain import Layer, explain

QWEN = Layer(tokens=4096, hidden=2048, intermediate=768, experts=128, top_k=8)
H200 = gpus.find("H200")


def kernels(report, key="forward"):
    return {kernel["kernel"]: kernel for kernel in report[key]["kernels"]}


def test_products_have_the_flops_of_the_layer():
    report = explain(QWEN, H200)
    assert report["forward"]["flops"] == QWEN.forward_flops == 6 * 4096 * 8 * 2048 * 768
    assert report["forward_backward"]["flops"] == 3 * QWEN.forward_flops


def test_bytes_are_those_of_the_tensors():
    up = kernels(explain(QWEN, H200))["up_wgmma_bf16_128x256_nt"]
    x, act, weights = 4096 * 2048, 4096 * 8 * 768, 128 * 2 * 768 * 2048
    assert up["bytes"] == pytest.approx(2 * (x + act + weights), rel=1e-3), "but for some indices"
    assert up["bound"] == "FLOPs"
    assert up["roofline_us"] == pytest.approx(1e6 * 2 * 4096 * 8 * 2 * 768 * 2048 / 989.4e12)
    assert up["grid"] == 132


@pytest.mark.parametrize(("multiprocessors", "grid"), [(132, 132), (131, 130), (1, 2)])
def test_blocks_of_warpgroups_come_in_pairs(multiprocessors, grid):
    report = explain(QWEN, replace(H200, multiprocessors=multiprocessors))
    products = [kernel for kernel in report["forward_backward"]["kernels"] if "_wgmma_" in kernel["kernel"]]
    assert len(products) == 6
    assert {kernel["grid"] for kernel in products} == {grid}


@pytest.mark.parametrize(
    ("gpu", "kernel", "shared_bytes", "stages"),
    [("A100", "up_bf16_128x256_nt", 98304, 4), ("H200", "up_wgmma_bf16_128x256_nt", 229504, None)],
)
def test_stages_are_those_of_tiles_with_shared_memory_for_nothing_else(
    gpu, kernel, shared_bytes, stages, monkeypatch
):
    compiled = {"name": kernel, "threads": 384, "registers": 168, "shared_bytes": shared_bytes}
    monkeypatch.setattr(_native, "images", lambda capability: [{"arch": "80", "kernels": [compiled]}])
    up = kernels(explain(QWEN, gpus.find(gpu)))[kernel]
    assert (up["image"], up["registers"], up["stages"]) == ("80", 168, stages)


def test_few_tokens_read_few_experts():
    one = Layer(1, 2048, 768, 128, 8)
    assert one.active_experts == pytest.approx(8)
    weights = 8 * 3 * 2048 * 768 * 2
    assert explain(one, H200)["forward"]["bytes"] == pytest.approx(weights, rel=0.01)


@pytest.mark.parametrize(
    ("layer", "train", "milliseconds"),
    [
        (Layer(4096, 4096, 14336, 8, 2), False, 3.65),
        (Layer(16384, 4096, 14336, 8, 2), True, 43.8),
        (Layer(4096, 7168, 2048, 256, 8), False, 5.33),
        (Layer(4096, 2048, 768, 128, 8), True, 1.17),
        (Layer(1, 2048, 768, 128, 8), False, 0.0176),
        (Layer(8, 7168, 2048, 256, 8), False, 1.176),
        (Layer(32, 2048, 1024, 64, 8), False, 0.185),
    ],
)
def test_floor_of_known_layers(layer, train, milliseconds):
    """At the 790 TFLOP/s and 4.3 TB/s that an H200 was measured to reach."""
    assert 1e3 * layer.floor(790e12, 4.3e12, train) == pytest.approx(milliseconds, rel=0.01)


def test_tiles_follow_the_gpu_the_type_and_the_rows():
    def tiles(layer, gpu):
        found = explain(layer, gpus.find(gpu))["forward"]["kernels"]
        return {kernel["tile"] for kernel in found} - {None}

    assert tiles(QWEN, "A100") == {"128x256"}
    assert tiles(QWEN, "RTX 4090") == {"128x128"}
    assert tiles(Layer(64, 2048, 768, 128, 8), "A100") == {"32x128"}
    assert tiles(Layer(4096, 2048, 768, 128, 8, math="f32"), "A100") == {"128x128"}
    assert tiles(Layer(4096, 2047, 768, 128, 8), "A100") == {"64x128"}, "rows that are not aligned"


def test_text_and_json_of_the_command(capsys):
    sizes = ["4096", "2048", "768", "128", "8"]
    assert main(["doctor", "--explain", *sizes, "--gpu", "a100", "--dtype", "tf32"]) == 0
    text = capsys.readouterr().out
    for part in ("on A100 (8.0)", "156 TFLOP/s", "up_tf32_128x128_nt", "not measurements"):
        assert part in text
    assert main(["doctor", "--explain", *sizes, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["gpu"]["name"] == "H200"
    assert report["forward"]["roofline_us"] >= report["forward"]["floor_us"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["8", "16", "16", "4", "8"], "argument --explain: got K 8, wanted at most E, 4"),
        (
            ["9999999999", "16", "16", "4", "2"],
            "argument --explain: T (tokens): got 9999999999, wanted at most 1073741824 on a GPU",
        ),
        (["9" * 30, "16", "16", "4", "2"], "argument --explain: "),
        (["9" * 6000, "16", "16", "4", "2"], "argument --explain: got '99999"),
        (["8", "16", "16", "4", "0"], "argument --explain: got '0', wanted a whole number from 1 on"),
        (
            ["8", "16", "16", "4", "2", "--gpu", "Z80"],
            "argument --gpu: got 'Z80', wanted one of A100",
        ),
    ],
)
def test_bad_arguments_end_in_a_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as end:
        main(["doctor", "--explain", *arguments])
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


@pytest.mark.parametrize("option", ["--gpu", "--dtype"])
def test_options_of_explain_need_it(option, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["doctor", option, "tf32"])
    assert f"argument {option}: it goes with --explain only" in capsys.readouterr().err

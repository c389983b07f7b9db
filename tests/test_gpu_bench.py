"""The benchmark of a GPU is a sound program: it runs on the CPU, beside stand-ins for others' libraries."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

ROOT = Path(__file__).parents[1]
PEERS = ROOT / "tests/gpu_peers"
QUICK = ("--device", "cpu", "--quick")
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")


def run(*command: object, peers: Path = PEERS) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "FASTMOE_BENCH_PEERS": str(peers)}
    command = (sys.executable, *map(str, command))
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def of_kind(entries: list[dict], kind: str) -> list[dict]:
    return [entry for entry in entries if entry["kind"] == kind]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The modules of bench/gpu, by name."""
    monkeypatch.syspath_prepend(ROOT / "bench")
    monkeypatch.syspath_prepend(ROOT / "bench/gpu")
    names = ("run", "supervisor", "worker", "measure", "clock", "peers", "problems", "report")
    return SimpleNamespace(**{name: importlib.import_module(name) for name in names})


def test_benchmark_of_a_gpu_records_and_reports(tmp_path: Path) -> None:
    path = tmp_path / "record.jsonl"
    done = run("bench/gpu/run.py", *QUICK, "--only", "train", "--out", path)
    assert done.returncode == 0, done.stdout + done.stderr
    entries = lines_of(path)
    assert [entry["kind"] for entry in entries] == ["machine", "ceilings", "routing", *["cell"] * 3]
    for cell in entries[3:]:
        assert len(cell["paths"]) == 7
        assert cell["took"]["answers"] > cell["paths"]["fastmoe_rs"]["first_s"] > 0
        assert cell["floor_s"] > 0
        assert set(cell["paths"]["fastmoe_rs"]["errors"]) == {"out", "x", "weights", "w1", "w2"}
        for name, found in cell["paths"].items():
            if "without gate" in cell["name"] and name not in ("fastmoe_rs", "torch_grouped"):
                assert found == {"status": "skipped", "reason": "gated activations only"}
            else:
                assert found["status"] == "ok", (name, found)
                assert found["eager"]["median_s"] > 0
                assert max(found["errors"].values()) < 3e-2
    assert set(entries[3]["paths"]["liger"]["errors"]) == {"out", "x", "weights", "w1", "w2"}
    assert path.with_suffix(".svg").read_text().startswith("<svg")
    page = path.with_suffix(".md").read_text()
    assert "## tiny T32 train" in page
    assert "of them until all had answered)" in done.stdout.splitlines()[-2]
    assert "| torch_grouped |" in page


def test_cells_and_peers_are_chosen(bench: Any, tmp_path: Path) -> None:
    assert tuple(path.name for path in bench.peers.PATHS[1:]) == bench.run.PEERS
    path = tmp_path / "record.jsonl"
    options = ("--only", "tiny T1 ", "--only", "gate T32 train", "--without", "liger", "--out", path)
    done = run("bench/gpu/run.py", *QUICK, *options)
    assert done.returncode == 0, done.stdout + done.stderr
    cells = of_kind(lines_of(path), "cell")
    assert [cell["name"] for cell in cells] == ["tiny without gate T32 train", "tiny T1 forward"]
    for cell in cells:
        assert cell["paths"]["liger"] == {"status": "skipped", "reason": "not asked for"}
        assert cell["paths"]["torch_grouped"]["status"] == "ok"
    assert run("bench/gpu/run.py", *QUICK, "--without", "sigma").returncode == 2


def test_the_passes_of_a_shape_follow_each_other(bench: Any) -> None:
    found = bench.problems.cells(quick=False)
    assert len({cell.name for cell in found}) == len(found)
    for first, second in zip(found[:8:2], found[1:8:2], strict=True):
        assert (first.shape, first.mode, second.mode) == (second.shape, "forward", "train")
    shapes = {(cell.shape.name, cell.mode) for cell in found[:36] if cell.tokens == 4096}
    assert len(shapes) == 2 * len(bench.problems.SHAPES)


def bad_peers(folder: Path, **modules: str) -> Path:
    """The stand-ins, with other lines at the end of some of them."""
    shutil.copytree(PEERS, folder)
    for path in folder.rglob("*.py"):
        with path.open("a") as file:
            file.write(modules.get(path.parent.name if path.stem == "__init__" else path.stem, ""))
    return folder


def test_bad_peers_cost_no_other_result(tmp_path: Path) -> None:
    aborts = "\nimport os\nLigerFusedMoEFunction.apply = lambda *rest: os.abort()\n"
    raises = "\ndef GLUMLP(*sizes, activation):\n    raise ValueError('no such layout')\n"
    lies = "\ndef moe_general_routing_inputs(x, *rest):\n    return (x,)\n"
    peers = bad_peers(tmp_path / "peers", fused_moe=aborts, mlp=raises, functional=lies)
    path = tmp_path / "record.jsonl"
    done = run("bench/gpu/run.py", *QUICK, "--only", "forward", "--out", path, peers=peers)
    assert done.returncode == 0, done.stdout + done.stderr
    entries = lines_of(path)
    (lost,) = of_kind(entries, "lost")
    died = "its process ended with status -6"
    assert lost == {"kind": "lost", "doing": "liger", "name": "tiny T32 forward", "reason": died}
    cells = {cell["name"]: cell["paths"] for cell in of_kind(entries, "cell")}
    assert len(cells) == 3
    for name in ("tiny T32 forward", "tiny T1 forward"):
        paths = cells[name]
        assert {paths[good]["status"] for good in ("fastmoe_rs", "torch_grouped")} == {"ok"}
        assert paths["liger"] == {"status": "failed", "reason": f"{died} (on tiny T32 forward)"}
        assert paths["scattermoe"] == {"status": "failed", "reason": "ValueError: no such layout"}
        assert paths["sonicmoe"]["status"] == "wrong"
        assert "eager" not in paths["sonicmoe"]
    assert "| liger | failed: its process ended" in path.with_suffix(".md").read_text()


def test_a_process_that_says_nothing_is_given_up(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(bench.supervisor.SILENCE, "cpu", 0.1)
    cells = bench.problems.cells(quick=True)
    found = [*bench.supervisor.results("cpu", cells, time.time() + 60, quick=True)]
    assert found[0] == {"kind": "lost", "doing": "start", "name": "", "reason": "said nothing for 0 s"}
    assert [entry["name"] for entry in found[1:]] == [cell.name for cell in cells]
    assert {entry["reason"] for entry in found[1:]} == {"the device is not to be had"}


def test_benchmark_of_a_gpu_stops_in_time(tmp_path: Path) -> None:
    path = tmp_path / "record.jsonl"
    done = run("bench/gpu/run.py", *QUICK, "--budget-seconds", 0, "--out", path)
    assert done.returncode == 0, done.stdout + done.stderr
    left = of_kind(lines_of(path), "left out")
    assert len(left) == 6
    assert "the time was used up" in path.with_suffix(".md").read_text()


@pytest.mark.parametrize("cut", [signal.SIGTERM, signal.SIGKILL])
def test_what_is_known_survives_a_cut(tmp_path: Path, cut: signal.Signals) -> None:
    path = tmp_path / "record.jsonl"
    sleeps = "\nimport time\nLigerFusedMoEFunction.apply = lambda *rest: time.sleep(1000)\n"
    peers = bad_peers(tmp_path / "peers", fused_moe=sleeps)
    program = subprocess.Popen(
        [sys.executable, "bench/gpu/run.py", *QUICK, "--out", str(path)],
        cwd=ROOT,
        env={**os.environ, "FASTMOE_BENCH_PEERS": str(peers)},
        stdout=subprocess.PIPE,
        text=True,
    )
    with program:
        assert program.stdout.readline() == "machine: ok\n"
        assert program.stdout.readline() == "ceilings: ok\n"
        program.send_signal(cut)
    entries = lines_of(path)
    assert [entry["kind"] for entry in entries[:2]] == ["machine", "ceilings"]
    page = path.with_suffix(".md")
    if cut == signal.SIGKILL:
        with path.open("a") as file:
            file.write('{"kind": "cel')
        assert not page.exists()
        assert run("bench/gpu/report.py", path).returncode == 0
    assert "Ceilings measured" in page.read_text()


def test_wrong_answers_are_not_timed(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    right = bench.peers.moe_mlp
    monkeypatch.setattr(bench.peers, "moe_mlp", lambda *args, **options: right(*args, **options) * 1.1)
    sent: list[dict] = []
    cells = bench.problems.cells(quick=True)
    bench.worker.work(sent.append, "cpu", cells, {}, None, time.time() + 60, True)
    assert [entry["name"] for entry in of_kind(sent, "wrong")] == [cell.name for cell in cells]
    assert "fastmoe_rs is wrong on tiny T32 forward" in of_kind(sent, "wrong")[0]["reason"]
    assert not of_kind(sent, "cell")
    monkeypatch.setattr(bench.run, "results", lambda *args, **options: iter(of_kind(sent, "wrong")))
    assert bench.run.main(["--device", "cpu", "--out", os.devnull]) == 1


def test_wrong_gradients_are_told_from_float64(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, weight: torch.Tensor) -> torch.Tensor:
            return weight.view_as(weight)

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            return 1.1 * grad

    right = bench.peers.moe_mlp

    def wrong(*args: torch.Tensor, **options: Any) -> torch.Tensor:
        return right(*args[:-1], Wrong.apply(args[-1]), **options)

    monkeypatch.setattr(bench.peers, "moe_mlp", wrong)
    problem = bench.problems.Problems("cpu").of(bench.problems.cells(quick=True)[2])
    with pytest.raises(ArithmeticError, match=r"tiny T32 train: error .* of w2"):
        bench.measure.agreeing(problem, {}, {}, lambda doing: None)


class Event:
    """Of torch.cuda, by the host's clock."""

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None: ...

    def elapsed_time(self, end: Event) -> float:
        return 1e3 * (end.at - self.at)


class Graph:
    replays = 0

    def replay(self) -> None:
        Graph.replays += 1


class Device:
    """What stands in for a GPU: tensors stay on the CPU, and `broken` makes it fail from then on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.broken, self.mode = False, "default"
        for name, value in {
            "Event": Event,
            "CUDAGraph": Graph,
            "graph": self.capture,
            "graph_pool_handle": lambda: (0, 1),
            "is_initialized": lambda: True,
            "synchronize": self.synchronize,
            "set_sync_debug_mode": lambda mode: setattr(self, "mode", mode),
            "empty_cache": lambda: None,
            "reset_peak_memory_stats": lambda: None,
            "memory_allocated": lambda: 100,
            "max_memory_allocated": lambda: 350,
            "clock_rate": lambda device: 1980,
            "temperature": lambda device: 40,
            "power_draw": lambda device: 500_000,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)

    def synchronize(self) -> None:
        if self.broken:
            raise RuntimeError("an illegal memory access was encountered")

    @contextmanager
    def capture(self, graph: Graph, pool: tuple[int, int]) -> Iterator[None]:
        assert pool == (0, 1)
        yield


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> Device:
    return Device(monkeypatch)


def beside_ours(bench: Any, monkeypatch: pytest.MonkeyPatch, **peers: Callable) -> None:
    """Our path, and peers that are ours after something else was called."""

    def maker(before: Callable) -> Callable:
        def make(problem: Any) -> tuple:
            call, parameters = bench.peers.ours(problem)
            return lambda batch: (before(), call(batch))[1], parameters

        return make

    found = [bench.peers.Path(name, maker(before)) for name, before in peers.items()]
    monkeypatch.setattr(bench.measure, "PATHS", (bench.peers.PATHS[0], *found))


def test_graphs_and_memory_are_measured(
    bench: Any, pretended: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wait() -> None:
        if pretended.mode == "error":
            raise RuntimeError("called a synchronizing CUDA operation")

    beside_ours(bench, monkeypatch, good=lambda: None, waits=wait, unlucky=lambda: None)
    cell = bench.problems.cells(quick=True)[2]
    clock = bench.clock.Clock("cpu")
    clock.cuda = True
    rates = {"flops_per_s": 1e12, "bytes_per_s": 1e11}
    given_up = {"graph of unlucky": {"status": "failed", "reason": "said nothing"}}
    heard: list[str] = []
    problem = bench.problems.Problems("cpu").of(cell)
    found = bench.measure.measure(problem, clock, rates, 0.0, given_up, heard.append)
    assert found["state"] == {"mhz": 1980, "celsius": 40, "watts": 500}
    assert found["took"].keys() == {"answers", "eager", "graph"}
    for name, path in found["paths"].items():
        assert path["peak_bytes"] == 250
        assert path["eager"]["host_s"] > 0
        if name in ("fastmoe_rs", "good"):
            assert path["graph"]["median_s"] < path["eager"]["median_s"]
    assert Graph.replays == 2 * (1 + bench.clock.LEAST_TURNS)  # no time for more to warm up
    assert found["paths"]["waits"]["graph"]["reason"] == "RuntimeError: called a synchronizing CUDA operation"
    assert found["paths"]["unlucky"]["graph"]["reason"] == "said nothing"
    assert pretended.mode == "default"
    assert heard == [
        *("fastmoe_rs", "good", "waits", "unlucky", "timing"),
        *("graph of fastmoe_rs", "graph of good", "graph of waits", "timing of graphs"),
    ]


def test_a_lost_device_is_told_with_what_lost_it(
    bench: Any, pretended: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    def break_device() -> None:
        pretended.broken = True
        raise RuntimeError("misaligned address")

    beside_ours(bench, monkeypatch, good=lambda: None, bad=break_device, after=lambda: None)
    sent: list[dict] = []
    bench.worker.work(sent.append, "cpu", bench.problems.cells(quick=True), {}, None, time.time() + 60, True)
    assert sent[-1]["kind"] == "lost"
    assert sent[-1]["doing"] == "bad"
    assert sent[-1]["name"] == "tiny T32 forward"
    assert "misaligned address" in sent[-1]["reason"]


def test_peers_that_tune_themselves_choose_among_few(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(PEERS)
    kernels = importlib.import_module("liger_kernel.ops.fused_moe_kernels")
    products = importlib.import_module("quack.gemm_interface")
    few = bench.peers.few_configurations
    few(kernels, bench.peers.liger_tile)
    few(products, bench.peers.hopper_tile)
    (up,) = kernels._fused_up_proj_swiglu_kernel.configs
    assert (up.kwargs, up.num_stages) == ({"BLOCK_N": 128, "BLOCK_K": 64}, 4)
    (grad,) = kernels._moe_bwd_dW1_kernel.configs
    assert grad.kwargs == {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 32}
    sums = kernels._token_gather_weighted_sum_kernel.configs
    assert [(found.kwargs["BLOCK_K"], found.num_warps) for found in sums] == [(4, 4), (8, 4)]
    tiles = [configuration.kwargs["config"] for configuration in products.gemm_tuned.configs]
    hopper = [(tile.tile_m, tile.tile_n) for tile in tiles if tile.device_capacity == 9]
    assert hopper == [(128, 128), (128, 192), (128, 256)]
    assert len(tiles) == 3 + 8
    few(products, lambda configuration: False)
    assert len(products.gemm_tuned.configs) == 3 + 8


def made_up(name: str, **speeds: float) -> dict:
    """A cell with a floor of 1 ms and paths at shares of its speed; 0 is a path that failed."""

    def times(share: float, host_s: float) -> dict:
        return {"median_s": 1e-3 / share, "tflops": 500 * share, "noise": 0.1, "host_s": host_s}

    paths = {
        path: {"status": "ok", "eager": times(share, 5e-3), "graph": times(share, 0), "peak_bytes": 1 << 30}
        if share
        else {"status": "failed", "reason": "RuntimeError: <no> kernel | image"}
        for path, share in speeds.items()
    }
    return {"kind": "cell", "name": name, "floor_s": 1e-3, "state": {"mhz": 1980}, "paths": paths}


def test_report_draws_shares_of_the_floor(bench: Any) -> None:
    machine = {"kind": "machine", "gpu": "A GPU", "date": "2030-01-01", "cuda": "13.0", "commit": "c"}
    machine["note"] = "It was cut off."
    entries = [
        {**machine, "versions": {"torch": "2.15.0", "triton": None}},
        {"kind": "ceilings", "flops_per_s": 8e14, "bytes_per_s": 4e12},
        made_up("Qwen3-30B-A3B T4096 train", fastmoe_rs=0.5, torch_grouped=0.25, liger=0),
        {"kind": "lost", "name": "OLMoE T1 forward", "doing": "liger", "reason": "said nothing for 120 s"},
        {"kind": "wrong", "name": "OLMoE T8 forward", "reason": "error 1.00e+00 of out"},
        {"kind": "left out", "name": "OLMoE T32 forward", "reason": "the time was used up"},
    ]
    page = bench.report.page(entries)
    assert (
        "| fastmoe_rs | 2 ms ±5%, 250 TFLOP/s, host-bound | 2 ms ±5%, 250 TFLOP/s | 50% | 1024 MiB |" in page
    )
    assert "| liger | failed: RuntimeError: <no> kernel / image |  |  |  |" in page
    assert "; commit c.\n\nIt was cut off.\n" in page
    assert "floor 1 ms; right after the runs 1980 mhz" in page
    for title in ("## Wrong", "## Processes lost", "## Left out"):
        assert title in page
    picture = ElementTree.fromstring(bench.report.svg(entries))
    bars = [element for element in picture.iter() if element.tag.endswith("rect") and "x" in element.attrib]
    assert [float(bar.get("width", 0)) for bar in bars] == [bench.report.WIDTH / 2, bench.report.WIDTH / 4]
    assert float(bars[-1].get("y", 0)) + bench.report.BAR < float(picture.get("height", 0))


@no_gpu
def test_benchmark_of_a_gpu_says_that_there_is_none(bench: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.run.main([]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "no CUDA device" in line


def test_the_readme_gets_a_line_for_each_layer(bench: Any, tmp_path: Path) -> None:
    def cell(shape: str, mode: str, routing: str = "balanced", **speeds: float) -> dict[str, Any]:
        about = {"shape": shape, "tokens": 4096, "mode": mode, "routing": routing}
        return made_up(f"{shape} T4096 {mode}", **speeds) | about

    machine = {"kind": "machine", "gpu": "A GPU", "date": "2030-01-01T00:00", "cuda": "13.0", "commit": "c"}
    entries = [
        {**machine, "versions": {"torch": "2.15.0"}},
        cell("OLMoE", "forward", fastmoe_rs=0.5, torch_grouped=0.25, liger=0.4),
        cell("OLMoE", "train", fastmoe_rs=0.5),
        cell("OLMoE", "train", routing="skewed", fastmoe_rs=0.1),
        cell("Switch", "train", fastmoe_rs=0.25, torch_grouped=0.5),
    ]
    record, readme = tmp_path / "results/run.jsonl", tmp_path / "README.md"
    record.parent.mkdir()
    record.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    readme.write_text("before\n<!-- gpu:start -->\nold\n<!-- gpu:end -->\nafter\n")
    bench.report.main([str(record), "--readme", str(readme)])
    text = readme.read_text()
    assert "| layer | forward, T 4096 | train, T 4096 |" in text
    assert "| OLMoE | 2 ms, 1.25x | 2 ms |" in text
    assert "| Switch |  | 4 ms, 0.50x |" in text
    assert "[All numbers](results/run.md)" in text
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    more = tmp_path / "results/more.jsonl"
    peers = [
        cell("OLMoE", mode, fastmoe_rs=0.5, torch_grouped=0.1, liger=0.1, sonicmoe=speed)
        for mode, speed in (("forward", 0.4), ("train", 0.25))
    ]
    more.write_text("".join(json.dumps(entry) + "\n" for entry in peers))
    bench.report.main([str(record), "--readme", str(readme), "--beside", str(more)])
    text = readme.read_text()
    assert "[on fewer layers](results/more.md) on an unknown machine (OLMoE T4096 forward, OLMoE T" in text
    assert ": `sonicmoe` 1.25 to 2.00." in text
    readme.write_text("no marks")
    with pytest.raises(SystemExit, match="gpu:start"):
        bench.report.main([str(record), "--readme", str(readme)])

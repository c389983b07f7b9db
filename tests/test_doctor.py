"""`python -m fastmoe_rs doctor` finds what is wrong and says what to do."""

import json
import os
import subprocess
import sys

import pytest
import torch

from fastmoe_rs import __version__, _native, doctor, functional
from fastmoe_rs.cli import main

NAMES = [
    "version",
    "wheel",
    "torch",
    "cpu features",
    "cpu kernels",
    "threads",
    "dlpack table",
    "transformers",
    "torch cuda",
    "cuda driver",
    "cuda kernels",
    "self-test float32",
    "self-test bfloat16",
]


def row(rows, name):
    return next(row for row in rows if row.name == name)


def test_json_has_every_row_and_a_healthy_machine_exits_with_0(capsys):
    status = main(["doctor", "--json"])
    diagnosis = json.loads(capsys.readouterr().out)
    assert status == 0
    assert diagnosis["ok"] is True
    assert [entry["name"] for entry in diagnosis["rows"]] == NAMES
    for entry in diagnosis["rows"]:
        assert set(entry) == {"name", "status", "value", "remedy"}
        assert entry["status"] in ("green", "yellow")
        assert entry["value"]
        assert bool(entry["remedy"]) == (entry["status"] != "green"), entry
    assert __version__ in diagnosis["rows"][0]["value"]


def test_text_has_every_row(capsys):
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name in NAMES:
        assert any(name in line for line in lines), name
    assert not any("\033" in line for line in lines), "no colours outside a terminal"


def test_wrong_results_are_red_with_a_remedy(monkeypatch, capsys):
    right = functional.moe_mlp
    monkeypatch.setattr(functional, "moe_mlp", lambda *inputs: right(*inputs) * 1.01)
    assert main(["doctor"]) == 1
    wrong = row(doctor.examine(), "self-test float32")
    assert wrong.status == "red"
    assert "FASTMOE_CPU_ISA=portable" in wrong.remedy
    assert wrong.remedy in capsys.readouterr().out


def test_unknown_instruction_set_is_red_with_a_remedy():
    environment = {**os.environ, "FASTMOE_CPU_ISA": "nonsense"}
    command = [sys.executable, "-m", "fastmoe_rs", "doctor", "--json"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 1, result.stderr
    rows = [doctor.Row(**entry) for entry in json.loads(result.stdout)["rows"]]
    kernels = row(rows, "cpu kernels")
    assert kernels.status == "red"
    assert "nonsense" in kernels.value
    assert "portable" in kernels.value, "the available ones are listed"
    assert "FASTMOE_CPU_ISA" in kernels.remedy
    assert [entry.name for entry in rows if entry.status == "red"] == ["cpu kernels"], (
        "one cause, one red row"
    )


def test_missing_torch_is_red_and_the_rest_still_runs(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    rows = doctor.examine()
    assert row(rows, "torch").status == "red"
    assert "pip install" in row(rows, "torch").remedy
    assert row(rows, "cpu features").status == "green"
    assert row(rows, "self-test float32").status == "yellow"


def test_old_torch_is_red(monkeypatch):
    monkeypatch.setattr("torch.__version__", "2.5.1+cpu")
    assert row(doctor.examine(), "torch").status == "red"


def test_too_many_threads_are_yellow(monkeypatch):
    monkeypatch.setattr(doctor, "usable_cpus", lambda: 0)
    threads = row(doctor.examine(), "threads")
    assert threads.status == "yellow"
    assert "set_num_threads" in threads.remedy


@pytest.mark.parametrize("version", ["4.57.6", None])
def test_missing_or_old_transformers_is_yellow(version, monkeypatch):
    def installed(name):
        if version is None:
            raise doctor.importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(doctor.importlib.metadata, "version", installed)
    found = doctor.check_transformers("transformers")
    assert found.status == "yellow"
    assert "pip install" in found.remedy


def test_a_check_that_breaks_is_a_red_row(monkeypatch):
    def broken(name):
        raise OSError("no such thing")

    monkeypatch.setattr(doctor, "check_dlpack", broken)
    found = row(doctor.examine(), "dlpack table")
    assert found.status == "red"
    assert "no such thing" in found.value
    assert found.remedy


H200 = {"name": "NVIDIA H200", "capability": (9, 0), "multiprocessors": 132, "shared_bytes": 227 << 10}


class TestGpus:
    """The rows of GPUs that this machine need not have."""

    @pytest.fixture
    def machine(self, monkeypatch):
        """Puts devices, an error of the driver, or images into the native module's answers."""

        def put(devices=(H200,), error=None, archs=("90a",), families=("sm80_up",)):
            def cuda_info():
                if error:
                    raise RuntimeError(error)
                return {"version": (13, 0), "devices": list(devices)}

            def images(capability=None):
                return [
                    {"family": family, "arch": arch, "bytes": 1000, "kernels": [{"name": family}]}
                    for arch in archs
                    for family in families
                ]

            monkeypatch.setattr(_native, "cuda_info", cuda_info)
            monkeypatch.setattr(_native, "images", images)
            monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

        return put

    def test_a_gpu_has_a_row_with_image_and_kernels(self, machine):
        machine()
        found = row(doctor.examine(), "gpu 0")
        assert found.status == "green"
        for part in (
            "NVIDIA H200, 9.0",
            "image 90a",
            "kernels of Ampere",
            "none with the instructions of 9.0",
        ):
            assert part in found.value
        assert found.value.endswith("tiles up to 128x256")
        assert row(doctor.examine(), "cuda driver").value.endswith("CUDA 13.0, 1 device")
        assert row(doctor.examine(), "cuda kernels").value == "1 kernel in 0.0 MB of images for 90a"

    @pytest.mark.parametrize(
        ("text", "version"),
        [
            ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05 ", "535.104.05, "),
            ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release", "580.95.05, "),
            ("", ""),
        ],
    )
    def test_the_release_of_the_driver(self, machine, monkeypatch, text, version):
        machine((H200, H200), archs=("100f", "80", "ptx", "90a"))
        monkeypatch.setattr(doctor, "read", lambda path: text)
        assert doctor.check_driver("").value == f"{version}CUDA 13.0, 2 devices"
        assert doctor.check_images("").value.endswith("images for 80, 90a, 100f, ptx")

    def test_kernels_of_its_own(self, machine):
        machine(families=("sm80_up", "sm90_up"))
        assert "kernels of its own (sm90_up), tiles" in row(doctor.examine(), "gpu 0").value

    def test_little_shared_memory_is_why_tiles_are_smaller(self, machine):
        machine(
            [{**H200, "name": "NVIDIA L40S", "capability": (8, 9), "shared_bytes": 99 << 10}], archs=("80",)
        )
        found = row(doctor.examine(), "gpu 0").value
        assert "tiles up to 128x128 (not 128x256: a block has 99 KB of shared memory)" in found

    def test_code_that_the_driver_compiles_is_yellow(self, machine):
        machine([{**H200, "capability": (8, 7)}], archs=("ptx",))
        found = row(doctor.examine(), "gpu 0")
        assert found.status == "yellow"
        assert "compiles it" in found.remedy

    def test_a_gpu_that_is_too_old_is_yellow(self, machine):
        machine([{**H200, "name": "Tesla T4", "capability": (7, 5)}])
        found = row(doctor.examine(), "gpu 0")
        assert found.status == "yellow"
        assert "8.0 (Ampere)" in found.remedy

    def test_a_gpu_without_any_image_is_red(self, machine):
        machine(archs=())
        rows = doctor.examine()
        assert row(rows, "gpu 0").status == row(rows, "cuda kernels").status == "red"
        assert "FASTMOE_CUDA_ARCHS=all" in row(rows, "gpu 0").remedy
        assert "nvcc" in row(rows, "cuda kernels").remedy

    def test_a_torch_that_does_not_see_the_gpu_is_yellow(self, machine):
        machine()
        found = row(doctor.examine(), "torch cuda")
        assert found.status == "yellow"
        assert "pytorch.org" in found.remedy

    @pytest.mark.parametrize(
        ("error", "value", "remedy"),
        [
            ("CUDA: the driver is too old: it supports CUDA 12.4", "supports CUDA 12.4", "580 or newer"),
            ("CUDA: the driver has no cuInit; please update it", "has no cuInit", "please update it"),
        ],
    )
    def test_a_driver_that_does_not_work_is_red(self, machine, error, value, remedy):
        machine(error=error)
        found = row(doctor.examine(), "cuda driver")
        assert found.status == "red"
        assert value in found.value
        assert remedy in found.remedy
        assert not any(row.name.startswith("gpu") for row in doctor.examine())

    def test_no_driver_is_no_fault(self, machine):
        machine(error="CUDA: no NVIDIA driver on this machine (libcuda.so.1); install one")
        assert row(doctor.examine(), "cuda driver").status == "green"

    def test_results_of_a_gpu_are_tested_on_it(self, machine, monkeypatch):
        """With "meta" in the place of the GPU: no result is right there."""
        machine()
        monkeypatch.setattr(doctor, "usable_gpus", lambda: ["meta"])
        found = row(doctor.examine(), "self-test bfloat16 on meta")
        assert found.status == "red"

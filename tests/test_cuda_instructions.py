"""The inline assembly of cuda/ptx compiles to the machine code of NVIDIA's own headers."""

import re

import pytest

import sass
import toolkit

# The instructions that those headers have no function for, and what makes them up.
ALONE = {
    "exp2_approx": "MUFU.EX2",
    "rcp_approx": "MUFU.RCP",
    "tanh_approx": "MUFU.TANH",
    "load_streaming": r"LDG.E.128\S*.CONSTANT|LDG.E\S*.NA\S*.128\S*.CONSTANT",
    "cp_async_16_of_256": r"LDGSTS.E.BYPASS.LTC256B.128",
}
DEVICE = toolkit.CUDA / "ptx" / "device"
SOURCE = toolkit.CUDA / "oracle" / "same_code.cu"


@pytest.fixture(scope="module")
def functions(tmp_path_factory, cuda_tools):
    cubin = tmp_path_factory.mktemp("cuda") / "same_code.cubin"
    includes = [f"-I{path}" for path in (toolkit.CUDA, toolkit.CUTLASS)]
    flags = ["-std=c++17", "-diag-suppress=554", "-DCUTLASS_ENABLE_GDC_FOR_SM90"]
    toolkit.run(toolkit.NVCC, "-cubin", "-arch=sm_90a", *flags, *includes, "-o", cubin, SOURCE)
    return sass.disassemble(cubin)


def text(function):
    return "\n".join(map(str, function.code))


def test_ours_is_theirs(functions):
    names = [name.removeprefix("ours_") for name in functions if name.startswith("ours_")]
    assert len(names) > 50
    different = {
        name: f"ours:\n{text(functions[f'ours_{name}'])}\ntheirs:\n{text(functions[f'theirs_{name}'])}"
        for name in names
        if text(functions[f"ours_{name}"]) != text(functions[f"theirs_{name}"])
    }
    assert not different, "\n".join(f"{name}, {both}" for name, both in different.items())


def test_the_comparison_tells_instructions_apart(functions):
    ours = [text(function) for name, function in functions.items() if name.startswith("ours_")]
    assert len(set(ours)) == len(ours)


@pytest.mark.parametrize("name", ALONE)
def test_without_a_counterpart(functions, name):
    assert re.search(ALONE[name], text(functions[f"alone_{name}"])), text(functions[f"alone_{name}"])


def test_every_instruction_is_compared():
    compared = SOURCE.read_text()
    functions = [f for header in DEVICE.glob("*.cuh") for f in re.split(r"\bPTX_D\b", header.read_text())]
    names = {re.search(r"(\w+)(<[^()]*>)?\(", function)[1] for function in functions if "asm" in function}
    assert {"mma", "cp_async", "bar_sync"} < names
    assert {name for name in names if f"ptx::{name}" not in compared} == set()

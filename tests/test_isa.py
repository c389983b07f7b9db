"""Every instruction set of this machine computes what the reference does; each in its own process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastmoe_rs import _native

PARITY = """
import sys
import torch
from moe_cases import DTYPES, assert_matches_reference, assert_near, mlp_case
from fastmoe_rs import _native, functional, reference

assert _native.cpu_info()["isa"] == sys.argv[1], _native.cpu_info()["isa"]
torch.set_num_threads(1)
for dtype in DTYPES:
    for activation, bias, transposed, interleaved in [
        ("swiglu", False, False, False),
        ("swiglu_oai", True, True, True),
        ("geglu", True, False, True),
        ("geglu_tanh", False, True, False),
        ("gelu", True, False, False),
        ("relu2", False, True, False),
    ]:
        for tokens, hidden, intermediate, experts, top_k in [(3, 31, 7, 6, 4), (150, 72, 96, 5, 2)]:
            torch.manual_seed(tokens)
            arguments, options = mlp_case(
                tokens, hidden, intermediate, experts, top_k, dtype=dtype, activation=activation,
                bias=bias, transposed=transposed, interleaved=interleaved,
            )
            assert_matches_reference(functional.moe_mlp, reference.moe_mlp, arguments, options)
    logits = torch.randn(50, 67).to(dtype)
    for score in ("softmax", "sigmoid"):
        ours, wanted = (m.route(logits, 8, score=score) for m in (functional, reference))
        assert torch.equal(ours.ids, wanted.ids)
        assert_near(ours.scores, wanted.scores.double())
"""

# Gradients that go past the caches, of experts without rows, with few and with many.
LARGE_GRADIENTS = """
import torch
from moe_cases import DTYPES, assert_near
from fastmoe_rs import functional

offsets = [0, 0, 5, 5, 5, 205, 205, 206, 206]
for dtype in DTYPES:
    for columns in (1024, 1000):
        x, grad = torch.randn(206, columns).to(dtype), torch.randn(206, 2176).to(dtype)
        w = torch.zeros(8, 2176, columns, dtype=dtype, requires_grad=True)
        functional.grouped_mm(x, w, torch.tensor(offsets)).backward(grad)
        for expert, rows in enumerate(map(slice, offsets, offsets[1:])):
            expected = grad[rows].double().T @ x[rows].double()
            assert_near(w.grad[expert], expected, what=f"{dtype}, {columns} columns, expert {expert}")
"""


def run(isa, script=PARITY):
    environment = os.environ | {"FASTMOE_CPU_ISA": isa, "PYTHONPATH": str(Path(__file__).parent)}
    command = [sys.executable, "-c", script, isa]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("script", [PARITY, LARGE_GRADIENTS], ids=["parity", "large gradients"])
@pytest.mark.parametrize("isa", _native.cpu_info()["available"])
def test_matches_the_reference(isa, script):
    result = run(isa, script)
    assert result.returncode == 0, result.stderr


def test_unknown_name_says_what_there_is():
    result = run("mmx")
    assert result.returncode != 0
    assert "FASTMOE_CPU_ISA" in result.stderr
    for isa in _native.cpu_info()["available"]:
        assert isa in result.stderr

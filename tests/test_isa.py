"""Every instruction set of this machine computes what the reference does; each in its own process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastmoe_rs import _native
from native_cases import python

PARITY = """
import sys
import torch
from moe_cases import DTYPES, assert_matches_reference, assert_near, mlp_case
from fastmoe_rs import _native, functional, reference

# One or two rows an expert, more, and as many as some instruction sets have kernels of their own for.
SIZES = [(3, 31, 7, 6, 4), (150, 72, 96, 5, 2), (420, 40, 72, 5, 2)]

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
        for tokens, hidden, intermediate, experts, top_k in SIZES:
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

# Gradients of experts without rows, with few and with many. Those of a second step, whose memory is not new,
# go past the caches.
LARGE_GRADIENTS = """
import torch
from moe_cases import DTYPES, assert_near
from fastmoe_rs import functional

offsets = [0, 0, 5, 5, 5, 205, 205, 206, 206]
for dtype in DTYPES:
    for columns in (1024, 1000):
        x, grad = torch.randn(206, columns).to(dtype), torch.randn(206, 2176).to(dtype)
        w = torch.zeros(8, 2176, columns, dtype=dtype, requires_grad=True)
        for step in range(2):
            w.grad = None
            functional.grouped_mm(x, w, torch.tensor(offsets)).backward(grad)
            for expert, rows in enumerate(map(slice, offsets, offsets[1:])):
                expected = grad[rows].double().T @ x[rows].double()
                what = f"{dtype}, {columns} columns, step {step}, expert {expert}"
                assert_near(w.grad[expert], expected, what=what)
"""

# Also where float32 is multiplied as a sum of narrower numbers, no bit of it may be lost.
FLOAT32 = """
import torch
from fastmoe_rs import functional

torch.manual_seed(0)
x, w, grad = torch.randn(600, 3584), torch.randn(2, 256, 3584) / 60, torch.randn(600, 256)
for scale in (1.0, 2.0**-90, 2.0**90):
    scaled, leaf = x * scale, w.clone().requires_grad_()
    out = functional.grouped_mm(scaled, leaf, torch.tensor([0, 300, 600]))
    out.backward(grad)
    for expert, rows in enumerate((slice(0, 300), slice(300, 600))):
        for got, wanted in (
            (out[rows], scaled[rows].double() @ w[expert].double().T),
            (leaf.grad[expert], grad[rows].double().T @ scaled[rows].double()),
        ):
            error = ((got.double() - wanted).norm() / wanted.norm()).item()
            assert error < 5e-7, (scale, expert, error)
"""


@pytest.mark.parametrize(
    "script", [PARITY, LARGE_GRADIENTS, FLOAT32], ids=["parity", "large gradients", "float32"]
)
@pytest.mark.parametrize("isa", _native.cpu_info()["available"])
def test_matches_the_reference(isa, script):
    environment = os.environ | {"FASTMOE_CPU_ISA": isa, "PYTHONPATH": str(Path(__file__).parent)}
    command = [sys.executable, "-c", script, isa]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_cpu_info():
    info = _native.cpu_info()
    assert info["isa"] in info["available"]
    assert "portable" in info["available"]
    assert set(info["kernels"]) == {"float32", "float64", "bfloat16", "float16"}
    assert info["threads_pool"] in {"openmp", "rayon"}


@pytest.mark.parametrize("isa", _native.cpu_info()["available"])
def test_forced_isa(isa):
    code = "from fastmoe_rs import _native; print(_native.cpu_info()['isa'])"
    assert python(code, FASTMOE_CPU_ISA=isa) == isa


@pytest.mark.cpu_only(reason="about the instruction set of the CPU")
@pytest.mark.parametrize(
    "use",
    [
        "_native.cpu_info()",
        "import numpy as np; x = np.ones((1, 1), np.float32); "
        "_native.permute(x, np.zeros(1, np.int32), x.copy(), threads=1)",
    ],
)
def test_unknown_isa(use):
    error = python(f"from fastmoe_rs import _native; {use}", FASTMOE_CPU_ISA="quantum")
    available = ", ".join(_native.cpu_info()["available"])
    assert error == f"ValueError: FASTMOE_CPU_ISA: got 'quantum', wanted one of {available}"

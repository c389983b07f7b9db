"""One training step of the layer through the CUDA kernels and through the CPU backend, number by number."""

import os
import subprocess
import sys

import pytest
import torch

from fastmoe_rs import RoutingPlan, functional
from moe_cases import TOLERANCES

T, H, I, E, K = 70, 40, 24, 6, 2
DTYPES = {
    str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.bfloat16, torch.float16)
}
PLAN = ("gather", "inverse", "offsets", "counts")


def step(dtype):
    """Everything that a step computes, from the router's logits on; expert 5 is never chosen."""
    random = torch.Generator().manual_seed(5)

    def draw(*shape, scale=1.0):
        return (torch.randn(shape, generator=random) * scale).to(dtype).requires_grad_()

    logits, x = draw(T, E), draw(T, H)
    weights = {"w1": (E, 2 * I, H), "w2": (E, H, I), "b1": (E, 2 * I), "b2": (E, H)}
    parameters = {name: draw(*shape, scale=0.2) for name, shape in weights.items()}
    bias = torch.tensor([0.0] * (E - 1) + [-9.0])
    routed = functional.route(logits, K, score="sigmoid", renormalize=True, scale=2.5, bias=bias)
    plan = RoutingPlan.from_ids(routed.ids, E)
    w1, w2 = parameters.pop("w1"), parameters.pop("w2")
    out = functional.moe_mlp(x, routed.ids, routed.weights, w1, w2, **parameters)
    direction = torch.randn(out.shape, generator=random).to(dtype)
    inputs = {"logits": logits, "x": x, "w1": w1, "w2": w2, **parameters}
    grads = torch.autograd.grad(out, inputs.values(), direction)
    exact = {**routed._asdict(), **{name: getattr(plan, name) for name in PLAN}}
    near = {"out": out, **{f"gradient of {name}": grad for name, grad in zip(inputs, grads, strict=True)}}
    return [{name: tensor.detach() for name, tensor in tensors.items()} for tensors in (exact, near)]


@pytest.mark.emulated_only(reason="compares the emulated GPU with the CPU backend")
@pytest.mark.parametrize("name", DTYPES)
def test_a_step_is_that_of_the_cpu_backend(name, tmp_path):
    """Routing and plan to the bit; outputs and gradients, added in another order, up to rounding."""
    away = ("FASTMOE_BACKEND", "FASTMOE_EMULATOR", "FASTMOE_CHECK", "PYTHONPATH")
    plain = {key: value for key, value in os.environ.items() if key not in away}
    subprocess.run([sys.executable, __file__, name, tmp_path / "step.pt"], env=plain, check=True)
    (exact, near), (exact_wanted, near_wanted) = step(DTYPES[name]), torch.load(tmp_path / "step.pt")
    assert exact_wanted["counts"].count_nonzero() == E - 1
    for what, tensor in exact.items():
        torch.testing.assert_close(tensor, exact_wanted[what], rtol=0, atol=0)
    for what, tensor in near.items():
        wanted = near_wanted[what].double()
        error = (tensor.double() - wanted).abs().max() / wanted.abs().max()
        assert error <= TOLERANCES[DTYPES[name]] / 3, f"{what}: {error:.1e}"


if __name__ == "__main__":
    dtype, file = sys.argv[1:]
    torch.save(step(DTYPES[dtype]), file)

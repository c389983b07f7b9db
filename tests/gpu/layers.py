"""A layer on the device under test: its inputs, and all that it computes."""

from dataclasses import dataclass

import torch

from fastmoe_rs import functional


@dataclass
class Layer:
    """Router and experts with leaves that require grad."""

    x: torch.Tensor
    logits: torch.Tensor
    w1: torch.Tensor
    w2: torch.Tensor
    grad_out: torch.Tensor
    top_k: int

    def forward(self):
        routing = functional.route(self.logits, self.top_k, renormalize=True)
        return functional.moe_mlp(self.x, routing.ids, routing.weights, self.w1, self.w2)

    def step(self):
        """Output, and gradients of x, logits, w1 and w2."""
        out = self.forward()
        return (out.detach(), *torch.autograd.grad(out, self.leaves, self.grad_out))

    @property
    def leaves(self):
        return self.x, self.logits, self.w1, self.w2

    def redraw(self, seed):
        """Other tokens, routed otherwise, in the same memory."""
        generator = torch.Generator(self.x.device).manual_seed(seed)
        with torch.no_grad():
            for tensor in (self.x, self.logits, self.grad_out):
                tensor.normal_(generator=generator)


def layer(device, tokens=64, hidden=64, intermediate=96, experts=8, top_k=2, dtype=torch.bfloat16):
    def draw(*shape, dtype=dtype):
        return torch.randn(shape, device=device).mul(shape[-1] ** -0.5).to(dtype).requires_grad_()

    return Layer(
        x=draw(tokens, hidden),
        logits=draw(tokens, experts, dtype=torch.float32),
        w1=draw(experts, 2 * intermediate, hidden),
        w2=draw(experts, hidden, intermediate),
        grad_out=draw(tokens, hidden).detach(),
        top_k=top_k,
    )


def assert_same_bits(results, expected):
    for index, (result, want) in enumerate(zip(results, expected, strict=True)):
        assert torch.equal(result, want), f"result {index} differs"

"""Expert MLPs as modules: E routed ones, and the shared one that every token goes through.

Legend: T tokens, H hidden size, I intermediate size, E experts, K experts per token, S shared experts.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import _check, functional
from .plan import RoutingPlan
from .reference import GATED, UNGATED
from .routers.base import uniform_


class Experts(nn.Module):
    """E gated MLPs: the weights that `functional.moe_mlp` takes.

    Args:
        hidden_size: H.
        intermediate_size: I.
        num_experts: E.
        activation: see `functional.moe_mlp`.
        bias: give both products of every expert a bias.

    Parameters: w1 [E, 2I, H] ([E, I, H] when the activation has no gate), w2 [E, H, I]; with a bias b1
    [E, 2I] and b2 [E, H].
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        *,
        activation: str = "swiglu",
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check.positive(hidden_size=hidden_size, intermediate_size=intermediate_size, num_experts=num_experts)
        width = _width(activation, intermediate_size)
        self.activation = activation

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(num_experts, *shape, device=device, dtype=dtype))

        self.w1 = parameter(width, hidden_size)
        self.w2 = parameter(hidden_size, intermediate_size)
        self.b1 = parameter(width) if bias else None
        self.b2 = parameter(hidden_size) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights of every expert as `nn.Linear` does; biases are 0."""
        uniform_(self.w1)
        uniform_(self.w2)
        for bias in (self.b1, self.b2):
            if bias is not None:
                nn.init.zeros_(bias)

    def forward(
        self, x_TH: Tensor, ids_TK: Tensor | None, weights_TK: Tensor, plan: RoutingPlan | None = None
    ) -> Tensor:
        """[T, H]; see `functional.moe_mlp`."""
        return functional.moe_mlp(
            x_TH,
            ids_TK,
            weights_TK,
            self.w1,
            self.w2,
            b1=self.b1,
            b2=self.b2,
            activation=self.activation,
            plan=plan,
        )

    def extra_repr(self) -> str:
        experts, hidden, intermediate = self.w2.shape
        return (
            f"{hidden}, {intermediate}, {experts}, activation={self.activation!r}, bias={self.b1 is not None}"
        )


class SharedExpert(nn.Module):
    """The dense MLP that every token goes through, with the activation and layout of an expert.

    Args:
        hidden_size: H.
        intermediate_size: I.
        activation: see `functional.moe_mlp`.

    Parameters: w1 [2I, H] ([I, H] when the activation has no gate), w2 [H, I].
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        *,
        activation: str = "swiglu",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check.positive(hidden_size=hidden_size, intermediate_size=intermediate_size)
        self.activation = activation
        width = _width(activation, intermediate_size)
        self.w1 = nn.Parameter(torch.empty(width, hidden_size, device=device, dtype=dtype))
        self.w2 = nn.Parameter(torch.empty(hidden_size, intermediate_size, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights as `nn.Linear` does."""
        uniform_(self.w1)
        uniform_(self.w2)

    def forward(self, x_TH: Tensor, weights_TS: Tensor | None = None) -> Tensor:
        """[T, H] to [T, H]; with weights [T, S] that of S experts which share the hidden units evenly.

        Raises:
            ValueError: S does not divide I.
        """
        hidden_TI = functional.activate(F.linear(x_TH, self.w1), self.activation)
        if weights_TS is not None:
            if hidden_TI.shape[1] % weights_TS.shape[1]:
                wanted = f"[T, S] with S a divisor of the {hidden_TI.shape[1]} hidden units"
                _check.wanted("weights", f"shape {tuple(weights_TS.shape)}", wanted)
            parts = hidden_TI.unflatten(1, (weights_TS.shape[1], -1))
            hidden_TI = (parts * weights_TS[:, :, None].to(parts.dtype)).flatten(1)
        return F.linear(hidden_TI, self.w2)

    def extra_repr(self) -> str:
        hidden, intermediate = self.w2.shape
        return f"{hidden}, {intermediate}, activation={self.activation!r}"


def _width(activation: str, intermediate_size: int) -> int:
    _check.one_of("activation", activation, GATED + UNGATED)
    return 2 * intermediate_size if activation in GATED else intermediate_size

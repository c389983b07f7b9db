"""The plain router: a linear layer that gives logits, and a choice of experts by them; and what routers tell.

Legend: T tokens, H hidden size, E experts, K experts per token, S shared experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import _check, functional, routing
from ..functional import Routing
from ..routing.noise import Seed

# Options of `functional.route` that weights depend on, not only the choice.
WEIGHING = ("score", "order", "renormalize", "scale", "renormalize_eps", "softcap")
GROUPS = ("n_group", "topk_group", "group_score", "group_losers")
# Options that act on the logits, whatever is made of them, and where the weights lie.
_PROJECTING = ("jitter", "logit_noise", "bias", "device", "dtype")
_OPTIONS = ("jitter", "logit_noise", "bias", "selection_bias", "expert_scale", *WEIGHING, *GROUPS)


class RouterOutput(NamedTuple):
    """What a router decided.

    Attributes:
        ids: int64 [T, K], the experts that tokens ask for; one outside [0, E) is a route without an expert.
        weights: [T, K] in float32 or float64.
        scores: [T, E] in float32 or float64.
        logits: [T, E].
        seats: `ids` with -1 for what a capacity refuses; None where nothing is refused.
        load: [T, E], for `losses.load_loss`; None from a router without it.
        shared_weights: [T, S], the weights of S shared experts; None where the router does not weigh them.
    """

    ids: Tensor
    weights: Tensor
    scores: Tensor
    logits: Tensor
    seats: Tensor | None = None
    load: Tensor | None = None
    shared_weights: Tensor | None = None

    @classmethod
    def of(cls, output: RouterOutput | Routing) -> RouterOutput:
        """The output of any router; logits that it does not tell are the logarithms of its scores.

        Raises:
            TypeError: `output` is neither of the two.
        """
        if isinstance(output, RouterOutput):
            return output
        if not isinstance(output, Routing):
            what = "a functional.Routing(ids, weights, scores) or a RouterOutput"
            _check.wanted("router", f"an output of type {type(output).__name__}", what, TypeError)
        tiny = torch.finfo(output.scores.dtype).tiny
        return cls(*output, output.scores.clamp(min=tiny).log())


class Router(nn.Module):
    """Picks the K experts that score best.

    Args:
        hidden_size: H.
        num_experts: E.
        top_k: K.
        jitter: in training, the input is multiplied by noise from [1 - jitter, 1 + jitter] (Switch
            Transformers, arXiv:2101.03961, section 2.2).
        logit_noise: standard deviation of noise that training adds to the logits; 1 / E in V-MoE
            (arXiv:2106.05974).
        bias: add a learned bias [E] to the logits, as gpt-oss does.
        selection_bias: keep a buffer `selection_bias` [E], zeros at first, added for the choice of experts
            only. It has no gradient; `balance` moves it. It stays in float32 when the module is cast.
        expert_scale: learn a factor for the weights of every expert, as Gemma 4 does.
        options: score, order, renormalize, scale, n_group and so on, see `functional.route`.

    Logits are computed in the wider dtype of x and the weight: `moe.router.float()` routes in float32 in a
    bfloat16 model, as Switch Transformers and most models after it do.

    Attributes:
        seed: decides the noise of routers that have some, see `routing.noise`; None for torch's generator.
    """

    selection_bias: Tensor | None
    rows: Any = None  # a method of routers whose ids have room for more than they use

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        *,
        jitter: float = 0.0,
        logit_noise: float = 0.0,
        bias: bool = False,
        selection_bias: bool = False,
        expert_scale: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        _check.positive(hidden_size=hidden_size, num_experts=num_experts)
        _check.whole("top_k", top_k)
        for name in options:
            _check.one_of("options", name, _OPTIONS, TypeError)
        functional.route(torch.empty(0, num_experts, device="meta"), top_k, **options)  # says what is wrong
        if not 0 <= jitter < 1:
            _check.wanted("jitter", jitter, "at least 0 and less than 1")
        if not 0 <= logit_noise < math.inf:
            _check.wanted("logit_noise", logit_noise, "a finite number of at least 0")
        self.top_k, self.jitter, self.logit_noise, self.options = top_k, jitter, logit_noise, options
        self.seed: Seed = None
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size, device=device, dtype=dtype))

        def per_expert(wanted: bool) -> nn.Parameter | None:
            return nn.Parameter(torch.empty(num_experts, device=device, dtype=dtype)) if wanted else None

        self.bias, self.expert_scale = per_expert(bias), per_expert(expert_scale)
        self.register_buffer(
            "selection_bias",
            torch.empty(num_experts, device=device, dtype=torch.float32) if selection_bias else None,
        )
        Router.reset_parameters(self)

    def reset_parameters(self) -> None:
        """Draw the weight as `nn.Linear` does; biases are 0, scales 1."""
        uniform_(self.weight)
        for bias in (self.bias, self.selection_bias):
            if bias is not None:
                nn.init.zeros_(bias)
        if self.expert_scale is not None:
            nn.init.ones_(self.expert_scale)

    def forward(self, x_TH: Tensor, ids_TK: Tensor | None = None, **inputs: Any) -> RouterOutput:
        """Route x [T, H]; with `ids_TK`, weigh these experts instead of choosing. `inputs` go to `choose`."""
        _check.like("x", x_TH, "the weight", self.weight, dtype=False)
        if self.jitter and self.training:
            x_TH = routing.input_jitter(x_TH, self.jitter, seed=self.seed)
        logits_TE = self.project(x_TH)
        if self.logit_noise and self.training:
            logits_TE = routing.logit_noise(logits_TE, self.logit_noise, seed=self.seed)
        if ids_TK is None:
            return self.choose(logits_TE, x_TH, **inputs)
        return self.chosen(logits_TE, x_TH, ids_TK)

    def project(self, x_TH: Tensor) -> Tensor:
        """The logits [T, E]."""
        return linear(x_TH, self.weight, self.bias)

    def choose(self, logits_TE: Tensor, x_TH: Tensor) -> RouterOutput:
        """Pick experts: what subclasses do in other ways."""
        picked = functional.route(
            logits_TE, self.top_k, **self.options, bias=self.selection_bias, expert_scale=self.expert_scale
        )
        return RouterOutput(*picked, logits_TE)

    def chosen(self, logits_TE: Tensor, x_TH: Tensor, ids_TK: Tensor) -> RouterOutput:
        """The output for experts that are given."""
        options = {name: self.options[name] for name in WEIGHING if name in self.options}
        weighed = routing.route_given(logits_TE, ids_TK, **options, expert_scale=self.expert_scale)
        return RouterOutput(*weighed, logits_TE)

    def balance(self, routes_E: Tensor, *, rate: float = 1e-3, group: Any = None) -> None:
        """Move the selection bias against the load: `routing.update_selection_bias`, once an optimizer step.

        Args:
            routes_E: routes that asked for every expert in this step, such as `RoutingStats.routes` or
                `MoE.stats().routes`.
            rate, group: see there.

        Raises:
            ValueError: the router has no selection bias.
        """
        if self.selection_bias is None:
            _check.wanted("selection_bias", "a router without one", "Router(..., selection_bias=True)")
        routing.update_selection_bias(self.selection_bias, routes_E, rate=rate, group=group)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Router:
        """Moves the selection bias but keeps its dtype: in bfloat16 the steps of `balance` would be lost."""
        before = self.selection_bias
        super()._apply(fn, recurse)
        after = self.selection_bias
        if before is not None and after is not None and after.dtype != before.dtype:
            self.selection_bias = before.to(after.device)
        return self

    def extra_repr(self) -> str:
        experts, hidden = self.weight.shape
        switches = {
            name: True
            for name in ("bias", "selection_bias", "expert_scale")
            if getattr(self, name) is not None
        }
        shown = {"top_k": self.top_k, **self.options, "jitter": self.jitter, **switches}
        return ", ".join([f"{hidden}, {experts}", *(f"{name}={value!r}" for name, value in shown.items())])


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear` in the wider dtype of x and weight."""
    if x.dtype != weight.dtype:
        dtype = torch.promote_types(x.dtype, weight.dtype)
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    return F.linear(x, weight, bias)


def uniform_(weight: Tensor) -> None:
    """Between -1 and 1 over the square root of the inputs, the default of `nn.Linear`."""
    bound = weight.shape[-1] ** -0.5
    nn.init.uniform_(weight, -bound, bound)


def only(options: dict[str, Any], *names: str) -> None:
    """Refuse options of `Router` that a subclass would leave out of account, always or but for replays."""
    for name, value in options.items():
        if name not in (*names, *_PROJECTING):
            known = ", ".join([*names, *_PROJECTING])
            _check.wanted(name, repr(value), f"only options that this router has: {known}")

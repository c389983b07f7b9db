"""The kernels as differentiable operators.

Each operator exists twice with one meaning. Eager code runs an `autograd.Function` around the kernel, the
shortest way there. Whatever has to see operators (torch.compile, torch.jit.trace, dispatch modes, tensor
subclasses, devices without memory) gets `torch.ops.fastmoe_rs`, with fake kernels. Both share the two
functions that say what to save and how to differentiate; only the expert MLP, the hottest, has a
`direct_mlp` of its own for eager code, which makes the plan of ids in the same native call.

Legend: T tokens, E experts, K experts per token, R routed rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from . import kernels, main_grad

_LIBRARY = torch.library.Library("fastmoe_rs", "DEF")
_PLAIN = frozenset({bool, int, float, str, tuple, list})

Setup = Callable[[Any, tuple[Any, ...], Any], None]
Backward = Callable[..., tuple[Any, ...]]


def _operator(
    schema: str, setup: Setup | None = None, backward: Backward | None = None
) -> Callable[..., Any]:
    """Define `torch.ops.fastmoe_rs.<name>` for the kernel of that name and return the function to call."""
    name = schema.partition("(")[0]
    kernel = getattr(kernels, name)

    def implementation(*args: Any) -> Any:
        result = kernel(*args)
        if isinstance(result, tuple):  # operators cannot return None
            return tuple(args[0].new_empty(0) if tensor is None else tensor for tensor in result)
        return result

    _LIBRARY.define(schema)
    for backend in ("CPU", "CUDA"):
        _LIBRARY.impl(name, implementation, backend)
    torch.library.register_fake(f"fastmoe_rs::{name}", implementation, lib=_LIBRARY)
    operator = getattr(torch.ops.fastmoe_rs, name).default
    if setup is None or backward is None:
        eager = kernel
    else:
        torch.library.register_autograd(f"fastmoe_rs::{name}", backward, setup_context=setup, lib=_LIBRARY)
        eager = _function(name, kernel, setup, backward).apply

    def call(*args: Any) -> Any:
        if not is_direct(args):
            return operator(*args)
        return eager(*args) if torch.is_grad_enabled() else kernel(*args)

    return call


def is_direct(args: tuple[Any, ...]) -> bool:
    """Whether a kernel may read the memory of the arguments as it is, and nothing must see the operator."""
    if torch.compiler.is_dynamo_compiling() or torch._C._len_torch_dispatch_stack():
        return False
    if torch._C._get_tracing_state() is not None:
        return False
    for arg in args:
        if arg is not None:
            kind = type(arg)
            if kind is Tensor or kind is Parameter:
                if arg.is_neg():
                    return False
            elif kind not in _PLAIN:
                return False
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError("fastmoe_rs: torch.func transforms are not supported (grad, vmap, jvp)")
    return not args[0].is_meta


def _function(
    name: str, kernel: Callable[..., Any], setup: Setup, backward: Backward
) -> type[torch.autograd.Function]:
    def forward(ctx: Any, *args: Any) -> Any:
        result = kernel(*args)
        setup(ctx, args, result)
        return result

    members = {"forward": forward, "backward": backward, "jvp": _no_jvp(name)}
    static = {key: staticmethod(member) for key, member in members.items()}
    return type(f"fastmoe_rs_{name}", (torch.autograd.Function,), static)


def _no_jvp(name: str) -> Callable[..., Any]:
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise NotImplementedError(f"fastmoe_rs.{name}: forward-mode differentiation is not supported")

    return jvp


def _only(needed: tuple[bool, ...], grads: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """One gradient per input: those computed, None for the others."""
    computed = [grad if need else None for need, grad in zip(needed, grads, strict=False)]
    return (*computed, *[None] * (len(needed) - len(grads)))


def _once(name: str) -> tuple[Setup, Backward]:
    """Setup and backward of an operator that is itself a gradient and cannot be differentiated again."""

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        raise RuntimeError(
            f"fastmoe_rs: the gradient of {name} cannot be differentiated again (double backward); "
            f"fastmoe_rs.reference.{name} can"
        )

    return setup, backward


def _route_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    logits, _, expert_scale, _, *ctx.options = inputs
    _, scores, ids = output
    ctx.mark_non_differentiable(ids)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, expert_scale, ids, scores)


def _route_backward(
    ctx: Any, grad_weights: Tensor | None, grad_scores: Tensor | None, _: None
) -> tuple[Any, ...]:
    # The formula can be differentiated again, and takes the batches of gradients that vmap makes.
    if torch.is_grad_enabled() or _is_batched(grad_weights) or _is_batched(grad_scores):
        return _route_backward_formula(ctx, grad_weights, grad_scores)
    logits, expert_scale, ids, scores = ctx.saved_tensors
    softcap, score, order, *_, renormalize, eps, scale = ctx.options
    grads = [None if grad is None else grad.contiguous() for grad in (grad_weights, grad_scores)]
    rules = softcap, score, order, renormalize, eps, scale
    grad_logits, grad_expert_scale = route_backward(
        logits, expert_scale, ids, scores, *grads, *rules, ctx.needs_input_grad[2]
    )
    return _only(ctx.needs_input_grad, (grad_logits, None, grad_expert_scale))


def _is_batched(tensor: Tensor | None) -> bool:
    functorch = torch._C._functorch
    return tensor is not None and (
        functorch.is_batchedtensor(tensor) or functorch.is_legacy_batchedtensor(tensor)
    )


def _route_backward_formula(
    ctx: Any, grad_weights: Tensor | None, grad_scores: Tensor | None
) -> tuple[Any, ...]:
    """d logits and d expert_scale, of differentiable torch functions."""
    logits, expert_scale, ids, scores = ctx.saved_tensors
    softcap, score, order, *_, renormalize, eps, scale = ctx.options
    capped = logits.to(scores.dtype)
    if softcap is not None:
        unit = (capped / softcap).tanh()
        capped = unit * softcap
    softmax_of_picked = order == "topk_score" and score == "softmax"
    grad_logits = torch.zeros_like(scores)
    grad_expert_scale = None
    if grad_weights is not None:
        picked = capped.gather(1, ids).softmax(1) if softmax_of_picked else scores.gather(1, ids)
        total = picked.sum(1, keepdim=True) + eps
        grad = grad_weights * scale
        if expert_scale is not None:
            by_route = grad * (picked / total if renormalize else picked)
            # By columns: adding at the ids would add in any order on a GPU.
            grad_expert_scale = torch.zeros_like(scores).scatter(1, ids, by_route).sum(0)
            grad = grad * expert_scale[ids]
        if renormalize:
            grad = (grad - (grad * picked).sum(1, keepdim=True) / total) / total
        if softmax_of_picked:
            grad_logits = grad_logits.scatter(1, ids, _softmax_backward(grad, picked))
        else:
            grad = grad_logits.scatter(1, ids, grad)
            grad_scores = grad if grad_scores is None else grad_scores + grad
    if grad_scores is not None:
        grad_logits = grad_logits + _SCORE_BACKWARD[score](grad_scores, scores)
    if softcap is not None:
        grad_logits = grad_logits * (1 - unit.square())
    return _only(ctx.needs_input_grad, (grad_logits.to(logits.dtype), None, grad_expert_scale))


def _softmax_backward(grad: Tensor, softmax: Tensor) -> Tensor:
    return softmax * (grad - (grad * softmax).sum(1, keepdim=True))


def _sigmoid_backward(grad: Tensor, sigmoid: Tensor) -> Tensor:
    return grad * sigmoid * (1 - sigmoid)


def _sqrt_softplus_backward(grad: Tensor, root: Tensor) -> Tensor:
    """The slope of softplus is 1 - exp(-softplus); that of its root goes to 0 with the root."""
    return grad * -torch.expm1(-root.square()) / (2 * root.clamp(min=torch.finfo(root.dtype).tiny))


_SCORE_BACKWARD = {
    "softmax": _softmax_backward,
    "sigmoid": _sigmoid_backward,
    "sqrt_softplus": _sqrt_softplus_backward,
}


def _mlp_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor | None]) -> None:
    tensors, (activation, transposed, interleaved, save_hidden), scales = (
        inputs[:9],
        inputs[9:13],
        inputs[13:],
    )
    _, hidden = output
    ctx.options = None
    if save_hidden:
        ctx.mark_non_differentiable(hidden)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, hidden, *scales)
        ctx.options = activation, transposed, interleaved
        ctx.owners = main_grad.owner(tensors[2]), main_grad.owner(tensors[3])


def _mlp_backward(ctx: Any, grad_out: Tensor | None, _: None) -> tuple[Any, ...]:
    needs = ctx.needs_input_grad
    if grad_out is None:
        return (None,) * len(needs)
    if ctx.options is None:
        raise RuntimeError(
            "fastmoe_rs.moe_mlp: cannot be differentiated, as it was traced or exported without gradients "
            "(torch.no_grad); trace or export it with them"
        )
    return _only(needs, _mlp_grads(ctx, grad_out))


def _mlp_grads(ctx: Any, grad_out: Tensor) -> tuple[Any, ...]:
    """The gradients of x, weights, w1, w2, b1 and b2, but for what is added to a main_grad."""
    needs = ctx.needs_input_grad[:6]
    saved = ctx.saved_tensors  # to be asked for once only
    arguments = grad_out.contiguous(), *saved[:10], *ctx.options, needs, *saved[10:]
    sums = _main_grads(ctx, arguments, needs[2:4], ("w1", "w2"))
    if sums is None:
        return mlp_backward(*arguments)
    grads = kernels.mlp_backward(*arguments, sums=sums)
    return *grads[:2], *_added(ctx, sums, grads[2:4]), *grads[4:]


def _main_grads(
    ctx: Any, arguments: tuple[Any, ...], needs: tuple[bool, ...], names: tuple[str, ...]
) -> list[Tensor | None] | None:
    """What the gradients of the weights are added to; None where none is, or something must see gradients."""
    if not any(hasattr(leaf, "main_grad") for leaf in ctx.owners):
        return None
    sums = [
        main_grad.target(name, leaf) if need else None
        for name, need, leaf in zip(names, needs, ctx.owners, strict=True)
    ]
    if all(target is None for target in sums) or torch.is_grad_enabled() or not is_direct(arguments):
        return None
    return sums


def _added(ctx: Any, sums: list[Tensor | None], grads: tuple[Tensor | None, ...]) -> list[Tensor | None]:
    """What autograd is given for the weights."""
    return [
        grad if target is None else main_grad.added(leaf, target)
        for leaf, target, grad in zip(ctx.owners, sums, grads, strict=True)
    ]


class _Mlp(torch.autograd.Function):
    """`direct_mlp` with gradients; unlike those of the operator, what it saves is no output.

    Its calls name every argument: a tuple unpacked into a call takes up to half a microsecond.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weights: Tensor,
        w1: Tensor,
        w2: Tensor,
        b1: Tensor | None,
        b2: Tensor | None,
        call: tuple[Any, ...],  # one argument, as autograd looks at each
    ) -> Tensor:
        ids, (offsets, gather, inverse), options = call
        activation, transposed, interleaved = options
        out, hidden = kernels.mlp(
            x,
            weights,
            w1,
            w2,
            b1,
            b2,
            offsets,
            gather,
            inverse,
            activation,
            transposed,
            interleaved,
            True,
            ids=ids,
        )
        ctx.save_for_backward(x, weights, w1, w2, b1, b2, offsets, gather, inverse, hidden)
        ctx.options = options
        ctx.owners = main_grad.owner(w1), main_grad.owner(w2)
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Any, ...]:
        if torch.is_grad_enabled() or not is_direct((grad_out,)):
            return _mlp_backward(ctx, grad_out, None)
        owner1, owner2 = ctx.owners
        if hasattr(owner1, "main_grad") or hasattr(owner2, "main_grad"):
            return _mlp_backward(ctx, grad_out, None)
        x, weights, w1, w2, b1, b2, offsets, gather, inverse, hidden = ctx.saved_tensors
        activation, transposed, interleaved = ctx.options
        needs = ctx.needs_input_grad[:6]
        grad_x, grad_weights, grad_w1, grad_w2, grad_b1, grad_b2 = kernels.mlp_backward(
            grad_out.contiguous(),
            x,
            weights,
            w1,
            w2,
            b1,
            b2,
            offsets,
            gather,
            inverse,
            hidden,
            activation,
            transposed,
            interleaved,
            needs,
        )
        return grad_x, grad_weights, grad_w1, grad_w2, grad_b1, grad_b2, None

    jvp = staticmethod(_no_jvp("moe_mlp"))


def direct_mlp(
    dense: tuple[Any, ...], ids: Tensor | None, rows: tuple[Any, ...], options: tuple[Any, ...]
) -> Tensor:
    """`mlp` of direct tensors.

    Args:
        dense: x, weights, w1, w2, b1 and b2.
        ids: None where a plan is followed.
        rows: offsets, gather and inverse of that plan, or three times None.
        options: activation, transposed and interleaved.
    """
    if torch.is_grad_enabled():
        for tensor in dense:
            if tensor is not None and tensor.requires_grad:
                x, weights, w1, w2, b1, b2 = dense
                return _Mlp.apply(x, weights, w1, w2, b1, b2, (ids, rows, options))
    kernel: Callable[..., Any] = kernels.mlp
    out, _ = kernel(*dense, *rows, *options, False, ids=ids)
    return out


def _grouped_mm_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, w, _, offsets, ctx.transposed = inputs
    ctx.save_for_backward(x, w, offsets)
    ctx.owners = (main_grad.owner(w),)


def _grouped_mm_backward(ctx: Any, grad_out: Tensor) -> tuple[Any, ...]:
    x, w, offsets = ctx.saved_tensors
    grad_out = grad_out.contiguous()
    needs_x, needs_w, needs_bias = ctx.needs_input_grad[:3]
    grad_x = grad_w = grad_bias = None
    if needs_x:
        grad_x = grouped_mm(grad_out, w, None, offsets, not ctx.transposed)
    sums = _main_grads(ctx, (grad_out, x, w), (needs_w,), ("w",))
    if sums is not None:
        grad_w, grad_bias = kernels.grouped_mm_grad_weight(
            grad_out, x, offsets, ctx.transposed, needs_bias, sum_w=sums[0]
        )
        (grad_w,) = _added(ctx, sums, (grad_w,))
    elif needs_w or needs_bias:
        grad_w, grad_bias = grouped_mm_grad_weight(grad_out, x, offsets, ctx.transposed, needs_bias)
    return _only(ctx.needs_input_grad, (grad_x, grad_w, grad_bias))


def _grad_weight_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor | None]) -> None:
    grad_out, x, offsets, ctx.transposed, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(grad_out, x, offsets)


def _grad_weight_backward(ctx: Any, grad_w: Tensor | None, grad_bias: Tensor | None) -> tuple[Any, ...]:
    grad_out, x, offsets = ctx.saved_tensors
    if grad_w is None:
        grad_w = x.new_zeros(kernels.weight_shape(grad_out, x, offsets, ctx.transposed))
    grad_w = grad_w.contiguous()
    grad_bias = None if grad_bias is None else grad_bias.contiguous()
    to_grad_out = to_x = None
    if ctx.needs_input_grad[0]:
        to_grad_out = grouped_mm(x, grad_w, grad_bias, offsets, ctx.transposed)
    if ctx.needs_input_grad[1]:
        to_x = grouped_mm(grad_out, grad_w, None, offsets, not ctx.transposed)
    return _only(ctx.needs_input_grad, (to_grad_out, to_x))


def _permute_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _permute_backward(ctx: Any, grad_out: Tensor) -> tuple[Any, ...]:
    gather, inverse = ctx.saved_tensors
    return unpermute(grad_out.contiguous(), None, gather, inverse), None, None


def _unpermute_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    y, weights, gather, inverse = inputs
    ctx.save_for_backward(None if weights is None else y, weights, gather, inverse)


def _unpermute_backward(ctx: Any, grad_out: Tensor) -> tuple[Any, ...]:
    y, weights, gather, inverse = ctx.saved_tensors
    grad_out = grad_out.contiguous()
    if weights is None:
        return permute(grad_out, gather, inverse), None, None, None
    needs = ctx.needs_input_grad
    return _only(needs, unpermute_backward(grad_out, y, weights, gather, inverse, needs[:2]))


plan = _operator(
    "plan(Tensor ids, Tensor? weights, SymInt num_experts, SymInt? capacity, str drop, bool pad,"
    " str out_of_range)"
    " -> (Tensor counts, Tensor offsets, Tensor gather, Tensor inverse, Tensor sorted_weights)"
)
route = _operator(
    "route(Tensor logits, Tensor? bias, Tensor? expert_scale, SymInt top_k, float? softcap, str score,"
    " str order, int n_group, int topk_group, str group_score, str group_losers, bool renormalize,"
    " float renormalize_eps, float scale)"
    " -> (Tensor weights, Tensor scores, Tensor ids)",
    _route_setup,
    _route_backward,
)
route_backward = _operator(
    "route_backward(Tensor logits, Tensor? expert_scale, Tensor ids, Tensor scores, Tensor? grad_weights,"
    " Tensor? grad_scores, float? softcap, str score, str order, bool renormalize, float renormalize_eps,"
    " float scale, bool with_expert_scale)"
    " -> (Tensor logits, Tensor expert_scale)"
)
mlp = _operator(
    "mlp(Tensor x, Tensor weights, Tensor w1, Tensor w2, Tensor? b1, Tensor? b2, Tensor offsets,"
    " Tensor gather, Tensor inverse, str activation, bool transposed, bool interleaved, bool save_hidden,"
    " Tensor? w1_scales=None, Tensor? w2_scales=None)"
    " -> (Tensor out, Tensor hidden)",
    _mlp_setup,
    _mlp_backward,
)
mlp_backward = _operator(
    "mlp_backward(Tensor grad_out, Tensor x, Tensor weights, Tensor w1, Tensor w2, Tensor? b1, Tensor? b2,"
    " Tensor? offsets, Tensor? gather, Tensor? inverse, Tensor hidden, str activation, bool transposed,"
    " bool interleaved, bool[] needs, Tensor? w1_scales=None, Tensor? w2_scales=None)"
    " -> (Tensor x, Tensor weights, Tensor w1, Tensor w2, Tensor b1, Tensor b2)",
    *_once("moe_mlp"),
)
grouped_mm = _operator(
    "grouped_mm(Tensor x, Tensor w, Tensor? bias, Tensor offsets, bool transposed) -> Tensor",
    _grouped_mm_setup,
    _grouped_mm_backward,
)
grouped_mm_grad_weight = _operator(
    "grouped_mm_grad_weight(Tensor grad_out, Tensor x, Tensor offsets, bool transposed, bool with_bias)"
    " -> (Tensor w, Tensor bias)",
    _grad_weight_setup,
    _grad_weight_backward,
)
permute = _operator(
    "permute(Tensor x, Tensor gather, Tensor inverse) -> Tensor", _permute_setup, _permute_backward
)
unpermute = _operator(
    "unpermute(Tensor y, Tensor? weights, Tensor gather, Tensor inverse) -> Tensor",
    _unpermute_setup,
    _unpermute_backward,
)
unpermute_backward = _operator(
    "unpermute_backward(Tensor grad_out, Tensor y, Tensor weights, Tensor gather, Tensor inverse,"
    " bool[] needs) -> (Tensor y, Tensor weights)",
    *_once("unpermute"),
)

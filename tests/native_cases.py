"""Every function of the native module with arguments that it takes, to be changed by tests.

T tokens, H hidden, I intermediate, E experts, K experts per token, R = T*K routed rows.
"""

import os
import subprocess
import sys

import torch

from fastmoe_rs import _native

T, H, I, E, K = 4, 8, 6, 3, 2
R = T * K
PLAN = 2 * E + 1 + 2 * R  # counts, offsets, gather and inverse


def int32(*shape):
    return torch.zeros(shape, dtype=torch.int32)


def routed_rows():
    """A plan of ids (t + k) % E: offsets, gather, inverse."""
    ids_TK = (torch.arange(T)[:, None] + torch.arange(K)) % E
    offsets, gather, inverse = int32(E + 1), int32(R), int32(T, K)
    options = {"num_experts": E, "capacity": None, "drop": "position", "pad": False, "out_of_range": "error"}
    _native.plan(ids_TK, None, int32(E), offsets, gather, inverse, None, threads=1, **options)
    return {"offsets": offsets, "gather": gather, "inverse": inverse}


def layer():
    return {
        "x": torch.randn(T, H),
        "w1": torch.randn(E, 2 * I, H),
        "b1": torch.randn(E, 2 * I),
        "w2": torch.randn(E, H, I),
        "b2": torch.randn(E, H),
        "weights": torch.rand(T, K),
    }


NO_PLAN = {"offsets": None, "gather": None, "inverse": None}
MLP_OPTIONS = {"activation": "swiglu", "transposed": False, "interleaved": False}


def route():
    inputs = {"logits": torch.randn(T, E), "bias": torch.randn(E), "expert_scale": torch.rand(E)}
    outputs = {
        "ids": torch.zeros(T, K, dtype=torch.int64),
        "weights": torch.zeros(T, K),
        "scores": torch.zeros(T, E),
    }
    options = {
        "softcap": None,
        "score": "softmax",
        "order": "score_topk",
        "n_group": 1,
        "topk_group": 1,
        "group_score": "top2",
        "group_losers": "-inf",
        "renormalize": True,
        "renormalize_eps": 1e-20,
        "scale": 1.0,
    }
    return inputs, outputs, options


def route_backward():
    inputs, outputs, options = route()
    _native.route(**inputs, **outputs, **options, threads=1)
    inputs = {
        "logits": inputs["logits"],
        "expert_scale": inputs["expert_scale"],
        "ids": outputs["ids"],
        "scores": outputs["scores"],
        "grad_weights": torch.randn(T, K),
        "grad_scores": torch.randn(T, E),
    }
    rules = ("softcap", "score", "order", "renormalize", "renormalize_eps", "scale")
    outputs = {"grad_logits": torch.zeros(T, E), "grad_expert_scale": torch.zeros(E)}
    return inputs, outputs, {rule: options[rule] for rule in rules}


def plan():
    inputs = {"ids": torch.randint(E, (T, K)), "weights": torch.rand(T, K)}
    outputs = {
        "counts": int32(E),
        "offsets": int32(E + 1),
        "gather": int32(R),
        "inverse": int32(T, K),
        "sorted_weights": torch.zeros(R),
    }
    options = {"num_experts": E, "capacity": None, "drop": "position", "pad": False, "out_of_range": "error"}
    return inputs, outputs, options


def mlp_forward():
    outputs = {"out": torch.zeros(T, H), "hidden": torch.zeros(R, 2 * I)}
    return layer() | routed_rows(), outputs, MLP_OPTIONS | {"ids": None}


def mlp_forward_of_ids():
    inputs = layer() | {"ids": torch.randint(E, (T, K))}
    outputs = {"out": torch.zeros(T, H), "hidden": torch.zeros(R * 2 * I + 2 * PLAN + 1)}
    return inputs, outputs, MLP_OPTIONS | NO_PLAN


def mlp_backward():
    inputs = layer() | routed_rows() | {"grad_out": torch.randn(T, H), "hidden": torch.randn(R, 2 * I)}
    names = ("x", "weights", "w1", "b1", "w2", "b2")
    return inputs, {f"grad_{name}": torch.zeros_like(inputs[name]) for name in names}, MLP_OPTIONS


def mlp_backward_of_ids():
    inputs, outputs, options = mlp_backward()
    counts = inputs["offsets"].diff()
    rows = [counts, *(inputs.pop(name).flatten() for name in ("offsets", "gather", "inverse"))]
    room = torch.zeros(2 * PLAN + 1)
    room[:PLAN] = torch.cat(rows).view(torch.float32)
    return inputs | {"hidden": torch.cat([inputs["hidden"].flatten(), room])}, outputs, options | NO_PLAN


def plan_in(hidden):
    """The plan that a flat tensor keeps behind the pre-activation, as a view of it."""
    return hidden[R * 2 * I :][:PLAN].view(torch.int32)


def grouped_mm():
    inputs = {
        "x": torch.randn(R, H),
        "w": torch.randn(E, I, H),
        "offsets": routed_rows()["offsets"],
        "bias": torch.randn(E, I),
    }
    return inputs, {"out": torch.zeros(R, I)}, {"transposed": False}


def grouped_mm_grad_weight():
    inputs = {"grad_out": torch.randn(R, I), "x": torch.randn(R, H), "offsets": routed_rows()["offsets"]}
    return inputs, {"grad_w": torch.zeros(E, I, H), "grad_bias": torch.zeros(E, I)}, {"transposed": False}


def permute():
    return {"x": torch.randn(T, H), "gather": routed_rows()["gather"]}, {"out": torch.zeros(R, H)}, {}


def unpermute():
    inputs = {"y": torch.randn(R, H), "inverse": routed_rows()["inverse"], "weights": torch.rand(T, K)}
    return inputs, {"out": torch.zeros(T, H)}, {}


def unpermute_backward():
    rows = routed_rows()
    inputs = {
        "grad_out": torch.randn(T, H),
        "y": torch.randn(R, H),
        "weights": torch.rand(T, K),
        "gather": rows["gather"],
        "inverse": rows["inverse"],
    }
    return inputs, {"grad_y": torch.zeros(R, H), "grad_weights": torch.zeros(T, K)}, {}


CASES = {
    case.__name__: case
    for case in (
        route,
        route_backward,
        plan,
        mlp_forward,
        mlp_forward_of_ids,
        mlp_backward,
        mlp_backward_of_ids,
        grouped_mm,
        grouped_mm_grad_weight,
        permute,
        unpermute,
        unpermute_backward,
    )
}


def function(name):
    return getattr(_native, name.removesuffix("_of_ids"))


def arguments(name):
    torch.manual_seed(0)
    return CASES[name]()


def call(name, **changes):
    inputs, outputs, options = CASES[name]()
    return function(name)(**({"threads": 1} | inputs | outputs | options | changes))


def argument_of(name, argument):
    inputs, outputs, _ = CASES[name]()
    return (inputs | outputs)[argument]


def python(code, **environment):
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, check=False)
    return done.stdout.strip() if done.returncode == 0 else done.stderr.strip().splitlines()[-1]

"""Routers beyond `functional.route`: functions from logits to ids, weights and scores.

They all give what `RoutingPlan.from_ids` and `functional.moe_mlp` take: ids [T, K'], where an id outside
[0, E) is a route that is not computed (make the plan with `out_of_range="drop"`), and weights [T, K'].

Logits are float32, bfloat16, float16 or, on the CPU, float64; weights and scores float32, float64 for float64
logits. Wrong arguments raise ValueError, wrong types and dtypes TypeError, with a message that names the
argument, what was given and what was wanted.

Legend: T tokens, H hidden size, E experts, K experts per token, C capacity of an expert.
"""

from .balance import update_selection_bias
from .capacity import drop_over_capacity, gshard_route
from .expert_choice import expert_choice_route
from .given import route_given
from .hashed import hash_route, hash_table
from .noise import gumbel, input_jitter, logit_noise, normal, uniform
from .noisy_topk import NoisyRouting, noisy_top_k_route
from .null_experts import identity_weight
from .product_keys import product_key_route
from .shared import SharedRouting, route_with_shared
from .sinkhorn import sinkhorn, sinkhorn_route
from .sparsemixer import sparsemixer_route
from .token_rounding import round_tokens

__all__ = [
    "NoisyRouting",
    "SharedRouting",
    "drop_over_capacity",
    "expert_choice_route",
    "gshard_route",
    "gumbel",
    "hash_route",
    "hash_table",
    "identity_weight",
    "input_jitter",
    "logit_noise",
    "noisy_top_k_route",
    "normal",
    "product_key_route",
    "round_tokens",
    "route_given",
    "route_with_shared",
    "sinkhorn",
    "sinkhorn_route",
    "sparsemixer_route",
    "uniform",
    "update_selection_bias",
]

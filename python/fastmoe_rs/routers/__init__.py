"""The routers of `nn.MoE` as modules.

A router of your own for `nn.MoE` is any module that takes x [T, H], and ids [T, K] to be weighed instead of
choosing when a recorded routing is replayed, and returns a `RouterOutput` or a `functional.Routing`. A method
`rows(tokens)`, if it has one, tells how many rows the plan needs where ids have room for more.

Legend: T tokens, H hidden size, K experts per token.
"""

from .base import Router, RouterOutput
from .capacity import CapacityRouter, ExpertChoiceRouter, GShardRouter, TokenRoundingRouter
from .token_choice import (
    HashRouter,
    NoisyTopKRouter,
    ProductKeyRouter,
    SharedRouter,
    SinkhornRouter,
    SparseMixerRouter,
)

__all__ = [
    "CapacityRouter",
    "ExpertChoiceRouter",
    "GShardRouter",
    "HashRouter",
    "NoisyTopKRouter",
    "ProductKeyRouter",
    "Router",
    "RouterOutput",
    "SharedRouter",
    "SinkhornRouter",
    "SparseMixerRouter",
    "TokenRoundingRouter",
]

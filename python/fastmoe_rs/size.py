"""The size of a Mixture-of-Experts model: its parameters by part, and the memory, FLOPs and bytes they imply.

Legend: I intermediate size, E experts, K experts per token.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["BITS", "Count", "Part"]

BITS = {"fp32": 32, "bf16": 16, "fp8": 8, "int4": 4}


@dataclass(frozen=True)
class Part:
    """Parameters of one kind: all, those that a token uses, and those of them that it is multiplied by."""

    total: int
    active: int
    multiplied: int

    def __add__(self, other: Part) -> Part:
        return Part(self.total + other.total, self.active + other.active, self.multiplied + other.multiplied)

    def __mul__(self, times: int) -> Part:
        return Part(self.total * times, self.active * times, self.multiplied * times)


@dataclass(frozen=True)
class Count:
    """The parameters of a model by part, and what follows from them.

    Attributes:
        model_type: the family.
        parts: parameters by the part of the model that they belong to.
        experts, top_k: E and K.
        lookup: parameters of an embedding table that is only looked up; 0 when it is the output head too.
        cache: numbers that attention keeps for every token of the context.
        attention_flops: of a token for every token of its context; a sliding window is not subtracted.
        dense_intermediate: the I of a dense model with the same attention whose MLPs have as many weights as
            a token uses here, averaged over the layers.
    """

    model_type: str
    parts: dict[str, Part]
    experts: int
    top_k: int
    lookup: int
    cache: int
    attention_flops: int
    dense_intermediate: int

    @property
    def total(self) -> int:
        """All parameters."""
        return sum(part.total for part in self.parts.values())

    @property
    def active(self) -> int:
        """Parameters that one token uses: all but the experts that it is not sent to and a vision tower.

        Both embedding tables count in full; some publishers leave out that of the inputs (`lookup`), or both.
        """
        return sum(part.active for part in self.parts.values())

    def flops(self, context: int = 0) -> int:
        """FLOPs of one token's forward, behind `context` tokens; training takes three times as many.

        Two for every weight that the token is multiplied by; norms, activations and softmax are left out.
        """
        multiplied = sum(part.multiplied for part in self.parts.values())
        return 2 * multiplied + context * self.attention_flops

    def memory(self, bits: int = 16) -> float:
        """Bytes of all parameters; scales and zero points of quantized formats are left out."""
        return self.total * bits / 8

    def weights_read(self, tokens: int = 1, bits: int = 16) -> float:
        """Bytes of weights read for each token, when `tokens` tokens are decoded in one step.

        A step reads what all tokens use once, and every expert that at least one token goes to: E * (1 -
        (1 - K/E)^tokens) of them, when the router spreads tokens evenly and independently.
        """
        routed = self.parts["routed experts"]
        touched = routed.total * (1 - (1 - self.top_k / self.experts) ** tokens)
        return (self.active - self.lookup - routed.active + touched) / tokens * bits / 8

    def cache_read(self, context: int) -> int:
        """Bytes of 16-bit keys and values that one token reads behind `context`, the latent ones of MLA."""
        return 2 * context * self.cache

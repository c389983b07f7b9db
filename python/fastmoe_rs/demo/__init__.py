"""Train a small byte-level Mixture-of-Experts language model with fastmoe_rs: `python -m fastmoe_rs demo`."""

from .config import BadArgument, Config, DemoError

__all__ = ["BadArgument", "Config", "DemoError"]

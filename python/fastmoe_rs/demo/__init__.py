"""Train a small byte-level Mixture-of-Experts language model with fastmoe_rs: `python -m fastmoe_rs demo`."""

from .config import CHECKPOINT, BadArgument, Config, DemoError

__all__ = ["CHECKPOINT", "BadArgument", "Config", "DemoError"]

"""Doors by which fastmoe_rs enters other libraries.

`accelerate(model)` switches a Hugging Face model over, `restore(model)` back; importing
`fastmoe_rs.integrations.transformers` only registers the experts implementation "fastmoe_rs", for
`experts_implementation="fastmoe_rs"`.
"""

from .swap import accelerate, restore

__all__ = ["accelerate", "restore"]

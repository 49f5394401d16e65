"""The namespace of the operators. A build for the Hugging Face Hub has a file of its own here, and so another one.

The two names are those that such builds have to have, so that both copies can be loaded in one process.
"""

from __future__ import annotations

import torch

__all__ = ["add_op_namespace_prefix", "ops"]

ops = torch.ops.diffuse_compress


def add_op_namespace_prefix(op_name: str) -> str:
    """``op_name`` with the namespace before it."""
    return f"diffuse_compress::{op_name}"

"""Registration of torch operators in the namespace of ``_ops.py``."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from diffuse_compress_kernels._ops import add_op_namespace_prefix, ops

__all__ = ["count_no_flops", "linear_flops", "operator"]

_LIBRARY = torch.library.Library(add_op_namespace_prefix("").removesuffix("::"), "FRAGMENT")


def linear_flops(rows: Sequence[int], *_: Any, out_shape: Sequence[int], **__: Any) -> int:
    """2 M N K of rows [M, K] multiplied to [M, N], however the weight is packed: what torch counts for the dense one.

    A multiplication and an addition are two, as in torch's formulas, which do not count scales and biases either.
    """
    return 2 * math.prod(out_shape) * rows[1]


def count_no_flops(*_: Any, **__: Any) -> int:
    """Of an operator that multiplies no matrices."""
    return 0


def operator(name: str, function: Callable[..., Any], fake: Callable[..., Any], *, flops: Callable[..., int]) -> Any:
    """The operator ``name`` in our namespace: a function for every device that changes no input and returns none.

    ``torch.library.custom_op`` wraps such a function in Python for autograd and aliasing, at every call: 14 us on a
    host where this takes 4. Nothing here has a gradient, so callers hand over detached tensors.

    Args:
        name: of the operator.
        function: with annotated parameters, which make its schema.
        fake: the same on tensors without data.
        flops: a formula for ``torch.utils.flop_counter``: it is given the arguments with shapes in place of tensors.
    """
    schema = torch.library.infer_schema(function, mutates_args=())
    _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
    torch.library.register_fake(add_op_namespace_prefix(name), fake, lib=_LIBRARY)
    packet = getattr(ops, name)
    register_flop_formula(packet)(flops)
    return packet.default

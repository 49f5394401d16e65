"""Registration of torch operators (namespace ``diffuse_compress``)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

__all__ = ["operator"]

_LIBRARY = torch.library.Library("diffuse_compress", "FRAGMENT")


def operator(name: str, function: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """The operator ``diffuse_compress::name``: a function for every device that changes no input and returns none.

    ``torch.library.custom_op`` wraps such a function in Python for autograd and aliasing, at every call: 14 us on a
    host where this takes 4. Nothing here has a gradient, so callers hand over detached tensors.

    Args:
        name: of the operator.
        function: with annotated parameters, which make its schema.
        fake: the same on tensors without data.
    """
    schema = torch.library.infer_schema(function, mutates_args=())
    _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"diffuse_compress::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.diffuse_compress, name).default

"""Triton kernels for CUDA devices: one file per kernel, each with its launcher.

``tiles.py`` describes tile shapes as data, ``tables.py`` holds the chosen ones, ``unpack.py`` and ``grid.py`` are
shared pieces, ``reference.py`` says in plain torch what the products must return. Importing this package imports no
triton; importing a kernel's module does, so the operators fetch those with :func:`module` when a CUDA tensor arrives.

Shapes: x [M, K] tokens by in_features, weight [N, K] out_features by in_features, both K-contiguous, y [M, N].
"""

from __future__ import annotations

import importlib
import importlib.util
from functools import cache
from typing import Any

import torch

__all__ = ["capability", "module", "usable"]

LEAST_CAPABILITY = (8, 0)


@cache
def module(name: str) -> Any:
    """A module of this package that needs triton."""
    return importlib.import_module(f"{__name__}.{name}")


@cache
def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of a CUDA device."""
    return torch.cuda.get_device_capability(device)


@cache
def usable(device: torch.device) -> bool:
    """True if the kernels run there: an NVIDIA GPU of capability 8.0 or more, and triton is installed."""
    if device.type != "cuda" or torch.version.hip is not None or not torch.cuda.is_available():
        return False
    if importlib.util.find_spec("triton") is None:
        return False
    return capability(device) >= LEAST_CAPABILITY

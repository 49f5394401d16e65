"""Adaptive layer norm as its parts, so that a branch can be computed without the others."""

from __future__ import annotations

from typing import Any

import torch

from diffuse_compress.families.base import Conditioning

__all__ = ["adaln_zero", "modulate"]


def adaln_zero(block: Any, conditioning: Conditioning, norm: str, chunks: int) -> tuple[torch.Tensor, ...]:
    """Chunks [batch, width] of ``norm.linear(silu(temb))``: shift, scale, gate of attention, then of feed-forward."""

    def compute() -> tuple[torch.Tensor, ...]:
        module = getattr(block, norm)
        return tuple(module.linear(module.silu(conditioning.temb)).chunk(chunks, dim=1))

    values: tuple[torch.Tensor, ...] = conditioning.once(norm, compute)
    return values


def modulate(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """x [batch, tokens, width] * (1 + scale) + shift, both [batch, width]."""
    return x * (1 + scale[:, None]) + shift[:, None]

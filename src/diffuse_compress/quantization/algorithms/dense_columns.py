"""What algorithms share that keep whole input columns of linear layers dense beside the codes."""

from __future__ import annotations

import torch
from torch import nn

from diffuse_compress.quantization.scheme import Scheme

__all__ = ["column_bytes", "columns_for", "largest", "why_no_columns"]


def why_no_columns(title: str, layer: nn.Module, scheme: Scheme) -> str | None:
    """Why a layer of this format can have no dense columns; None if it can."""
    if not isinstance(layer, nn.Linear):
        return f"{title} keeps input columns of linear layers, not of convolutions"
    if scheme.input_rotation is not None:
        return f"{title}: a rotated input has no columns that stand out"
    if scheme.weight.stores_float_zero_point:
        return f"{title} needs codes that stand for exactly 0, got {scheme.name} with zero points that are no integers"
    return None


def columns_for(share: float, layer: nn.Linear) -> int:
    """``share`` of a layer's input columns, rounded; never all of them."""
    return min(round(share * layer.in_features), layer.in_features - 1)


def column_bytes(count: int, layer: nn.Linear) -> int:
    """Bytes of ``count`` dense columns of a layer, and of their int32 indices."""
    return count * (4 + layer.out_features * layer.weight.element_size())


def largest(score: torch.Tensor, count: int) -> torch.Tensor | None:
    """int64 [count], ascending: where ``score`` [K] is largest, the first of equals; None for no column."""
    if count < 1:
        return None
    return torch.argsort(score, descending=True, stable=True)[:count].sort().values

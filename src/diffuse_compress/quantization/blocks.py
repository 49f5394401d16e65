"""Scales that several rows or columns share, written out for each, and ranges gathered over blocks."""

from __future__ import annotations

from collections.abc import Callable

import torch

from diffuse_compress.quantization.scheme import BLOCK_SIZE, PerBlock, WeightScheme

__all__ = ["over_blocks", "over_columns", "scale_rows"]


def over_blocks(values: torch.Tensor, granularity: PerBlock, reduce: Callable[..., torch.Tensor]) -> torch.Tensor:
    """[ceil(N / 128), G] of values [N, G]: smallest or largest of each block's rows; ranges include 0."""
    rows, groups = values.shape
    padded = torch.nn.functional.pad(values, (0, 0, 0, -rows % granularity.block_size))
    return reduce(padded.view(granularity.num_blocks(rows), granularity.block_size, groups), dim=1)


def scale_rows(scale: torch.Tensor, scheme: WeightScheme, rows: int, start: int = 0) -> torch.Tensor:
    """``scale`` with the rows of blocks written out: [rows, G], from row ``start`` on; others as they are."""
    if not isinstance(scheme.granularity, PerBlock):
        return scale
    places = torch.arange(start, start + rows, device=scale.device) // scheme.granularity.block_size
    return scale[places]


def over_columns(scale: torch.Tensor, columns: int) -> torch.Tensor:
    """Scales [..., ceil(K / 128)] of groups as [..., K]; those of rows and tensors as they are."""
    if scale.dim() == 0 or scale.shape[-1] in (1, columns):
        return scale
    return scale.repeat_interleave(BLOCK_SIZE, dim=-1)[..., :columns]

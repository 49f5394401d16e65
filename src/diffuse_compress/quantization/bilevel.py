"""Scales that are codes themselves: how ``scheme.Bilevel`` rounds and stores them."""

from __future__ import annotations

import torch

from diffuse_compress.quantization.scheme import BILEVEL_GROUPS, BILEVEL_MAX_CODE, NumberFormat

__all__ = ["MIN_SCALE", "bilevel", "read_bilevel"]

MIN_SCALE = torch.finfo(torch.float32).tiny
"""Smallest scale, the smallest normal float32: an all-zero element quantizes to zeros without a division by 0."""


def bilevel(
    wanted: torch.Tensor, low: torch.Tensor, high: torch.Tensor, fmt: NumberFormat
) -> tuple[torch.Tensor, torch.Tensor]:
    """(scale fp32 [N, 2 * ceil(G / 16)], a byte int8 [N, G]): scales on 16 evenly spaced values for each run of groups.

    Args:
        wanted: fp32 [N, G], the scales as they should be.
        low: fp32 [N, G], at most 0; with ``high``, at least 0, the ranges that codes are to cover.
        high: likewise.
        fmt: of the codes; zero points are those that fit the rounded scales.
    """
    rows, groups = wanted.shape
    # By what stands there already: a last run is no wider for being padded.
    padded = torch.cat([wanted, wanted[:, -1:].expand(-1, -groups % BILEVEL_GROUPS)], dim=1) if groups else wanted
    runs = padded.reshape(rows, -1, BILEVEL_GROUPS)
    # Groups of zeros, which any scale suits, do not widen the grid of the others.
    base = torch.where(runs > MIN_SCALE, runs, torch.inf).amin(dim=-1)
    base = torch.where(base.isinf(), MIN_SCALE, base)
    step = ((runs.amax(dim=-1) - base) / BILEVEL_MAX_CODE).clamp_(min=MIN_SCALE)
    codes = ((runs - base.unsqueeze(-1)) / step.unsqueeze(-1)).round_().clamp_(0, BILEVEL_MAX_CODE)
    byte, stored = codes.reshape(rows, -1)[:, :groups].to(torch.int8), torch.cat([base, step], dim=1)
    scale, _ = read_bilevel(stored, byte)
    # The middle of the range that the rounded scale leaves free on either side.
    zero_point = (fmt.qmin - low / scale + (fmt.qmax - high / scale)).mul_(0.5).round_().clamp_(fmt.qmin, fmt.qmax)
    return stored, (zero_point.to(torch.int8) << 4) | byte


def read_bilevel(stored: torch.Tensor, byte: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(scale fp32 [N, G], zero point int8 [N, G]) of what :func:`bilevel` returned."""
    base, step = (part.repeat_interleave(BILEVEL_GROUPS, dim=1)[:, : byte.shape[1]] for part in stored.chunk(2, dim=1))
    # Shifts of int8 to the right copy the sign.
    return base + step * (byte & BILEVEL_MAX_CODE).float(), byte >> 4

"""What the integer kernels must return, in plain torch: int64 sums and a float64 epilogue."""

from __future__ import annotations

import torch

__all__ = ["int_matmul_reference", "linear_codes_reference"]


def int_matmul_reference(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """int64 [M, N] of int8 codes a [M, K] and b [N, K]."""
    return (a.cpu().long().unsqueeze(1) * b.cpu().long().unsqueeze(0)).sum(dim=-1)


def linear_codes_reference(
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """float64 [M, N]: scale * weight_scale * ((codes - zero_point) @ weight.T) + bias."""
    centred = codes.cpu().long() if zero_point is None else codes.cpu().long() - zero_point.cpu().long()
    acc = (centred.unsqueeze(1) * weight.cpu().long().unsqueeze(0)).sum(dim=-1).double()
    y = acc * scale.cpu().double() * weight_scale.cpu().double().reshape(1, -1)
    return y if bias is None else y + bias.cpu().double()

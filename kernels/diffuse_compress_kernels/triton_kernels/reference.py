"""What the kernels must return, in plain torch and float64, slow and obvious."""

from __future__ import annotations

import torch

__all__ = ["int8_weight_reference", "unpack_int4_reference", "w4a16_reference"]


def unpack_int4_reference(packed: torch.Tensor, columns: int) -> torch.Tensor:
    """int64 codes [N, columns] of int8 bytes [N, G * 64]: byte j of a group holds columns j (low nibble) and j + 64."""
    groups = packed.view(torch.uint8).long().view(packed.shape[0], -1, 64)
    nibbles = torch.cat([groups & 15, groups >> 4], dim=-1).flatten(1)
    return torch.where(nibbles < 8, nibbles, nibbles - 16)[:, :columns]


def int8_weight_reference(packed: torch.Tensor, group_scale: torch.Tensor | None, columns: int) -> torch.Tensor:
    """int64 [N, columns] that an integer product multiplies: codes, times the integer scale of their group of 128."""
    codes = unpack_int4_reference(packed, columns)
    return codes if group_scale is None else codes * group_scale.long().repeat_interleave(128, dim=1)[:, :columns]


def w4a16_reference(
    x: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None, group_size: int
) -> torch.Tensor:
    """float64 x @ (scale * (codes - zero_point)).T."""
    codes = unpack_int4_reference(packed, x.shape[1]).double()
    if zero_point is not None:
        codes = codes - zero_point.double().repeat_interleave(group_size, dim=1)[:, : x.shape[1]]
    weight = codes * scale.double().repeat_interleave(group_size, dim=1)[:, : x.shape[1]]
    return x.double() @ weight.t()

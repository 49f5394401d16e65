"""int4 weights without a kernel of their own, on any device: unpacked a block of rows at a time, then multiplied.

A row of K codes is stored in groups of 128 columns, 64 bytes each; byte j of a group holds column j in its low and
column j + 64 in its high nibble, two's complement.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from diffuse_compress_kernels.int8_linear import cpu, cuda

__all__ = ["unpack_int4", "w4a8_linear_codes", "w4a16_linear"]

BLOCK_ELEMENTS = 1 << 23


def unpack_int4(packed: torch.Tensor, columns: int) -> torch.Tensor:
    """int8 codes [N, columns] of packed bytes [N, ceil(columns / 128) * 64]."""
    groups = packed.view(torch.int8).reshape(packed.shape[0], -1, 1, 64)
    # Arithmetic: int8 shifts to the right copy the sign bit.
    codes = torch.cat([(groups << 4) >> 4, groups >> 4], dim=2)
    return codes.reshape(packed.shape[0], -1)[:, :columns].contiguous()


def _blocks(outputs: int, depth: int) -> Iterator[slice]:
    step = max(1, BLOCK_ELEMENTS // max(depth, 1))
    for start in range(0, max(outputs, 1), step):
        yield slice(start, min(start + step, outputs))


def _rows(tensor: torch.Tensor | None, part: slice) -> torch.Tensor | None:
    return None if tensor is None else tensor[part]


def _per_column(values: torch.Tensor, group_size: int, columns: int) -> torch.Tensor:
    """[N, G] as [N, columns]; a single group serves a whole row."""
    if group_size == 0:
        return values
    return values.repeat_interleave(group_size, dim=1)[:, :columns]


def w4a8_linear_codes(
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    packed: torch.Tensor,
    weight_scale: torch.Tensor,
    group_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """As the operator of that name."""
    columns = codes.shape[1]
    run = (cuda if codes.device.type == "cuda" else cpu).linear_codes
    parts = []
    for part in _blocks(packed.shape[0], columns):
        weight = unpack_int4(packed[part], columns)
        if group_scale is not None:
            weight.mul_(_per_column(group_scale[part], 128, columns))
        row_scale = weight_scale if weight_scale.shape[0] == 1 else weight_scale[part]
        parts.append(run(codes, scale, zero_point, weight, row_scale, _rows(bias, part), dtype))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def w4a16_linear(
    x: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    group_size: int,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """As the operator of that name."""
    columns = x.shape[1]
    parts = []
    for part in _blocks(packed.shape[0], columns):
        values = unpack_int4(packed[part], columns).float()
        row_scale = scale if scale.shape[0] == 1 else scale[part]
        if zero_point is not None:
            row_zero = zero_point if zero_point.shape[0] == 1 else zero_point[part]
            values.sub_(_per_column(row_zero.float(), group_size, columns))
        values.mul_(_per_column(row_scale, group_size, columns))
        some_bias = None if bias is None else bias[part].to(x.dtype)
        parts.append(torch.nn.functional.linear(x, values.to(x.dtype), some_bias))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

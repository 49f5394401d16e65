"""Integer products on CUDA: the Triton kernels where they run and the rows are aligned, else ``torch._int_mm``.

``torch._int_mm`` needs more than 16 rows and K, N multiples of 8: the operands are padded with zeros, which changes no
sum. Its int32 result goes through memory, so rows are processed in blocks that bound it.
"""

from __future__ import annotations

from typing import cast

import torch

from diffuse_compress_kernels import triton_kernels

__all__ = ["int_matmul", "linear", "linear_codes", "quantize_rows", "quantize_rows_in_torch"]

MIN_SCALE = torch.finfo(torch.float32).tiny
MIN_ROWS = 17
ALIGNMENT = 8
BLOCK_ELEMENTS = 1 << 26
TRITON_ALIGNMENT = 16


def _suits_triton(a: torch.Tensor, b: torch.Tensor) -> bool:
    """True for rows of aligned bytes, K-contiguous both: byte by byte, loads would cost more than the product."""
    aligned = a.shape[1] % TRITON_ALIGNMENT == 0 and a.stride(0) % TRITON_ALIGNMENT == 0
    contiguous = a.stride(1) == 1 and b.stride(1) == 1 and b.stride(0) % TRITON_ALIGNMENT == 0
    return aligned and contiguous and triton_kernels.usable(a.device)


def quantize_rows(
    x: torch.Tensor,
    qmin: int,
    qmax: int,
    scale: torch.Tensor | None = None,
    zero_point: torch.Tensor | None = None,
    pre_scale: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As :func:`diffuse_compress_kernels.int8_linear.cpu.quantize_rows`."""
    if triton_kernels.usable(x.device):
        run = triton_kernels.module("products").quantize_rows
        return cast(tuple[torch.Tensor, torch.Tensor], run(x, qmin, qmax, scale, zero_point, pre_scale))
    return quantize_rows_in_torch(x, qmin, qmax, scale, zero_point, pre_scale)


def quantize_rows_in_torch(
    x: torch.Tensor,
    qmin: int,
    qmax: int,
    scale: torch.Tensor | None = None,
    zero_point: torch.Tensor | None = None,
    pre_scale: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same from plain operations on whole tensors, which a compiler fuses into what computes x."""
    values = x.float() if pre_scale is None else x.float() * pre_scale
    if scale is None:
        amax = values.abs().amax(dim=1, keepdim=True)
        # By a tensor: CUDA divides by a Python number through its reciprocal, which is not the CPU's quotient, and one
        # unit in the last place of a scale turns ties (common in bf16) into other codes.
        row_scale = amax.div_(torch.full_like(amax, qmax)).clamp_(min=MIN_SCALE)
        return torch.div(values, row_scale).round_().to(torch.int8), row_scale
    steps = torch.div(values, scale.reshape(1, 1)).round_()
    if zero_point is not None:
        steps.add_(zero_point)
    return steps.clamp_(qmin, qmax).to(torch.int8), scale.reshape(1, 1)


def int_matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """int32 [M, N] of int8 a [M, K] and b [K, N], exact; fastest if b is the transpose of a contiguous [N, K]."""
    rows, depth = a.shape
    columns = b.shape[1]
    if 0 in (rows, depth, columns):
        return torch.zeros(rows, columns, dtype=torch.int32, device=a.device)
    if _suits_triton(a, b.t()):
        return cast(torch.Tensor, triton_kernels.module("products").int_matmul(a, b.t()))
    pad_rows, pad_depth, pad_columns = max(0, MIN_ROWS - rows), -depth % ALIGNMENT, -columns % ALIGNMENT
    if pad_rows or pad_depth:
        a = torch.nn.functional.pad(a, (0, pad_depth, 0, pad_rows))
    if pad_columns or pad_depth:
        b = torch.nn.functional.pad(b.t(), (0, pad_depth, 0, pad_columns)).t()
    elif not b.t().is_contiguous():
        b = b.t().contiguous().t()
    return torch._int_mm(a.contiguous(), b)[:rows, :columns]


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    qmin: int,
    qmax: int,
    input_scale: torch.Tensor | None,
    input_zero_point: torch.Tensor | None,
    pre_scale: torch.Tensor | None,
) -> torch.Tensor:
    """y [M, N] in x's dtype from x [M, K] and int8 weight [N, K]."""
    codes, scale = quantize_rows(x, qmin, qmax, input_scale, input_zero_point, pre_scale)
    return linear_codes(codes, scale, input_zero_point, weight, weight_scale, bias, x.dtype)


def linear_codes(
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The same for an input that is quantized already: codes [M, K], scale [M, 1] or [1, 1]."""
    rows, outputs = codes.shape[0], weight.shape[0]
    offset = None
    if zero_point is not None:
        offset = weight.sum(dim=1, dtype=torch.int32).mul_(zero_point.reshape(1).to(torch.int32))
    if _suits_triton(codes, weight):
        run = triton_kernels.module("products").int8_linear_codes
        return cast(torch.Tensor, run(codes, scale, offset, weight, weight_scale, bias, dtype))
    out = torch.empty(rows, outputs, dtype=dtype, device=codes.device)
    channel_scale = weight_scale.reshape(1, -1)
    block = max(MIN_ROWS, BLOCK_ELEMENTS // max(outputs, 1))
    for start in range(0, rows, block):
        part = slice(start, start + block)
        acc = int_matmul(codes[part], weight.t())
        if offset is not None:
            acc = acc - offset
        values = acc.float().mul_(scale if scale.shape[0] == 1 else scale[part]).mul_(channel_scale)
        if bias is not None:
            values.add_(bias)
        out[part] = values
    return out

"""Quantization of rows: one program per row, which stays in registers between its range and its codes.

    s[m] = max_k |x[m, k] * pre[k]| / qmax       q[m, k] = round(x[m, k] * pre[k] / s[m])

All arithmetic is fp32 with IEEE division and rounds half to even, so codes and scales are bit for bit the CPU's.
Rows longer than ``MAX_BLOCK`` are read twice, the second time from cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

__all__ = ["quantize_rows", "quantize_rows_kernel", "store_codes"]

FLOAT8_MAX = 448.0
MIN_SCALE = tl.constexpr(torch.finfo(torch.float32).tiny)
# 1.5 * 2**23: adding it to |v| <= 2**22 rounds v half to even and leaves the integer in the low bits of the float.
ROUNDING_MAGIC = tl.constexpr(12582912.0)
MAX_BLOCK = 16384
ELEMENTS_PER_THREAD = 16


@triton.jit
def store_codes(places, values, scale, zero, mask, QMIN: tl.constexpr, QMAX: tl.constexpr, CLAMP: tl.constexpr):
    """Codes of fp32 ``values``; float8 if QMAX is 448."""
    steps = tl.div_rn(values, scale)
    if QMAX == 448:
        codes = tl.clamp(steps, -448.0, 448.0).to(tl.float8e4nv)
    else:
        if CLAMP:
            # Wide enough to change no code, narrow enough for the rounding to hold.
            steps = tl.clamp(steps, -1048576.0, 1048576.0)
        steps = (steps + ROUNDING_MAGIC) - ROUNDING_MAGIC
        if CLAMP:
            steps = tl.clamp(steps + zero, QMIN, QMAX)
        codes = steps.to(tl.int32).to(tl.int8)
    tl.store(places, codes, mask=mask)


@triton.jit
def _load_values(x_ptr, pre_ptr, k, mask):
    values = tl.load(x_ptr + k, mask=mask, other=0.0).to(tl.float32)
    if pre_ptr is not None:
        values *= tl.load(pre_ptr + k, mask=mask, other=0.0)
    return values


@triton.jit
def row_scale(values, QMAX: tl.constexpr):
    """Largest magnitude / QMAX; NaN if any value is, so that it shows in the output."""
    amax = tl.max(tl.abs(values), axis=0)
    has_nan = tl.max((values != values).to(tl.int32), axis=0) > 0
    scale = tl.maximum(tl.div_rn(amax, QMAX * 1.0), MIN_SCALE)
    return tl.where(has_nan, float("nan"), scale)


@triton.jit
def quantize_rows_kernel(
    x_ptr,
    codes_ptr,
    scale_ptr,
    given_ptr,
    zero_ptr,
    pre_ptr,
    K,
    stride_xm,
    stride_cm,
    QMIN: tl.constexpr,
    QMAX: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
):
    """``given_ptr``: the one scale of a static input, None measures the row. ``zero_ptr``: its zero point or None."""
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * stride_xm
    codes_ptr += row * stride_cm
    k = tl.arange(0, BLOCK_K)
    zero = 0.0
    if zero_ptr is not None:
        zero = tl.load(zero_ptr).to(tl.float32)
    if ONE_BLOCK:
        mask = k < K
        values = _load_values(x_ptr, pre_ptr, k, mask)
        if given_ptr is None:
            scale = row_scale(values, QMAX)
            tl.store(scale_ptr + row, scale)
        else:
            scale = tl.load(given_ptr)
        store_codes(codes_ptr + k, values, scale, zero, mask, QMIN, QMAX, given_ptr is not None)
    else:
        if given_ptr is None:
            scale = tl.full((), MIN_SCALE, tl.float32)
            for start in range(0, K, BLOCK_K):
                other = row_scale(_load_values(x_ptr, pre_ptr, start + k, start + k < K), QMAX)
                # A NaN on either side stays.
                scale = tl.where((scale != scale) | (scale > other), scale, other)
            tl.store(scale_ptr + row, scale)
        else:
            scale = tl.load(given_ptr)
        for start in range(0, K, BLOCK_K):
            mask = start + k < K
            values = _load_values(x_ptr, pre_ptr, start + k, mask)
            store_codes(codes_ptr + start + k, values, scale, zero, mask, QMIN, QMAX, given_ptr is not None)


def warps_for(block: int) -> int:
    """Warps of a program that holds ``block`` elements."""
    return max(1, min(16, block // (32 * ELEMENTS_PER_THREAD)))


def quantize_rows(
    x: torch.Tensor,
    qmin: int,
    qmax: int,
    scale: torch.Tensor | None = None,
    zero_point: torch.Tensor | None = None,
    pre_scale: torch.Tensor | None = None,
    *,
    max_block: int = MAX_BLOCK,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [M, K] of x and their scale, [M, 1] measured or [1, 1] given; as the CPU's ``quantize_rows``.

    Args:
        x: fp32, bf16 or fp16 [M, K], contiguous rows.
        qmin: lowest code, used with a given scale.
        qmax: highest code: 127, 7, or 448 for float8_e4m3fn codes.
        scale: one fp32 number; None measures one per row.
        zero_point: one int8 number, with ``scale`` only.
        pre_scale: fp32 [K].
        max_block: longest row that is kept in registers.
    """
    rows, columns = x.shape
    dtype = torch.float8_e4m3fn if qmax == FLOAT8_MAX else torch.int8
    codes = torch.empty(rows, columns, dtype=dtype, device=x.device)
    measured = torch.empty(rows, 1, dtype=torch.float32, device=x.device) if scale is None else scale.reshape(1, 1)
    if rows == 0 or columns == 0:
        if scale is None:
            measured.fill_(torch.finfo(torch.float32).tiny)
        return codes, measured
    if x.stride(1) != 1:
        x = x.contiguous()
    block = min(triton.next_power_of_2(columns), max_block)
    quantize_rows_kernel[(rows,)](
        x,
        codes,
        measured,
        scale,
        zero_point,
        pre_scale,
        columns,
        x.stride(0),
        codes.stride(0),
        QMIN=qmin,
        QMAX=int(qmax),
        BLOCK_K=block,
        ONE_BLOCK=block >= columns,
        num_warps=warps_for(block),
    )
    return codes, measured

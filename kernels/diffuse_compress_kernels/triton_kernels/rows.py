"""Quantization of rows, alone or with the normalization that makes them: one program per row, kept in registers.

    s[m] = max_k |x[m, k] * pre[k]| / qmax       q[m, k] = round(x[m, k] * pre[k] / s[m])

All arithmetic is fp32 with IEEE quotients and rounds half to even, so codes and scales are bit for bit the CPU's.
A row is held as two power-of-two blocks, so that few lanes idle: 3072 = 2048 + 1024. Rows longer than ``MAX_BLOCK``
are read twice in steps of ``STEP``, the second time from cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from diffuse_compress_kernels.triton_kernels.plans import plan_for, start_and_keep
from diffuse_compress_kernels.triton_kernels.start import INTERPRETED, variant

__all__ = ["largest_of", "quantize_rows", "quantize_rows_kernel", "row_blocks", "row_scale", "store_codes", "warps_for"]

FLOAT8_MAX = 448.0
MIN_SCALE = tl.constexpr(torch.finfo(torch.float32).tiny)
# 1.5 * 2**23: adding it to |v| <= 2**22 rounds v half to even and leaves the integer in the low bits of the float.
ROUNDING_MAGIC = tl.constexpr(12582912.0)
# Longer rows leave too few programs on a multiprocessor to hide their loads: those take two passes in small steps.
MAX_BLOCK = 12287
STEP = 4096
ELEMENTS_PER_THREAD = 16


@triton.jit
def divide(values, scale, FMA: tl.constexpr):
    """IEEE quotients of a row by its scale.

    FMA: from one reciprocal for the row, corrected twice by its exact residual (Markstein 1990): after the first step
    the quotient is within one unit in the last place, so the second rounds it correctly. 5 operations each, where the
    hardware's division takes several times as many. Without fused operations, as in the interpreter, divide.
    """
    if FMA:
        # Residuals of tiny rows would underflow: those divide.
        if scale > 1e-24:
            inverse = tl.div_rn(1.0, scale)
            quotient = values * inverse
            quotient = tl.fma(tl.fma(-quotient, scale, values), inverse, quotient)
            quotient = tl.fma(tl.fma(-quotient, scale, values), inverse, quotient)
        else:
            quotient = tl.div_rn(values, scale)
    else:
        quotient = tl.div_rn(values, scale)
    return quotient


@triton.jit
def store_codes(
    places, values, scale, zero, mask, QMIN: tl.constexpr, QMAX: tl.constexpr, CLAMP: tl.constexpr, FMA: tl.constexpr
):
    """Codes of fp32 ``values``; float8 if QMAX is 448."""
    steps = divide(values, scale, FMA)
    if QMAX == 448:
        codes = tl.clamp(steps, -448.0, 448.0).to(tl.float8e4nv)
    else:
        if CLAMP:
            # Wide enough to change no code, narrow enough for the rounding to hold.
            steps = tl.clamp(steps, -1048576.0, 1048576.0)
            steps = (steps + ROUNDING_MAGIC) - ROUNDING_MAGIC
            codes = tl.clamp(steps + zero, QMIN, QMAX).to(tl.int32).to(tl.int8)
        else:
            codes = (steps + ROUNDING_MAGIC).to(tl.int32, bitcast=True).to(tl.int8)
    tl.store(places, codes, mask=mask)


@triton.jit
def _load_values(x_ptr, pre_ptr, k, mask):
    values = tl.load(x_ptr + k, mask=mask, other=0.0).to(tl.float32)
    if pre_ptr is not None:
        values *= tl.load(pre_ptr + k, mask=mask, other=0.0)
    return values


@triton.jit
def largest_of(values):
    """Largest magnitude as the integer of its bits: these order as the floats do, with NaN above all."""
    bits = values.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return tl.max(bits, axis=0)


@triton.jit
def row_scale(largest, QMAX: tl.constexpr):
    """Scale of a row from :func:`largest_of`; NaN if any value is, so that it shows in the output."""
    amax = largest.to(tl.float32, bitcast=True)
    scale = tl.div_rn(amax, QMAX * 1.0)
    return tl.where(scale < MIN_SCALE, MIN_SCALE, scale)


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
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    WHOLE: tl.constexpr,
    FMA: tl.constexpr,
):
    """``given_ptr``: the one scale of a static input, None measures the row. ``zero_ptr``: its zero point or None.

    WHOLE: the row is FIRST columns and up to SECOND more (0: none); otherwise it is read in steps of FIRST.
    """
    CLAMP: tl.constexpr = given_ptr is not None
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * stride_xm
    codes_ptr += row * stride_cm
    k = tl.arange(0, FIRST)
    zero = 0.0
    if zero_ptr is not None:
        zero = tl.load(zero_ptr).to(tl.float32)
    if WHOLE:
        mask = k < K
        values = _load_values(x_ptr, pre_ptr, k, mask)
        if SECOND > 0:
            k_rest = FIRST + tl.arange(0, SECOND)
            mask_rest = k_rest < K
            rest = _load_values(x_ptr, pre_ptr, k_rest, mask_rest)
        if given_ptr is None:
            largest = largest_of(values)
            if SECOND > 0:
                largest = tl.maximum(largest, largest_of(rest))
            scale = row_scale(largest, QMAX)
            tl.store(scale_ptr + row, scale)
        else:
            scale = tl.load(given_ptr)
        store_codes(codes_ptr + k, values, scale, zero, mask, QMIN, QMAX, CLAMP, FMA)
        if SECOND > 0:
            store_codes(codes_ptr + k_rest, rest, scale, zero, mask_rest, QMIN, QMAX, CLAMP, FMA)
    else:
        if given_ptr is None:
            largest = tl.full((), 0, tl.int32)
            for start in range(0, K, FIRST):
                part = _load_values(x_ptr, pre_ptr, start + k, start + k < K)
                largest = tl.maximum(largest, largest_of(part))
            scale = row_scale(largest, QMAX)
            tl.store(scale_ptr + row, scale)
        else:
            scale = tl.load(given_ptr)
        for start in range(0, K, FIRST):
            mask = start + k < K
            values = _load_values(x_ptr, pre_ptr, start + k, mask)
            store_codes(codes_ptr + start + k, values, scale, zero, mask, QMIN, QMAX, CLAMP, FMA)


def row_blocks(columns: int, max_block: int = MAX_BLOCK) -> tuple[int, int, bool]:
    """(first, second, whole): powers of two that hold a row of ``columns`` together, if they hold all of it."""
    if columns > max_block:
        return min(STEP, 1 << (max_block.bit_length() - 1)), 0, False
    first = 1 << (columns.bit_length() - 1)
    second = 0 if first == columns else 1 << (columns - first - 1).bit_length()
    return (first * 2, 0, True) if second == first else (first, second, True)


def warps_for(block: int) -> int:
    """Warps of a program whose larger block has this many elements."""
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
    fma: bool = not INTERPRETED,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [M, K] of x and their scale, [M, 1] measured or [1, 1] given; as the CPU's ``quantize_rows``.

    Args:
        x: fp32, bf16 or fp16 [M, K], contiguous rows.
        qmin: lowest code, used with a given scale.
        qmax: highest code: 127, 7, or 448 for float8_e4m3fn codes.
        scale: one fp32 number; None measures one per row.
        zero_point: one int8 number, with ``scale`` only.
        pre_scale: fp32 [K].
        max_block: longest row that is kept in registers; longer ones take steps of at most ``STEP``.
        fma: divide with fused multiply-adds; False is slower and as exact.
    """
    (rows, columns), device = x.shape, x.device
    codes = torch.empty(rows, columns, dtype=torch.float8_e4m3fn if qmax == FLOAT8_MAX else torch.int8, device=device)
    measured = torch.empty(rows, 1, dtype=torch.float32, device=device) if scale is None else scale.reshape(1, 1)
    if rows == 0 or columns == 0:
        if scale is None:
            measured.fill_(torch.finfo(torch.float32).tiny)
        return codes, measured
    if x.stride(1) != 1:
        x = x.contiguous()
    pointers = (x, codes, measured, scale, zero_point, pre_scale)
    absent = (scale is None, zero_point is None, pre_scale is None)
    key = ("rows", x.shape, x.stride(), x.dtype, qmin, qmax, absent, max_block, fma, device.index)
    plan = plan_for(key, device)
    if plan is not None and plan.run(device.index, pointers):
        return codes, measured
    first, second, whole = row_blocks(columns, max_block)
    chosen = variant(
        quantize_rows_kernel,
        QMIN=qmin,
        QMAX=int(qmax),
        FIRST=first,
        SECOND=second,
        WHOLE=whole,
        FMA=fma,
        num_warps=warps_for(first),
        enable_fp_fusion=False,
    )
    start_and_keep(key, chosen, device, (rows, 1, 1), pointers, (columns, x.stride(0), columns))
    return codes, measured

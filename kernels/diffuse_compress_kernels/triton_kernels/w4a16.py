"""bf16 or fp16 activations times packed int4 weights with a scale (and zero point) per group of 32, 64 or 128 columns.

    y[m, n] = sum_k x[m, k] * s[n, g] * (q[n, k] - z[n, g]) + bias[n],   g = k // group size

q - z is exact in 16 bits, its product with s (rounded to 16 bits) is rounded once, sums are fp32. With one scale per
row, group size 0, s multiplies the fp32 sum instead. The weight stands
on the left of the dot: unpacked codes go into the tensor core's register operand on Hopper. With few tokens, several
programs share a tile's K and add their sums in a fixed order.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from diffuse_compress_kernels.triton_kernels.grid import row_offsets, sum_parts, tile_position, write_tile
from diffuse_compress_kernels.triton_kernels.launch import Operands, launch
from diffuse_compress_kernels.triton_kernels.tiles import TileConfig
from diffuse_compress_kernels.triton_kernels.unpack import to_float

__all__ = ["w4a16", "w4a16_kernel"]

HALF = tl.constexpr(64)
GROUP = tl.constexpr(128)


@triton.jit
def _group_values(places, step, groups, GROUP_SIZE: tl.constexpr):
    """Values of both halves of a step's 128 columns: [rows, 1], or [rows, 64] with groups of 32.

    A last step may have groups past the end: they repeat the last one, and x is 0 there.
    """
    if GROUP_SIZE == 128:
        low = tl.load(places + step)[:, None]
        high = low
    elif GROUP_SIZE == 64:
        low = tl.load(places + 2 * step)[:, None]
        high = tl.load(places + tl.minimum(2 * step + 1, groups - 1))[:, None]
    else:
        first = tl.arange(0, HALF)[None, :] < 32
        a = tl.load(places + 4 * step)[:, None]
        b = tl.load(places + tl.minimum(4 * step + 1, groups - 1))[:, None]
        c = tl.load(places + tl.minimum(4 * step + 2, groups - 1))[:, None]
        d = tl.load(places + tl.minimum(4 * step + 3, groups - 1))[:, None]
        low = tl.where(first, a, b)
        high = tl.where(first, c, d)
    return low, high


@triton.jit
def _dot_over_k(
    x,
    w,
    scale_ptr,
    zero_ptr,
    m0,
    n0,
    M,
    N,
    K,
    stride_xm,
    stride_wn,
    stride_sn,
    first_step,
    last_step,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TMA: tl.constexpr,
    EVEN_K: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    DTYPE: tl.constexpr,
    ASM: tl.constexpr,
):
    """acc fp32 [BLOCK_N, BLOCK_M] over some groups of 128 columns."""
    BFLOAT16: tl.constexpr = DTYPE == tl.bfloat16
    MAGIC: tl.constexpr = 136 if BFLOAT16 else 1032
    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    k = tl.arange(0, HALF)
    if not TMA:
        x_rows = row_offsets(m0, M, stride_xm, BLOCK_M)
        x_places = x + m0.to(tl.int64) * stride_xm + first_step * GROUP + (x_rows[:, None] + k[None, :])
        w_rows = row_offsets(n0, N, stride_wn, BLOCK_N)
        w_places = w + n0.to(tl.int64) * stride_wn + first_step * HALF + (w_rows[:, None] + k[None, :])
    scale_rows = n0.to(tl.int64) * stride_sn + row_offsets(n0, N, stride_sn, BLOCK_N)
    if GROUP_SIZE == 0:
        zero = tl.full((BLOCK_N, 1), MAGIC, DTYPE)
        if zero_ptr is not None:
            zero = (tl.load(zero_ptr + scale_rows).to(tl.int32) + MAGIC).to(DTYPE)[:, None]
    else:
        groups = tl.cdiv(K, GROUP_SIZE)
    for step in tl.range(first_step, last_step):
        if TMA:
            w_tile = w.load([n0, step * HALF])
            x_low = x.load([m0, step * GROUP])
            x_high = x.load([m0, step * GROUP + HALF])
        else:
            w_tile = tl.load(w_places)
            if EVEN_K:
                x_low = tl.load(x_places)
                x_high = tl.load(x_places + HALF)
            else:
                left = K - step * GROUP
                x_low = tl.load(x_places, mask=k[None, :] < left, other=0.0)
                x_high = tl.load(x_places + HALF, mask=k[None, :] < left - HALF, other=0.0)
        low, high = to_float(w_tile, BFLOAT16, ASM)
        if GROUP_SIZE == 0:
            low = low - zero
            high = high - zero
        else:
            if zero_ptr is None:
                low = low - tl.full((1, 1), MAGIC, DTYPE)
                high = high - tl.full((1, 1), MAGIC, DTYPE)
            else:
                zero_low, zero_high = _group_values(zero_ptr + scale_rows, step, groups, GROUP_SIZE)
                low = low - (zero_low.to(tl.int32) + MAGIC).to(DTYPE)
                high = high - (zero_high.to(tl.int32) + MAGIC).to(DTYPE)
            scale_low, scale_high = _group_values(scale_ptr + scale_rows, step, groups, GROUP_SIZE)
            low = low * scale_low.to(DTYPE)
            high = high * scale_high.to(DTYPE)
        acc = tl.dot(low, x_low.T, acc)
        acc = tl.dot(high, x_high.T, acc)
        if not TMA:
            x_places += GROUP
            w_places += HALF
    return acc


@triton.jit(do_not_specialize=["M", "programs", "stride_gn"])
def w4a16_kernel(
    x,
    w,
    y_ptr,
    y_desc,
    x_scale_ptr,
    w_scale_ptr,
    offset_ptr,
    bias_ptr,
    parts_ptr,
    counters_ptr,
    group_scale_ptr,
    zero_ptr,
    M,
    N,
    K,
    stride_xm,
    stride_wn,
    stride_ym,
    programs,
    stride_gn,
    X_SCALES: tl.constexpr,
    W_SCALES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUP_M: tl.constexpr,
    SPLIT_K: tl.constexpr,
    TMA: tl.constexpr,
    PERSISTENT: tl.constexpr,
    EVEN_K: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    ASM: tl.constexpr,
):
    """x [M, K] bf16 or fp16 and w [N, K / 2] uint8: pointers, or descriptors of half a group's columns with TMA."""
    DTYPE: tl.constexpr = y_ptr.dtype.element_ty
    steps = tl.cdiv(K, GROUP)
    if PERSISTENT:
        tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
        for tile in tl.range(tl.program_id(0), tiles, programs, flatten=True):
            m0, n0 = tile_position(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
            acc = _dot_over_k(
                x, w, group_scale_ptr, zero_ptr, m0, n0, M, N, K, stride_xm, stride_wn, stride_gn, 0, steps,
                BLOCK_M, BLOCK_N, TMA, EVEN_K, GROUP_SIZE, DTYPE, ASM,
            )  # fmt: skip
            write_tile(
                acc, x_scale_ptr, w_scale_ptr, offset_ptr, bias_ptr, y_ptr, y_desc, m0, n0, M, N, stride_ym,
                X_SCALES, W_SCALES, 0, BLOCK_M, BLOCK_N, True,
            )  # fmt: skip
    else:
        tile = tl.program_id(0)
        part = tl.program_id(1)
        m0, n0 = tile_position(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
        per_part = tl.cdiv(steps, SPLIT_K)
        first = part * per_part
        acc = _dot_over_k(
            x, w, group_scale_ptr, zero_ptr, m0, n0, M, N, K, stride_xm, stride_wn, stride_gn,
            tl.minimum(first, steps), tl.minimum(first + per_part, steps),
            BLOCK_M, BLOCK_N, TMA, EVEN_K, GROUP_SIZE, DTYPE, ASM,
        )  # fmt: skip
        last = True
        if SPLIT_K > 1:
            last, acc = sum_parts(acc, parts_ptr, counters_ptr, tile, part, SPLIT_K, BLOCK_N, BLOCK_M)
        if last:
            write_tile(
                acc, x_scale_ptr, w_scale_ptr, offset_ptr, bias_ptr, y_ptr, y_desc, m0, n0, M, N, stride_ym,
                X_SCALES, W_SCALES, 0, BLOCK_M, BLOCK_N, True,
            )  # fmt: skip


def w4a16(
    x: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    group_size: int,
    config: TileConfig,
    *,
    bias: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    asm: bool = True,
    key: tuple[Any, ...] | None = None,
) -> torch.Tensor:
    """y [M, N] in the dtype of x; equation in the module docstring.

    Args:
        x: bf16 or fp16 [M, K].
        packed: int8 bytes [N, ceil(K / 128) * 64], two codes each: columns j and j + 64 of a group of 128.
        scale: fp32 [N, ceil(K / group_size)]; with ``group_size`` 0 [N, 1] or [1, 1].
        zero_point: int8 of ``scale``'s shape; None is symmetric.
        group_size: 32, 64, 128, or 0 for a whole row.
        config: tile shape.
        bias: [N], any float dtype.
        out: where to write, [M, N] in the dtype of x with contiguous rows.
        asm: unpack with inline assembly; False is slower and works in the interpreter too.
        key: under which the call leaves a plan for calls like it.
    """
    row_scale = scale if group_size == 0 else None
    if group_size == 0 and zero_point is not None:
        zero_point = zero_point.expand(packed.shape[0], 1)
    values = zero_point if group_size == 0 else scale
    operands = Operands(x, packed.view(torch.uint8), x.shape[1], None, row_scale, None, bias, out, x.dtype, key)
    constants = (("GROUP_SIZE", group_size), ("ASM", asm))
    pointers = (None if group_size == 0 else scale, zero_point)
    stride_gn = 0 if values is None else values.stride(0)
    return launch(w4a16_kernel, operands, config, constants, torch.float32, pointers, (stride_gn,), 64, 64)

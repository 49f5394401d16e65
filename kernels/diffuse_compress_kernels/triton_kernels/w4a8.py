"""int8 activations times packed int4 weights, exact int32 sums, scales and bias applied before writing.

Per channel:   y[m, n] = (sum_k x[m, k] * q[n, k]) * x_scale[m] * w_scale[n] + bias[n]
Two levels:    the same with q[n, k] * group_scale[n, k // 128], an integer of at most 112, in place of q.

The weight stands on the left of the dot, so on Hopper its codes go from the unpacking straight into the tensor core's
register operand; on the right they would pass through shared memory. Tokens are the columns of the accumulator.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from diffuse_compress_kernels.triton_kernels.grid import row_offsets, sum_parts, tile_position, write_tile
from diffuse_compress_kernels.triton_kernels.launch import Operands, launch
from diffuse_compress_kernels.triton_kernels.tiles import TileConfig
from diffuse_compress_kernels.triton_kernels.unpack import to_int8_scaled, to_int8_times_16

__all__ = ["w4a8", "w4a8_kernel"]

HALF = tl.constexpr(64)
GROUP = tl.constexpr(128)


@triton.jit
def _dot_over_k(
    x,
    w,
    group_scale_ptr,
    m0,
    n0,
    M,
    N,
    K,
    stride_xm,
    stride_wn,
    stride_gn,
    first_step,
    last_step,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TMA: tl.constexpr,
    EVEN_K: tl.constexpr,
    TWO_LEVEL: tl.constexpr,
    ASM: tl.constexpr,
):
    """acc int32 [BLOCK_N, BLOCK_M] over some groups of 128 columns; 16 times the sum unless TWO_LEVEL."""
    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.int32)
    k = tl.arange(0, HALF)
    if not TMA:
        x_rows = row_offsets(m0, M, stride_xm, BLOCK_M)
        x_places = x + m0.to(tl.int64) * stride_xm + first_step * GROUP + (x_rows[:, None] + k[None, :])
        w_rows = row_offsets(n0, N, stride_wn, BLOCK_N)
        w_places = w + n0.to(tl.int64) * stride_wn + first_step * HALF + (w_rows[:, None] + k[None, :])
    if TWO_LEVEL:
        scale_places = group_scale_ptr + n0.to(tl.int64) * stride_gn + row_offsets(n0, N, stride_gn, BLOCK_N)
        scale = tl.load(scale_places + first_step).to(tl.int32)
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
                x_low = tl.load(x_places, mask=k[None, :] < left, other=0)
                x_high = tl.load(x_places + HALF, mask=k[None, :] < left - HALF, other=0)
        if TWO_LEVEL:
            low, high = to_int8_scaled(w_tile, scale[:, None], ASM)
            # The next group's scales are on their way while this one is multiplied: loads of bytes are not pipelined.
            scale = tl.load(scale_places + tl.minimum(step + 1, last_step - 1)).to(tl.int32)
        else:
            low, high = to_int8_times_16(w_tile, ASM)
        acc = tl.dot(low, x_low.T, acc, out_dtype=tl.int32)
        acc = tl.dot(high, x_high.T, acc, out_dtype=tl.int32)
        if not TMA:
            x_places += GROUP
            w_places += HALF
    return acc


@triton.jit(do_not_specialize=["M", "programs", "stride_gn"])
def w4a8_kernel(
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
    TWO_LEVEL: tl.constexpr,
    ASM: tl.constexpr,
):
    """x [M, K] int8 and w [N, K / 2] uint8: pointers, or descriptors of half a group's columns with TMA."""
    SHIFT: tl.constexpr = 0 if TWO_LEVEL else 4
    steps = tl.cdiv(K, GROUP)
    if PERSISTENT:
        tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
        for tile in tl.range(tl.program_id(0), tiles, programs, flatten=True):
            m0, n0 = tile_position(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
            acc = _dot_over_k(
                x, w, group_scale_ptr, m0, n0, M, N, K, stride_xm, stride_wn, stride_gn, 0, steps,
                BLOCK_M, BLOCK_N, TMA, EVEN_K, TWO_LEVEL, ASM,
            )  # fmt: skip
            write_tile(
                acc, x_scale_ptr, w_scale_ptr, offset_ptr, bias_ptr, y_ptr, y_desc, m0, n0, M, N, stride_ym,
                X_SCALES, W_SCALES, SHIFT, BLOCK_M, BLOCK_N, True,
            )  # fmt: skip
    else:
        tile = tl.program_id(0)
        part = tl.program_id(1)
        m0, n0 = tile_position(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
        per_part = tl.cdiv(steps, SPLIT_K)
        first = part * per_part
        acc = _dot_over_k(
            x, w, group_scale_ptr, m0, n0, M, N, K, stride_xm, stride_wn, stride_gn,
            tl.minimum(first, steps), tl.minimum(first + per_part, steps),
            BLOCK_M, BLOCK_N, TMA, EVEN_K, TWO_LEVEL, ASM,
        )  # fmt: skip
        last = True
        if SPLIT_K > 1:
            last, acc = sum_parts(acc, parts_ptr, counters_ptr, tile, part, SPLIT_K, BLOCK_N, BLOCK_M)
        if last:
            write_tile(
                acc, x_scale_ptr, w_scale_ptr, offset_ptr, bias_ptr, y_ptr, y_desc, m0, n0, M, N, stride_ym,
                X_SCALES, W_SCALES, SHIFT, BLOCK_M, BLOCK_N, True,
            )  # fmt: skip


def w4a8(
    codes: torch.Tensor,
    x_scale: torch.Tensor | None,
    packed: torch.Tensor,
    w_scale: torch.Tensor | None,
    config: TileConfig,
    *,
    group_scale: torch.Tensor | None = None,
    offset: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
    asm: bool = True,
    key: tuple[Any, ...] | None = None,
) -> torch.Tensor:
    """y [M, N]; equations in the module docstring.

    Args:
        codes: int8 [M, K]; int4 codes in int8 are welcome.
        x_scale: fp32 of 1 or M numbers; None leaves it out.
        packed: int8 bytes [N, ceil(K / 128) * 64], two codes each: columns j and j + 64 of a group of 128.
        w_scale: fp32 of 1 or N numbers; None leaves it out.
        config: tile shape.
        group_scale: int8 [N, ceil(K / 128)] in 1..16 for two-level weights.
        offset: int32 [N], what a zero point of the input adds to the sums.
        bias: [N], any float dtype.
        out: where to write, [M, N] with contiguous rows; int32 with no scales holds the accumulators.
        dtype: of the result if ``out`` is None.
        asm: unpack with inline assembly; False is slower and works in the interpreter too.
        key: under which the call leaves a plan for calls like it.
    """
    operands = Operands(
        codes, packed.view(torch.uint8), codes.shape[1], x_scale, w_scale, offset, bias, out, dtype, key
    )
    constants = (("TWO_LEVEL", group_scale is not None), ("ASM", asm))
    stride_gn = 0 if group_scale is None else group_scale.stride(0)
    return launch(w4a8_kernel, operands, config, constants, torch.int32, (group_scale,), (stride_gn,), 64, 64)

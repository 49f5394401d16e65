"""Products with 8-bit weights, scales and bias applied to the accumulator before it is written.

    y[m, n] = (sum_k x[m, k] * w[n, k] - offset[n]) * x_scale[m] * w_scale[n] + bias[n]

x and the weight are int8, or float8, or x has 16 bits and the weight's codes are converted to its dtype, exactly. int8
sums are int32 and exact. float8 sums are the tensor core's, about 14 bits before Blackwell. Either operand may stand on
the left of the dot: with the weight there, few tokens become the narrow side of the instruction.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from diffuse_compress_kernels.triton_kernels.grid import row_offsets, sum_parts, tile_position, write_tile
from diffuse_compress_kernels.triton_kernels.launch import Operands, launch
from diffuse_compress_kernels.triton_kernels.start import INTERPRETED
from diffuse_compress_kernels.triton_kernels.tiles import TileConfig
from diffuse_compress_kernels.triton_kernels.unpack import codes_to_float

__all__ = ["w8a8", "w8a8_kernel"]


@triton.jit
def _dot_over_k(
    x,
    w,
    m0,
    n0,
    M,
    N,
    K,
    stride_xm,
    stride_wn,
    first_step,
    last_step,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WEIGHT_LEFT: tl.constexpr,
    TMA: tl.constexpr,
    EVEN_K: tl.constexpr,
    ACC: tl.constexpr,
    ASM: tl.constexpr,
):
    """acc [BLOCK_N, BLOCK_M] if WEIGHT_LEFT, else [BLOCK_M, BLOCK_N], over some steps of K."""
    acc = tl.zeros((BLOCK_N, BLOCK_M) if WEIGHT_LEFT else (BLOCK_M, BLOCK_N), dtype=ACC)
    k = tl.arange(0, BLOCK_K)
    if not TMA:
        x_rows = row_offsets(m0, M, stride_xm, BLOCK_M)
        w_rows = row_offsets(n0, N, stride_wn, BLOCK_N)
        x_start = x + m0.to(tl.int64) * stride_xm + first_step * BLOCK_K
        w_start = w + n0.to(tl.int64) * stride_wn + first_step * BLOCK_K
        x_places = x_start + (x_rows[:, None] + k[None, :])
        w_places = w_start + (w_rows[:, None] + k[None, :])
    for step in tl.range(first_step, last_step):
        if TMA:
            x_tile = x.load([m0, step * BLOCK_K])
            w_tile = w.load([n0, step * BLOCK_K])
        elif EVEN_K:
            x_tile = tl.load(x_places)
            w_tile = tl.load(w_places)
        else:
            inside = k[None, :] < K - step * BLOCK_K
            x_tile = tl.load(x_places, mask=inside, other=0.0)
            w_tile = tl.load(w_places, mask=inside, other=0.0)
        if w_tile.dtype != x_tile.dtype:
            # Every 8-bit code is a number of 16 bits.
            w_tile = codes_to_float(w_tile, x_tile.dtype, ASM)
        if WEIGHT_LEFT:
            acc = tl.dot(w_tile, x_tile.T, acc, out_dtype=ACC)
        else:
            acc = tl.dot(x_tile, w_tile.T, acc, out_dtype=ACC)
        if not TMA:
            x_places += BLOCK_K
            w_places += BLOCK_K
    return acc


@triton.jit(do_not_specialize=["M", "programs"])
def w8a8_kernel(
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
    M,
    N,
    K,
    stride_xm,
    stride_wn,
    stride_ym,
    programs,
    X_SCALES: tl.constexpr,
    W_SCALES: tl.constexpr,
    INTEGER: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    SPLIT_K: tl.constexpr,
    WEIGHT_LEFT: tl.constexpr,
    TMA: tl.constexpr,
    PERSISTENT: tl.constexpr,
    EVEN_K: tl.constexpr,
    ASM: tl.constexpr,
):
    """x, w: pointers to matrices, or their descriptors with TMA. A program per tile and part of K, or, if
    PERSISTENT, ``programs`` that walk over the tiles."""
    ACC: tl.constexpr = tl.int32 if INTEGER else tl.float32
    ROWS: tl.constexpr = BLOCK_N if WEIGHT_LEFT else BLOCK_M
    COLS: tl.constexpr = BLOCK_M if WEIGHT_LEFT else BLOCK_N
    steps = tl.cdiv(K, BLOCK_K)
    if PERSISTENT:
        tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
        for tile in tl.range(tl.program_id(0), tiles, programs, flatten=True):
            m0, n0 = tile_position(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
            acc = _dot_over_k(
                x, w, m0, n0, M, N, K, stride_xm, stride_wn, 0, steps,
                BLOCK_M, BLOCK_N, BLOCK_K, WEIGHT_LEFT, TMA, EVEN_K, ACC, ASM,
            )  # fmt: skip
            write_tile(
                acc, x_scale_ptr, w_scale_ptr, offset_ptr, bias_ptr, y_ptr, y_desc, m0, n0, M, N, stride_ym,
                X_SCALES, W_SCALES, 0, BLOCK_M, BLOCK_N, WEIGHT_LEFT,
            )  # fmt: skip
    else:
        tile = tl.program_id(0)
        part = tl.program_id(1)
        m0, n0 = tile_position(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
        per_part = tl.cdiv(steps, SPLIT_K)
        first = part * per_part
        last_step = tl.minimum(first + per_part, steps)
        acc = _dot_over_k(
            x, w, m0, n0, M, N, K, stride_xm, stride_wn, first, last_step,
            BLOCK_M, BLOCK_N, BLOCK_K, WEIGHT_LEFT, TMA, EVEN_K, ACC, ASM,
        )  # fmt: skip
        last = True
        if SPLIT_K > 1:
            last, acc = sum_parts(acc, parts_ptr, counters_ptr, tile, part, SPLIT_K, ROWS, COLS)
        if last:
            write_tile(
                acc, x_scale_ptr, w_scale_ptr, offset_ptr, bias_ptr, y_ptr, y_desc, m0, n0, M, N, stride_ym,
                X_SCALES, W_SCALES, 0, BLOCK_M, BLOCK_N, WEIGHT_LEFT,
            )  # fmt: skip


def w8a8(
    codes: torch.Tensor,
    x_scale: torch.Tensor | None,
    weight: torch.Tensor,
    w_scale: torch.Tensor | None,
    config: TileConfig,
    *,
    offset: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
    asm: bool = not INTERPRETED,
    key: tuple[Any, ...] | None = None,
) -> torch.Tensor:
    """y [M, N]; equation in the module docstring.

    Args:
        codes: int8, float8_e4m3fn, bf16 or fp16 [M, K].
        x_scale: fp32 of 1 or M numbers; None leaves it out.
        weight: [N, K] of the same dtype; int8 or float8_e4m3fn if that has 16 bits.
        w_scale: fp32 of 1 or N numbers; None leaves it out.
        config: tile shape.
        offset: int32 [N], int8 only.
        bias: [N], any float dtype.
        out: where to write, [M, N] with contiguous rows; int32 with no scales holds the accumulators.
        dtype: of the result if ``out`` is None.
        asm: convert codes with inline assembly; False is slower and works in the interpreter too.
        key: under which the call leaves a plan for calls like it.
    """
    operands = Operands(codes, weight, codes.shape[1], x_scale, w_scale, offset, bias, out, dtype, key)
    integer = codes.dtype == torch.int8
    kind = (("INTEGER", integer), ("BLOCK_K", config.block_k), ("WEIGHT_LEFT", config.weight_left))
    constants = (*kind, ("ASM", asm and codes.dtype != weight.dtype))
    return launch(w8a8_kernel, operands, config, constants, torch.int32 if integer else torch.float32)

"""Pieces that every product shares: the order of tiles, addresses of rows, sums over parts of K, the epilogue."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["row_offsets", "sum_parts", "tile_position", "write_tile"]


@triton.jit
def tile_position(tile, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """(m0, n0) of a tile. GROUP_M rows of tiles go column by column: neighbours in time share weights in L2."""
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    per_group = GROUP_M * tiles_n
    first = (tile // per_group) * GROUP_M
    size = tl.minimum(tiles_m - first, GROUP_M)
    inside = tile % per_group
    return (first + inside % size) * BLOCK_M, (inside // size) * BLOCK_N


@triton.jit
def row_offsets(first, count, stride, BLOCK: tl.constexpr):
    """int32 offsets of BLOCK rows from row ``first``; rows past the end repeat the last one, so loads need no mask."""
    return tl.minimum(tl.arange(0, BLOCK), count - 1 - first) * stride


@triton.jit
def sum_parts(acc, parts_ptr, counters_ptr, tile, part, SPLIT_K: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """(last, sum): the program that arrives last at a tile adds all partial sums, in the order of the parts.

    The order, not the arrival, fixes the result, so floats are deterministic. The counter is left at 0 for the next
    call.
    """
    inner = tl.arange(0, ROWS)[:, None] * COLS + tl.arange(0, COLS)[None, :]
    base = parts_ptr + tile.to(tl.int64) * (SPLIT_K * ROWS * COLS)
    tl.store(base + part * (ROWS * COLS) + inner, acc)
    # All threads' stores come before the one thread's release.
    tl.debug_barrier()
    arrived = tl.atomic_add(counters_ptr + tile, 1, sem="acq_rel", scope="gpu")
    last = arrived == SPLIT_K - 1
    if last:
        # Past L1, which does not see other multiprocessors' stores.
        acc = tl.load(base + inner, cache_modifier=".cg")
        # Unrolled, so that all loads are on their way before the first sum.
        for other in tl.static_range(1, SPLIT_K):
            acc += tl.load(base + other * (ROWS * COLS) + inner, cache_modifier=".cg")
        tl.store(counters_ptr + tile, 0)
    return last, acc


@triton.jit
def write_tile(
    acc,
    x_scale_ptr,
    w_scale_ptr,
    offset_ptr,
    bias_ptr,
    y_ptr,
    y_desc,
    m0,
    n0,
    M,
    N,
    stride_ym,
    X_SCALES: tl.constexpr,
    W_SCALES: tl.constexpr,
    SHIFT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):
    """y[m0:, n0:] = (acc >> SHIFT - offset[n]) * x_scale[m] * w_scale[n] + bias[n], fp32, rounded once.

    X_SCALES, W_SCALES: "none", "one" or "rows". TRANSPOSED: acc is [BLOCK_N, BLOCK_M].
    """
    m = m0 + tl.arange(0, BLOCK_M)
    n = n0 + tl.arange(0, BLOCK_N)
    if SHIFT > 0:
        acc = acc >> SHIFT
    if offset_ptr is not None:
        offset = tl.load(offset_ptr + n, mask=n < N, other=0)
        acc -= offset[:, None] if TRANSPOSED else offset[None, :]
    values = acc.to(tl.float32)
    if X_SCALES == "rows":
        x_scale = tl.load(x_scale_ptr + m, mask=m < M, other=0.0)
        values *= x_scale[None, :] if TRANSPOSED else x_scale[:, None]
    if X_SCALES == "one":
        values *= tl.load(x_scale_ptr)
    if W_SCALES == "rows":
        w_scale = tl.load(w_scale_ptr + n, mask=n < N, other=0.0)
        values *= w_scale[:, None] if TRANSPOSED else w_scale[None, :]
    if W_SCALES == "one":
        values *= tl.load(w_scale_ptr)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)
        values += bias[:, None] if TRANSPOSED else bias[None, :]
    result = values.to(y_ptr.dtype.element_ty)
    if TRANSPOSED:
        result = tl.trans(result)
    if y_desc is not None:
        y_desc.store([m0, n0], result)
    else:
        places = y_ptr + m0.to(tl.int64) * stride_ym + tl.arange(0, BLOCK_M)[:, None] * stride_ym + n[None, :]
        tl.store(places, result, mask=(m[:, None] < M) & (n[None, :] < N))

"""Quantized weights written out: packed int4 as int8, any as float matrices, a block of rows at a time.

With many tokens a product is bound by its arithmetic, and unpacking once, at memory speed, costs less than unpacking
in front of every tensor-core instruction. The matrix lives for one call, in chunks of rows that bound it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from diffuse_compress_kernels.triton_kernels.start import variant

__all__ = ["expand_codes", "expand_to_float", "expand_to_int8"]

HALF = tl.constexpr(64)
GROUP = tl.constexpr(128)
BLOCK_N = 32
WARPS = 4
CODES_BLOCK_N, CODES_BLOCK_K = 16, 256


@triton.jit
def _signed_codes(packed):
    low = ((packed & 0x0F).to(tl.int8, bitcast=True) ^ 8) - 8
    high = ((packed >> 4).to(tl.int8, bitcast=True) ^ 8) - 8
    return low, high


@triton.jit
def expand_to_int8_kernel(
    packed_ptr, group_scale_ptr, out_ptr, N, K, stride_pn, stride_gn, stride_on, BLOCK_N: tl.constexpr
):
    """Program (rows, group of 128 columns): codes, times the integer scale of their group if there is one."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    group = tl.program_id(1)
    rows = n.to(tl.int64)
    n_mask = n < N
    j = tl.arange(0, HALF)
    packed = tl.load(packed_ptr + rows[:, None] * stride_pn + group * HALF + j[None, :], mask=n_mask[:, None], other=0)
    low, high = _signed_codes(packed)
    if group_scale_ptr is not None:
        scale = tl.load(group_scale_ptr + rows * stride_gn + group, mask=n_mask, other=1)[:, None]
        low *= scale
        high *= scale
    k = group * GROUP + j
    places = out_ptr + rows[:, None] * stride_on + k[None, :]
    tl.store(places, low, mask=n_mask[:, None] & (k[None, :] < K))
    tl.store(places + HALF, high, mask=n_mask[:, None] & (k[None, :] < K - HALF))


@triton.jit
def _per_group(places, group, groups, GROUP_SIZE: tl.constexpr):
    """Values of both halves of a group of 128 columns: [rows, 1] or [rows, 64]."""
    if GROUP_SIZE == 0:
        low = tl.load(places)[:, None]
        high = low
    elif GROUP_SIZE == 128:
        low = tl.load(places + group)[:, None]
        high = low
    else:
        per_group: tl.constexpr = GROUP // GROUP_SIZE
        which = group * per_group + tl.arange(0, HALF)[None, :] // GROUP_SIZE
        low = tl.load(places[:, None] + tl.minimum(which, groups - 1))
        high = tl.load(places[:, None] + tl.minimum(which + HALF // GROUP_SIZE, groups - 1))
    return low, high


@triton.jit
def expand_to_float_kernel(
    packed_ptr,
    scale_ptr,
    zero_ptr,
    out_ptr,
    N,
    K,
    stride_pn,
    stride_sn,
    stride_zn,
    stride_on,
    GROUP_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Program (rows, group of 128 columns): scale * (code - zero point) in fp32, rounded once."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    group = tl.program_id(1)
    rows = tl.minimum(n, N - 1).to(tl.int64)
    j = tl.arange(0, HALF)
    packed = tl.load(packed_ptr + rows[:, None] * stride_pn + group * HALF + j[None, :])
    low, high = _signed_codes(packed)
    low = low.to(tl.float32)
    high = high.to(tl.float32)
    groups = 1 if GROUP_SIZE == 0 else tl.cdiv(K, GROUP_SIZE)
    if zero_ptr is not None:
        zero_low, zero_high = _per_group(zero_ptr + rows * stride_zn, group, groups, GROUP_SIZE)
        low -= zero_low.to(tl.float32)
        high -= zero_high.to(tl.float32)
    scale_low, scale_high = _per_group(scale_ptr + rows * stride_sn, group, groups, GROUP_SIZE)
    dtype = out_ptr.dtype.element_ty
    k = group * GROUP + j
    places = out_ptr + rows[:, None] * stride_on + k[None, :]
    mask = (n < N)[:, None]
    tl.store(places, (low * scale_low).to(dtype), mask=mask & (k[None, :] < K))
    tl.store(places + HALF, (high * scale_high).to(dtype), mask=mask & (k[None, :] < K - HALF))


@triton.jit
def expand_codes_kernel(
    codes_ptr,
    scale_ptr,
    zero_ptr,
    out_ptr,
    N,
    K,
    stride_cn,
    stride_sn,
    stride_zn,
    stride_on,
    GROUP_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Program (rows, columns): scale * (code - zero point) in fp32, rounded once. GROUP_SIZE 0: a scale per row."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    rows = tl.minimum(n, N - 1).to(tl.int64)
    mask = (n < N)[:, None] & (k < K)[None, :]
    values = tl.load(codes_ptr + (rows * stride_cn)[:, None] + k[None, :], mask=mask, other=0.0).to(tl.float32)
    if GROUP_SIZE == 0:
        if zero_ptr is not None:
            values -= tl.load(zero_ptr + rows * stride_zn).to(tl.float32)[:, None]
        values *= tl.load(scale_ptr + rows * stride_sn)[:, None]
    else:
        group = (tl.minimum(k, K - 1) // GROUP_SIZE)[None, :]
        if zero_ptr is not None:
            values -= tl.load(zero_ptr + (rows * stride_zn)[:, None] + group).to(tl.float32)
        values *= tl.load(scale_ptr + (rows * stride_sn)[:, None] + group)
    tl.store(out_ptr + (rows * stride_on)[:, None] + k[None, :], values.to(out_ptr.dtype.element_ty), mask=mask)


def expand_to_int8(packed: torch.Tensor, group_scale: torch.Tensor | None, out: torch.Tensor) -> torch.Tensor:
    """``out`` int8 [N, K] = codes of packed int8 [N, ceil(K / 128) * 64], times group_scale int8 [N, ceil(K / 128)]."""
    outputs, columns = out.shape
    variant(expand_to_int8_kernel, BLOCK_N=BLOCK_N, num_warps=WARPS).start(
        packed.device,
        (-(-outputs // BLOCK_N), -(-columns // 128), 1),
        (packed.view(torch.uint8), group_scale, out),
        (outputs, columns, packed.stride(0), 0 if group_scale is None else group_scale.stride(0), out.stride(0)),
    )
    return out


def expand_to_float(
    packed: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None, group_size: int, out: torch.Tensor
) -> torch.Tensor:
    """``out`` [N, K], any float dtype = scale * (codes - zero_point); ``group_size`` 0 is one scale per row."""
    outputs, columns = out.shape
    variant(expand_to_float_kernel, GROUP_SIZE=group_size, BLOCK_N=BLOCK_N, num_warps=WARPS).start(
        packed.device,
        (-(-outputs // BLOCK_N), -(-columns // 128), 1),
        (packed.view(torch.uint8), scale, zero_point, out),
        (outputs, columns, packed.stride(0), _row_stride(scale), _row_stride(zero_point), out.stride(0)),
    )
    return out


def _row_stride(qparam: torch.Tensor | None) -> int:
    """0 where all rows share what the first has."""
    return 0 if qparam is None or qparam.shape[0] == 1 else qparam.stride(0)


def expand_codes(
    codes: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None, group_size: int, out: torch.Tensor
) -> torch.Tensor:
    """``out`` [N, K], any float dtype = scale * (codes - zero_point) of int8 or float8_e4m3fn codes [N, K]."""
    outputs, columns = out.shape
    chosen = variant(
        expand_codes_kernel, GROUP_SIZE=group_size, BLOCK_N=CODES_BLOCK_N, BLOCK_K=CODES_BLOCK_K, num_warps=WARPS
    )
    chosen.start(
        codes.device,
        (-(-outputs // CODES_BLOCK_N), -(-columns // CODES_BLOCK_K), 1),
        (codes, scale, zero_point, out),
        (outputs, columns, codes.stride(0), _row_stride(scale), _row_stride(zero_point), out.stride(0)),
    )
    return out

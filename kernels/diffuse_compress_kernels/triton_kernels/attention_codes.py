"""Keys and values of attention as codes: two launches before the attention kernel.

    k_mean[d] = mean_n k[n, d]        t[block] = max |k - k_mean| / 127        codes = round((k - k_mean) / t)
    u[d] = max_n |v[n, d]| / 448      codes = e4m3(v / u)

The first launch adds up keys and finds the largest values of each channel over chunks of tokens; the second joins the
chunks, always in the same order, and writes codes. Keys: [B, Hkv, S', D'] with S' a multiple of 128 and D' that of
``columns_of``; what is beyond tokens and channels is 0. Values, for the fast variant only: turned to [B, Hkv, D', S'],
as tensor cores read 8-bit operands along the summed dimension, and keys of every 16 in the order of ``key_at``.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from diffuse_compress_kernels.triton_kernels.attention_tables import KEY_BLOCK, columns_of
from diffuse_compress_kernels.triton_kernels.divide import larger
from diffuse_compress_kernels.triton_kernels.plans import plan_for, start_and_keep
from diffuse_compress_kernels.triton_kernels.rows import MIN_SCALE, ROUNDING_MAGIC
from diffuse_compress_kernels.triton_kernels.start import variant

__all__ = ["KeyValueCodes", "codes_kernel", "floored", "key_at", "quantize_keys_values", "statistics_kernel"]

BLOCK_S = 64
MAX_CHUNKS = 32
FLOAT8_MAX = tl.constexpr(448.0)


class KeyValueCodes(NamedTuple):
    """What the attention kernel reads; values and their scale are None where it reads them as they are.

    keys: int8 [B, Hkv, S', D'].
    key_scale: fp32 [B, Hkv, S' / 128].
    values: float8_e4m3fn [B, Hkv, D', S'].
    value_scale: fp32 [B, Hkv, D'].
    """

    keys: torch.Tensor
    key_scale: torch.Tensor
    values: torch.Tensor | None
    value_scale: torch.Tensor | None


@triton.jit
def key_at(place):
    """The key whose value stands at a place.

    A thread of a tensor core's result holds columns 2c, 2c + 1, 2c + 8, 2c + 9 of 16, and as 8-bit left operand of the
    next product it must hold 4c to 4c + 3: in this order it already does.
    """
    return (place & -16) | ((place & 2) << 2) | ((place & 12) >> 1) | (place & 1)


@triton.jit
def floored(scale):
    """A scale to divide by: never 0, and NaN stays, so that it shows in the output."""
    return tl.where(scale < MIN_SCALE, MIN_SCALE, scale)


@triton.jit(do_not_specialize=["S"])
def statistics_kernel(
    k_ptr, v_ptr, sums_ptr, maxima_ptr, lengths_ptr,
    S, D, chunk,
    stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Per chunk of tokens, head and batch: sums [B, H, chunks, BLOCK_D] of keys, largest magnitudes of values."""
    part, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    length = S
    if lengths_ptr is not None:
        length = tl.minimum(S, tl.load(lengths_ptr + batch).to(tl.int32))
    d = tl.arange(0, BLOCK_D)
    inside = (d < D)[None, :]
    k_ptr += batch * stride_kb + head.to(tl.int64) * stride_kh
    total = tl.zeros((BLOCK_D,), tl.float32)
    largest = tl.zeros((BLOCK_D,), tl.float32)
    if v_ptr is not None:
        v_ptr += batch * stride_vb + head.to(tl.int64) * stride_vh
    for start in range(part * chunk, tl.minimum((part + 1) * chunk, length), BLOCK_S):
        n = start + tl.arange(0, BLOCK_S)
        mask = (n < length)[:, None] & inside
        total += tl.sum(tl.load(k_ptr + n[:, None] * stride_ks + d[None, :], mask=mask, other=0.0).to(tl.float32), 0)
        if v_ptr is not None:
            values = tl.load(v_ptr + n[:, None] * stride_vs + d[None, :], mask=mask, other=0.0).to(tl.float32)
            largest = larger(largest, tl.reduce(tl.abs(values), 0, larger))
    place = ((batch * tl.num_programs(1) + head) * tl.num_programs(0) + part) * BLOCK_D + d
    tl.store(sums_ptr + place, total)
    if v_ptr is not None:
        tl.store(maxima_ptr + place, largest)


@triton.jit(do_not_specialize=["S", "chunks"])
def codes_kernel(
    k_ptr, v_ptr, sums_ptr, maxima_ptr, lengths_ptr, k_codes_ptr, k_scale_ptr, v_codes_ptr, v_scale_ptr,
    S, D, heads, chunks,
    stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs, k_columns, v_columns, places,
    BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A program per block of tokens, head (of keys, then of values) and batch; ``places`` is S'."""
    block, batch = tl.program_id(0), tl.program_id(2).to(tl.int64)
    head = tl.program_id(1) % heads
    length = S
    if lengths_ptr is not None:
        length = tl.minimum(S, tl.load(lengths_ptr + batch).to(tl.int32))
    d = tl.arange(0, BLOCK_D)
    inside = (d < D)[None, :]
    row = batch * heads + head
    statistics = row * chunks * BLOCK_D + d
    j = block * BLOCK_S + tl.arange(0, BLOCK_S)
    if tl.program_id(1) < heads:
        total = tl.zeros((BLOCK_D,), tl.float32)
        for part in range(chunks):
            total += tl.load(sums_ptr + statistics + part * BLOCK_D)
        mean = total / tl.maximum(length, 1).to(tl.float32)
        mask = (j < length)[:, None] & inside
        places_k = k_ptr + batch * stride_kb + head.to(tl.int64) * stride_kh + j[:, None] * stride_ks + d[None, :]
        keys = tl.load(places_k, mask=mask, other=0.0).to(tl.float32)
        keys = tl.where(mask, keys - mean[None, :], 0.0)
        scale = floored(tl.reduce(tl.reduce(tl.abs(keys), 1, larger), 0, larger) / 127.0)
        codes = (tl.div_rn(keys, scale) + ROUNDING_MAGIC).to(tl.int32, bitcast=True).to(tl.int8)
        tl.store(k_scale_ptr + row * tl.num_programs(0) + block, scale)
        to = k_codes_ptr + (row * places + j[:, None]) * k_columns + d[None, :]
        tl.store(to, codes, mask=(d < k_columns)[None, :])
    else:
        largest = tl.zeros((BLOCK_D,), tl.float32)
        for part in range(chunks):
            largest = larger(largest, tl.load(maxima_ptr + statistics + part * BLOCK_D))
        scale = floored(largest / FLOAT8_MAX)
        n = key_at(j)
        mask = (n < length)[:, None] & inside
        places_v = v_ptr + batch * stride_vb + head.to(tl.int64) * stride_vh + n[:, None] * stride_vs + d[None, :]
        values = tl.load(places_v, mask=mask, other=0.0).to(tl.float32)
        codes = tl.div_rn(values, tl.broadcast_to(scale[None, :], values.shape))
        codes = tl.clamp(codes, -FLOAT8_MAX, FLOAT8_MAX).to(tl.float8e4nv)
        column = (d < v_columns)[None, :]
        tl.store(v_codes_ptr + (row * v_columns + d[None, :]) * places + j[:, None], codes, mask=column)
        tl.store(v_scale_ptr + row * v_columns + d, scale, mask=(d < v_columns) & (block == 0))


@lru_cache(maxsize=1024)
def _chunks(tokens: int) -> tuple[int, int]:
    """(chunks, tokens of each): enough programs for a large device, few enough to read what they left."""
    chunk = -(-tokens // (MAX_CHUNKS * BLOCK_S)) * BLOCK_S
    return -(-tokens // chunk), chunk


def quantize_keys_values(
    key: torch.Tensor, value: torch.Tensor, lengths: torch.Tensor | None, *, fp8_values: bool
) -> KeyValueCodes:
    """Codes of keys, and of values if ``fp8_values``.

    Args:
        key: fp16, bf16 or fp32 [B, Hkv, S, D], the last dimension contiguous.
        value: like key.
        lengths: int32 [B], tokens of each sample that count; None counts all.
        fp8_values: quantize the values too.
    """
    batch, heads, tokens, depth = key.shape
    first, second, v_second = columns_of(depth)
    k_columns, v_columns, blocks = first + second, first + v_second, -(-tokens // KEY_BLOCK)
    places, device = blocks * KEY_BLOCK, key.device
    block_d = triton.next_power_of_2(k_columns)
    chunks, chunk = _chunks(tokens)
    sums = torch.empty(batch, heads, chunks, block_d, dtype=torch.float32, device=device)
    keys = torch.empty(batch, heads, places, k_columns, dtype=torch.int8, device=device)
    key_scale = torch.empty(batch, heads, blocks, dtype=torch.float32, device=device)
    maxima = values = value_scale = read = None
    if fp8_values:
        read, maxima = value, torch.empty_like(sums)
        values = torch.empty(batch, heads, v_columns, places, dtype=torch.float8_e4m3fn, device=device)
        value_scale = torch.empty(batch, heads, v_columns, dtype=torch.float32, device=device)
    strides = (*key.stride()[:3], *value.stride()[:3])
    signature = (key.shape, key.dtype, strides, lengths is None, fp8_values, device.index)
    pointers: tuple[torch.Tensor | None, ...] = (key, read, sums, maxima, lengths)
    numbers: tuple[int, ...] = (tokens, depth, chunk, *strides)
    _start(("attention statistics", *signature), statistics_kernel, (chunks, heads, batch), pointers, numbers, BLOCK_S)
    pointers = (*pointers, keys, key_scale, values, value_scale)
    numbers = (tokens, depth, heads, chunks, *strides, k_columns, v_columns, places)
    grid = (blocks, heads * (1 + fp8_values), batch)
    _start(("attention codes", *signature), codes_kernel, grid, pointers, numbers, KEY_BLOCK)
    return KeyValueCodes(keys, key_scale, values, value_scale)


def _start(
    key: tuple[object, ...],
    kernel: object,
    grid: tuple[int, int, int],
    pointers: tuple[torch.Tensor | None, ...],
    numbers: tuple[int, ...],
    rows: int,
) -> None:
    keys = pointers[0]
    assert keys is not None
    plan = plan_for(key, keys.device)
    if plan is not None and plan.run(keys.device.index, pointers):
        return
    first, second, _ = columns_of(keys.shape[-1])
    block_d = triton.next_power_of_2(first + second)
    chosen = variant(kernel, BLOCK_S=rows, BLOCK_D=block_d, num_warps=8 if rows == KEY_BLOCK else 4)
    start_and_keep(key, chosen, keys.device, grid, pointers, numbers)

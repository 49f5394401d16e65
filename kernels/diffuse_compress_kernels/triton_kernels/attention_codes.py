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
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from diffuse_compress_kernels.triton_kernels.attention_tables import KEY_BLOCK, columns_of
from diffuse_compress_kernels.triton_kernels.divide import larger
from diffuse_compress_kernels.triton_kernels.plans import plan_for, start_and_keep
from diffuse_compress_kernels.triton_kernels.rows import MIN_SCALE, ROUNDING_MAGIC
from diffuse_compress_kernels.triton_kernels.start import INTERPRETED, variant

__all__ = [
    "KeyValueCodes",
    "codes_kernel",
    "floored",
    "key_at",
    "largest_along",
    "quantize_keys_values",
    "quotients",
    "statistics_kernel",
    "to_float8",
]

BLOCK_S = 64
MAX_CHUNKS = 32
FLOAT8_MAX = tl.constexpr(448.0)
LEAST_NORMAL = tl.constexpr(2.0**-6)
# Numbers this large are multiples of 2**-9, as float8 below its least normal number.
SUBNORMAL_MAGIC = tl.constexpr(1.5 * 2.0**14)


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
def largest_along(values, AXIS: tl.constexpr):
    """Largest magnitudes, of a NaN if there is one: as integers of their bits, which order as the floats do."""
    return tl.max(values.to(tl.int32, bitcast=True) & 0x7FFFFFFF, AXIS).to(tl.float32, bitcast=True)


@triton.jit
def to_float8(values, COMPILED: tl.constexpr):
    """e4m3 of magnitudes up to 448. The interpreter loses the carry into the next power of two: round before."""
    if not COMPILED:
        bits = values.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000
        small = (values + SUBNORMAL_MAGIC) - SUBNORMAL_MAGIC
        values = tl.where(tl.abs(values) < LEAST_NORMAL, small, bits.to(tl.float32, bitcast=True))
    return values.to(tl.float8e4nv)


@triton.jit
def quotients(values, scale, COMPILED: tl.constexpr):
    """values / scale of one shape, or to be broadcast: rounds to the code that the IEEE quotient does (``divide.py``).

    Without its way for tiny scales, which are those of a head of zeros; not COMPILED: the interpreter fuses nothing.
    """
    scale = tl.broadcast_to(scale, values.shape)
    if COMPILED:
        inverse = 1.0 / scale
        result = values * inverse
        return tl.fma(tl.fma(-scale, result, values), inverse, result)
    else:
        return tl.div_rn(values, scale)


@triton.jit
def floored(scale):
    """A scale to divide by: never 0, and NaN stays, so that it shows in the output."""
    return tl.where(scale < MIN_SCALE, MIN_SCALE, scale)


@triton.jit(do_not_specialize=["S"])
def statistics_kernel(
    k_ptr, v_ptr, sums_ptr, maxima_ptr, lengths_ptr,
    S, eighths, chunk,
    stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Per chunk of tokens, head and batch: sums [B, H, chunks, BLOCK_D] of keys, largest magnitudes of values."""
    part, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    length = S
    if lengths_ptr is not None:
        length = tl.minimum(S, tl.load(lengths_ptr + batch).to(tl.int32))
    d = tl.arange(0, BLOCK_D)
    # A multiple of 8, or loads would go by single elements.
    inside = (d < eighths * 8)[None, :]
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
            largest = larger(largest, largest_along(values, 0))
    place = ((batch * tl.num_programs(1) + head) * tl.num_programs(0) + part) * BLOCK_D + d
    tl.store(sums_ptr + place, total)
    if v_ptr is not None:
        tl.store(maxima_ptr + place, largest)


@triton.jit(do_not_specialize=["S", "chunks"])
def codes_kernel(
    k_ptr, v_ptr, sums_ptr, maxima_ptr, lengths_ptr, k_codes_ptr, k_scale_ptr, v_codes_ptr, v_scale_ptr,
    S, eighths, heads, chunks,
    stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs, stride_cn, v_columns, stride_cd,
    BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, COMPILED: tl.constexpr,
):  # fmt: skip
    """A program per block of tokens, head (of keys, then of values) and batch; stride_cd is S', stride_cn D'."""
    block, batch = tl.program_id(0), tl.program_id(2).to(tl.int64)
    head = tl.program_id(1) % heads
    length = S
    if lengths_ptr is not None:
        length = tl.minimum(S, tl.load(lengths_ptr + batch).to(tl.int32))
    d = tl.arange(0, BLOCK_D)
    # A multiple of 8, or loads would go by single elements.
    inside = (d < eighths * 8)[None, :]
    row = batch * heads + head
    statistics = row * chunks * BLOCK_D + d
    j = block * BLOCK_S + tl.arange(0, BLOCK_S)
    if tl.program_id(1) < heads:
        total = tl.zeros((BLOCK_D,), tl.float32)
        for part in range(chunks):
            total += tl.load(sums_ptr + statistics + part * BLOCK_D)
        count = tl.maximum(length, 1).to(tl.float32)
        mean = tl.div_rn(total, tl.broadcast_to(count, total.shape))
        mask = (j < length)[:, None] & inside
        places_k = k_ptr + batch * stride_kb + head.to(tl.int64) * stride_kh + j[:, None] * stride_ks + d[None, :]
        keys = tl.load(places_k, mask=mask, other=0.0).to(tl.float32)
        keys = tl.where(mask, keys - mean[None, :], 0.0)
        largest = tl.max(largest_along(keys, 1).to(tl.int32, bitcast=True), 0).to(tl.float32, bitcast=True)
        scale = floored(tl.div_rn(largest, 127.0))
        codes = (quotients(keys, scale, COMPILED) + ROUNDING_MAGIC).to(tl.int32, bitcast=True).to(tl.int8)
        tl.store(k_scale_ptr + row * tl.num_programs(0) + block, scale)
        to = k_codes_ptr + (row * stride_cd + j[:, None]) * stride_cn + d[None, :]
        tl.store(to, codes, mask=(d < stride_cn)[None, :])
    else:
        most = tl.zeros((BLOCK_D,), tl.float32)
        for part in range(chunks):
            most = larger(most, tl.load(maxima_ptr + statistics + part * BLOCK_D))
        v_scale = floored(tl.div_rn(most, tl.full((BLOCK_D,), FLOAT8_MAX, tl.float32)))
        n = key_at(j)
        v_mask = (n < length)[:, None] & inside
        places_v = v_ptr + batch * stride_vb + head.to(tl.int64) * stride_vh + n[:, None] * stride_vs + d[None, :]
        values = tl.load(places_v, mask=v_mask, other=0.0).to(tl.float32)
        v_codes = quotients(values, v_scale[None, :], COMPILED)
        v_codes = to_float8(tl.clamp(v_codes, -FLOAT8_MAX, FLOAT8_MAX), COMPILED)
        column = (d < v_columns)[None, :]
        tl.store(v_codes_ptr + (row * v_columns + d[None, :]) * stride_cd + j[:, None], v_codes, mask=column)
        if block == 0:
            tl.store(v_scale_ptr + row * v_columns + d, v_scale, mask=d < v_columns)


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
    numbers: tuple[int, ...] = (tokens, depth // 8, chunk, *strides)
    _start(
        ("attention statistics", *signature),
        statistics_kernel,
        (chunks, heads, batch),
        pointers,
        numbers,
        BLOCK_S=BLOCK_S,
    )
    pointers = (*pointers, keys, key_scale, values, value_scale)
    numbers = (tokens, depth // 8, heads, chunks, *strides, k_columns, v_columns, places)
    grid = (blocks, heads * (1 + fp8_values), batch)
    _start(("attention codes", *signature), codes_kernel, grid, pointers, numbers, BLOCK_S=KEY_BLOCK,
           COMPILED=not INTERPRETED, num_warps=8)  # fmt: skip
    return KeyValueCodes(keys, key_scale, values, value_scale)


def _start(
    key: tuple[object, ...],
    kernel: object,
    grid: tuple[int, int, int],
    pointers: tuple[torch.Tensor | None, ...],
    numbers: tuple[int, ...],
    **constants: Any,
) -> None:
    keys = pointers[0]
    assert keys is not None
    plan = plan_for(key, keys.device)
    if plan is not None and plan.run(keys.device.index, pointers):
        return
    first, second, _ = columns_of(keys.shape[-1])
    block_d = triton.next_power_of_2(first + second)
    chosen = variant(kernel, BLOCK_D=block_d, **constants)
    start_and_keep(key, chosen, keys.device, grid, pointers, numbers)

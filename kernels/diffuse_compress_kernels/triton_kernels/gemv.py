"""One token (or a few, one after the other) times packed int4 weights: no tensor cores, the weight read once.

    y[m, n] = sum_k x[m, k] * s[n, g] * (q[n, k] - z[n, g]) + bias[n],   g = k // 128

Converting every weight to a float would cost more than loading it, so x becomes integers instead: each group of 128
columns is written as fixed-point numbers of 16 bits, relative to its own largest magnitude,

    x ~ t * v,   v = 256 * hi + lo an integer of at most 32512,   t = max |x| / 32512

with hi and lo signed bytes. Four codes of a word then meet four digits in one dp4a instruction, the int32 sums are
exact, and t * s multiplies them in fp32. The error of x is at most 2**-16 of the largest of its group: less
than rounding the dequantized weight to 16 bits costs.

A program owns BLOCK_N rows over all of K, so no partial sums leave it. Its threads lie along K: each converts the part
of x that it multiplies, once per program.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from diffuse_compress_kernels.triton_kernels.start import INTERPRETED, variant
from diffuse_compress_kernels.triton_kernels.tiles import GemvConfig

__all__ = ["w4a16_gemv", "w4a16_gemv_kernel"]

COLUMNS_PER_THREAD = 32
LARGEST = tl.constexpr(32512.0)
# 1.5 * 2**23: the sum with it holds the rounded integer in its low bits.
ROUNDING_MAGIC = tl.constexpr(12582912.0)
MAGIC_BITS = tl.constexpr(0x4B400000)


@triton.jit
def _pack_digits(digits, WORDS: tl.constexpr):
    """int32 [WORDS] of signed bytes [groups, 16, 4], the first in the low byte."""
    place = tl.arange(0, 4)[None, None, :] * 8
    return tl.reshape(tl.sum((digits & 0xFF) << place, axis=2), (WORDS,))


@triton.jit
def _fixed_point(x_low, x_high, WORDS: tl.constexpr):
    """(hi, lo words of the low columns, of the high ones, sums and steps of four words) of x [groups, 16, 4] each."""
    GROUPS: tl.constexpr = WORDS // 16
    largest = tl.max(tl.max(tl.maximum(tl.abs(x_low), tl.abs(x_high)), axis=2), axis=1)
    step = tl.maximum(largest * (1.0 / LARGEST), 1e-30)
    inverse = (1.0 / step)[:, None, None]
    low = (x_low * inverse + ROUNDING_MAGIC).to(tl.int32, bitcast=True) - MAGIC_BITS
    high = (x_high * inverse + ROUNDING_MAGIC).to(tl.int32, bitcast=True) - MAGIC_BITS
    totals = tl.sum(tl.reshape(tl.sum(low + high, axis=2), (WORDS // 4, 4)), axis=1)
    steps = tl.reshape(tl.broadcast_to(step[:, None], (GROUPS, 4)), (WORDS // 4,))
    hi_of_low = (low + 128) >> 8
    hi_of_high = (high + 128) >> 8
    return (
        _pack_digits(hi_of_low, WORDS), _pack_digits(low - hi_of_low * 256, WORDS),
        _pack_digits(hi_of_high, WORDS), _pack_digits(high - hi_of_high * 256, WORDS), totals, steps,
    )  # fmt: skip


@triton.jit
def _four(words):
    """[..., 2, 2] as four tensors [...]."""
    even, odd = tl.split(words)
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def _dot_words(packed, low_hi, low_lo, high_hi, high_lo, BLOCK_N: tl.constexpr, T: tl.constexpr, ASM: tl.constexpr):
    """int32 [N, T]: 16 times the sum over 32 codes times 256 * hi + lo; packed [N, 4 * T] words, digits [4 * T]."""
    if ASM:
        w0, w1, w2, w3 = _four(tl.reshape(packed, (BLOCK_N, T, 2, 2)))
        lh0, lh1, lh2, lh3 = _four(tl.reshape(low_hi, (T, 2, 2)))
        ll0, ll1, ll2, ll3 = _four(tl.reshape(low_lo, (T, 2, 2)))
        hh0, hh1, hh2, hh3 = _four(tl.reshape(high_hi, (T, 2, 2)))
        hl0, hl1, hl2, hl3 = _four(tl.reshape(high_lo, (T, 2, 2)))
        result = tl.inline_asm_elementwise(
            """{
            .reg .b32 a, b, h, l;
            shl.b32 a, $1, 4;
            and.b32 a, a, 0xF0F0F0F0;
            and.b32 b, $1, 0xF0F0F0F0;
            dp4a.s32.s32 h, a, $5, 0;
            dp4a.s32.s32 l, a, $9, 0;
            dp4a.s32.s32 h, b, $13, h;
            dp4a.s32.s32 l, b, $17, l;
            shl.b32 a, $2, 4;
            and.b32 a, a, 0xF0F0F0F0;
            and.b32 b, $2, 0xF0F0F0F0;
            dp4a.s32.s32 h, a, $6, h;
            dp4a.s32.s32 l, a, $10, l;
            dp4a.s32.s32 h, b, $14, h;
            dp4a.s32.s32 l, b, $18, l;
            shl.b32 a, $3, 4;
            and.b32 a, a, 0xF0F0F0F0;
            and.b32 b, $3, 0xF0F0F0F0;
            dp4a.s32.s32 h, a, $7, h;
            dp4a.s32.s32 l, a, $11, l;
            dp4a.s32.s32 h, b, $15, h;
            dp4a.s32.s32 l, b, $19, l;
            shl.b32 a, $4, 4;
            and.b32 a, a, 0xF0F0F0F0;
            and.b32 b, $4, 0xF0F0F0F0;
            dp4a.s32.s32 h, a, $8, h;
            dp4a.s32.s32 l, a, $12, l;
            dp4a.s32.s32 h, b, $16, h;
            dp4a.s32.s32 l, b, $20, l;
            mad.lo.s32 $0, h, 256, l;
            }""",
            "=r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r",
            [
                w0, w1, w2, w3,
                lh0[None, :], lh1[None, :], lh2[None, :], lh3[None, :],
                ll0[None, :], ll1[None, :], ll2[None, :], ll3[None, :],
                hh0[None, :], hh1[None, :], hh2[None, :], hh3[None, :],
                hl0[None, :], hl1[None, :], hl2[None, :], hl3[None, :],
            ],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )  # fmt: skip
    else:
        words = tl.zeros_like(packed)
        for i in tl.static_range(4):
            a = ((packed << (28 - 8 * i)) >> 28) * 16
            b = ((packed << (24 - 8 * i)) >> 28) * 16
            x_low = ((low_hi << (24 - 8 * i)) >> 24) * 256 + ((low_lo << (24 - 8 * i)) >> 24)
            x_high = ((high_hi << (24 - 8 * i)) >> 24) * 256 + ((high_lo << (24 - 8 * i)) >> 24)
            words += a * x_low[None, :] + b * x_high[None, :]
        result = tl.sum(tl.reshape(words, (BLOCK_N, T, 4)), axis=2)
    return result


@triton.jit(do_not_specialize=["stride_sn"])
def w4a16_gemv_kernel(
    x_ptr,
    w_ptr,
    scale_ptr,
    zero_ptr,
    bias_ptr,
    y_ptr,
    N,
    K,
    stride_xm,
    stride_wn,
    stride_sn,
    stride_ym,
    BLOCK_N: tl.constexpr,
    THREADS: tl.constexpr,
    EVEN_K: tl.constexpr,
    ASM: tl.constexpr,
):
    """Program (BLOCK_N rows, token). A tile is [BLOCK_N, 4 * THREADS] words of 8 codes; ``w_ptr`` is int32.

    Four threads share a group of 128 columns: thread t owns columns 16 * (t % 4) to + 15 of its low half, and the same
    of its high half.
    """
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    token = tl.program_id(1).to(tl.int64)
    rows = tl.minimum(n, N - 1).to(tl.int64)
    WORDS: tl.constexpr = 4 * THREADS
    t = tl.arange(0, THREADS)
    word = tl.arange(0, WORDS)
    # Columns of a group's low half by word: [groups, 16, 4].
    g = tl.arange(0, WORDS // 16)[:, None, None]
    column = g * 128 + tl.arange(0, 16)[None, :, None] * 4 + tl.arange(0, 4)[None, None, :]
    w_places = w_ptr + (rows * stride_wn)[:, None] + word[None, :]
    x_ptr += token * stride_xm
    scale_rows = (rows * stride_sn)[:, None]
    acc = tl.zeros((BLOCK_N, THREADS), dtype=tl.float32)
    for start in tl.range(0, K, 8 * WORDS):
        inside = start + t // 4 * 128 < K
        if EVEN_K:
            packed = tl.load(w_places + start // 8)
            x_low = tl.load(x_ptr + start + column).to(tl.float32)
            x_high = tl.load(x_ptr + start + column + 64).to(tl.float32)
        else:
            packed = tl.load(w_places + start // 8, mask=(start + word // 16 * 128 < K)[None, :], other=0)
            x_low = tl.load(x_ptr + start + column, mask=start + column < K, other=0.0).to(tl.float32)
            x_high = tl.load(x_ptr + start + column + 64, mask=start + column + 64 < K, other=0.0).to(tl.float32)
        low_hi, low_lo, high_hi, high_lo, total, step = _fixed_point(x_low, x_high, WORDS)
        group = scale_rows + ((start // 128) + t // 4)[None, :]
        scale = tl.load(scale_ptr + group, mask=inside[None, :], other=0.0) * (step * 0.0625)[None, :]
        sums = _dot_words(packed, low_hi, low_lo, high_hi, high_lo, BLOCK_N, THREADS, ASM)
        if zero_ptr is not None:
            zero = tl.load(zero_ptr + group, mask=inside[None, :], other=0).to(tl.int32)
            sums -= zero * (total * 16)[None, :]
        acc += sums.to(tl.float32) * scale
    y = tl.sum(acc, axis=1)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)
    tl.store(y_ptr + token * stride_ym + n, y.to(y_ptr.dtype.element_ty), mask=n < N)


def w4a16_gemv(
    x: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    config: GemvConfig,
    *,
    bias: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    asm: bool = not INTERPRETED,
) -> torch.Tensor:
    """y [M, N] in the dtype of x, any float dtype, groups of 128; arguments as ``w4a16``.

    Each token reads the weight again.
    """
    rows, outputs = x.shape[0], packed.shape[0]
    if out is None:
        out = torch.empty(rows, outputs, dtype=x.dtype, device=x.device)
    if rows == 0 or outputs == 0:
        return out
    chosen = variant(
        w4a16_gemv_kernel,
        BLOCK_N=config.block_n,
        THREADS=config.threads,
        EVEN_K=x.shape[1] % (config.threads * COLUMNS_PER_THREAD) == 0,
        ASM=asm,
        num_warps=config.threads // 32,
    )
    chosen.start(
        x.device,
        (-(-outputs // config.block_n), rows, 1),
        (x, packed.view(torch.int32), scale, zero_point, bias, out),
        (outputs, x.shape[1], x.stride(0), packed.stride(0) // 4, scale.stride(0), out.stride(0)),
    )
    return out

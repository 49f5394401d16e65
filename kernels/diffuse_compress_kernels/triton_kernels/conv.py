"""int8 convolution as an implicit product: windows are addressed, never gathered.

    y[b, n, p] = (sum_k x[b, window(p)_k] * w[n, k] - offset[n]) * x_scale[b] * w_scale[n] + bias[n]

A first kernel quantizes each sample into [B, H + pads, W + pads, C] int8, with a border that stands for 0, whatever
the layout of x. There the C channels of every tap of every window are consecutive bytes at a fixed distance from the
window's first one, so the product's loop over taps and channels adds one offset per step and needs no mask. Its left
operand is the weight [N, taps, C]; pixels are the columns of the accumulator, which is how y, [B, N, Ho, Wo], lies.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from diffuse_compress_kernels.triton_kernels.launch import INTERPRETED, on_device_of
from diffuse_compress_kernels.triton_kernels.rows import largest_of, row_scale, store_codes
from diffuse_compress_kernels.triton_kernels.tiles import TileConfig

__all__ = ["conv2d_int8", "conv_config", "quantize_samples", "suits"]

RANGE_BLOCK = 8192
TILE_PIXELS = 64
TILE_CHANNELS = 64


@triton.jit
def sample_range_kernel(x_ptr, pre_ptr, parts_ptr, per_sample, pixels, parts, BLOCK: tl.constexpr):
    """parts_ptr[sample, part] = bits of the largest magnitude in a part of a sample; x is contiguous."""
    sample = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    i = part * BLOCK + tl.arange(0, BLOCK)
    mask = i < per_sample
    values = tl.load(x_ptr + sample * per_sample + i, mask=mask, other=0.0).to(tl.float32)
    if pre_ptr is not None:
        values *= tl.load(pre_ptr + i // pixels, mask=mask, other=0.0)
    tl.store(parts_ptr + sample * parts + part, largest_of(values))


@triton.jit
def quantize_samples_kernel(
    x_ptr,
    codes_ptr,
    scale_ptr,
    parts_ptr,
    given_ptr,
    zero_ptr,
    pre_ptr,
    C,
    H,
    W,
    stride_b,
    stride_c,
    stride_h,
    stride_w,
    padded_h,
    padded_w,
    top,
    left,
    parts,
    QMIN: tl.constexpr,
    QMAX: tl.constexpr,
    PARTS: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    FMA: tl.constexpr,
):
    """Program (padded pixels, channels, sample): codes [pixel, channel], the zero point on the border."""
    sample = tl.program_id(2).to(tl.int64)
    pixel = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    row = pixel // padded_w - top
    column = pixel % padded_w - left
    inside = (row >= 0) & (row < H) & (column >= 0) & (column < W)
    zero = 0.0
    if zero_ptr is not None:
        zero = tl.load(zero_ptr).to(tl.float32)
    if given_ptr is None:
        p = tl.arange(0, PARTS)
        bits = tl.load(parts_ptr + sample * parts + p, mask=p < parts, other=0)
        scale = row_scale(tl.max(bits, axis=0), QMAX)
        tl.store(scale_ptr + sample, scale)
    else:
        scale = tl.load(given_ptr)
    mask = inside[:, None] & (c < C)[None, :]
    places = sample * stride_b + (row * stride_h + column * stride_w)[:, None] + c[None, :] * stride_c
    values = tl.load(x_ptr + places, mask=mask, other=0.0).to(tl.float32)
    if pre_ptr is not None:
        values *= tl.load(pre_ptr + c, mask=c < C, other=0.0)[None, :]
    out = codes_ptr + sample * padded_h * padded_w * C + pixel[:, None] * C + c[None, :]
    wanted = (pixel < padded_h * padded_w)[:, None] & (c < C)[None, :]
    # The value 0 outside has the zero point as its code.
    store_codes(out, values, scale, zero, wanted, QMIN, QMAX, given_ptr is not None, FMA)


@triton.jit(do_not_specialize=["M", "out_w"])
def conv2d_kernel(
    x_ptr,
    w_ptr,
    y_ptr,
    x_scale_ptr,
    w_scale_ptr,
    offset_ptr,
    bias_ptr,
    M,
    N,
    C,
    pixels,
    out_w,
    padded_w,
    sample_bytes,
    stride_h,
    stride_w,
    dilation_h,
    dilation_w,
    KW: tl.constexpr,
    TAPS: tl.constexpr,
    X_SCALE_ROWS: tl.constexpr,
    W_SCALE_ROWS: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """M = B * pixels windows; ``C`` is a multiple of BLOCK_K. ALIGNED: pixels are a multiple of 16."""
    tile = tl.program_id(0)
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    per_group = GROUP_M * tiles_n
    first = (tile // per_group) * GROUP_M
    size = tl.minimum(tiles_m - first, GROUP_M)
    m0 = (first + tile % per_group % size) * BLOCK_M
    n0 = tile % per_group // size * BLOCK_N
    m = m0 + tl.arange(0, BLOCK_M)
    n = n0 + tl.arange(0, BLOCK_N)
    m_in = tl.minimum(m, M - 1)
    sample = m_in // pixels
    pixel = m_in % pixels
    window = (pixel // out_w * stride_h * padded_w + pixel % out_w * stride_w) * C
    k = tl.arange(0, BLOCK_K)
    x_places = x_ptr + (sample.to(tl.int64) * sample_bytes + window)[:, None] + k[None, :]
    w_places = w_ptr + tl.minimum(n, N - 1).to(tl.int64)[:, None] * (TAPS * C) + k[None, :]
    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.int32)
    steps = C // BLOCK_K
    for step in tl.range(0, TAPS * steps):
        tap = step // steps
        shift = (tap // KW * dilation_h * padded_w + tap % KW * dilation_w) * C + step % steps * BLOCK_K
        x_tile = tl.load(x_places + shift)
        w_tile = tl.load(w_places + step * BLOCK_K)
        acc = tl.dot(w_tile, x_tile.T, acc, out_dtype=tl.int32)
    n_mask = n < N
    if offset_ptr is not None:
        acc -= tl.load(offset_ptr + n, mask=n_mask, other=0)[:, None]
    values = acc.to(tl.float32)
    if X_SCALE_ROWS:
        values *= tl.load(x_scale_ptr + sample)[None, :]
    else:
        values *= tl.load(x_scale_ptr)
    if W_SCALE_ROWS:
        values *= tl.load(w_scale_ptr + n, mask=n_mask, other=0.0)[:, None]
    else:
        values *= tl.load(w_scale_ptr)
    if bias_ptr is not None:
        values += tl.load(bias_ptr + n, mask=n_mask, other=0.0).to(tl.float32)[:, None]
    # One 64-bit address for the tile and 32-bit distances from it: the samples of a tile are neighbours.
    first_sample = m0 // pixels
    start = y_ptr + first_sample.to(tl.int64) * N * pixels + n0.to(tl.int64) * pixels
    columns = (sample - first_sample) * N * pixels + pixel
    m_mask = m < M
    if ALIGNED:
        # Runs of 16 windows lie in one sample, hence side by side.
        columns = tl.max_contiguous(tl.multiple_of(columns, 16), 16)
        m_mask = m // 16 < M // 16
    places = start + (tl.arange(0, BLOCK_N) * pixels)[:, None] + columns[None, :]
    tl.store(places, values.to(y_ptr.dtype.element_ty), mask=n_mask[:, None] & m_mask[None, :])


def suits(channels: int) -> bool:
    """True if a tap's channels are whole steps of aligned loads."""
    return channels % 32 == 0


def conv_config(channels: int) -> TileConfig:
    """Tile shape by the channels of the input."""
    if channels % 128 == 0:
        return TileConfig(128, 128, 128, 4, 3)
    return TileConfig(128, 128, 64 if channels % 64 == 0 else 32, 4, 4)


def quantize_samples(
    x: torch.Tensor,
    code_range: tuple[int, int],
    padding: tuple[int, int, int, int],
    scale: torch.Tensor | None = None,
    zero_point: torch.Tensor | None = None,
    pre_scale: torch.Tensor | None = None,
    *,
    fma: bool = not INTERPRETED,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [B, H + top + bottom, W + left + right, C] and scale, [B] measured or [1] given.

    Args:
        x: fp32, bf16 or fp16 [B, C, H, W], any strides.
        code_range: lowest and highest code.
        padding: (left, right, top, bottom).
        scale: one fp32 number; None measures one per sample.
        zero_point: one int8 number, with ``scale`` only.
        pre_scale: fp32 [C].
        fma: as in ``quantize_rows``.
    """
    samples, channels, height, width = x.shape
    left, right, top, bottom = padding
    padded_h, padded_w = height + top + bottom, width + left + right
    codes = torch.empty(samples, padded_h, padded_w, channels, dtype=torch.int8, device=x.device)
    measured = torch.empty(samples, dtype=torch.float32, device=x.device) if scale is None else scale.reshape(1)
    parts, count = None, triton.cdiv(channels * height * width, RANGE_BLOCK)
    with on_device_of(x):
        if scale is None:
            parts = _sample_ranges(x, pre_scale, count)
        grid = (triton.cdiv(padded_h * padded_w, TILE_PIXELS), triton.cdiv(channels, TILE_CHANNELS), samples)
        quantize_samples_kernel[grid](
            x,
            codes,
            measured,
            parts,
            scale,
            zero_point,
            pre_scale,
            channels,
            height,
            width,
            *x.stride(),
            padded_h,
            padded_w,
            top,
            left,
            count,
            QMIN=code_range[0],
            QMAX=code_range[1],
            PARTS=triton.next_power_of_2(count),
            PIXELS=TILE_PIXELS,
            CHANNELS=TILE_CHANNELS,
            FMA=fma,
            num_warps=4,
            enable_fp_fusion=False,
        )
    return codes, measured


def _sample_ranges(x: torch.Tensor, pre_scale: torch.Tensor | None, count: int) -> torch.Tensor:
    """int32 [B, count]: bits of the largest magnitudes of each sample's parts."""
    samples, channels, height, width = x.shape
    parts = torch.empty(samples, count, dtype=torch.int32, device=x.device)
    # The largest magnitude needs no order unless channels have factors of their own.
    flat = x.contiguous() if pre_scale is not None or not _is_dense(x) else x
    pixels = height * width
    sample_range_kernel[(samples, count)](
        flat, pre_scale, parts, channels * pixels, pixels, count, BLOCK=RANGE_BLOCK, num_warps=8
    )
    return parts


def _is_dense(x: torch.Tensor) -> bool:
    """True if each sample is one run of memory."""
    return x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)


def conv2d_int8(
    codes: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    w_scale: torch.Tensor,
    size: tuple[int, int],
    kernel: tuple[int, int],
    stride: tuple[int, int],
    dilation: tuple[int, int],
    dtype: torch.dtype,
    *,
    offset: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    config: TileConfig | None = None,
) -> torch.Tensor:
    """y [B, N, Ho, Wo], contiguous; equation in the module docstring.

    codes int8 [B, Hp, Wp, C] of :func:`quantize_samples`, C as :func:`suits` wants it; x_scale fp32 of 1 or B numbers;
    weight int8 [N, kh * kw * C], a tap's channels together; w_scale fp32 of 1 or N numbers; size (Ho, Wo); kernel,
    stride and dilation (vertical, horizontal); offset int32 [N]; bias [N]; the ``block_k`` of config divides C.
    """
    samples, _, padded_w, channels = codes.shape
    outputs, pixels = weight.shape[0], size[0] * size[1]
    config = config or conv_config(channels)
    y = torch.empty(samples, outputs, *size, dtype=dtype, device=codes.device)
    tiles = triton.cdiv(samples * pixels, config.block_m) * triton.cdiv(outputs, config.block_n)
    with on_device_of(codes):
        conv2d_kernel[(tiles,)](
            codes,
            weight,
            y,
            x_scale,
            w_scale,
            offset,
            bias,
            samples * pixels,
            outputs,
            channels,
            pixels,
            size[1],
            padded_w,
            codes.stride(0),
            *stride,
            *dilation,
            KW=kernel[1],
            TAPS=kernel[0] * kernel[1],
            X_SCALE_ROWS=x_scale.numel() == samples,
            W_SCALE_ROWS=w_scale.numel() == outputs,
            ALIGNED=pixels % 16 == 0,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            BLOCK_K=config.block_k,
            GROUP_M=config.group_m,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            enable_fp_fusion=True,
        )
    return y

"""Quantization of pictures into the layout that the convolution reads, one scale per sample or a given one.

    s[b] = max over the sample of |x[b, c, h, w] * pre[c]| / qmax        q = round(x * pre[c] / s[b])

Two launches where the scale is measured: maxima of parts of each sample, then codes, for which every program takes the
maximum of the parts itself. Nothing is read back, and the maximum does not depend on the order. NCHW and channels-last
inputs are read as they stand; gaps get the code of 0 in the same launch.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from diffuse_compress_kernels.triton_kernels.conv_geometry import ConvShape
from diffuse_compress_kernels.triton_kernels.divide import larger, largest_magnitude, quotient
from diffuse_compress_kernels.triton_kernels.plans import plan_for, start_and_keep
from diffuse_compress_kernels.triton_kernels.rows import row_scale
from diffuse_compress_kernels.triton_kernels.start import INTERPRETED, variant

__all__ = ["pictures_kernel", "quantize_pictures", "runs_kernel", "sample_maxima_kernel"]

MAX_PARTS = 256
ALIGNMENT = 16
LEAST_PART = 8192
RANGE_BLOCK = 8192
RUN_BLOCK = 4096
# 1.5 * 2**23: adding it to |v| <= 2**22 rounds v half to even and leaves the integer in the low bits of the float.
ROUNDING_MAGIC = tl.constexpr(12582912.0)


@triton.jit
def sample_maxima_kernel(
    x_ptr, pre_ptr, maxima_ptr, size, inner, C, part_size, PARTS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Bits of the largest magnitude of each part of each sample; ``inner`` elements in a row have the same channel."""
    part = tl.program_id(0)
    sample = tl.program_id(1)
    x_ptr += sample.to(tl.int64) * size
    first = part * part_size
    end = tl.minimum(first + part_size, size)
    largest = tl.zeros((BLOCK,), tl.float32)
    for start in range(first, end, BLOCK):
        i = start + tl.arange(0, BLOCK)
        values = tl.load(x_ptr + i, mask=i < end, other=0.0).to(tl.float32)
        if pre_ptr is not None:
            values *= tl.load(pre_ptr + i // inner % C)
        largest = larger(largest, tl.abs(values))
    tl.store(maxima_ptr + sample * PARTS + part, largest_magnitude(largest))


@triton.jit
def _scale_of(sample, first, scale_ptr, maxima_ptr, given_ptr, QMAX: tl.constexpr, PARTS: tl.constexpr):
    """The given scale, or that of the sample, which the program that is its ``first`` writes down."""
    if given_ptr is None:
        scale = row_scale(tl.max(tl.load(maxima_ptr + sample * PARTS + tl.arange(0, PARTS)), axis=0), QMAX)
        if first:
            tl.store(scale_ptr + sample, scale)
    else:
        scale = tl.load(given_ptr)
    return scale


@triton.jit
def _write(
    places, values, scale, zero_ptr, mask, QMIN: tl.constexpr, QMAX: tl.constexpr, GIVEN: tl.constexpr,
    COMPILED: tl.constexpr,
):  # fmt: skip
    if GIVEN:
        # Beyond this bound every code is a limit of their range; within it the division's corrections do not overflow.
        bound = scale * 1048576.0
        steps = quotient(tl.clamp(values, -bound, bound), scale, COMPILED)
        steps = (steps + ROUNDING_MAGIC) - ROUNDING_MAGIC
        if zero_ptr is not None:
            steps += tl.load(zero_ptr).to(tl.float32)
        steps = tl.clamp(steps, QMIN, QMAX)
    else:
        steps = quotient(values, scale, COMPILED)
    tl.store(places, (steps + ROUNDING_MAGIC).to(tl.int32, bitcast=True).to(tl.int8), mask=mask)


@triton.jit
def _fill_gaps(codes_ptr, zero_ptr, index, B, H, W, CS, gap_h, gap_w, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """Codes of 0 for BLOCK_P of the pixels that belong to no picture."""
    pitch = W + gap_w
    lead = gap_h * pitch + gap_w
    right = H * gap_w
    per_sample = right + gap_h * pitch
    i = index * BLOCK_P + tl.arange(0, BLOCK_P)
    inside = i - lead
    sample = inside // per_sample
    rest = inside % per_sample
    # Without a horizontal gap there are none of the first kind, and the division has to survive it.
    width = tl.maximum(gap_w, 1)
    right_place = rest // width * pitch + W + rest % width
    place = tl.where(rest < right, right_place, H * pitch + rest - right)
    place = tl.where(i < lead, i, lead + sample * ((H + gap_h) * pitch) + place)
    mask = i < lead + B * per_sample
    zero = tl.full((BLOCK_P, BLOCK_C), 0, tl.int8)
    if zero_ptr is not None:
        zero += tl.load(zero_ptr).to(tl.int8)
    for start in range(0, CS, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        tl.store(codes_ptr + (place * CS)[:, None] + c[None, :], zero, mask=mask[:, None] & (c < CS)[None, :])


@triton.jit(do_not_specialize=["B", "H", "W", "gap_h", "gap_w", "runs"])
def runs_kernel(
    x_ptr, codes_ptr, scale_ptr, maxima_ptr, given_ptr, zero_ptr, pre_ptr,
    B, H, W, C, gap_h, gap_w, runs, size, length, distance,
    QMIN: tl.constexpr, QMAX: tl.constexpr, PARTS: tl.constexpr, EXACT: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, COMPILED: tl.constexpr,
):  # fmt: skip
    """Channels-last pictures with no channels added: runs of ``length`` elements keep their order.

    A run is a row of pixels, ``distance`` elements apart in memory, or, without gaps, a sample. A program per part of a
    run, run and sample, the last ones first: what the maxima have read last is in cache still. Programs past the runs
    fill the gaps.
    """
    chunk = tl.num_programs(0) - 1 - tl.program_id(0)
    run = runs - 1 - tl.program_id(1)
    sample = B - 1 - tl.program_id(2)
    if run >= 0:
        scale = _scale_of(sample, (run == 0) & (chunk == 0), scale_ptr, maxima_ptr, given_ptr, QMAX, PARTS)
        i = chunk * BLOCK + tl.arange(0, BLOCK)
        mask = None if EXACT else i < length
        places = x_ptr + sample.to(tl.int64) * size + run * length + i
        values = tl.load(places, mask=mask, eviction_policy="evict_first").to(tl.float32)
        if pre_ptr is not None:
            values *= tl.load(pre_ptr + i % C)
        first = ((gap_h + sample * (H + gap_h)) * (W + gap_w) + gap_w) * C + run * distance
        _write(codes_ptr + first + i, values, scale, zero_ptr, mask, QMIN, QMAX, given_ptr is not None, COMPILED)
    else:
        index = ((-1 - run) * B + sample) * tl.num_programs(0) + chunk
        _fill_gaps(codes_ptr, zero_ptr, index, B, H, W, C, gap_h, gap_w, BLOCK_P, BLOCK_C)


@triton.jit(do_not_specialize=["B", "H", "W", "gap_h", "gap_w", "tiles_c"])
def pictures_kernel(
    x_ptr, codes_ptr, scale_ptr, maxima_ptr, given_ptr, zero_ptr, pre_ptr,
    B, C, H, W, HW, CS, gap_h, gap_w, stride_xb, stride_xc, stride_xp, tiles_c,
    QMIN: tl.constexpr, QMAX: tl.constexpr, PARTS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
    COMPILED: tl.constexpr,
):  # fmt: skip
    """Any pictures: a program per sample, pixels and channels, in the order of ``runs_kernel``. CS: channels stored."""
    tile_p = tl.num_programs(0) - 1 - tl.program_id(0)
    tile_c = tiles_c - 1 - tl.program_id(1)
    sample = B - 1 - tl.program_id(2)
    if tile_c >= 0:
        scale = _scale_of(sample, (tile_p == 0) & (tile_c == 0), scale_ptr, maxima_ptr, given_ptr, QMAX, PARTS)
        p = tile_p * BLOCK_P + tl.arange(0, BLOCK_P)
        c = tile_c * BLOCK_C + tl.arange(0, BLOCK_C)
        places = x_ptr + sample.to(tl.int64) * stride_xb + (p * stride_xp)[:, None] + (c * stride_xc)[None, :]
        mask = (p < HW)[:, None] & (c < C)[None, :]
        values = tl.load(places, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
        if pre_ptr is not None:
            values *= tl.load(pre_ptr + c, mask=c < C, other=0.0)[None, :]
        pixel = gap_h * (W + gap_w) + gap_w + (sample * (H + gap_h) + p // W) * (W + gap_w) + p % W
        places = codes_ptr + (pixel * CS)[:, None] + c[None, :]
        stored = (p < HW)[:, None] & (c < CS)[None, :]
        _write(places, values, scale, zero_ptr, stored, QMIN, QMAX, given_ptr is not None, COMPILED)
    else:
        index = ((-1 - tile_c) * B + sample) * tl.num_programs(0) + tile_p
        _fill_gaps(codes_ptr, zero_ptr, index, B, H, W, CS, gap_h, gap_w, BLOCK_P, BLOCK_C)


def _dense(x: torch.Tensor) -> torch.Tensor:
    """x itself if it is dense in one of the two layouts, else a copy that is."""
    if x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last):
        return x
    return x.contiguous(memory_format=torch.channels_last)


def _maxima(x: torch.Tensor, pre_scale: torch.Tensor | None, key: tuple[Any, ...]) -> torch.Tensor:
    """int32 [B, parts]: bits of the largest magnitudes."""
    samples, channels, height, width = x.shape
    size = channels * height * width
    parts = _parts(size)
    maxima = torch.empty(samples, parts, dtype=torch.int32, device=x.device)
    pointers, key = (x, pre_scale, maxima), ("maxima", *key)
    plan = plan_for(key, x.device)
    if plan is not None and plan.run(x.device.index, pointers):
        return maxima
    # Aligned starts take the widest loads.
    part_size = -(-size // (parts * ALIGNMENT)) * ALIGNMENT
    inner = height * width if x.is_contiguous() else 1
    chosen = variant(sample_maxima_kernel, PARTS=parts, BLOCK=RANGE_BLOCK, num_warps=8)
    start_and_keep(key, chosen, x.device, (parts, samples, 1), pointers, (size, inner, channels, part_size))
    return maxima


def _parts(size: int) -> int:
    """Programs for a sample of ``size`` elements."""
    return min(MAX_PARTS, 1 << (-(-size // LEAST_PART) - 1).bit_length())


def quantize_pictures(
    x: torch.Tensor,
    shape: ConvShape,
    qmin: int,
    qmax: int,
    scale: torch.Tensor | None = None,
    zero_point: torch.Tensor | None = None,
    pre_scale: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 codes [pixels, stored channels] in the layout of ``shape``, and the fp32 scale: [B], or the given [1].

    Args:
        x: fp32, bf16 or fp16 [B, C, H, W]; contiguous and channels-last tensors are read without a copy.
        shape: of the convolution that reads the codes.
        qmin: lowest code, used with a given scale.
        qmax: highest code.
        scale: one fp32 number; None measures one per sample.
        zero_point: one int8 number, with ``scale`` only.
        pre_scale: fp32 [C].
    """
    x = _dense(x)
    codes = torch.empty(shape.pixels, shape.stored_channels, dtype=torch.int8, device=x.device)
    absent = (scale is None, zero_point is None, pre_scale is None)
    key = ("pictures", shape, x.stride(), x.dtype, qmin, qmax, absent, x.device.index)
    maxima = None
    if scale is None:
        measured = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
        maxima = _maxima(x, pre_scale, key)
    else:
        measured = scale.reshape(1)
    pointers = (x, codes, measured, maxima, scale, zero_point, pre_scale)
    plan = plan_for(key, x.device)
    if plan is not None and plan.run(x.device.index, pointers):
        return codes, measured
    constants = {
        "QMIN": qmin,
        "QMAX": qmax,
        "PARTS": 1 if maxima is None else maxima.shape[1],
        "COMPILED": not INTERPRETED,
        "enable_fp_fusion": False,
    }
    last = not x.is_contiguous() or x.shape[1] == 1 or x.shape[2] * x.shape[3] == 1
    write = _write_runs if last and shape.stored_channels == x.shape[1] else _write_tiles
    write(x, shape, pointers, constants, key)
    return codes, measured


def _gap_programs(shape: ConvShape, per_program: int) -> int:
    gaps = shape.pixels - shape.samples * shape.height * shape.width
    return -(-gaps // per_program)


def _write_runs(x: torch.Tensor, shape: ConvShape, pointers: Any, constants: dict[str, Any], key: Any) -> None:
    samples, channels, height, width = x.shape
    gap_h, gap_w = shape.gap
    size = channels * height * width
    runs = height if gap_w else 1
    length = size // runs
    chunks = -(-length // RUN_BLOCK)
    block_c = min(256, triton.next_power_of_2(channels))
    block_p = RUN_BLOCK // block_c
    chosen = variant(
        runs_kernel, EXACT=length % RUN_BLOCK == 0, BLOCK=RUN_BLOCK, BLOCK_P=block_p, BLOCK_C=block_c, num_warps=4,
        **constants,
    )  # fmt: skip
    start_and_keep(
        key, chosen, x.device, (chunks, runs + -(-_gap_programs(shape, block_p) // (chunks * samples)), samples),
        pointers, (samples, height, width, channels, gap_h, gap_w, runs, size, length, (width + gap_w) * channels),
    )  # fmt: skip


def _write_tiles(x: torch.Tensor, shape: ConvShape, pointers: Any, constants: dict[str, Any], key: Any) -> None:
    samples, channels, height, width = x.shape
    pixels, stored = height * width, shape.stored_channels
    strides = (pixels, 1) if x.is_contiguous() else (1, channels)
    # Read along pixels, written along channels: a square tile turns in shared memory.
    block_p = block_c = 64
    tiles_p, tiles_c = -(-pixels // block_p), -(-stored // block_c)
    chosen = variant(pictures_kernel, BLOCK_P=block_p, BLOCK_C=block_c, num_warps=4, **constants)
    start_and_keep(
        key, chosen, x.device, (tiles_p, tiles_c + -(-_gap_programs(shape, block_p) // (tiles_p * samples)), samples),
        pointers,
        (samples, channels, height, width, pixels, stored, *shape.gap, channels * pixels, *strides, tiles_c),
    )  # fmt: skip

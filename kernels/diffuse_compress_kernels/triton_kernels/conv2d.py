"""int8 convolution as an implicit GEMM: exact int32 sums, scales and bias applied to the accumulator.

    acc[p, n] = sum over taps and channels of codes[pixel of p at the tap, c] * weight[n, tap, c]
    y[p, n]   = (acc[p, n] - offset[n]) * x_scale[sample of p] * w_scale[n] + bias[n]

Rows of the product are output pixels, columns are output channels, and the sum runs over (tap, channel), channels
fastest: both operands are contiguous along it, as 8-bit operands of the tensor core must be. The codes' layout and the
three ways to load a tile of them are in ``conv_geometry.py``.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl

from diffuse_compress_kernels.triton_kernels.conv_geometry import ConvConfig, ConvShape, box_width, tiles_of_pixels
from diffuse_compress_kernels.triton_kernels.grid import sum_parts
from diffuse_compress_kernels.triton_kernels.launch import Unsuitable, scratch_for
from diffuse_compress_kernels.triton_kernels.plans import plan_for, start_and_keep
from diffuse_compress_kernels.triton_kernels.start import Matrix, Variant, variant

__all__ = ["conv2d", "conv2d_kernel"]

MAX_ELEMENTS = 1 << 31
SCRATCH_PLACE = 7
NONE = (None, None)


@triton.jit
def _corner(tile, HO, WO, BLOCK_M: tl.constexpr, BLOCK_W: tl.constexpr):
    """(sample, row, column) where the rectangle of outputs of a "box" tile begins."""
    BLOCK_H: tl.constexpr = BLOCK_M // BLOCK_W
    tiles_w = tl.cdiv(WO, BLOCK_W)
    tiles_h = tl.cdiv(HO, BLOCK_H)
    rest = tile // tiles_w
    return rest // tiles_h, (rest % tiles_h) * BLOCK_H, (tile % tiles_w) * BLOCK_W


@triton.jit
def _outputs(
    tile, BATCH, HO, WO, HWO, XH, XW, MODE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_W: tl.constexpr
):  # fmt: skip
    """(sample, pixel of its output, whether there is such a pixel) of each row of a tile."""
    row = tl.arange(0, BLOCK_M)
    if MODE == "box":
        sample, h0, w0 = _corner(tile, HO, WO, BLOCK_M, BLOCK_W)
        h = h0 + row // BLOCK_W
        w = w0 + row % BLOCK_W
        return sample + tl.zeros_like(row), h * WO + w, (h < HO) & (w < WO)
    if MODE == "shift":
        place = tile * BLOCK_M + row
        sample = place // (XH * XW)
        rest = place % (XH * XW)
        h = rest // XW
        w = rest % XW
        return tl.minimum(sample, BATCH - 1), h * WO + w, (sample < BATCH) & (h < HO) & (w < WO)
    place = tile * BLOCK_M + row
    sample = place // HWO
    return tl.minimum(sample, BATCH - 1), place % HWO, sample < BATCH


@triton.jit
def _sum_over_taps(
    x, w, tile, n0, BATCH, HO, WO, HWO, N, C, XH, XW, FIRST, TOP, LEFT, stride_wn, first_step, last_step,
    TAPS: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    MODE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_W: tl.constexpr,
    WEIGHT_LEFT: tl.constexpr, EVEN_C: tl.constexpr,
):  # fmt: skip
    """acc int32, [BLOCK_N, BLOCK_M] if WEIGHT_LEFT, else [BLOCK_M, BLOCK_N], over some steps of (tap, channels)."""
    acc = tl.zeros((BLOCK_N, BLOCK_M) if WEIGHT_LEFT else (BLOCK_M, BLOCK_N), dtype=tl.int32)
    per_tap = tl.cdiv(C, BLOCK_K)
    tap = first_step // per_tap
    c = (first_step % per_tap) * BLOCK_K
    k = tl.arange(0, BLOCK_K)
    if MODE == "box":
        sample, h0, w0 = _corner(tile, HO, WO, BLOCK_M, BLOCK_W)
    if MODE == "gather":
        place = tl.minimum(tile * BLOCK_M + tl.arange(0, BLOCK_M), BATCH * HWO - 1)
        out = place % HWO
        pixel = FIRST + (place // HWO * XH + out // WO * SH) * XW + out % WO * SW
        x_places = x + (pixel * C)[:, None] + k[None, :]
        rows = tl.minimum(n0 + tl.arange(0, BLOCK_N), N - 1)
        w_places = w + (rows * stride_wn)[:, None] + k[None, :]
    for _ in tl.range(first_step, last_step):
        i = tap // KW * DH
        j = tap % KW * DW
        if MODE == "box":
            x_tile = x.load([sample, h0 + i - TOP, w0 + j - LEFT, c]).reshape(BLOCK_M, BLOCK_K)
            w_tile = w.load([n0, tap * C + c])
        elif MODE == "shift":
            # Channels past the last are read as 0, and what the weight has there does not count.
            x_tile = x.load([tile * BLOCK_M + FIRST + i * XW + j, c])
            w_tile = w.load([n0, tap * C + c])
        else:
            shift = (i * XW + j) * C + c
            if EVEN_C:
                x_tile = tl.load(x_places + shift)
                w_tile = tl.load(w_places + (tap * C + c))
            else:
                inside = k[None, :] < C - c
                x_tile = tl.load(x_places + shift, mask=inside, other=0)
                w_tile = tl.load(w_places + (tap * C + c), mask=inside, other=0)
        if WEIGHT_LEFT:
            acc = tl.dot(w_tile, x_tile.T, acc, out_dtype=tl.int32)
        else:
            acc = tl.dot(x_tile, w_tile.T, acc, out_dtype=tl.int32)
        c += BLOCK_K
        wrap = c >= C
        c = tl.where(wrap, 0, c)
        tap = tl.where(wrap, tap + 1, tap)
    return acc


@triton.jit
def _write(
    acc, sample, pixel, valid, n0, N, x_scale_ptr, w_scale_ptr, offset_ptr, bias_ptr, y_ptr,
    stride_yb, stride_yn, stride_yp, X_SCALES: tl.constexpr, W_SCALES: tl.constexpr,
    BLOCK_N: tl.constexpr, WEIGHT_LEFT: tl.constexpr,
):  # fmt: skip
    """The epilogue, in fp32, rounded once. X_SCALES: "none", "one" or "samples"; W_SCALES: "none", "one" or "rows"."""
    n = n0 + tl.arange(0, BLOCK_N)
    if offset_ptr is not None:
        offset = tl.load(offset_ptr + n, mask=n < N, other=0)
        acc -= offset[:, None] if WEIGHT_LEFT else offset[None, :]
    values = acc.to(tl.float32)
    if X_SCALES == "samples":
        x_scale = tl.load(x_scale_ptr + sample)
        values *= x_scale[None, :] if WEIGHT_LEFT else x_scale[:, None]
    if X_SCALES == "one":
        values *= tl.load(x_scale_ptr)
    if W_SCALES == "rows":
        w_scale = tl.load(w_scale_ptr + n, mask=n < N, other=0.0)
        values *= w_scale[:, None] if WEIGHT_LEFT else w_scale[None, :]
    if W_SCALES == "one":
        values *= tl.load(w_scale_ptr)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)
        values += bias[:, None] if WEIGHT_LEFT else bias[None, :]
    result = values.to(y_ptr.dtype.element_ty) if X_SCALES != "none" else acc.to(y_ptr.dtype.element_ty)
    row = sample.to(tl.int64) * stride_yb + pixel * stride_yp
    if WEIGHT_LEFT:
        places = y_ptr + (n * stride_yn)[:, None] + row[None, :]
        tl.store(places, result, mask=(n < N)[:, None] & valid[None, :])
    else:
        places = y_ptr + row[:, None] + (n * stride_yn)[None, :]
        tl.store(places, result, mask=valid[:, None] & (n < N)[None, :])


@triton.jit(do_not_specialize=["BATCH", "HO", "WO", "XH", "XW", "FIRST", "TOP", "LEFT", "tiles_m"])
def conv2d_kernel(
    x, w, y_ptr, x_scale_ptr, w_scale_ptr, offset_ptr, bias_ptr, parts_ptr, counters_ptr,
    BATCH, HO, WO, HWO, N, C, XH, XW, FIRST, TOP, LEFT, tiles_m, stride_wn, stride_yb, stride_yn, stride_yp,
    TAPS: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    X_SCALES: tl.constexpr, W_SCALES: tl.constexpr, MODE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_W: tl.constexpr, GROUP_M: tl.constexpr, SPLIT_K: tl.constexpr,
    WEIGHT_LEFT: tl.constexpr, EVEN_C: tl.constexpr,
):  # fmt: skip
    """A program per tile and part of the steps. x, w: pointers to codes and weight, or descriptors; C as stored."""
    program = tl.program_id(0)
    part = tl.program_id(1)
    per_group = GROUP_M * tl.cdiv(N, BLOCK_N)
    first_row = program // per_group * GROUP_M
    rows = tl.minimum(tiles_m - first_row, GROUP_M)
    tile = first_row + program % per_group % rows
    n0 = program % per_group // rows * BLOCK_N
    steps = TAPS * tl.cdiv(C, BLOCK_K)
    per_part = tl.cdiv(steps, SPLIT_K)
    acc = _sum_over_taps(
        x, w, tile, n0, BATCH, HO, WO, HWO, N, C, XH, XW, FIRST, TOP, LEFT, stride_wn,
        tl.minimum(part * per_part, steps), tl.minimum(part * per_part + per_part, steps),
        TAPS, KW, SH, SW, DH, DW, MODE, BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_W, WEIGHT_LEFT, EVEN_C,
    )  # fmt: skip
    last = True
    if SPLIT_K > 1:
        ROWS: tl.constexpr = BLOCK_N if WEIGHT_LEFT else BLOCK_M
        last, acc = sum_parts(acc, parts_ptr, counters_ptr, program, part, SPLIT_K, ROWS, BLOCK_M * BLOCK_N // ROWS)
    if last:
        sample, pixel, valid = _outputs(tile, BATCH, HO, WO, HWO, XH, XW, MODE, BLOCK_M, BLOCK_W)
        _write(
            acc, sample, pixel, valid, n0, N, x_scale_ptr, w_scale_ptr, offset_ptr, bias_ptr, y_ptr,
            stride_yb, stride_yn, stride_yp, X_SCALES, W_SCALES, BLOCK_N, WEIGHT_LEFT,
        )  # fmt: skip


def _inputs(codes: torch.Tensor, weight: torch.Tensor, shape: ConvShape, config: ConvConfig) -> tuple[Any, Any]:
    """Codes and weight as the mode loads them."""
    if config.mode == "gather":
        return codes, weight
    channels, (rows, columns) = shape.stored_channels, shape.pitch
    w_desc = Matrix(weight, tuple(weight.shape), weight.stride(), (config.block_n, config.block_k))
    if config.mode == "shift":
        sizes, strides, block = (shape.pixels, channels), (channels, 1), (config.block_m, config.block_k)
        return Matrix(codes, sizes, strides, block), w_desc
    block_w = box_width(shape.out, config.block_m)
    sizes = (shape.samples, shape.height, shape.width, channels)
    strides = (rows * columns * channels, columns * channels, channels, 1)
    block = (1, config.block_m // block_w, block_w, config.block_k)
    pictures = codes.view(-1)[shape.lead * channels :]
    return Matrix(pictures, sizes, strides, block), w_desc


def conv2d(
    codes: torch.Tensor,
    x_scale: torch.Tensor | None,
    weight: torch.Tensor,
    w_scale: torch.Tensor | None,
    shape: ConvShape,
    config: ConvConfig,
    *,
    offset: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    out: torch.Tensor,
) -> torch.Tensor:
    """Write y into ``out``; equation in the module docstring.

    Args:
        codes: int8 [pixels, stored channels] in the layout of ``shape``.
        x_scale: fp32 of 1 or B numbers; None leaves it and ``w_scale`` out.
        weight: int8 [N, taps * stored channels], contiguous.
        w_scale: fp32 of 1 or N numbers.
        shape: of the convolution.
        config: tile shape and loads.
        offset: int32 [N], what the input's zero point adds to the sums.
        bias: [N], any float dtype.
        out: [B, N, Ho, Wo], channels-last or contiguous; int32 without scales holds the sums.

    Raises:
        Unsuitable: the configuration cannot run this shape.
    """
    scales = (
        "none" if x_scale is None else "samples" if x_scale.numel() > 1 else "one",
        "none" if x_scale is None or w_scale is None else "rows" if w_scale.numel() > 1 else "one",
    )
    absent = (x_scale is None, w_scale is None, offset is None, None if bias is None else bias.dtype)
    key = ("conv2d", shape, config, weight.shape, scales, absent, out.stride(), out.dtype, codes.device.index)
    plan = plan_for(key, codes.device)
    tensors = (codes, weight, out, x_scale, w_scale, offset, bias, None, None)
    if plan is not None and plan.run(codes.device.index, tensors):
        return out
    if not shape.fits(config.mode) or (config.mode == "box" and offset is not None and any(shape.padding)):
        raise Unsuitable(f"{config.name} cannot load {shape}.")
    if max(codes.numel(), out.numel(), weight.numel()) >= MAX_ELEMENTS:
        raise Unsuitable(f"offsets are 32 bits wide, got {list(codes.shape)} and {list(out.shape)}.")
    (height, width), left, top = shape.out, shape.padding[0], shape.padding[2]
    tiles_m = tiles_of_pixels(shape, config)
    tiles = tiles_m * -(-weight.shape[0] // config.block_n)
    room = partial(scratch_for, config, tiles, torch.int32, codes.device) if config.split_k > 1 else None
    start_and_keep(
        # The descriptor of pictures with a lead does not begin where the codes do.
        None if config.mode == "box" and shape.lead else key,
        _variant_for(shape, config, scales), codes.device, (tiles, config.split_k, 1),
        (*_inputs(codes, weight, shape, config), out, x_scale, w_scale, offset, bias, *(room() if room else NONE)),
        (shape.samples, height, width, height * width, weight.shape[0], shape.stored_channels, *shape.pitch,
         shape.first, top, left, tiles_m, weight.stride(0), out.stride(0), out.stride(1), out.stride(3)),
        (SCRATCH_PLACE, room) if room else None,
    )  # fmt: skip
    return out


def _variant_for(shape: ConvShape, config: ConvConfig, scales: tuple[str, str]) -> Variant:
    return variant(
        conv2d_kernel,
        TAPS=shape.taps, KW=shape.kernel[1], SH=shape.stride[0], SW=shape.stride[1],
        DH=shape.dilation[0], DW=shape.dilation[1], X_SCALES=scales[0], W_SCALES=scales[1],
        MODE=config.mode, BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k,
        BLOCK_W=box_width(shape.out, config.block_m), GROUP_M=config.group_m, SPLIT_K=config.split_k,
        WEIGHT_LEFT=config.weight_left, EVEN_C=shape.stored_channels % config.block_k == 0,
        # Unfused, as the CPU's epilogue is.
        num_warps=config.num_warps, num_stages=config.num_stages, enable_fp_fusion=False,
    )  # fmt: skip

"""The convolution on CUDA devices with triton: input quantized into the kernel's layout, one implicit product."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import torch

from diffuse_compress_kernels import triton_kernels
from diffuse_compress_kernels.triton_kernels.conv_geometry import ConvConfig, ConvShape
from diffuse_compress_kernels.triton_kernels.conv_tables import choose_conv

__all__ = ["conv2d", "suits"]

# The kernels' offsets are int32.
MAX_ELEMENTS = 1 << 31
MAX_TAPS = 64

Geometry = tuple[list[int], list[int], list[int], list[int]]


def _shape(x: torch.Tensor, geometry: Geometry) -> ConvShape:
    kernel, stride, padding, dilation = geometry
    return _shape_of(x.shape, tuple(kernel), tuple(stride), tuple(padding), tuple(dilation))


@lru_cache(maxsize=4096)
def _shape_of(
    size: torch.Size,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int, int, int],
    dilation: tuple[int, int],
) -> ConvShape:
    """One object for equal convolutions: it keeps what follows from its sizes."""
    samples, channels, height, width = size
    return ConvShape(samples, height, width, channels, kernel, stride, padding, dilation)


def suits(x: torch.Tensor, outputs: int, geometry: Geometry) -> bool:
    """True if :func:`conv2d` can run it."""
    if not triton_kernels.usable(x.device) or x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return False
    return _suits(_shape(x, geometry), outputs)


@lru_cache(maxsize=4096)
def _suits(shape: ConvShape, outputs: int) -> bool:
    largest = max(
        shape.pixels * shape.stored_channels,
        shape.samples * shape.channels * shape.height * shape.width,
        shape.samples * outputs * shape.out[0] * shape.out[1],
        outputs * shape.taps * shape.stored_channels,
    )
    return largest < MAX_ELEMENTS and shape.taps <= MAX_TAPS and min(shape.padding) >= 0


@lru_cache(maxsize=4096)
def _laid_out(shape: ConvShape, mode: str) -> ConvShape:
    """With gaps where its loads need them: "box" loads read what is outside of a picture as 0."""
    return replace(shape, gaps=mode != "box" and any(shape.padding))


def conv2d(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    geometry: Geometry,
    code_range: tuple[int, int],
    input_scale: torch.Tensor | None,
    zero_point: torch.Tensor | None,
    pre_scale: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    """Write y into ``out``, contiguous or channels-last; arguments as ``int8_conv2d`` takes them."""
    shape, outputs = _shape(x, geometry), weight.shape[0]
    capability = triton_kernels.capability(x.device)
    config = choose_conv(shape, outputs, capability, zero_point=zero_point is not None)
    run(config, shape, x, weight, weight_scale, bias, code_range, input_scale, zero_point, pre_scale, out)


def run(
    config: ConvConfig,
    shape: ConvShape,
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    code_range: tuple[int, int],
    input_scale: torch.Tensor | None,
    zero_point: torch.Tensor | None,
    pre_scale: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    """The same with a given configuration."""
    shape = _laid_out(shape, config.mode)
    quantize = triton_kernels.module("conv_quantize").quantize_pictures
    codes, scale = quantize(x, shape, *code_range, input_scale, zero_point, pre_scale)
    offset = None
    if zero_point is not None:
        offset = weight.flatten(1).sum(dim=1, dtype=torch.int32).mul_(zero_point.reshape(1).to(torch.int32))
    stored = triton_kernels.module("conv_weight").taps_last(weight, shape.kernel, shape.stored_channels)
    triton_kernels.module("conv2d").conv2d(
        codes, scale, stored, weight_scale, shape, config, offset=offset, bias=bias, out=out
    )

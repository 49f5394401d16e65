"""Integer 2-d convolution: quantize each sample once, gather int8 windows, one exact integer GEMM per block of rows.

A convolution's token is a sample: one scale per sample (or per tensor), so a sample's result does not depend on its
batch. The windows of a block of output rows become the columns of a matrix, and the weight stands on the left, so that
the product already has the layout of the output::

    cols [C * kh * kw, rows * Wo]  from codes [C, Hp, Wp]        int8 copies, no floats
    acc  [N, rows * Wo] = weight [N, C * kh * kw] @ cols         int32, exact

Padding is exact: the border holds the code of 0, i.e. the zero point. A 1x1 convolution of stride 1 needs no copy.
NVIDIA GPUs with triton gather nothing: there ``cuda.py`` runs the same sums as an implicit product.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch

from diffuse_compress_kernels.int8_conv2d import cuda as triton_path
from diffuse_compress_kernels.int8_linear import cpu, cuda
from diffuse_compress_kernels.int8_linear.op import is_plain
from diffuse_compress_kernels.registration import operator

__all__ = ["int8_conv2d", "output_size"]

COLUMN_BLOCK_ELEMENTS = {"cpu": 1 << 21, "cuda": 1 << 27}


def output_size(
    size: tuple[int, int], kernel: list[int], stride: list[int], padding: list[int], dilation: list[int]
) -> tuple[int, int]:
    """(Ho, Wo) of an input of ``size``; ``padding`` is (left, right, top, bottom)."""
    height = (size[0] + padding[2] + padding[3] - dilation[0] * (kernel[0] - 1) - 1) // stride[0] + 1
    width = (size[1] + padding[0] + padding[1] - dilation[1] * (kernel[1] - 1) - 1) // stride[1] + 1
    return height, width


def _int8_conv2d_now(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    qmin: int,
    qmax: int,
    input_scale: torch.Tensor | None,
    input_zero_point: torch.Tensor | None,
    pre_scale: torch.Tensor | None,
) -> torch.Tensor:
    geometry = (kernel, stride, padding, dilation)
    return _run(x, weight, weight_scale, bias, geometry, (qmin, qmax), input_scale, input_zero_point, pre_scale)


def _int8_conv2d_fake(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    qmin: int,
    qmax: int,
    input_scale: torch.Tensor | None,
    input_zero_point: torch.Tensor | None,
    pre_scale: torch.Tensor | None,
) -> torch.Tensor:
    height, width = output_size((x.shape[2], x.shape[3]), kernel, stride, padding, dilation)
    y = x.new_empty(x.shape[0], weight.shape[0], height, width)
    return y.contiguous(memory_format=_layout(x))


def _int8_conv2d_flops(_: Sequence[int], weight: Sequence[int], *__: Any, out_shape: Sequence[int], **___: Any) -> int:
    return 2 * math.prod(out_shape) * math.prod(weight[1:])


_int8_conv2d = operator("int8_conv2d", _int8_conv2d_now, _int8_conv2d_fake, flops=_int8_conv2d_flops)


def _layout(x: torch.Tensor) -> torch.memory_format:
    """That of the result: channels-last if x is, as for the stock convolution."""
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


def int8_conv2d(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    kernel: tuple[int, int],
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int, int, int] = (0, 0, 0, 0),
    dilation: tuple[int, int] = (1, 1),
    qmin: int = -127,
    qmax: int = 127,
    input_scale: torch.Tensor | None = None,
    input_zero_point: torch.Tensor | None = None,
    pre_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """y [B, N, Ho, Wo] in the dtype of x, channels-last if x is and else contiguous; summed exactly in int32.

    Args:
        x: [B, C, H, W] fp32, bf16 or fp16, any strides.
        weight: int8 [N, C * kh * kw], the flattened convolution weight, or [N, C, kh, kw], which saves the Triton
            kernel a copy if it is channels-last; groups are not supported.
        weight_scale: fp32 [N, 1] or [1, 1].
        bias: [N], any float dtype.
        kernel: (kh, kw).
        stride: (vertical, horizontal).
        padding: zeros on the (left, right, top, bottom), as ``torch.nn.functional.pad`` orders them.
        dilation: (vertical, horizontal).
        qmin: lowest input code.
        qmax: highest input code.
        input_scale: one fp32 number for the whole batch; None measures one per sample.
        input_zero_point: one int8 number, with ``input_scale`` only.
        pre_scale: fp32 [C] that multiplies x before it is quantized.

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    shapes = ((x.shape[1] * kernel[0] * kernel[1],), (x.shape[1], *kernel)) if x.dim() == 4 else ()
    if weight.dtype != torch.int8 or tuple(weight.shape[1:]) not in shapes:
        raise ValueError(
            f"int8_conv2d: need x [B, C, H, W] and int8 weight [N, C * {kernel[0]} * {kernel[1]}], got "
            f"{list(x.shape)} and {weight.dtype} {list(weight.shape)}."
        )
    geometry = (list(kernel), list(stride), list(padding), list(dilation))
    x, bias = x.detach(), None if bias is None else bias.detach()
    if is_plain(x):
        return _run(x, weight, weight_scale, bias, geometry, (qmin, qmax), input_scale, input_zero_point, pre_scale)
    y = _int8_conv2d(x, weight, weight_scale, bias, *geometry, qmin, qmax, input_scale, input_zero_point, pre_scale)
    return cast(torch.Tensor, y)


def _run(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    geometry: tuple[list[int], list[int], list[int], list[int]],
    code_range: tuple[int, int],
    input_scale: torch.Tensor | None,
    zero_point: torch.Tensor | None,
    pre_scale: torch.Tensor | None,
) -> torch.Tensor:
    samples, channels, height, width = x.shape
    out_height, out_width = output_size((height, width), *geometry)
    out_shape = (samples, weight.shape[0], out_height, out_width)
    out = torch.empty(out_shape, dtype=x.dtype, device=x.device, memory_format=_layout(x))
    if out.numel() == 0:
        return out
    if triton_path.suits(x, weight.shape[0], geometry):
        arguments = (geometry, code_range, input_scale, zero_point, pre_scale)
        triton_path.conv2d(x, weight, weight_scale, bias, *arguments, out)
        return out
    weight = weight.flatten(1)
    implementation = cuda if x.device.type == "cuda" else cpu
    per_element = None
    if pre_scale is not None:
        per_element = pre_scale.view(-1, 1).expand(channels, height * width).reshape(1, -1)
    offset = None
    if zero_point is not None:
        offset = weight.sum(dim=1, keepdim=True, dtype=torch.int32).mul_(zero_point.reshape(1).to(torch.int32))
    row_scale = weight_scale.reshape(-1, 1)
    row_bias = None if bias is None else bias.float().view(-1, 1)
    for sample in range(samples):
        flat = x[sample].reshape(1, -1)
        codes, scale = implementation.quantize_rows(flat, *code_range, input_scale, zero_point, per_element)
        padded = _pad(codes.view(channels, height, width), geometry[2], zero_point)
        target = out[sample].flatten(1)
        for first, last, columns in _column_blocks(padded, geometry, (out_height, out_width)):
            acc = implementation.int_matmul(weight, columns)
            if offset is not None:
                acc = acc - offset
            values = acc.float().mul_(scale).mul_(row_scale)
            target[:, first:last] = values if row_bias is None else values.add_(row_bias)
    return out


def _pad(codes: torch.Tensor, padding: list[int], zero_point: torch.Tensor | None) -> torch.Tensor:
    """Codes [C, H, W] with a border that stands for 0."""
    if not any(padding):
        return codes
    left, right, top, bottom = padding
    channels, height, width = codes.shape
    shape = (channels, height + top + bottom, width + left + right)
    padded = torch.zeros(shape, dtype=torch.int8, device=codes.device)
    if zero_point is not None:
        padded += zero_point.reshape(1).to(torch.int8)
    padded[:, top : top + height, left : left + width] = codes
    return padded


def _column_blocks(
    codes: torch.Tensor, geometry: tuple[list[int], list[int], list[int], list[int]], size: tuple[int, int]
) -> list[tuple[int, int, torch.Tensor]] | _Blocks:
    """(first, last, columns [K, last - first]) for consecutive output positions."""
    kernel, stride, _, dilation = geometry
    if kernel == [1, 1] and stride == [1, 1] and codes.is_contiguous():
        return [(0, size[0] * size[1], codes.view(codes.shape[0], -1))]
    return _Blocks(codes, kernel, stride, dilation, size)


class _Blocks:
    """Iterates over blocks of output rows, gathering their windows into one reused int8 buffer."""

    def __init__(
        self, codes: torch.Tensor, kernel: list[int], stride: list[int], dilation: list[int], size: tuple[int, int]
    ) -> None:
        plane, row, column = codes.stride()
        self.size = size
        self.depth = codes.shape[0] * kernel[0] * kernel[1]
        self.windows = codes.as_strided(
            (codes.shape[0], *kernel, *size),
            (plane, row * dilation[0], column * dilation[1], row * stride[0], column * stride[1]),
        )
        limit = COLUMN_BLOCK_ELEMENTS.get(codes.device.type, 1 << 21)
        self.rows = min(size[0], max(1, limit // (self.depth * size[1])))

    def __iter__(self):  # type: ignore[no-untyped-def]
        height, width = self.size
        buffer = torch.empty(self.depth * self.rows * width, dtype=torch.int8, device=self.windows.device)
        for top in range(0, height, self.rows):
            part = self.windows[:, :, :, top : top + self.rows]
            count = part.shape[3] * width
            columns = buffer[: self.depth * count]
            columns.view(part.shape).copy_(part)
            yield top * width, top * width + count, columns.view(self.depth, count)

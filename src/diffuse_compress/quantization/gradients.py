"""Gradients of quantized layers, straight through the quantizer of the input."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.grad import conv2d_input

from diffuse_compress.quantization.dispatch import Geometry, InputQuantization, conv2d, dense_weight, linear
from diffuse_compress.quantization.packed import QuantizedWeight, SparseOutliers
from diffuse_compress.quantization.scheme import Scheme, WeightScheme

__all__ = ["ConvFunction", "LinearFunction"]


class LinearFunction(torch.autograd.Function):
    """Straight-through: the gradient of x is that of the dense layer with the dequantized weight."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        bias: torch.Tensor | None,
        qweight: torch.Tensor,
        scale: torch.Tensor,
        zero_point: torch.Tensor | None,
        group_scale: torch.Tensor | None,
        outlier_rows: torch.Tensor | None,
        outlier_columns: torch.Tensor | None,
        outlier_values: torch.Tensor | None,
        pre_scale: torch.Tensor | None,
        input_scale: torch.Tensor | None,
        input_zero_point: torch.Tensor | None,
        clip: torch.Tensor | None,
        scheme: Scheme,
    ) -> torch.Tensor:
        stored = (qweight, scale, zero_point, group_scale, outlier_rows, outlier_columns, outlier_values)
        ctx.save_for_backward(*stored, pre_scale)
        ctx.weight_scheme, ctx.columns = scheme.weight, x.shape[-1]
        weight = _stored_weight(stored, x.shape[-1], scheme.weight)
        return linear(x, weight, scheme, bias, InputQuantization(input_scale, input_zero_point, pre_scale, clip))

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad,) = grad_outputs
        *stored, pre_scale = ctx.saved_tensors
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            weight = _stored_weight(stored, ctx.columns, ctx.weight_scheme)
            grad_x = grad @ dense_weight(weight, grad.dtype, pre_scale)
        if ctx.needs_input_grad[1]:
            grad_bias = grad.reshape(-1, grad.shape[-1]).sum(dim=0)
        return grad_x, grad_bias, *(None,) * 12


def _stored_weight(stored: Sequence[Any], columns: int, scheme: WeightScheme) -> QuantizedWeight:
    """Of the tensors that a layer keeps of its weight, in the order of its parameters."""
    qweight, scale, zero_point, group_scale, *outliers = stored
    sparse = None if outliers[0] is None else SparseOutliers(*outliers)
    return QuantizedWeight(qweight, scale, zero_point, group_scale, columns, scheme, sparse)


class ConvFunction(torch.autograd.Function):
    """As :class:`LinearFunction`, for a convolution."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        bias: torch.Tensor | None,
        qweight: torch.Tensor,
        scale: torch.Tensor,
        zero_point: torch.Tensor | None,
        group_scale: torch.Tensor | None,
        outlier_rows: torch.Tensor | None,
        outlier_columns: torch.Tensor | None,
        outlier_values: torch.Tensor | None,
        pre_scale: torch.Tensor | None,
        column_scale: torch.Tensor | None,
        input_scale: torch.Tensor | None,
        input_zero_point: torch.Tensor | None,
        scheme: Scheme,
        geometry: Geometry,
    ) -> torch.Tensor:
        stored = (qweight, scale, zero_point, group_scale, outlier_rows, outlier_columns, outlier_values)
        ctx.save_for_backward(*stored, column_scale)
        ctx.weight_scheme, ctx.geometry, ctx.input_size = scheme.weight, geometry, x.shape
        weight = _stored_weight(stored, geometry.columns(x.shape[1]), scheme.weight)
        inputs = InputQuantization(input_scale, input_zero_point, pre_scale)
        return conv2d(x, weight, scheme, geometry, bias, inputs)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad,) = grad_outputs
        *stored, column_scale = ctx.saved_tensors
        geometry: Geometry = ctx.geometry
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            weight = _stored_weight(stored, geometry.columns(ctx.input_size[1]), ctx.weight_scheme)
            kernel = dense_weight(weight, grad.dtype, column_scale).unflatten(1, (-1, *geometry.kernel))
            grad_x = conv2d_input(
                ctx.input_size, kernel, grad, geometry.stride, geometry.padding, geometry.dilation, geometry.groups
            )
        if ctx.needs_input_grad[1]:
            grad_bias = grad.sum(dim=(0, 2, 3))
        return grad_x, grad_bias, *(None,) * 13

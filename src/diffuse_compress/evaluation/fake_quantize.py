"""The reference for a compressed model: the same codes and scales, simulated in float32.

A quantized layer runs integer or float8 kernels, or expands its weight in the compute dtype. Replacing each by a
float32 layer that dequantizes the *same* stored codes and quantizes and dequantizes its input shows what these
kernels add to the error of the scheme itself: nothing but float rounding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from diffuse_compress.quantization.clips import clip_of_rows
from diffuse_compress.quantization.layers import QuantizedConv2d, QuantizedLinear
from diffuse_compress.quantization.numerics import choose_activation_qparams, dequantize, fake_quantize_activation
from diffuse_compress.quantization.outlier_columns import outlier_columns
from diffuse_compress.quantization.rotation import rotate
from diffuse_compress.quantization.scheme import ActivationScheme

__all__ = ["FakeQuantizedLayer", "to_fake_quantized"]

_TENSORS = (
    "act_pre_shift",
    "act_pre_scale",
    "input_scale",
    "input_zero_point",
    "low_rank_down",
    "low_rank_up",
    "input_clip",
    "dense_columns",
    "dense_weight",
)


class FakeQuantizedLayer(nn.Module):
    """What a quantized layer stands for, in float32: ``y = dense(Q(u * act_pre_scale)) + low-rank branch``, with
    ``u = x - act_pre_shift`` and the rotation of the scheme before Q; columns that are not quantized are multiplied as
    they come.

    Args:
        layer: a QuantizedLinear or QuantizedConv2d; its codes, scales and bias are copied in float32.
        quantize_input: False leaves the input alone, as on devices where a path is weight-only.
    """

    dense: Any
    act_pre_shift: torch.Tensor | None
    act_pre_scale: torch.Tensor | None
    input_scale: torch.Tensor | None
    input_zero_point: torch.Tensor | None
    low_rank_down: torch.Tensor | None
    low_rank_up: torch.Tensor | None
    input_clip: torch.Tensor | None
    dense_columns: torch.Tensor | None
    dense_weight: torch.Tensor | None

    def __init__(self, layer: QuantizedLinear | QuantizedConv2d, quantize_input: bool = True) -> None:
        super().__init__()
        dense = layer.to_dense().float()
        with torch.no_grad():
            # to_dense folds smoothing and the low-rank branch into the weight; here they stay apart.
            dense.weight.copy_(dequantize(layer.quantized_weight(), torch.float32).view_as(dense.weight))
            if dense.bias is not None:
                dense.bias.copy_(layer.bias)
        self.dense = dense.requires_grad_(False)
        self.activation: ActivationScheme | None = layer.scheme.activation if quantize_input else None
        self.feature_dims = 3 if isinstance(dense, nn.Conv2d) else 1
        self.input_rotation = layer.scheme.input_rotation
        self.timestep_groups = layer.timestep_groups
        for name in _TENSORS:
            value = getattr(layer, name)
            self.register_buffer(name, None if value is None else value.detach().clone(), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """y in the dtype of x; shapes as in the stock layer."""
        values = x.float()
        if self.act_pre_shift is not None:
            values = (values - self.act_pre_shift).to(x.dtype).float()
        columns = None if self.dense_columns is None else self.dense_columns.long()
        act = self.activation
        if act is not None and act.outlier_threshold is not None:
            columns = outlier_columns(values, act.outlier_threshold).nonzero().flatten()
        inputs = values if columns is None or act is None else values.index_fill(-1, columns, 0)
        if self.act_pre_scale is not None:
            inputs = inputs * (self.act_pre_scale.view(-1, 1, 1) if self.feature_dims == 3 else self.act_pre_scale)
        if self.input_rotation is not None:
            inputs = rotate(inputs, self.input_rotation)
        if self.activation is not None:
            scale = self.input_scale if self.input_clip is None else self._clipped_scale(inputs, self.activation)
            inputs = fake_quantize_activation(inputs, self.activation, scale, self.input_zero_point, self.feature_dims)
        y = self.dense(inputs)
        if columns is not None:
            y = y + nn.functional.linear(values[..., columns], self._weight_of(columns))
        if self.low_rank_down is not None and self.low_rank_up is not None:
            y = y + self._low_rank(values, self.low_rank_up.float() @ self.low_rank_down.float())
        return y.to(x.dtype)

    def _weight_of(self, columns: torch.Tensor) -> torch.Tensor:
        """Of input columns that are not quantized: their own, or in a threshold's case that of the codes."""
        if self.dense_weight is not None:
            return self.dense_weight.float()
        weight: torch.Tensor = self.dense.weight[:, columns]
        return weight if self.act_pre_scale is None else weight * self.act_pre_scale[columns]

    def _clipped_scale(self, x: torch.Tensor, activation: ActivationScheme) -> torch.Tensor:
        assert self.input_clip is not None
        groups, lead = self.timestep_groups, x.shape[:-1]
        clip = clip_of_rows(self.input_clip, None if groups is None else groups.index, lead)
        clip = clip if clip.numel() == 1 else clip.reshape(*lead, 1)
        return choose_activation_qparams(x, activation, clip=clip.reshape(1) if clip.numel() == 1 else clip).scale

    def _low_rank(self, x: torch.Tensor, product: torch.Tensor) -> torch.Tensor:
        if isinstance(self.dense, nn.Conv2d):
            return self.dense._conv_forward(x, product.view_as(self.dense.weight), None)
        return nn.functional.linear(x, product)


def to_fake_quantized(model: Any, follow_device: bool = False) -> list[str]:
    """Replace, in place, every quantized layer of ``model`` by its :class:`FakeQuantizedLayer`.

    For measurements only: the result cannot be saved as a compressed model, so work on a copy.

    Args:
        model: any module with quantized layers.
        follow_device: leave inputs alone where the layer's own path on its device does (float8 without a float8
            matmul); False simulates the scheme as written.

    Returns:
        Names of the replaced layers, in order.
    """
    found = [(name, m) for name, m in model.named_modules() if isinstance(m, QuantizedLinear | QuantizedConv2d)]
    for name, layer in found:
        weight_only = follow_device and layer.compute_path().name == "dequantize-weight-only"
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, FakeQuantizedLayer(layer, quantize_input=not weight_only))
    return [name for name, _ in found]

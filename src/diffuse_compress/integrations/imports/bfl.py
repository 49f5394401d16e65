"""Black Forest Labs' row-wise fp8 (``fp8r``), as diffusers loads it with BFLQuantizationConfig.

The weight is float8_e4m3fn [N, K] with an fp32 scale for each row, and inputs are quantized row by row where the device
has a float8 product: our ``fp8``, number for number.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from diffuse_compress.integrations.imports.base import ForeignLayer, NotImportableError, require_equal
from diffuse_compress.quantization.packed import QuantizedWeight
from diffuse_compress.quantization.scheme import ActivationScheme, NumberFormat, PerChannel, Scheme, WeightScheme

__all__ = ["is_layer", "read"]

_SCHEME = Scheme(WeightScheme(NumberFormat.FLOAT8_E4M3, PerChannel()), ActivationScheme(NumberFormat.FLOAT8_E4M3))


def is_layer(module: nn.Module) -> bool:
    """True for a layer of diffusers' ``bfl`` quantizer."""
    return type(module).__module__.startswith("diffusers.quantizers.bfl")


def read(module: nn.Module) -> ForeignLayer:
    """The BFLFP8RLinear ``module``. Raises NotImportableError for NVFP4 layers."""
    if type(module).__name__ != "BFLFP8RLinear":
        raise NotImportableError(
            f"{type(module).__name__} (only BFLFP8RLinear can be; we have no float4 format): take the fp8r file, or "
            "call dequantize() on the model, then compress()"
        )
    layer: Any = module
    codes, scale = layer.weight.detach(), layer.weight_scale.float().reshape(-1, 1)
    weight = QuantizedWeight(codes, scale, None, None, layer.in_features, _SCHEME.weight)
    require_equal(weight, codes.float() * layer.weight_scale.float()[:, None])
    return ForeignLayer(weight, _SCHEME, layer.compute_dtype or torch.bfloat16, "BFL fp8r")

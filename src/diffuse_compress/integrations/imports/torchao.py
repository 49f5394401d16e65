"""torchao's Int8Tensor and Float8Tensor weights, whoever made them: ``TorchAoConfig`` of either library, ``quantize_``.

Both keep plain codes and fp32 scales, which become ours without a copy. What differs afterwards is the quantizer of the
input: torchao's symmetric int8 scale is amax / 127.5, ours amax / 127.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from diffuse_compress.integrations.imports.base import ForeignLayer, NotImportableError, require_equal
from diffuse_compress.quantization.packed import QuantizedWeight
from diffuse_compress.quantization.scheme import (
    GROUP_SIZES,
    ActivationScheme,
    Granularity,
    NumberFormat,
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
    ScaleRule,
    Scheme,
    WeightScheme,
)

__all__ = ["holds", "read"]


def holds(tensor: Any) -> bool:
    """True for a parameter that is a tensor subclass of torchao's."""
    return any(cls.__module__.split(".")[0] == "torchao" for cls in type(tensor).__mro__)


def read(module: nn.Module) -> ForeignLayer:
    """The linear layer ``module`` with a torchao weight.

    Raises:
        NotImportableError: another tensor class, block size, or quantizer of the input than we have.
    """
    tensor: Any = module.weight
    kind = type(tensor).__name__
    readers = {"Int8Tensor": _int8, "Float8Tensor": _float8}
    if kind not in readers:
        raise NotImportableError(
            f"torchao {kind} (only Int8Tensor and Float8Tensor can be): call dequantize() on the model, then compress()"
        )
    weight, activation, extra = readers[kind](tensor)
    require_equal(weight, tensor.dequantize(torch.float32))
    return ForeignLayer(weight, Scheme(weight.scheme, activation), tensor.dtype, f"torchao {kind}", extra)


def _int8(tensor: Any) -> tuple[QuantizedWeight, ActivationScheme | None, dict[str, Any]]:
    granularity = _granularity(tensor)
    zero_point = tensor.zero_point
    if zero_point is not None and not bool(zero_point.any()):
        zero_point = None
    if zero_point is None:
        scheme = WeightScheme(NumberFormat.INT8, granularity, scale_rule=ScaleRule.AMAX_OVER_HALF_RANGE)
    else:
        scheme = WeightScheme(NumberFormat.INT8, granularity, symmetric=False)
        zero_point = zero_point.to(torch.int8)
    activation = _activation(tensor, NumberFormat.INT8)
    extra: dict[str, Any] = {}
    if tensor.act_pre_scale is not None:
        extra["act_pre_scale"] = tensor.act_pre_scale.float().expand(tensor.shape[1])
    if activation is not None and not activation.dynamic:
        extra["input_scale"] = tensor.act_quant_scale
    return _weight(tensor, scheme, zero_point), activation, extra


def _float8(tensor: Any) -> tuple[QuantizedWeight, ActivationScheme | None, dict[str, Any]]:
    if tensor.qdata.dtype != torch.float8_e4m3fn:
        raise NotImportableError(f"float8 of dtype {tensor.qdata.dtype}, we have float8_e4m3fn: quantize it to that")
    granularity = _granularity(tensor)
    if isinstance(granularity, PerGroup):
        raise NotImportableError("float8 with a scale per group: quantize it with PerRow() or PerTensor()")
    scheme = WeightScheme(NumberFormat.FLOAT8_E4M3, granularity)
    return _weight(tensor, scheme, None), _activation(tensor, NumberFormat.FLOAT8_E4M3), {}


def _weight(tensor: Any, scheme: WeightScheme, zero_point: torch.Tensor | None) -> QuantizedWeight:
    rows, columns = tensor.shape
    groups = 1 if isinstance(scheme.granularity, PerTensor) else rows, scheme.num_groups(columns)
    scale = tensor.scale.float().reshape(groups)
    zero_point = None if zero_point is None else zero_point.reshape(groups)
    return QuantizedWeight(tensor.qdata.contiguous(), scale, zero_point, None, columns, scheme)


def _granularity(tensor: Any) -> Granularity:
    """Which elements of the weight [N, K] share a scale, from torchao's block size."""
    if tensor.qdata.dim() != 2:
        raise NotImportableError(f"a weight of {tensor.qdata.dim()} dimensions; only matrices can be imported")
    shape, block = list(tensor.shape), list(tensor.block_size or tensor.shape)
    if block == [1, shape[1]]:
        return PerChannel()
    if block == shape:
        return PerTensor()
    if block[0] == 1 and block[1] in GROUP_SIZES and shape[1] % block[1] == 0:
        return PerGroup(block[1])
    raise NotImportableError(
        f"scales of blocks {block}; ours are per tensor, per row, or per {', '.join(map(str, GROUP_SIZES))} columns: "
        "quantize it with such a granularity"
    )


def _activation(tensor: Any, fmt: NumberFormat) -> ActivationScheme | None:
    given = tensor.act_quant_kwargs
    if given is None:
        return None
    if getattr(given, "mapping_type", None) is not None and given.mapping_type.name != "SYMMETRIC":
        raise NotImportableError(
            f"inputs quantized with MappingType.{given.mapping_type.name}; our dynamic ones are symmetric: quantize it "
            "with MappingType.SYMMETRIC"
        )
    bounds = (getattr(given, "hp_value_lb", None), getattr(given, "hp_value_ub", None))
    if bounds != (None, None):
        raise NotImportableError(f"inputs clipped to {bounds} first: quantize it without activation_value_lb and _ub")
    if getattr(given, "float8_dtype", torch.float8_e4m3fn) != torch.float8_e4m3fn:
        raise NotImportableError(f"inputs in {given.float8_dtype}, we have float8_e4m3fn: quantize it to that")
    known: dict[str, Granularity] = {"PerRow": PerToken(), "PerTensor": PerTensor()}
    rows = known.get(type(given.granularity).__name__)
    if rows is None:
        raise NotImportableError(f"inputs with {given.granularity}: quantize it with PerRow() or PerTensor()")
    static = getattr(tensor, "act_quant_scale", None)
    if static is None:
        return ActivationScheme(fmt, rows)
    zero_point = tensor.act_quant_zero_point
    if static.numel() != 1 or (zero_point is not None and bool(zero_point.any())):
        raise NotImportableError("static inputs with several scales or a zero point: quantize it with PerTensor()")
    return ActivationScheme(fmt, PerTensor(), dynamic=False)

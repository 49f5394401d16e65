"""Writing a compressed component as torchao tensors, so that stock libraries load it without this package.

A layer is written so only if torchao's tensor holds its codes and scales as they are, and its product means the same
weight. The live model keeps our layers: while it is saved, its quantizer and its config are torchao's.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from diffuse_compress.assignment import LayerAssignment
from diffuse_compress.errors import ConfigError, reasons_text
from diffuse_compress.integrations.compat import add_to_diffusers_config, require, torchao_classes
from diffuse_compress.integrations.component import quantized_layers
from diffuse_compress.integrations.doors import library_of
from diffuse_compress.integrations.peft import has_adapters
from diffuse_compress.integrations.refusals import require_none_carried
from diffuse_compress.patterns import generalize
from diffuse_compress.quantization.layers import QuantizedConv2d, QuantizedLinear
from diffuse_compress.quantization.scheme import (
    NumberFormat,
    PerBlock,
    PerChannel,
    PerGroup,
    PerInputGroup,
    PerTensor,
    PerToken,
    Scheme,
)

__all__ = ["config_for", "require_exact", "written_as_torchao"]

_FP8_MULTIPLE = 16
_QPARAMS = ("scale", "act_pre_scale")


# --- what can be written ----------------------------------------------------------------------------------------


def require_exact(where: str, model: nn.Module, planned: Mapping[str, LayerAssignment] | None = None) -> None:
    """Raise ConfigError naming every layer that cannot be written, or MissingDependencyError without torchao.

    Args:
        where: the component's name, for the message.
        model: with the layers, or on the meta device.
        planned: what is about to be done to its dense layers, on top of those that are quantized.
    """
    require("torchao", 'save_pretrained(format="torchao")')
    if has_adapters(model):
        raise ConfigError(
            f'{where}: format="torchao" needs a model without adapters, found peft layers. Fuse or unload them first.'
        )
    require_none_carried(f'{where}: format="torchao"', model)
    found = {name: _reason_of_layer(layer) for name, layer in quantized_layers(model).items()}
    for name, item in (planned or {}).items():
        if item.scheme is not None:
            layer: Any = model.get_submodule(name)
            is_convolution = isinstance(layer, nn.Conv2d)
            found[name] = _reason(item.scheme, item.shape, layer.weight.dtype, is_convolution=is_convolution)
    reasons = {name: reason for name, reason in found.items() if reason is not None}
    if not reasons:
        return
    raise ConfigError(
        f'{where}: format="torchao" needs layers that torchao\'s tensors hold exactly, got {len(reasons)} of '
        f"{len(found)} that they do not. {reasons_text(reasons)}. Nothing was written. Leave format= "
        'out, or name the components that can be: format={"text_encoder": "torchao"}.'
    )


def _reason_of_layer(layer: QuantizedLinear | QuantizedConv2d) -> str | None:
    if isinstance(layer, QuantizedConv2d):
        return _reason(layer.scheme, layer.qweight.shape, layer.compute_dtype, is_convolution=True)
    return _reason(
        layer.scheme,
        (layer.out_features, layer.in_features),
        layer.compute_dtype,
        is_smoothed=layer.act_pre_scale is not None,
        is_low_rank=layer.low_rank_down is not None,
        has_dense_columns=layer.dense_columns is not None,
        is_clipped=layer.input_clip is not None,
        is_shifted=layer.act_pre_shift is not None or layer.gained_bias,
    )


def _reason(
    scheme: Scheme,
    shape: Sequence[int],
    compute_dtype: torch.dtype,
    *,
    is_convolution: bool = False,
    is_smoothed: bool = False,
    is_low_rank: bool = False,
    has_dense_columns: bool = False,
    is_clipped: bool = False,
    is_shifted: bool = False,
) -> str | None:
    """Why no torchao tensor holds a layer of this format exactly; None if one does.

    Args:
        scheme: the layer's.
        shape: [N, K] of its weight.
        compute_dtype: of its inputs.
        is_convolution: it is no linear layer.
        is_smoothed: it has an ``act_pre_scale``.
        is_low_rank: it has a low-rank branch.
        has_dense_columns: some of its input columns have no codes.
        is_clipped: its inputs have learned clips.
        is_shifted: a shift of its input is with it, or has given it a bias.
    """
    if is_convolution:
        return "a convolution; torchao's loaders know linear layers only"
    if is_low_rank:
        return f"{scheme.name} with a low-rank branch, which torchao's tensors do not have"
    if is_shifted:
        return f"{scheme.name} with a shift of its inputs, which torchao's tensors do not have"
    if has_dense_columns:
        return f"{scheme.name} with dense input columns, which torchao's tensors do not have"
    if scheme.activation is not None and scheme.activation.outlier_threshold is not None:
        return f"{scheme.name} with columns chosen at run time (LLM.int8), which torchao's tensors do not have"
    if is_clipped:
        return f"{scheme.name} with learned clips of its inputs, which torchao's tensors do not have"
    if scheme.input_rotation is not None:
        return f"{scheme.name} of rotated inputs, which torchao's tensors do not have"
    if scheme.activation is not None and not scheme.activation.dynamic:
        return f"{scheme.name} with static inputs, whose scales transformers does not read back"
    if not scheme.weight.format.is_integer:
        return _float8_reason(scheme, shape, compute_dtype, is_smoothed)
    if scheme.weight.format is not NumberFormat.INT8:
        return f"{scheme.name}; torchao packs {scheme.weight.format.value} codes in other layouts, for some GPUs only"
    return _int8_reason(scheme, shape, is_smoothed)


def _int8_reason(scheme: Scheme, shape: Sequence[int], is_smoothed: bool) -> str | None:
    weight = scheme.weight
    if not weight.symmetric:
        return f"{scheme.name} with zero points, which torchao's int8 products ignore"
    if scheme.activation is not None and scheme.activation.format is not NumberFormat.INT8:
        return f"{scheme.name}; torchao quantizes no inputs to {scheme.activation.format.value}"
    if isinstance(weight.granularity, PerInputGroup):
        return f"{scheme.name} with groups of rows, which torchao does not have"
    if isinstance(weight.granularity, PerGroup):
        if scheme.activation is not None:
            return f"{scheme.name} with a scale per group; torchao's product of int8 inputs takes one per row"
        if shape[1] % weight.granularity.group_size:
            return f"{scheme.name} with a last group that is not full, which torchao does not have"
    if is_smoothed and scheme.activation is None:
        return f"{scheme.name} with smoothed inputs; torchao smooths only inputs that it quantizes"
    return None


def _float8_reason(scheme: Scheme, shape: Sequence[int], compute_dtype: torch.dtype, is_smoothed: bool) -> str | None:
    act = scheme.activation
    if is_smoothed:
        return f"{scheme.name} with smoothed inputs, which torchao's float8 tensors do not have"
    if isinstance(scheme.weight.granularity, PerBlock):
        return f'{scheme.name} with scales per block, which are not written so: take format="compressed-tensors"'
    if act is None:
        return None
    if isinstance(scheme.weight.granularity, PerChannel) != isinstance(act.granularity, PerToken):
        return f"{scheme.name} with scales per row on one side only, for which torchao has no product"
    if compute_dtype != torch.bfloat16 and isinstance(act.granularity, PerToken):
        return f"{scheme.name} in {compute_dtype}; torchao's row-wise product is bfloat16: .to(torch.bfloat16) first"
    if any(side % _FP8_MULTIPLE for side in shape):
        return f"{scheme.name} of sides that are no multiples of {_FP8_MULTIPLE}, which torchao's product needs"
    return None


# --- tensors and configs ----------------------------------------------------------------------------------------


def _tensor(layer: QuantizedLinear) -> torch.Tensor:
    """The layer's weight as torchao's tensor; shares its bytes."""
    from torchao.float8.inference import Float8MMConfig
    from torchao.quantization import Float8Tensor, Int8Tensor
    from torchao.quantization.quantize_.workflows import QuantizeTensorToFloat8Kwargs, QuantizeTensorToInt8Kwargs

    scheme, act = layer.scheme, layer.scheme.activation
    rows, columns = layer.out_features, layer.in_features
    granularity = scheme.weight.granularity
    block = [rows if isinstance(granularity, PerTensor) else 1, scheme.weight.group_size or columns]
    codes, scale, dtype = layer.qweight.detach(), layer.scale.detach(), layer.compute_dtype
    if scheme.weight.format.is_integer:
        given = None if act is None else QuantizeTensorToInt8Kwargs(_ao_granularity(act.granularity))
        smooth = None if layer.act_pre_scale is None else layer.act_pre_scale.detach()
        return Int8Tensor(codes, scale, block, dtype, act_pre_scale=smooth, act_quant_kwargs=given)  # type: ignore[no-any-return]
    if act is None:
        return Float8Tensor(codes, scale, block, dtype=dtype)  # type: ignore[no-any-return]
    inputs = QuantizeTensorToFloat8Kwargs(granularity=_ao_granularity(act.granularity))
    mm_config = Float8MMConfig(use_fast_accum=True)
    return Float8Tensor(codes, scale, block, mm_config, inputs, dtype=dtype)  # type: ignore[no-any-return]


def _ao_granularity(granularity: Any) -> Any:
    from torchao.quantization import PerGroup as AoPerGroup
    from torchao.quantization import PerRow as AoPerRow
    from torchao.quantization import PerTensor as AoPerTensor

    if isinstance(granularity, PerGroup):
        return AoPerGroup(granularity.group_size)
    return AoPerTensor() if isinstance(granularity, PerTensor) else AoPerRow()


def _ao_config(scheme: Scheme) -> Any:
    """The config with which torchao itself would quantize a layer to this format."""
    from torchao import quantization as ao

    weight, act = scheme.weight, scheme.activation
    granularity = _ao_granularity(weight.granularity)
    if act is None:
        kind = ao.Int8WeightOnlyConfig if weight.format.is_integer else ao.Float8WeightOnlyConfig
        return kind(granularity=granularity)
    both = [_ao_granularity(act.granularity), granularity]
    if weight.format.is_integer:
        return ao.Int8DynamicActivationInt8WeightConfig(granularity=both)
    return ao.Float8DynamicActivationFloat8WeightConfig(granularity=both)


def config_for(model: nn.Module) -> Any:
    """The library's TorchAoConfig that describes ``model``: its formats by layer name, and what stayed dense."""
    from torchao.quantization import FqnToConfig

    schemes = {name: layer.scheme for name, layer in quantized_layers(model).items()}
    linears = {name: schemes.get(name) for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    if len(set(schemes.values())) == 1:
        described = _ao_config(next(iter(schemes.values())))
    else:
        described = FqnToConfig(
            OrderedDict((rule, _ao_config(scheme)) for rule, scheme in generalize(linears) if scheme)
        )
    # Both libraries take a name as a piece of text: one that stands inside a packed layer's would keep that dense too.
    dense = [
        name
        for name, scheme in linears.items()
        if scheme is None and not any(f"{name}." in f"{packed}.weight" for packed in schemes)
    ]
    config_class, _ = torchao_classes(library_of(model))
    return config_class(described, modules_to_not_convert=dense or None)


def _torchao_state_dict(model: nn.Module, state_dict: dict[str, torch.Tensor]) -> tuple[dict[str, Any], dict[str, Any]]:
    """``state_dict`` as torchao writes it: (plain tensors, safetensors metadata)."""
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict

    tensors = dict(state_dict)
    for name, layer in model.named_modules(remove_duplicate=False):
        if isinstance(layer, QuantizedLinear):
            del tensors[f"{name}.qweight"]
            for leaf in _QPARAMS:
                tensors.pop(f"{name}.{leaf}", None)
            tensors[f"{name}.weight"] = _tensor(layer)
    return flatten_tensor_state_dict(tensors)  # type: ignore[no-any-return]


# --- while saving -----------------------------------------------------------------------------------------------


@contextmanager
def written_as_torchao(model: Any) -> Iterator[None]:
    """While it lasts, the stock ``save_pretrained`` of ``model`` writes torchao tensors. The layers stay ours."""
    library = library_of(model)
    config = config_for(model)
    _, quantizer_class = torchao_classes(library)
    quantizer = quantizer_class(config, pre_quantized=True)
    quantizer.offload = False
    writers: dict[str, Callable[..., Any]] = {
        "diffusers": lambda state_dict, safe_serialization=True: _torchao_state_dict(model, state_dict),
        "transformers": lambda whole: _torchao_state_dict(model, whole.state_dict()),
    }
    quantizer.get_state_dict_and_metadata = writers[library]
    marks = {name: model.__dict__[name] for name in ("hf_quantizer", "_internal_dict") if name in model.__dict__}
    ours = model.config.quantization_config
    model.hf_quantizer = quantizer
    try:
        if library == "diffusers":
            add_to_diffusers_config(model, "quantization_config", config)
        else:
            model.config.quantization_config = config
        yield
    finally:
        model.__dict__.update(marks)
        if library == "transformers":
            model.config.quantization_config = ours

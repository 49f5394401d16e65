"""Linear layers of a compressed-tensors checkpoint; the layouts are those of ``exports/compressed_tensors.py``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch

from diffuse_compress.integrations.imports.base import ForeignLayer, NotImportableError
from diffuse_compress.quantization.packed import QuantizedWeight
from diffuse_compress.quantization.scheme import (
    BLOCK_SIZE,
    GROUP_SIZES,
    ActivationScheme,
    Granularity,
    NumberFormat,
    PerBlock,
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
    ScaleRule,
    Scheme,
    WeightScheme,
)
from diffuse_compress.quantization.word_packing import from_unsigned, pack_words, unpack_words

__all__ = ["METHOD", "TENSORS", "names", "read", "whole_reason"]

METHOD = "compressed-tensors"
TENSORS = (
    "weight_packed",
    "weight",
    "weight_scale",
    "weight_zero_point",
    "weight_shape",
    "weight_g_idx",
    "input_scale",
    "input_zero_point",
)
_FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized")


def whole_reason(config: Mapping[str, Any]) -> str | None:
    """Why nothing of a checkpoint with this ``quantization_config`` can be imported; None if layers can be asked."""
    if config.get("kv_cache_scheme"):
        return "its keys and values are quantized (kv_cache_scheme), which is no part of our layers"
    if config.get("transform_config"):
        return "it transforms tensors at run time (transform_config), which our layers do not"
    sparsity = (config.get("sparsity_config") or {}).get("format", "dense")
    return None if sparsity == "dense" else f"its weights are sparse ({sparsity})"


def names(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """Names of the quantized layers in a file."""
    ending = ".weight_scale"
    return [key.removesuffix(ending) for key in tensors if key.endswith(ending)]


def read(name: str, own: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> ForeignLayer:
    """The layer ``name`` with the tensors ``own``, of those in ``TENSORS`` and its bias.

    Raises:
        NotImportableError: a format, granularity or quantizer of the input that we do not have.
    """
    group = _group_of(name, config.get("config_groups") or {})
    form = group.get("format") or config.get("format")
    if form not in _FORMATS:
        raise NotImportableError(f"of format {form!r}; {', '.join(_FORMATS)} can be imported")
    if group.get("output_activations"):
        raise NotImportableError("with quantized outputs, which our layers do not have")
    if "weight_g_idx" in own:
        raise NotImportableError("with columns in another order (weight_g_idx); take one made with actorder='weight'")
    scheme = _weight_scheme(group["weights"])
    activation = _activation(group.get("input_activations"))
    weight = _packed(own, scheme) if "weight_packed" in own else _plain(own, scheme)
    extra: dict[str, Any] = {}
    if activation is not None and not activation.dynamic:
        extra["input_scale"] = own["input_scale"].float().reshape(1)
        if not activation.symmetric:
            extra["input_zero_point"] = own["input_zero_point"].to(torch.int8).reshape(1)
    return ForeignLayer(
        weight, Scheme(scheme, activation), torch.float32, f"compressed-tensors {form}", extra, own.get("bias")
    )


def _group_of(name: str, groups: Mapping[str, Any]) -> Mapping[str, Any]:
    """The first group with a target that is the name, then one that matches it, then one of all linear layers."""
    for fits in (
        lambda target: target == name,
        lambda target: target.startswith("re:") and re.match(target[3:], name) is not None,
        lambda target: target == "Linear",
    ):
        for group in groups.values():
            if any(fits(target) for target in group.get("targets", ())):
                found: Mapping[str, Any] = group
                return found
    raise NotImportableError("no group of its quantization_config names it: download it again")


def _weight_scheme(arguments: Mapping[str, Any]) -> WeightScheme:
    fmt = _number_format(arguments, "weights")
    symmetric = bool(arguments.get("symmetric", True))
    granularity = _weight_granularity(arguments)
    if not fmt.is_integer:
        if isinstance(granularity, PerGroup):
            raise NotImportableError("float8 with a scale per group, which we do not have")
        return WeightScheme(fmt, granularity)
    # Codes of theirs go down to -2**(bits - 1).
    rule = ScaleRule.AMAX_OVER_HALF_RANGE if symmetric else ScaleRule.AMAX_OVER_QMAX
    return WeightScheme(fmt, granularity, symmetric=symmetric, scale_rule=rule)


def _number_format(arguments: Mapping[str, Any], what: str) -> NumberFormat:
    bits, kind = arguments.get("num_bits", 8), arguments.get("type", "int")
    known = {
        ("int", 8): NumberFormat.INT8,
        ("int", 4): NumberFormat.INT4,
        ("int", 2): NumberFormat.INT2,
        ("float", 8): NumberFormat.FLOAT8_E4M3,
    }
    if (kind, bits) not in known:
        raise NotImportableError(f"{what} of {bits} bits, type {kind!r}; integers of 2, 4 and 8 and float8 can be")
    return known[kind, bits]


def _weight_granularity(arguments: Mapping[str, Any]) -> Granularity:
    strategy, size = arguments.get("strategy"), arguments.get("group_size")
    if strategy is None:
        strategy = "tensor" if size is None else "channel" if size == -1 else "group"
    if strategy == "group" and size in GROUP_SIZES:
        return PerGroup(size)
    if strategy == "block" and arguments.get("block_structure") == [BLOCK_SIZE, BLOCK_SIZE]:
        return PerBlock()
    plain: dict[str, Granularity] = {"tensor": PerTensor(), "channel": PerChannel()}
    if strategy not in plain:
        raise NotImportableError(
            f"scales by {strategy!r}, group size {size}; ours are per tensor, per channel, per "
            f"{', '.join(map(str, GROUP_SIZES))} columns, or per block of {BLOCK_SIZE} by {BLOCK_SIZE}"
        )
    return plain[strategy]


def _activation(arguments: Mapping[str, Any] | None) -> ActivationScheme | None:
    if not arguments:
        return None
    fmt = _number_format(arguments, "inputs")
    dynamic, symmetric = bool(arguments.get("dynamic", False)), bool(arguments.get("symmetric", True))
    strategy = arguments.get("strategy") or "tensor"
    grouped = strategy == "group" and dynamic and not fmt.is_integer and arguments.get("group_size") == BLOCK_SIZE
    if grouped and symmetric:
        return ActivationScheme(fmt, PerGroup(BLOCK_SIZE))
    if strategy not in ("tensor", "token") or (dynamic and not symmetric):
        how = "dynamic" if dynamic else "static"
        raise NotImportableError(f"{how} inputs by {strategy!r}, symmetric={symmetric}, which our layers do not have")
    return ActivationScheme(fmt, PerToken() if strategy == "token" else PerTensor(), dynamic, symmetric)


def _packed(own: Mapping[str, torch.Tensor], scheme: WeightScheme) -> QuantizedWeight:
    rows, columns = (int(side) for side in own["weight_shape"].tolist())
    bits, words = scheme.format.bits, own["weight_packed"]
    codes = unpack_words(words, bits, columns)
    if not torch.equal(pack_words(codes, bits), words):
        raise NotImportableError("its words hold more than codes: download it again")
    scale, zero_point = own["weight_scale"].float().reshape(rows, -1), None
    if not scheme.symmetric:
        zeros = unpack_words(own["weight_zero_point"].T, bits, rows).T
        zero_point = (zeros.to(torch.int16) - (1 << (bits - 1))).to(torch.int8).contiguous()
    return QuantizedWeight(from_unsigned(codes, bits), scale, zero_point, None, columns, scheme)


def _plain(own: Mapping[str, torch.Tensor], scheme: WeightScheme) -> QuantizedWeight:
    codes = own["weight"]
    expected = torch.int8 if scheme.format.is_integer else torch.float8_e4m3fn
    if codes.dtype != expected or (scheme.format.is_integer and scheme.format is not NumberFormat.INT8):
        raise NotImportableError(f"{scheme.format.value} in {codes.dtype}, which we do not read")
    rows = 1 if isinstance(scheme.granularity, PerTensor) else codes.shape[0]
    if isinstance(scheme.granularity, PerBlock):
        rows = scheme.granularity.num_blocks(rows)
    scale, zero_point = own["weight_scale"].float().reshape(rows, -1), None
    if not scheme.symmetric:
        zero_point = own["weight_zero_point"].to(torch.int8).reshape(scale.shape)
    return QuantizedWeight(codes, scale, zero_point, None, codes.shape[1], scheme)

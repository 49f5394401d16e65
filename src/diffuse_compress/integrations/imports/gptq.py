"""Linear layers of GPTQ and AWQ checkpoints; the layouts are those of ``exports/gptq.py`` and ``exports/awq.py``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from diffuse_compress.integrations.exports.awq import interleaved
from diffuse_compress.integrations.exports.gptq import V1, V2, group_index
from diffuse_compress.integrations.imports.base import ForeignLayer, NotImportableError
from diffuse_compress.quantization.packed import QuantizedWeight
from diffuse_compress.quantization.scheme import (
    GROUP_SIZES,
    Granularity,
    NumberFormat,
    PerChannel,
    PerGroup,
    ScaleRule,
    Scheme,
    WeightScheme,
)
from diffuse_compress.quantization.word_packing import from_unsigned, unpack_words

__all__ = ["AWQ_METHOD", "METHOD", "TENSORS", "names", "read", "read_awq", "whole_reason", "whole_reason_awq"]

METHOD, AWQ_METHOD = "gptq", "awq"
TENSORS = ("qweight", "qzeros", "scales", "g_idx")
_BITS = {2: NumberFormat.INT2, 3: NumberFormat.INT3, 4: NumberFormat.INT4, 8: NumberFormat.INT8}


def whole_reason(config: Mapping[str, Any]) -> str | None:
    """Why nothing of a GPTQ checkpoint with this ``quantization_config`` can be imported; None if layers can."""
    layout = config.get("checkpoint_format") or V1
    if layout not in (V1, V2):
        return f"its checkpoint_format is {layout!r}, {V1!r} and {V2!r} can be read"
    if config.get("bits") not in _BITS:
        return f"its weights have {config.get('bits')} bits, 2, 3, 4 and 8 can be read"
    varied = [rule for rule in config.get("dynamic") or {} if not rule.startswith("-:")]
    return f"its layers have formats of their own ({varied[0]})" if varied else None


def whole_reason_awq(config: Mapping[str, Any]) -> str | None:
    """As :func:`whole_reason`, of an AWQ checkpoint."""
    version = str(config.get("version") or config.get("format") or "gemm").lower()
    if version != "gemm" or config.get("bits", config.get("w_bit", 4)) != 4:
        return f"it is of version {version!r} with {config.get('bits')} bits; 'gemm' with 4 can be read"
    return None


def names(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """Names of the quantized layers in a file."""
    ending = ".qweight"
    return [key.removesuffix(ending) for key in tensors if key.endswith(ending)]


def read(name: str, own: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> ForeignLayer:
    """The layer ``name`` of a GPTQ checkpoint, with the tensors ``own``, of those in ``TENSORS`` and its bias.

    Raises:
        NotImportableError: columns in another order, a group size that we do not have, or an ambiguous zero point.
    """
    bits, rows = int(config["bits"]), own["scales"].shape[1]
    columns = own["qweight"].shape[0] * 32 // bits
    granularity = _granularity(config.get("group_size", -1), columns)
    expected = group_index(columns, getattr(granularity, "group_size", None), own["qweight"].device)
    if "g_idx" in own and not torch.equal(own["g_idx"].to(torch.int32), expected):
        raise NotImportableError("with columns in another order (g_idx); take one made with desc_act=False")
    codes = unpack_words(own["qweight"].T, bits, columns)
    zeros = unpack_words(own["qzeros"], bits, rows).T.to(torch.int16)
    if (config.get("checkpoint_format") or V1) == V1:
        zeros = zeros + 1
        if int(zeros.max()) >= 1 << bits:
            raise NotImportableError(
                f"with a zero point that readers of {V1!r} take for 0 or for {1 << bits}; take one in {V2!r}"
            )
    return _layer(codes, zeros, own, bits, granularity, f"GPTQ, {bits} bits")


def read_awq(name: str, own: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> ForeignLayer:
    """As :func:`read`, of an AWQ checkpoint."""
    columns, rows = own["qweight"].shape[0], own["scales"].shape[1]
    granularity = _granularity(config.get("group_size", config.get("q_group_size", -1)), columns)
    codes = interleaved(unpack_words(own["qweight"], 4, rows), back=True).T.contiguous()
    zeros = interleaved(unpack_words(own["qzeros"], 4, rows), back=True).T.to(torch.int16)
    return _layer(codes, zeros, own, 4, granularity, "AWQ")


def _granularity(group_size: int, columns: int) -> Granularity:
    if group_size in (-1, columns) and group_size not in GROUP_SIZES:
        return PerChannel()
    if group_size not in GROUP_SIZES or columns % group_size:
        raise NotImportableError(
            f"{columns} columns in groups of {group_size}; ours are of {', '.join(map(str, GROUP_SIZES))}"
        )
    return PerGroup(group_size)


def _layer(
    codes: torch.Tensor,
    zeros: torch.Tensor,
    own: Mapping[str, torch.Tensor],
    bits: int,
    granularity: Granularity,
    source: str,
) -> ForeignLayer:
    """From unsigned codes [N, K] and zero points [N, G]; symmetric where every zero point is the middle."""
    middle = 1 << (bits - 1)
    symmetric = bool((zeros == middle).all())
    rule = ScaleRule.AMAX_OVER_HALF_RANGE if symmetric else ScaleRule.AMAX_OVER_QMAX
    scheme = WeightScheme(_BITS[bits], granularity, symmetric=symmetric, scale_rule=rule)
    scale = own["scales"].T.float().contiguous()
    zero_point = None if symmetric else (zeros - middle).to(torch.int8).contiguous()
    weight = QuantizedWeight(from_unsigned(codes, bits), scale, zero_point, None, codes.shape[1], scheme)
    return ForeignLayer(weight, Scheme(scheme), torch.float32, source, bias=own.get("bias"))

"""Linear layers of checkpoints of transformers' ``fp8`` (DeepSeek-V3, Qwen3-FP8, ...); layout in ``exports/fp8.py``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from diffuse_compress.integrations.imports.base import ForeignLayer, NotImportableError
from diffuse_compress.quantization.packed import QuantizedWeight
from diffuse_compress.quantization.scheme import (
    BLOCK_SIZE,
    ActivationScheme,
    Granularity,
    NumberFormat,
    PerBlock,
    PerGroup,
    PerTensor,
    PerToken,
    Scheme,
    WeightScheme,
)

__all__ = ["METHOD", "TENSORS", "names", "read", "whole_reason"]

METHOD = "fp8"
TENSORS = ("weight", "weight_scale_inv", "activation_scale")
_FP8 = NumberFormat.FLOAT8_E4M3


def whole_reason(config: Mapping[str, Any]) -> str | None:
    """Why nothing of a checkpoint with this ``quantization_config`` can be imported; None if layers can be asked."""
    block = config.get("weight_block_size")
    if block is not None and list(block) != [BLOCK_SIZE, BLOCK_SIZE]:
        return f"its blocks are of {list(block)}, ours of {BLOCK_SIZE} by {BLOCK_SIZE}"
    if config.get("scale_fmt") not in (None, "float") or config.get("expert_dtype", "fp8") != "fp8":
        return f"its scales are {config.get('scale_fmt')!r}, its experts {config.get('expert_dtype', 'fp8')!r}"
    if config.get("modules_to_convert"):
        return "it holds embeddings in float8 (modules_to_convert), ours are dense"
    known = ("dynamic", "static")
    scheme = config.get("activation_scheme", "dynamic")
    return None if scheme in known else f"its activation_scheme is {scheme!r}, {' and '.join(known)} can be read"


def names(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """Names of the quantized layers in a file."""
    ending = ".weight_scale_inv"
    return [key.removesuffix(ending) for key in tensors if key.endswith(ending)]


def read(name: str, own: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> ForeignLayer:
    """The layer ``name`` with the tensors ``own``, of those in ``TENSORS`` and its bias.

    Raises:
        NotImportableError: weights or scales of another type or shape.
    """
    codes, scale = own["weight"], own["weight_scale_inv"]
    if codes.dtype != torch.float8_e4m3fn or codes.dim() != 2 or scale.dtype not in (torch.float32, torch.bfloat16):
        raise NotImportableError(
            f"{codes.dtype} {list(codes.shape)} with scales in {scale.dtype}, which we do not read"
        )
    granularity: Granularity = PerTensor() if config.get("weight_block_size") is None else PerBlock()
    shape = (1, 1)
    if isinstance(granularity, PerBlock):
        shape = (granularity.num_blocks(codes.shape[0]), granularity.num_blocks(codes.shape[1]))
    if scale.numel() != shape[0] * shape[1]:
        raise NotImportableError(f"with scales {list(scale.shape)} where {list(shape)} belong: download it again")
    weight = QuantizedWeight(
        codes, scale.float().reshape(shape), None, None, codes.shape[1], WeightScheme(_FP8, granularity)
    )
    extra = {}
    if config.get("activation_scheme", "dynamic") == "static":
        activation = ActivationScheme(_FP8, PerTensor(), dynamic=False)
        extra["input_scale"] = own["activation_scale"].float().reshape(1)
    elif isinstance(granularity, PerBlock):
        activation = ActivationScheme(_FP8, PerGroup(BLOCK_SIZE))
    else:
        activation = ActivationScheme(_FP8, PerToken())
    return ForeignLayer(
        weight, Scheme(weight.scheme, activation), torch.float32, "transformers fp8", extra, own.get("bias")
    )

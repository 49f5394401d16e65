"""Quantizing a layer at the moment its dense weight arrives from a checkpoint, so that both never stand in memory."""

from __future__ import annotations

import torch
from torch import nn

from diffuse_compress.quantization.convert import quantize_module, replace_module
from diffuse_compress.quantization.scheme import Scheme
from diffuse_compress.quantization.spec import QuantizationSpec

__all__ = ["quantize_loaded_weight"]


def quantize_loaded_weight(
    model: nn.Module,
    name: str,
    weight: torch.Tensor,
    scheme: Scheme,
    spec: QuantizationSpec,
    device: torch.device | str,
) -> None:
    """Replace the (meta) layer ``name`` of ``model`` by its quantized form on ``device``.

    ``weight`` is the checkpoint's tensor in the dtype the model is loaded in. A bias that was loaded before is
    carried over; one that comes later finds its placeholder.
    """
    dense = model.get_submodule(name)
    dense.weight = nn.Parameter(weight.to(device), requires_grad=False)
    layer = quantize_module(
        dense, scheme, spec.algorithm, compute_dtype=weight.dtype, name=name, generator=spec.generator(name)
    )
    replace_module(model, name, layer)

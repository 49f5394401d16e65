"""Multiply-accumulates of linears and convolutions, counted from the shapes of one real call."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from diffuse_compress.quantization.layers import QuantizedConv2d, QuantizedLinear
from diffuse_compress.quantization.scheme import Scheme

__all__ = ["count_macs", "share_at_scheme"]


def count_macs(model: nn.Module, run: Callable[[], object]) -> dict[str, int]:
    """MACs of every linear and convolution of ``model`` while ``run()`` runs, by qualified name.

    Attention products, norms and elementwise work are not counted.
    """
    macs: dict[str, int] = {}
    handles = []
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
            macs[name] = 0

            def count(module: nn.Module, args: Any, output: torch.Tensor, name: str = name) -> None:
                macs[name] += output.numel() * _depth(module)

            handles.append(layer.register_forward_hook(count))
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return macs


def share_at_scheme(model: nn.Module, macs: Mapping[str, int], scheme: Scheme) -> float:
    """Share of ``macs`` that layers of exactly this scheme compute.

    Args:
        model: compressed.
        macs: of :func:`count_macs` on it or on its dense form.
        scheme: e.g. the body scheme of a preset.
    """
    claimed = 0
    for name, count in macs.items():
        layer = model.get_submodule(name)
        if isinstance(layer, QuantizedLinear | QuantizedConv2d) and layer.scheme == scheme:
            claimed += count
    return claimed / max(1, sum(macs.values()))


def _depth(layer: Any) -> int:
    """Products summed for one output element."""
    if isinstance(layer, nn.Linear):
        return layer.in_features
    depth = layer.in_channels // layer.groups
    for size in layer.kernel_size:
        depth *= size
    return int(depth)

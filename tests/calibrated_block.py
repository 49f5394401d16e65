"""A small block with outlier channels, and a BlockWork around it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from diffuse_compress.calibration.engine import calibrate_block, quantized_layer
from diffuse_compress.calls import Call
from diffuse_compress.quantization.algorithms.base import AlgorithmConfig
from diffuse_compress.quantization.algorithms.block import BlockWork, LayerWork
from diffuse_compress.quantization.convert import replace_module
from diffuse_compress.quantization.scheme import Scheme


class Block(nn.Module):
    """Attention-like: three layers share an input, then one, then a feed-forward; a convolution on the side."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.to_out = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.to_q(x), self.to_k(x), self.to_v(x)
        x = x + self.to_out(torch.softmax(q @ k.transpose(-1, -2) / 11, dim=-1) @ v)
        return x + self.down(torch.nn.functional.gelu(self.up(x)))


def inputs(calls: int = 4, width: int = 128, seed: int = 0) -> list[Call]:
    """Correlated tokens with a few channels that are ten times as large as the others."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.randn(width // 4, width, generator=generator)
    found = []
    for _ in range(calls):
        x = torch.randn(2, 24, width // 4, generator=generator) @ basis / 5
        x = x + 0.2 * torch.randn(x.shape, generator=generator)
        x[..., ::31] *= 10
        found.append(Call((x,)))
    return found


def work_of(block: nn.Module, scheme: Scheme, calls: list[Call], **given: Any) -> BlockWork:
    """A BlockWork of all linears and convolutions of ``block``; ``given`` are further fields of it."""
    layers = {name: m for name, m in block.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    work = {name: LayerWork(name, layer, scheme) for name, layer in layers.items()}

    def install(layer: LayerWork) -> nn.Module:
        done = quantized_layer(layer)
        replace_module(block, layer.name, done)
        return done

    return BlockWork("block", block, calls, work, lambda name: torch.Generator(), install, **given)


def calibrated(
    block: nn.Module, scheme: Scheme, algorithm: AlgorithmConfig, calls: list[Call], **given: Any
) -> BlockWork:
    """``block`` with every layer quantized by ``algorithm`` (and rounding of what it leaves), in place."""
    found = work_of(block, scheme, calls, **given)
    calibrate_block(found, algorithm)
    return found


def error(block: nn.Module, reference: nn.Module, calls: list[Call]) -> float:
    """Relative error of the block's output."""
    with torch.no_grad():
        pairs = [(call.run(block), call.run(reference)) for call in calls]
    return float(sum((a - b).square().sum() for a, b in pairs) / sum(b.square().sum() for _, b in pairs)) ** 0.5

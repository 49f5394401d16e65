"""Random weights in the form of FID's Inception weight file, for tests: same keys and shapes, features alive."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch

from diffuse_compress.evaluation.inception import InceptionNetwork


@cache
def state_dict(seed: int = 0) -> dict[str, torch.Tensor]:
    """Weights scaled to keep the signal's size, batch norms that are not the identity."""
    generator = torch.Generator().manual_seed(seed)
    state: dict[str, torch.Tensor] = {}
    for name, module in InceptionNetwork().named_modules():
        if isinstance(module, torch.nn.Conv2d):
            fan_in = module.weight[0].numel()
            width, stem = module.out_channels, name.removesuffix("conv")
            state[f"{stem}conv.weight"] = torch.randn(module.weight.shape, generator=generator) * (2 / fan_in) ** 0.5
            state[f"{stem}bn.weight"] = torch.rand(width, generator=generator) + 0.5
            state[f"{stem}bn.bias"] = torch.randn(width, generator=generator) * 0.1
            state[f"{stem}bn.running_mean"] = torch.randn(width, generator=generator) * 0.1
            state[f"{stem}bn.running_var"] = torch.rand(width, generator=generator) + 0.5
            state[f"{stem}bn.num_batches_tracked"] = torch.tensor(0)
    state["fc.weight"] = torch.randn(1008, 2048, generator=generator) / 2048**0.5
    state["fc.bias"] = torch.randn(1008, generator=generator) * 0.1
    return state


def write(path: Path, seed: int = 0) -> Path:
    """Write the file and return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state_dict(seed), path)
    return path

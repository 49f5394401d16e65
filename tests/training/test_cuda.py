"""Layers in training on a GPU: what is deployed there, and what their backward says there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from diffuse_compress.training.config import QVGenConfig
from diffuse_compress.training.layers import TrainedLinear
from tolerance import GRADIENT, KERNEL, assert_close

pytestmark = pytest.mark.gpu
SCHEMES = ["w4a4", "w4a8", "w8a8", "w4a16", "w3a16", "w3a3"]


def made(scheme: str, dtype: torch.dtype, **given: Any) -> tuple[TrainedLinear, torch.Tensor]:
    torch.manual_seed(0)
    linear = nn.Linear(512, 384).to("cuda", dtype)
    config = QVGenConfig(scheme, **{"clip_groups": 1, "method": "kd", **given})
    return TrainedLinear.from_dense(linear, config.layer_scheme, config), torch.randn(2, 150, 512).to("cuda", dtype)


@pytest.mark.parametrize("groups", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_deployed_layer_computes_what_training_did(scheme: str, dtype: torch.dtype, groups: int) -> None:
    layer, x = made(scheme, dtype, clip_groups=groups)
    stored = layer.to_quantized()
    stored.set_input_clip(layer.clips())
    with torch.no_grad():
        trained, deployed = layer(x), stored(x)
    if layer.scheme.has_integer_path:
        assert torch.equal(trained, deployed)
    else:
        assert_close(deployed, trained, KERNEL[dtype], scheme)


@pytest.mark.parametrize("rows", [10, 300], ids=["branch on activations", "branch on weights"])
@pytest.mark.parametrize("scheme", ["w4a4", "w4a16", "w3a3"])
def test_gradients_are_those_of_the_cpu(scheme: str, rows: int) -> None:
    layer, x = made(scheme, torch.float32, method="qvgen", phi_rank=8)
    x = x.reshape(300, 512)[:rows].requires_grad_()
    grad = torch.randn(rows, 384, device="cuda")
    found = []
    for device in ("cuda", "cpu"):
        layer, there = layer.to(device), x.detach().to(device).requires_grad_()
        inputs = [there, *layer.parameters()]
        found.append(torch.autograd.grad(layer(there), inputs, grad.to(device)))
    for mine, theirs in zip(*found, strict=True):
        assert_close(mine.cpu(), theirs, GRADIENT[torch.float32] * 50)  # sums of many codes in another order

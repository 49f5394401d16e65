"""The float32 simulation of a compressed model equals the real layers up to float rounding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import tiny
from diffuse_compress.evaluation.fake_quantize import FakeQuantizedLayer, to_fake_quantized
from diffuse_compress.quantization.algorithms.rtn import RTNConfig
from diffuse_compress.quantization.convert import quantize_module
from diffuse_compress.quantization.layers import QuantizedLinear
from diffuse_compress.quantization.presets import PRESETS
from tolerance import KERNEL, assert_close, snr_db

BLOCK_LINEARS = ("to_q", "to_k", "to_v", "to_out.0", "proj", "net.2")


def quantized_pixart(preset: str) -> Any:
    """The tiny transformer with its blocks' linears in the format of ``preset``."""
    model, scheme = tiny.build("pixart"), PRESETS[preset].scheme
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and name.startswith("transformer_blocks") and name.endswith(BLOCK_LINEARS):
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, quantize_module(layer, scheme, RTNConfig(), name=name))
    return model


@pytest.mark.parametrize("preset", list(PRESETS))
def test_to_fake_quantized_layer_equals_the_real_one(preset: str) -> None:
    """Layer by layer, on inputs with an outlier channel; float8 is compared as this device runs it."""
    model = quantized_pixart(preset)
    for name, layer in model.named_modules():
        if not isinstance(layer, QuantizedLinear):
            continue
        x = torch.randn(3, 7, layer.in_features)
        x[..., 5] *= 30
        fake = FakeQuantizedLayer(layer, quantize_input=layer.compute_path().name != "dequantize-weight-only")
        with torch.no_grad():
            assert_close(fake(x), layer(x), KERNEL[torch.float32], f"{preset} {name}")


@pytest.mark.parametrize("preset", list(PRESETS))
def test_to_fake_quantized_model_stays_close_to_the_real_path(preset: str) -> None:
    dense = tiny.build("pixart")
    inputs = tiny.inputs_for(dense)
    real, fake = quantized_pixart(preset), quantized_pixart(preset)
    names = to_fake_quantized(fake, follow_device=True)
    assert len(names) == 2 * 10
    assert not any(isinstance(module, QuantizedLinear) for module in fake.modules())
    with torch.no_grad():
        reference, measured, simulated = (model(**inputs).sample for model in (dense, real, fake))
    # A last bit of a float can move an activation code, so the two agree in quality, not bit for bit.
    assert abs(snr_db(reference, measured) - snr_db(reference, simulated)) < 0.5


def test_to_fake_quantized_simulates_float8_inputs_unless_told_to_follow_the_device() -> None:
    written, followed = quantized_pixart("fp8"), quantized_pixart("fp8")
    to_fake_quantized(written)
    to_fake_quantized(followed, follow_device=True)
    layers = [m for m in written.modules() if isinstance(m, FakeQuantizedLayer)]
    assert all(layer.activation is not None for layer in layers)
    assert all(m.activation is None for m in followed.modules() if isinstance(m, FakeQuantizedLayer))


def test_fake_quantized_layer_keeps_smoothing_low_rank_and_convolutions() -> None:
    scheme = PRESETS["w8a8"].scheme
    linear = nn.Linear(128, 24)
    real = quantize_module(linear, scheme, RTNConfig(), name="linear")
    smoothed = QuantizedLinear.from_dense(
        linear,
        real.quantized_weight(),
        scheme,
        act_pre_scale=torch.rand(128) + 0.5,
        low_rank=(torch.randn(4, 128), torch.randn(24, 4)),
    )
    conv = quantize_module(nn.Conv2d(8, 16, 3, stride=2, padding=1), scheme, RTNConfig(), name="conv")
    x, picture = torch.randn(5, 128), torch.randn(2, 8, 9, 9)
    with torch.no_grad():
        assert_close(FakeQuantizedLayer(smoothed)(x), smoothed(x), KERNEL[torch.float32], "smoothed")
        assert_close(FakeQuantizedLayer(conv)(picture), conv(picture), KERNEL[torch.float32], "conv")

"""LLM.int8: what its thresholds make of a layer, against float64, and what it gains on outliers."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

import diffuse_compress as dc
import tiny
from calibrated_block import Block, calibrated, error, inputs
from diffuse_compress.errors import ConfigError
from diffuse_compress.quantization.algorithms.base import SequenceConfig
from diffuse_compress.quantization.convert import quantize_module
from diffuse_compress.quantization.layers import QuantizedLinear
from diffuse_compress.quantization.numerics import fake_quantize_activation
from diffuse_compress.quantization.outlier_columns import divide
from diffuse_compress.quantization.presets import PRESETS
from tolerance import KERNEL, assert_close

W8A8 = PRESETS["w8a8"].scheme
ROUNDED = dc.RTNConfig(observer="minmax")


def layer_of(dense: nn.Linear, threshold: float | None) -> QuantizedLinear:
    config = ROUNDED if threshold is None else dc.LLMInt8Config(threshold)
    layer = quantize_module(dense, config.format_of(dense, W8A8), config)
    assert isinstance(layer, QuantizedLinear)
    return layer


def outlying(*shape: int) -> torch.Tensor:
    """Inputs below 3, with values of 20 and 9 in columns 3 and 40."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(1)).clamp(-3, 3)
    x[..., 0, 3], x[..., 1, 40] = 20.0, -9.0
    return x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_out_of_reach_is_plain_w8a8_and_zero_is_the_dense_layer(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    dense, x = nn.Linear(96, 64, dtype=dtype), outlying(2, 5, 96).to(dtype)
    plain = layer_of(dense, None)
    far = layer_of(dense, 1e30)
    assert torch.equal(far.qweight, plain.qweight)
    assert torch.equal(far(x), plain(x))
    everything = layer_of(dense, 0.0)
    # Nothing is rounded but the weight once, and the sum.
    expected = nn.functional.linear(x.double(), plain.weight.double(), plain.bias.double())
    assert_close(everything(x), expected.to(dtype), KERNEL[dtype])


def test_columns_are_those_that_reach_the_threshold() -> None:
    torch.manual_seed(0)
    dense, x = nn.Linear(96, 64), outlying(2, 5, 96)
    layer, columns = layer_of(dense, 6.0), [3, 40]
    rest = x.clone()
    rest[..., columns] = 0
    assert W8A8.activation is not None
    rest = fake_quantize_activation(rest, W8A8.activation)
    rest[..., columns] = x[..., columns]
    expected = nn.functional.linear(rest.double(), layer.weight.double(), layer.bias.double())
    assert_close(layer(x).double(), expected, KERNEL[torch.float32])
    # A value of exactly the threshold belongs to them, and in another call they are others.
    x = torch.zeros(1, 96)
    x[0, 5], x[0, 6] = -6.0, 0.01  # beside a 6 that is quantized, this would be 0
    assert_close(layer(x), nn.functional.linear(x, layer.weight, layer.bias), KERNEL[torch.float32])
    assert torch.equal(layer(x * 0.5), layer_of(dense, None)(x * 0.5))


@pytest.mark.parametrize("smoothed", [False, True])
def test_the_whole_product_without_waiting_is_the_same(smoothed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    x, weight = outlying(2, 5, 96), layer_of(nn.Linear(96, 64), 6.0).quantized_weight()
    scale = torch.rand(96) + 0.5 if smoothed else None
    rest, aside = divide(x, weight, 6.0, scale)
    monkeypatch.setattr("diffuse_compress.quantization.outlier_columns._cannot_wait", lambda x: True)
    whole_rest, whole_aside = divide(x, weight, 6.0, scale)
    assert torch.equal(rest, whole_rest)
    assert aside is not None
    assert whole_aside is not None
    assert_close(whole_aside, aside, KERNEL[torch.float32])


def test_gradients_are_those_of_the_dequantized_weight() -> None:
    torch.manual_seed(0)
    layer, x = layer_of(nn.Linear(96, 64), 6.0), outlying(2, 5, 96).requires_grad_()
    layer(x).sum().backward()
    assert x.grad is not None
    assert_close(x.grad, layer.weight.sum(dim=0).expand_as(x), KERNEL[torch.float32] * 2)


def test_beats_rounding_and_other_algorithms_see_the_same_inputs() -> None:
    torch.manual_seed(3)
    dense = Block()
    ours, plain, both = (copy.deepcopy(dense) for _ in range(3))
    config = dc.LLMInt8Config()
    scheme = config.format_of(dense.to_q, W8A8)
    calibrated(ours, scheme, config, inputs(2))
    calibrated(plain, W8A8, dc.RTNConfig(), inputs(2))
    calibrated(both, scheme, dc.GPTQConfig(), inputs(4))
    fresh = inputs(2, seed=1)
    assert error(ours, dense, fresh) < 0.6 * error(plain, dense, fresh)
    assert error(both, dense, fresh) < 0.6 * error(plain, dense, fresh)


def test_the_format_is_written_and_read() -> None:
    config = dc.LLMInt8Config(4)
    scheme = config.format_of(nn.Linear(8, 8), W8A8)
    assert scheme.activation is not None
    assert scheme.activation.outlier_threshold == 4.0
    assert dc.Scheme.from_dict(scheme.to_dict()) == scheme
    assert "outlier_threshold" not in str(W8A8.to_dict())
    assert config.format_of(nn.Linear(8, 8), PRESETS["w8a16"].scheme) == PRESETS["w8a16"].scheme


def test_refusals() -> None:
    for threshold in (-1.0, math.inf, math.nan):
        with pytest.raises(ConfigError, match="threshold must be a finite number >= 0"):
            dc.LLMInt8Config(threshold)
    with pytest.raises(ConfigError, match="observer must be"):
        dc.LLMInt8Config(observer="best")
    with pytest.raises(
        ConfigError, match=r"LLM\.int8: needs symmetric int8 weights per channel, .* got int4, TwoLevel"
    ):
        tiny.build("llama").compression_plan(dc.QuantizationConfig("w4a8", algorithm=dc.LLMInt8Config()))
    with pytest.raises(ConfigError, match="LLMInt8Config is for quantized inputs, got none"):
        tiny.build("llama").compression_plan(dc.QuantizationConfig("w8a16", algorithm=dc.LLMInt8Config()))
    with pytest.raises(ConfigError, match="LLMInt8Config has nothing to do after SmoothQuantConfig: its threshold"):
        SequenceConfig((dc.SmoothQuantConfig(), dc.LLMInt8Config()))
    static = replace(W8A8, activation=dc.ActivationScheme("int8", dc.PerTensor(), dynamic=False))
    assert "needs dynamic int8" in str(dc.LLMInt8Config().unsupported(nn.Linear(8, 8), static))
    assert "not of convolutions" in str(dc.LLMInt8Config().unsupported(nn.Conv2d(8, 8, 1), W8A8))
    with pytest.raises(ConfigError, match="outlier_threshold needs dynamic int8 inputs"):
        dc.ActivationScheme("int4", outlier_threshold=6.0)
    with pytest.raises(ConfigError, match="outlier_threshold needs symmetric int8 weights"):
        dc.Scheme(PRESETS["w4a8"].scheme.weight, dc.ActivationScheme("int8", outlier_threshold=6.0))

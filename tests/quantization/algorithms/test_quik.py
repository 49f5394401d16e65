"""QUIK: columns of the largest inputs are dense on both sides, and set no scale of the others."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

import diffuse_compress as dc
import tiny
from calibrated_block import Block, calibrated, error, inputs
from diffuse_compress.errors import ConfigError
from diffuse_compress.quantization.algorithms.base import SequenceConfig, algorithm_from_dict, algorithm_to_dict
from diffuse_compress.quantization.algorithms.gptq import GPTQConfig
from diffuse_compress.quantization.numerics import dequantize, fake_quantize_activation
from diffuse_compress.quantization.presets import PRESETS
from diffuse_compress.quantization.scheme import Scheme
from tolerance import KERNEL, assert_close

W4A4, W4A8, W8A8 = (PRESETS[name].scheme for name in ("w4a4", "w4a8", "w8a8"))
STATIC = replace(W8A8, activation=dc.ActivationScheme("int8", dc.PerTensor(), dynamic=False, symmetric=False))
COLUMNS = [0, 31, 62, 93, 124]
QUIK = dc.QUIKConfig(share=5 / 128, sensitive_share=5 / 128)


@pytest.mark.parametrize("scheme", [W4A4, W4A8, W8A8, STATIC], ids=lambda scheme: scheme.name)
def test_outlier_columns_are_dense_on_both_sides(scheme: Scheme) -> None:
    torch.manual_seed(0)
    block, calls = nn.Sequential(nn.Linear(128, 48)), inputs(4)
    calibrated(block, scheme, QUIK, calls)
    layer, x = block[0], calls[0].args[0]
    assert layer.dense_columns.tolist() == COLUMNS
    assert not dequantize(layer.quantized_weight())[:, COLUMNS].any()
    # The input without them is quantized by its own range.
    rest = x.index_fill(-1, torch.tensor(COLUMNS), 0)
    assert scheme.activation is not None
    rounded = fake_quantize_activation(rest, scheme.activation, layer.input_scale, layer.input_zero_point)
    rounded = rounded.index_copy(-1, torch.tensor(COLUMNS), x[..., COLUMNS])
    expected = nn.functional.linear(rounded.double(), layer.weight.double(), layer.bias.double())
    assert_close(layer(x).double(), expected, KERNEL[torch.float32])
    if layer.input_scale is not None:
        assert float(layer.input_scale) * 255 < 1.1 * float(rest.max() - rest.min())
    # However large they are, the others keep their grid.
    larger = x.clone()
    larger[..., COLUMNS] *= 1000
    change = nn.functional.linear((larger - x)[..., COLUMNS], layer.dense_weight)
    assert_close(layer(larger) - layer(x), change, KERNEL[torch.float32] * 10)


def test_gradients_are_those_of_the_dense_equivalent() -> None:
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(128, 48))
    calibrated(block, W4A8, QUIK, inputs(2))
    x = inputs(1)[0].args[0].clone().requires_grad_()
    block(x).sum().backward()
    assert x.grad is not None
    assert_close(x.grad, block[0].weight.sum(dim=0).expand_as(x), KERNEL[torch.float32] * 2)


@pytest.mark.parametrize("scheme", [W4A4, W8A8], ids=lambda scheme: scheme.name)
def test_no_columns_are_gptq_bit_for_bit(scheme: Scheme) -> None:
    torch.manual_seed(1)
    ours, theirs = Block(), Block()
    theirs.load_state_dict(ours.state_dict())
    calibrated(ours, scheme, dc.QUIKConfig(share=0, sensitive_share=0), inputs(2))
    calibrated(theirs, scheme, GPTQConfig(), inputs(2))
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor), name


@pytest.mark.parametrize(
    ("scheme", "algorithm", "factor"),
    [
        (W4A4, QUIK, 0.5),
        (W4A8, QUIK, 0.9),
        (W8A8, QUIK, 0.5),
        (STATIC, QUIK, 0.5),
        (W4A4, SequenceConfig((dc.SmoothQuantConfig(), QUIK)), 0.5),
    ],
    ids=["w4a4", "w4a8", "w8a8", "static", "smoothed"],
)
def test_beats_rounding_on_inputs_that_were_not_seen(
    scheme: Scheme, algorithm: dc.QUIKConfig | SequenceConfig, factor: float
) -> None:
    torch.manual_seed(3)
    dense = Block()
    ours, plain = copy.deepcopy(dense), copy.deepcopy(dense)
    calibrated(ours, scheme, algorithm, inputs(4))
    calibrated(plain, scheme, dc.RTNConfig(), inputs(4))
    fresh = inputs(6)[4:]
    assert error(ours, dense, fresh) < factor * error(plain, dense, fresh)


def test_layers_of_one_input_share_their_columns_and_their_rounding() -> None:
    torch.manual_seed(2)
    block = Block()
    work = calibrated(block, W4A4, QUIK, inputs(2))
    first = work.layers["to_q"].dense_columns
    assert first is work.layers["to_k"].dense_columns is work.layers["to_v"].dense_columns
    alone = nn.Sequential(copy.deepcopy(work.layers["to_k"].dense))
    calibrated(alone, W4A4, QUIK, inputs(2))
    assert torch.equal(alone[0].qweight, block.to_k.qweight)
    assert torch.equal(alone[0].dense_weight, block.to_k.dense_weight)


def test_sensitive_layers_get_eight_bits_and_their_own_share() -> None:
    model = tiny.build("llama")
    config = dc.QuantizationConfig("w4a4", algorithm=dc.QUIKConfig(share=1 / 32, sensitive_share=1 / 8))
    layers = model.compression_plan(config, calibration=[tiny.inputs_for(model)]).components[""].layers
    down = [name for name in layers if name.endswith("down_proj")]
    assert down
    for name, scheme in layers.items():
        assert scheme.name == ("w8a8" if name in down else "w4a4")
    kept = dc.QUIKConfig(sensitive_bits=None)
    assert kept.format_of(nn.Linear(128, 64), W4A4, name=down[0]) == W4A4
    assert dc.QUIKConfig().format_of(nn.Linear(128, 64), W4A8, name=down[0]) == W4A8
    model.compress(config, calibration=[tiny.inputs_for(model)], measure=False)
    layer = model.get_submodule(down[0])
    assert layer.dense_columns.shape[0] == layer.in_features // 8
    layer = model.get_submodule(down[0].replace("down_proj", "up_proj"))
    assert layer.dense_columns.shape[0] == layer.in_features // 32


def test_refusals() -> None:
    for fields in ({"share": 1.0}, {"sensitive_share": -0.1}, {"sensitive_bits": 4}):
        with pytest.raises(ConfigError, match="QUIKConfig: need 0 <= share < 1"):
            dc.QUIKConfig(**fields)
    with pytest.raises(ConfigError, match="rotated inputs have no columns that stand out"):
        SequenceConfig((dc.QuaRotConfig(), dc.QUIKConfig()))
    with pytest.raises(ConfigError, match="QUIKConfig is for quantized inputs, got none"):
        tiny.build("llama").compression_plan(
            dc.QuantizationConfig("w4a16", algorithm=dc.QUIKConfig()), calibration=[[1, 2, 3]]
        )
    assert "not of convolutions" in str(QUIK.unsupported(nn.Conv2d(8, 8, 1), W4A4))
    config = dc.QUIKConfig(sensitive=["*.wo"])
    assert algorithm_from_dict(algorithm_to_dict(config)) == config

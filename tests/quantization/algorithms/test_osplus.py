"""OS+: shifts and scales that change nothing but what is rounded, where they are kept, and that they beat rounding."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import nn

from calibrated_block import Block, calibrated, error, inputs, work_of
from diffuse_compress.calibration.engine import calibrate_block
from diffuse_compress.calls import Call
from diffuse_compress.errors import ConfigError
from diffuse_compress.evaluation.fake_quantize import FakeQuantizedLayer
from diffuse_compress.quantization.algorithms.awq import AWQConfig
from diffuse_compress.quantization.algorithms.base import AlgorithmConfig, SequenceConfig
from diffuse_compress.quantization.algorithms.brecq import BRECQConfig
from diffuse_compress.quantization.algorithms.folding import set_scale, takes_shift
from diffuse_compress.quantization.algorithms.gptq import GPTQConfig
from diffuse_compress.quantization.algorithms.osplus import OSPlusConfig, middle_of, thresholds
from diffuse_compress.quantization.algorithms.quarot import QuaRotConfig
from diffuse_compress.quantization.algorithms.rtn import RTNConfig
from diffuse_compress.quantization.algorithms.smoothquant import SmoothQuantConfig
from diffuse_compress.quantization.algorithms.svdquant import SVDQuantConfig
from diffuse_compress.quantization.convert import requantize
from diffuse_compress.quantization.layers import QuantizedLinear
from diffuse_compress.quantization.numerics import quantize_weight
from diffuse_compress.quantization.presets import PRESETS
from diffuse_compress.quantization.scheme import (
    ActivationScheme,
    NumberFormat,
    PerChannel,
    PerTensor,
    Scheme,
    WeightScheme,
)
from normed_block import NormedBlock, setter
from tolerance import relative_rms

W8, W8A8, W4A4 = (PRESETS[name].scheme for name in ("w8a16", "w8a8", "w4a4"))
STATIC = Scheme(
    WeightScheme(NumberFormat.INT8, PerChannel()),
    ActivationScheme(NumberFormat.INT8, PerTensor(), dynamic=False, symmetric=False),
)


def shifted_layer(bias: bool, **given: Any) -> tuple[nn.Linear, QuantizedLinear, torch.Tensor]:
    dense, shift = nn.Linear(64, 48, bias=bias), 10 * torch.randn(64)
    given = {name: value for name, value in given.items() if value is not None}
    weight = dense.weight.detach() / given.get("act_pre_scale", 1.0)
    scheme = given.pop("scheme", W8)
    layer = QuantizedLinear.from_dense(
        dense, quantize_weight(weight, scheme.weight), scheme, act_pre_shift=shift, **given
    )
    return dense, layer, shift


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("scheme", [W8, W8A8])
@pytest.mark.parametrize("scaled", [True, False])
def test_a_shifted_layer_is_the_dense_one_but_for_rounding(bias: bool, scheme: Scheme, scaled: bool) -> None:
    scale = 1 + torch.rand(64) if scaled else None
    dense, layer, shift = shifted_layer(bias, act_pre_scale=scale, scheme=scheme)
    x = shift + torch.randn(5, 64)
    assert relative_rms(dense(x), layer(x)) < 0.02
    assert torch.allclose(layer(x), FakeQuantizedLayer(layer)(x), atol=1e-4)
    assert layer.gained_bias == (not bias)
    stock = layer.to_dense()
    assert type(stock) is nn.Linear
    if scheme is W8:
        assert torch.allclose(stock(x), layer(x), atol=1e-3)
    again = requantize(layer, stock)
    assert torch.allclose(again.bias, layer.bias, atol=1e-3)
    assert again.gained_bias == layer.gained_bias
    assert layer.num_bytes == sum(p.numel() * p.element_size() for p in layer.parameters())
    half = copy.deepcopy(layer).to(torch.bfloat16)
    assert half.act_pre_shift is not None
    assert half.act_pre_shift.dtype == torch.float32
    y = layer(x.requires_grad_())
    y.sum().backward()
    assert relative_rms(x.grad, dense.weight.sum(dim=0).expand(5, 64)) < 0.02


@pytest.mark.parametrize("scaled", [True, False])
def test_what_is_folded_no_longer_is_the_layers(scaled: bool) -> None:
    """A scale alone: the shift is of the scaled input then. A shift: the bias stays."""
    scale = 1 + torch.rand(64) if scaled else None
    _, layer, shift = shifted_layer(False, act_pre_scale=scale)
    x = shift + torch.randn(5, 64)
    expected = layer(x)
    if scale is not None:
        layer.fold_pre_scale()
        assert torch.allclose(layer(x * scale), expected, atol=1e-4)
        x, shift = x * scale, shift * scale
    layer.fold_pre_shift()
    assert layer.act_pre_shift is None
    assert torch.allclose(layer(x - shift), expected, atol=1e-4)
    layer.shift_outputs(torch.ones(48))
    assert torch.allclose(layer(x - shift), expected + 1, atol=1e-4)


@pytest.mark.parametrize("fold", [False, True])
def test_the_transformation_keeps_the_output(fold: bool) -> None:
    """With 8-bit weights and inputs as they are, whatever is set; folded into norms and values."""
    torch.manual_seed(1)
    dense = NormedBlock()
    block = copy.deepcopy(dense)
    work = work_of(block, W8, CALLS[:2], change=setter(block))
    for names in work.subsets:
        width = work.layers[names[0]].dense.in_features
        layers = [work.layers[name] for name in names]
        set_scale(work, layers, 0.5 + torch.rand(width), fold, torch.randn(width))
    folded = {names: one.takes_shift for names, one in work.folded.items()}
    expected = {("to_q", "to_k", "to_v"): True, ("to_out",): True, ("up",): True} if fold else {}
    assert folded == expected
    assert not takes_shift(work, ["down"])
    calibrate_block(work, RTNConfig())
    assert error(block, dense, CALLS[4:]) < 3 * _of(dense, RTNConfig(), W8)
    layers = {name: block.get_submodule(name) for name in work.layers}
    assert {name for name, layer in layers.items() if layer.act_pre_shift is None} == (
        {"to_q", "to_k", "to_v", "to_out", "up"} if fold else set()
    )
    if fold:
        assert not torch.equal(block.norm1.bias, dense.norm1.bias)


CALLS = inputs(6, 64)


def _of(dense: nn.Module, algorithm: AlgorithmConfig, scheme: Scheme, fold: bool = False) -> float:
    block = copy.deepcopy(dense)
    calibrated(block, scheme, algorithm, CALLS[:4], change=setter(block) if fold else None)
    # Static ranges are as tight as the shifted channels: of so few rows they do not hold for others.
    return error(block, dense, CALLS[:4] if scheme.has_static_inputs else CALLS[4:])


def test_nothing_is_left_of_a_shift_of_zero_and_a_scale_of_one() -> None:
    """One threshold, the widest channel, and inputs that lie around zero: bit for bit as rounded."""
    torch.manual_seed(1)
    dense, calls = Block(), [Call((torch.cat([c.args[0], -c.args[0]]),)) for c in inputs(2)]
    blocks = [copy.deepcopy(dense) for _ in range(2)]
    for block, algorithm in zip(blocks, (OSPlusConfig(num_thresholds=1), RTNConfig()), strict=True):
        work = work_of(block, W8A8, calls)
        work.layers = {"to_q": work.layers["to_q"]}
        calibrate_block(work, algorithm)
    ours, plain = (dict(block.named_parameters()) for block in blocks)
    assert ours.keys() == plain.keys()
    assert all(torch.equal(ours[name], plain[name]) for name in plain)


def test_thresholds_go_from_the_widest_channel_to_the_median() -> None:
    found = thresholds(torch.tensor([0.0, 1.0, 2.0, 32.0]), 5)
    assert found[0] == 32.0
    assert found[-1] == pytest.approx(2.0)
    assert [later / earlier for earlier, later in itertools.pairwise(found)] == pytest.approx([0.5] * 4)
    assert thresholds(torch.zeros(3), 4) == [1.0]
    assert torch.equal(middle_of(torch.tensor([-1.0, 2.0]), torch.tensor([3.0, 2.0])), torch.tensor([1.0, 2.0]))


@pytest.mark.parametrize("scheme", [W8A8, W4A4, STATIC], ids=lambda scheme: scheme.name)
def test_beats_rounding_and_smoothing_on_asymmetric_outliers(scheme: Scheme) -> None:
    torch.manual_seed(3)
    dense = NormedBlock()
    mine = _of(dense, OSPlusConfig(num_thresholds=4), scheme)
    assert mine < 0.3 * _of(dense, RTNConfig(), scheme)
    assert mine < 0.3 * _of(dense, SmoothQuantConfig(), scheme)
    assert mine < 0.5 * _of(dense, OSPlusConfig(num_thresholds=4, shift=False), scheme)
    assert _of(dense, OSPlusConfig(num_thresholds=4, fold=True), scheme, fold=True) == pytest.approx(mine, rel=0.1)


@pytest.mark.parametrize(
    "last",
    [GPTQConfig(), BRECQConfig(iterations=5, batch_size=1), SVDQuantConfig(rank=4, iterations=1), AWQConfig(4)],
    ids=lambda config: config.kind,
)
def test_what_follows_builds_on_the_shift(last: AlgorithmConfig) -> None:
    torch.manual_seed(3)
    dense = NormedBlock()
    first = OSPlusConfig(num_thresholds=2)
    assert _of(dense, SequenceConfig((first, last)), W4A4) < 1.1 * _of(dense, first, W4A4)


def test_convolutions_are_scaled_only() -> None:
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 4, 1))
    calls = [Call((8 * torch.rand(2, 8, 6, 6) * torch.tensor([20.0, *[1.0] * 7])[:, None, None],)) for _ in range(2)]
    block = copy.deepcopy(dense)
    work = calibrated(block, W8A8, OSPlusConfig(num_thresholds=3), calls)
    assert all(layer.act_pre_shift is None for layer in work.layers.values())
    assert error(block, dense, calls) < 0.05


def test_it_is_refused_where_scales_are_chosen_already() -> None:
    with pytest.raises(ConfigError, match="OSPlusConfig has nothing to do after AWQConfig"):
        SequenceConfig((AWQConfig(), OSPlusConfig(), RTNConfig()))
    with pytest.raises(ConfigError, match="SmoothQuantConfig has nothing to do after OSPlusConfig"):
        SequenceConfig((OSPlusConfig(), SmoothQuantConfig()))
    with pytest.raises(ConfigError, match="num_thresholds >= 1, got 0"):
        OSPlusConfig(num_thresholds=0)
    SequenceConfig((QuaRotConfig(), OSPlusConfig()))

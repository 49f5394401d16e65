"""OWQ: which columns are weak, that they are dense and make up for the others, and what that gains."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

import diffuse_compress as dc
from calibrated_block import Block, calibrated, error, inputs, work_of
from diffuse_compress.errors import ConfigError
from diffuse_compress.quantization.algorithms.base import SequenceConfig, calibrate_with
from diffuse_compress.quantization.algorithms.gptq import GPTQConfig, round_columns
from diffuse_compress.quantization.algorithms.owq import sensitivity
from diffuse_compress.quantization.presets import PRESETS
from diffuse_compress.quantization.scheme import Scheme
from tolerance import KERNEL, assert_close

W4A16 = PRESETS["w4a16"].scheme
W3 = Scheme(dc.WeightScheme("int3", dc.PerGroup(64), symmetric=False))


def test_weak_columns_are_dense_and_make_up_for_the_rest() -> None:
    torch.manual_seed(0)
    block, calls = nn.Sequential(nn.Linear(128, 48)), inputs(4)
    dense = block[0]
    work = calibrated(block, W3, dc.OWQConfig(columns=5), calls)
    layer, rows = block[0], torch.cat([call.args[0].flatten(0, 1) for call in calls])
    # Inputs of channels 0, 31, 62, ... are ten times as large.
    columns = layer.dense_columns.tolist()
    assert columns == [0, 31, 62, 93, 124]
    others = [column for column in range(128) if column not in columns]
    # Codes stand for exactly 0 there, and the layer for the dense columns.
    assert torch.equal(layer.weight[:, columns], layer.dense_weight)
    x = torch.zeros(3, 128)
    x[:, columns] = torch.randn(3, 5)
    assert_close(layer(x), nn.functional.linear(x[:, columns], layer.dense_weight, layer.bias), KERNEL[torch.float32])
    # What they are in float64: the least squares answer to the errors of all the others.
    x, weight = rows.double(), dense.weight.detach().double()
    hessian = x.t() @ x
    # Damped as GPTQ is.
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(128, dtype=torch.float64)
    left = (weight - layer.weight.double())[:, others] @ hessian[others][:, columns]
    expected = weight[:, columns] + left @ torch.linalg.inv(hessian[columns][:, columns])
    assert_close(layer.dense_weight.double(), expected, KERNEL[torch.float32] * 10)
    assert work.layers["0"].quantized is not None


def test_columns_of_a_weight_on_the_grid_stay_what_they_are() -> None:
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(128, 48))
    scheme = replace(W4A16, weight=dc.WeightScheme("int4", dc.PerChannel()))
    dense = block[0].weight.detach()
    # Integers up to 7 in every row, and in five columns anything below that.
    dense.copy_(torch.randint(-7, 8, dense.shape).float())
    dense[:, 1] = 7.0
    dense[:, ::31] = torch.randn(48, 5)
    original = dense.clone()
    calibrated(block, scheme, dc.OWQConfig(columns=5, observer="minmax"), inputs(2))
    assert torch.equal(block[0].weight[:, ::31], original[:, ::31])
    assert_close(block[0].weight, original, KERNEL[torch.float32])


def test_sensitivity_is_the_papers() -> None:
    torch.manual_seed(0)
    work = work_of(nn.Sequential(nn.Linear(128, 48)), W3, inputs(2))
    layer = work.layers["0"]
    diagonal = torch.rand(128)
    rounded = dc.RTNConfig()
    expected = torch.zeros(128)
    copied = copy.deepcopy(layer.dense)
    block = nn.Sequential(copied)
    calibrated(block, W3, rounded, inputs(1))
    for column in range(128):
        lost = block[0].weight[:, column] - layer.dense.weight[:, column]
        expected[column] = diagonal[column] * lost.square().sum()
    assert_close(sensitivity(layer, diagonal, "mse"), expected.detach(), KERNEL[torch.float32])


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("scheme", [W3, W4A16, replace(W3, weight=dc.WeightScheme("int4"))], ids=["w3", "w4", "row"])
def test_no_columns_are_gptq_bit_for_bit(scheme: Scheme, act_order: bool) -> None:
    torch.manual_seed(1)
    ours, theirs = Block(), Block()
    theirs.load_state_dict(ours.state_dict())
    calibrated(ours, scheme, dc.OWQConfig(columns=0, act_order=act_order), inputs(2))
    calibrated(theirs, scheme, GPTQConfig(act_order=act_order), inputs(2))
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor), name
    assert "to_q.dense_columns" not in ours.state_dict()


@pytest.mark.parametrize("act_order", [False, True])
def test_beats_gptq_on_inputs_that_were_not_seen(act_order: bool) -> None:
    torch.manual_seed(3)
    dense = Block()
    ours, gptq, rounded = (copy.deepcopy(dense) for _ in range(3))
    calibrated(ours, W3, dc.OWQConfig(columns=5, act_order=act_order), inputs(4))
    calibrated(gptq, W3, GPTQConfig(act_order=act_order), inputs(4))
    calibrated(rounded, W3, dc.RTNConfig(), inputs(4))
    fresh = inputs(6)[4:]
    errors = [error(block, dense, fresh) for block in (ours, gptq, rounded)]
    assert errors[0] < 0.85 * errors[1] < 0.5 * errors[2], errors


@pytest.mark.parametrize("fold", [False, True])
def test_after_smoothing(fold: bool) -> None:
    torch.manual_seed(4)
    dense = Block()
    ours, alone = copy.deepcopy(dense), copy.deepcopy(dense)
    sequence = SequenceConfig((dc.AWQConfig(num_ratios=4, clip=False, fold=fold), dc.OWQConfig(columns=5)))
    calibrated(ours, W3, sequence, inputs(4))
    calibrated(alone, W3, dc.RTNConfig(), inputs(4))
    assert error(ours, dense, inputs(6)[4:]) < 0.75 * error(alone, dense, inputs(6)[4:])
    layer = next(module for module in ours.modules() if getattr(module, "act_pre_scale", None) is not None)
    # Folding a scale away moves it into the dense columns, and out of the codes' input.
    x = torch.randn(3, layer.in_features)
    expected, scale = layer(x), layer.act_pre_scale.detach().clone()
    layer.fold_pre_scale()
    assert_close(layer(x * scale), expected, KERNEL[torch.float32] * 2)


def test_extra_bits_are_what_is_stored() -> None:
    layer = nn.Linear(2048, 512, dtype=torch.bfloat16)
    plain = W4A16.weight_bytes((512, 2048))
    for bits in (0.05, 0.5):
        found = 8 * dc.OWQConfig(bits).branch_bytes(layer, W4A16) / (512 * 2048)
        assert bits - 0.01 < found <= bits
    # A narrow layer has one all the same, and columns say it instead.
    assert dc.OWQConfig(0.001).count(nn.Linear(64, 64)) == 1
    assert dc.OWQConfig(columns=7).branch_bytes(layer, W4A16) == 7 * (4 + 512 * 2)
    assert plain > 0


def test_the_order_of_columns_that_are_rounded_does_not_matter_to_plain_gptq() -> None:
    """``round_columns`` is what it was: no column stays, each is on the grid."""
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(8, 64, generator=generator), torch.randn(200, 64, generator=generator)
    result, qparams = round_columns(weight.clone(), x.t() @ x, W3.weight, GPTQConfig())
    assert qparams.zero_point is not None
    steps = result / qparams.scale + qparams.zero_point.float()
    assert_close(steps, steps.round(), KERNEL[torch.float32])


def test_refusals() -> None:
    for fields in ({"extra_bits": 0.0}, {"columns": -1}):
        with pytest.raises(ConfigError, match="OWQConfig: need 0 < extra_bits <= 8"):
            dc.OWQConfig(**fields)
    with pytest.raises(ConfigError, match="damping"):
        dc.OWQConfig(damping=2.0)
    with pytest.raises(ConfigError, match="rotated inputs have no columns that stand out"):
        SequenceConfig((dc.QuaRotConfig(), dc.OWQConfig()))
    config, linear = dc.OWQConfig(), nn.Linear(128, 8)
    assert "not of convolutions" in str(config.unsupported(nn.Conv2d(8, 8, 1), W4A16))
    assert "weight-only formats" in str(config.unsupported(linear, PRESETS["w4a8"].scheme))
    floating = W4A16.replace(weight_float_zero_point=True)
    assert "no integers" in str(config.unsupported(linear, floating))
    assert "rotated input" in str(config.unsupported(linear, replace(W4A16, input_rotation=128)))
    work = work_of(nn.Sequential(linear), W4A16, inputs(1))
    calibrate_with(config, work)
    assert work.layers["0"].quantized is not None

"""SpQR: bilevel scales and sparse outliers against float64, which weights are outliers, and what that gains."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

import diffuse_compress as dc
from calibrated_block import Block, calibrated, error, inputs
from diffuse_compress.calls import Call
from diffuse_compress.errors import ConfigError
from diffuse_compress.quantization.algorithms.gptq import GPTQConfig
from diffuse_compress.quantization.algorithms.spqr import find_outliers, gains
from diffuse_compress.quantization.convert import requantize
from diffuse_compress.quantization.layers import QuantizedLinear
from diffuse_compress.quantization.numerics import choose_qparams, dequantize, quantize_weight
from diffuse_compress.quantization.packed import SparseOutliers
from diffuse_compress.quantization.packing import unpack
from diffuse_compress.quantization.presets import PRESETS
from diffuse_compress.quantization.qparams import expanded
from diffuse_compress.quantization.scheme import Bilevel, Scheme, WeightScheme
from tolerance import KERNEL, assert_close, snr_db

W4A16 = PRESETS["w4a16"].scheme
W3 = Scheme(WeightScheme("int3", dc.PerGroup(128), symmetric=False))
FORMATS = {bits: WeightScheme(f"int{bits}", Bilevel(16), symmetric=False) for bits in (2, 3, 4)}


def heavy_tailed(rows: int = 48, columns: int = 300, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    weight[torch.rand(weight.shape, generator=generator) < 0.01] *= 8
    return weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_dequantize_equals_a_float64_loop_over_what_is_stored(bits: int, dtype: torch.dtype) -> None:
    """300 columns: 19 groups, the last of 12, in two runs."""
    dense = nn.Linear(300, 48, dtype=dtype)
    dense.weight.data.copy_(heavy_tailed())
    block = nn.Sequential(dense)
    calls = [Call((torch.randn(2, 40, 300).to(dtype),))]
    calibrated(block, Scheme(FORMATS[bits]), dc.SpQRConfig(threshold=0.05, max_share=0.02), calls)
    layer = block[0]
    assert layer.scale.shape == (48, 4)
    assert layer.group_scale.shape == (48, 19)
    assert layer.group_scale.dtype == torch.int8
    codes = unpack(layer.qweight, bits, 300).double()
    expected = torch.empty(48, 300, dtype=torch.float64)
    for row in range(48):
        for column in range(300):
            group = column // 16
            byte = int(layer.group_scale[row, group]) & 0xFF
            zero = (byte >> 4) - (16 if byte >= 128 else 0)
            assert -(2 ** (bits - 1)) <= zero < 2 ** (bits - 1)
            run = group // 16
            scale = layer.scale[row, run].double() + layer.scale[row, 2 + run].double() * (byte & 15)
            expected[row, column] = scale * (codes[row, column] - zero)
    pointers = layer.outlier_rows.tolist()
    assert pointers[0] == 0
    assert 0 < pointers[-1] == layer.outlier_values.numel() <= int(0.02 * 48 * 300)
    for row in range(48):
        for entry in range(pointers[row], pointers[row + 1]):
            expected[row, int(layer.outlier_columns[entry])] += layer.outlier_values[entry].double()
    assert_close(dequantize(layer.quantized_weight()).double(), expected, KERNEL[torch.float32])
    assert layer.outlier_values.dtype == dtype
    x = torch.randn(3, 300).to(dtype)
    assert_close(layer(x).float(), (x.double() @ expected.t() + layer.bias.double()).float(), KERNEL[dtype])
    # Any rows by themselves are those of the whole.
    rows = dequantize(layer.quantized_weight(), rows=slice(7, 20))
    assert torch.equal(rows, dequantize(layer.quantized_weight())[7:20])


def test_columns_beyond_int16_are_found_again() -> None:
    mask, values = torch.zeros(3, 65536, dtype=torch.bool), torch.randn(3, 65536)
    mask[0, 40000] = mask[2, 65535] = mask[2, 1] = True
    outliers = SparseOutliers.at(mask, values, torch.float32)
    assert outliers is not None
    assert outliers.columns.dtype == torch.int16
    assert torch.equal(outliers.add_to(torch.zeros(3, 65536), 0), torch.where(mask, values, 0))
    assert torch.equal(outliers.add_to(torch.zeros(2, 65536), 1), torch.where(mask, values, 0)[1:])
    assert SparseOutliers.at(torch.zeros(3, 4, dtype=torch.bool), values[:, :4], torch.float32) is None


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_bilevel_scales_are_near_those_they_stand_for(bits: int) -> None:
    scheme, weight = FORMATS[bits], torch.randn(64, 512, generator=torch.Generator().manual_seed(0))
    weight[3, 32:64] = 0
    bilevel = dequantize(quantize_weight(weight, scheme))
    assert not bilevel[3, 32:64].any()
    # Per group of 32 with fp32 scales takes half a bit more, and errs more.
    plain = dequantize(quantize_weight(weight, replace(scheme, granularity=dc.PerGroup(32))))
    assert snr_db(weight, bilevel) > snr_db(weight, plain) + 0.5
    found = Scheme(scheme)
    assert found.bits_per_weight((64, 4096)) == bits + 0.75
    assert Scheme.from_dict(found.to_dict()) == found
    qparams = choose_qparams(weight, scheme)
    wide = expanded(qparams, scheme)
    assert wide.scale.shape == (64, 32)
    assert wide.zero_point is not None
    low, high = scheme.range
    assert int(wide.zero_point.min()) >= low
    assert int(wide.zero_point.max()) <= high


def test_gains_are_those_of_leaving_one_out() -> None:
    scheme, weight = FORMATS[3], heavy_tailed(4, 40)
    costs = torch.rand(40) + 0.5
    found = gains(weight, costs, scheme)

    def rounded(values: torch.Tensor, of_range: torch.Tensor) -> torch.Tensor:
        low, high = of_range.min().clamp(max=0), of_range.max().clamp(min=0)
        scale = (high - low) / 7
        zero = (-4 - low / scale).round().clamp(-4, 3)
        return ((values / scale + zero).round().clamp(-4, 3) - zero) * scale

    for row in range(4):
        for start in range(0, 40, 16):
            group, cost = weight[row, start : start + 16].double(), costs[start : start + 16].double()
            padded = torch.cat([group, torch.zeros(16 - len(group))])
            whole = ((rounded(group, group) - group).square() * cost).sum()
            for i in range(len(group)):
                others = torch.arange(16) != i
                lost = ((rounded(group, padded[others]) - group).square() * cost)[others[: len(group)]].sum()
                assert abs(float(found[row, start + i]) - float(whole - lost)) < 1e-4 * float(whole)


def test_outliers_are_the_weights_that_spoil_their_group_and_no_more_than_allowed() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(32, 128, generator=generator)
    planted = torch.zeros(32, 128, dtype=torch.bool)
    planted[torch.arange(32), torch.arange(32) * 4] = True
    weight[planted] = 12.0
    found = find_outliers(weight, torch.ones(128), FORMATS[3], 0.2, 1 / 128)
    assert torch.equal(found, planted)
    assert int(find_outliers(weight, torch.ones(128), FORMATS[3], 0.0, 0.002).sum()) == int(0.002 * 32 * 128)
    assert not find_outliers(weight, torch.ones(128), FORMATS[3], 1e9, 0.01).any()


@pytest.mark.parametrize("act_order", [False, True])
def test_no_outliers_are_gptq_bit_for_bit(act_order: bool) -> None:
    torch.manual_seed(1)
    ours, theirs, none = Block(), Block(), Block()
    for block in (theirs, none):
        block.load_state_dict(ours.state_dict())
    scheme = Scheme(FORMATS[3])
    calibrated(ours, scheme, dc.SpQRConfig(max_share=0, act_order=act_order), inputs(2))
    calibrated(none, scheme, dc.SpQRConfig(threshold=1e9, act_order=act_order), inputs(2))
    calibrated(theirs, scheme, GPTQConfig(act_order=act_order), inputs(2))
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor), name
        assert torch.equal(none.state_dict()[name], tensor), name


def test_beats_gptq_in_larger_groups_and_outliers_help() -> None:
    torch.manual_seed(3)
    dense = Block()
    with torch.no_grad():
        for layer in (dense.to_q, dense.to_k, dense.to_v, dense.to_out, dense.up, dense.down):
            layer.weight.copy_(heavy_tailed(*layer.weight.shape) * layer.weight.std())
    config = dc.SpQRConfig(max_share=0.02)
    blocks = [copy.deepcopy(dense) for _ in range(4)]
    scheme = config.format_of(dense.to_q, W3)
    for block, form, algorithm in zip(
        blocks,
        (scheme, scheme, W3, W3),
        (config, replace(config, max_share=0), GPTQConfig(), dc.RTNConfig()),
        strict=True,
    ):
        calibrated(block, form, algorithm, inputs(4))
    errors = [error(block, dense, inputs(6)[4:]) for block in blocks]
    assert errors[0] < 0.8 * errors[1] < 0.8 * errors[2] < errors[3], errors


def test_convolutions_keep_their_outliers_too() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(16, 24, 3, padding=1), nn.GELU(), nn.Conv2d(24, 8, 1))
    with torch.no_grad():
        model[0].weight[:, 3, 1, 1] = 3.0
    ours, plain = copy.deepcopy(model), copy.deepcopy(model)
    calls = [Call((torch.randn(4, 16, 8, 8),))]
    calibrated(ours, Scheme(FORMATS[3]), dc.SpQRConfig(), calls)
    calibrated(plain, Scheme(FORMATS[3]), dc.RTNConfig(), calls)
    assert ours[0].outlier_values is not None
    assert error(ours, model, calls) < 0.6 * error(plain, model, calls)
    x = calls[0].args[0].clone().requires_grad_()
    y = ours(x)
    dense = nn.Sequential(ours[0].to_dense(), nn.GELU(), ours[2].to_dense())
    assert_close(y, dense(calls[0].args[0]), KERNEL[torch.float32])
    y.sum().backward()
    given = calls[0].args[0].clone().requires_grad_()
    dense(given).sum().backward()
    assert x.grad is not None
    assert given.grad is not None
    assert_close(x.grad, given.grad, KERNEL[torch.float32] * 2)


def test_outliers_follow_what_is_done_to_a_layer() -> None:
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(300, 48))
    block[0].weight.data.copy_(heavy_tailed())
    dense = copy.deepcopy(block[0])
    calibrated(block, Scheme(FORMATS[4]), dc.SpQRConfig(threshold=0.05), [Call((torch.randn(60, 300),))])
    layer = block[0]
    assert isinstance(layer, QuantizedLinear)
    before, entries = layer.weight.clone(), layer.outlier_values.clone()
    # Another weight in the same format: outliers stay, codes stand for the rest.
    again = requantize(layer, dense)
    assert torch.equal(again.outlier_values, entries)
    rounded = dequantize(quantize_weight(dense.weight.detach(), FORMATS[4]))
    assert snr_db(dense.weight, again.weight) > snr_db(dense.weight, rounded) + 2
    factors = torch.rand(48) + 0.5
    layer.scale_outputs(factors)
    assert_close(layer.weight, before * factors.unsqueeze(1), KERNEL[torch.float32])
    layer.to(torch.bfloat16)
    assert layer.outlier_values.dtype == torch.bfloat16
    assert layer.scale.dtype == torch.float32
    assert layer.outlier_columns.dtype == torch.int16


def test_refusals() -> None:
    for fields in ({"threshold": -1.0}, {"max_share": 0.5}):
        with pytest.raises(ConfigError, match="SpQRConfig: need threshold >= 0"):
            dc.SpQRConfig(**fields)
    with pytest.raises(ConfigError, match="group_size must be one of"):
        dc.SpQRConfig(group_size=128)
    with pytest.raises(ConfigError, match="Bilevel needs int4, int3 or int2 with integer zero points"):
        WeightScheme("int8", Bilevel(16), symmetric=False)
    config, linear = dc.SpQRConfig(), nn.Linear(128, 8)
    assert "weight-only" in str(config.unsupported(linear, PRESETS["w4a8"].scheme))
    assert "2 to 4 bits" in str(config.unsupported(linear, PRESETS["w8a16"].scheme))
    assert "16 bits" in str(config.unsupported(nn.Linear(70000, 2, device="meta"), W4A16))
    with pytest.raises(ConfigError, match="SpQR: needs bilevel scales"):
        config.check(W4A16.weight)
    for other in (dc.HQQConfig(), dc.AdaRoundConfig()):
        with pytest.raises(ConfigError, match="bilevel"):
            other.check(FORMATS[4])

"""A convolution over a concatenation in two parts."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from diffuse_compress.errors import ConfigError, ModelStateError
from diffuse_compress.quantization.algorithms.rtn import RTNConfig
from diffuse_compress.quantization.convert import quantize_module, replace_module
from diffuse_compress.quantization.presets import PRESETS
from diffuse_compress.quantization.split import SplitConv2d, split_conv
from tolerance import KERNEL, assert_close, snr_db

W8A8 = PRESETS["w8a8"].scheme


def conv(**options) -> nn.Conv2d:
    return nn.Conv2d(24, 8, 3, **{"padding": 1, **options})


def quantized(split: SplitConv2d, scheme=W8A8) -> SplitConv2d:
    for name in ("hidden", "skip"):
        replace_module(split, name, quantize_module(split.get_submodule(name), scheme, RTNConfig()))
    return split


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"stride": 2, "padding": 0}], ids=str)
def test_the_parts_compute_what_the_whole_does(options):
    whole = conv(**options)
    x = torch.randn(2, 24, 6, 6)
    split = split_conv(whole, 16)
    assert (split.in_channels, split.out_channels, split.hidden.in_channels) == (24, 8, 16)
    expected = nn.functional.conv2d(
        x.double(),
        whole.weight.double(),
        None if whole.bias is None else whole.bias.double(),
        whole.stride,
        whole.padding,
    )
    assert_close(split(x), expected, KERNEL[torch.float32])
    merged = split.merged()
    assert torch.equal(merged.weight, whole.weight)
    assert (merged.bias is None) == (whole.bias is None)
    assert torch.equal(merged(x), whole(x))
    before = whole.weight.clone()
    split.hidden.weight.data.zero_()
    assert torch.equal(whole.weight, before)


def test_each_half_has_scales_of_its_own():
    """Ranges a hundred times apart: with one scale for both the narrow half has about one code."""
    whole = conv()
    whole.weight.data[:, :16] *= 0.01
    x = torch.randn(2, 24, 6, 6)
    x[:, :16] *= 100
    exact = whole(x)
    together = quantize_module(whole, W8A8, RTNConfig())(x)
    apart = quantized(split_conv(whole, 16))(x)
    assert snr_db(exact, apart) > snr_db(exact, together) + 15, (snr_db(exact, apart), snr_db(exact, together))
    scales = [split.scale for split in quantized(split_conv(whole, 16)).children()]
    assert float((scales[1] / scales[0]).median()) > 50


def test_quantized_parts_are_the_sum_over_their_own_grids():
    """Naive float64: codes of each half's weight rows and of each half's samples, products and one sum."""
    whole, x = conv(), torch.randn(2, 24, 5, 5)
    x[:, 16:] *= 30
    found = quantized(split_conv(whole, 16))
    expected = whole.bias.double().reshape(1, -1, 1, 1)
    for part, layer in ((slice(0, 16), found.hidden), (slice(16, None), found.skip)):
        values = x[:, part].double()
        scale = (values.abs().amax(dim=(1, 2, 3), keepdim=True).float() / 127).double()
        rows = layer.qweight.double() * layer.scale.double()
        kernel = rows.unflatten(1, (-1, 3, 3))
        expected = expected + nn.functional.conv2d((values / scale).round() * scale, kernel, padding=1)
    assert_close(found(x), expected, KERNEL[torch.float32])


def test_merged_parts_are_rounded_to_their_grids():
    split = quantized(split_conv(conv(), 16))
    merged = split.merged()
    assert torch.equal(merged.weight, torch.cat([split.hidden.weight, split.skip.weight], dim=1))
    assert type(merged) is nn.Conv2d


def test_what_cannot_be_split_is_refused():
    with pytest.raises(ConfigError, match="groups=1 and 0 < channels < 24"):
        split_conv(conv(), 24)
    with pytest.raises(ConfigError, match="groups=8"):
        split_conv(conv(groups=8), 8)
    with pytest.raises(ModelStateError, match="got a Linear"):
        split_conv(nn.Linear(4, 4), 2)

"""Codes of keys and values against float64 written out group by group; packed bytes; configurations."""

from __future__ import annotations

import math

import pytest
import torch

import diffuse_compress as dc
from diffuse_compress.quantization.kv_cache import (
    dequantize_states,
    pack_codes,
    quantize_states,
    unpack_codes,
)


def states(tokens: int = 64, dim: int = 64, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    made = torch.randn(2, 3, tokens, dim, generator=generator)
    made[..., 5] = made[..., 5] * 9 + 20  # a channel as keys have them
    return made


def written_out(x: torch.Tensor, bits: int, size: int, along_tokens: bool) -> torch.Tensor:
    """Quantized and back, in float64, one group after the other; scale and minimum rounded to fp16."""
    out, most = torch.empty_like(x, dtype=torch.float64), 2**bits - 1
    batch, heads, tokens, dim = x.shape
    for b in range(batch):
        for h in range(heads):
            for line in range(dim if along_tokens else tokens):
                row = (x[b, h, :, line] if along_tokens else x[b, h, line]).double()
                done = []
                for group in row.split(size):
                    low = float(group.min().half())
                    scale = float(((group.max() - low) / most).half())
                    done += [round(min(max((float(v) - low) / scale, 0), most)) * scale + low for v in group]
                (out[b, h, :, line] if along_tokens else out[b, h, line]).copy_(torch.tensor(done, dtype=torch.float64))
    return out


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("per_channel", [True, False])
def test_codes_are_those_of_float64(bits: int, per_channel: bool) -> None:
    x, config = states(32, 32), dc.KIVIConfig(bits=bits, group_size=16)
    found = dequantize_states(quantize_states(x, config, per_channel=per_channel), config, torch.float32)
    # Equal to rounding in float32, or the other neighbour of a tie: none here.
    torch.testing.assert_close(found.double(), written_out(x, bits, 16, per_channel), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_packing_is_exact_and_as_documented(bits: int) -> None:
    codes = torch.randint(0, 2**bits, (3, 5, 64), dtype=torch.uint8)
    packed = pack_codes(codes, bits)
    assert packed.shape == (3, 5, 64 * bits // 8)
    assert packed.dtype == torch.uint8
    assert torch.equal(unpack_codes(packed, bits), codes)
    run = 64 * bits // 8
    assert int(packed[0, 0, 1]) == sum(int(codes[0, 0, 1 + i * run]) << bits * i for i in range(8 // bits))


@pytest.mark.parametrize(("dim", "size", "scales"), [(64, 64, "float16"), (128, 64, "float16"), (32, 32, "float8")])
def test_two_bits_take_at_most_0_16_of_bf16(dim: int, size: int, scales: str) -> None:
    x, config = states(128, dim).bfloat16(), dc.KIVIConfig(group_size=size, scale_dtype=scales)
    parts = [quantize_states(x, config, per_channel=per_channel) for per_channel in (True, False)]
    assert sum(part.nbytes for part in parts) <= 0.16 * 2 * x.nbytes
    factors = sum(part.factors.nbytes for part in parts if part.factors is not None)
    bits = (sum(part.nbytes for part in parts) - factors) * 8 / (2 * x.numel())
    assert bits == config.bits_per_element(dim) == 2.5


def test_fp8_scales_lose_little_and_nothing_overflows() -> None:
    errors = {}
    for scales in ("float16", "float8"):
        config = dc.KIVIConfig(bits=2, group_size=32, scale_dtype=scales)
        for size in (1e-3, 1.0, 1e3):
            x = states(seed=1) * size
            for per_channel in (True, False):
                found = dequantize_states(quantize_states(x, config, per_channel=per_channel), config, torch.float32)
                errors[scales, size, per_channel] = float((found - x).norm() / x.norm())
    for (scales, size, per_channel), error in errors.items():
        if scales == "float8":
            assert error < 1.35 * errors["float16", size, per_channel]  # measured: up to 1.17


def test_keys_per_channel_keep_channels_that_stand_out() -> None:
    x, config = states(seed=2), dc.KIVIConfig(bits=2, group_size=32)
    ordinary = [i for i in range(64) if i != 5]
    error = {
        per_channel: float(
            (dequantize_states(quantize_states(x, config, per_channel=per_channel), config, torch.float32) - x)[
                ..., ordinary
            ].norm()
        )
        for per_channel in (True, False)
    }
    assert error[True] < 0.5 * error[False]


def test_groups_of_one_value_and_zeros_are_exact() -> None:
    for scales in ("float16", "float8"):
        config = dc.KIVIConfig(group_size=8, scale_dtype=scales)
        for value in (0.0, 1.0):
            x = torch.full((1, 1, 8, 8), value)
            for per_channel in (True, False):
                found = dequantize_states(quantize_states(x, config, per_channel=per_channel), config, torch.float32)
                assert torch.equal(found, x)


def test_configurations_are_checked_and_come_back() -> None:
    config = dc.KIVIConfig(4, 32, 16, "naive", 3, "float8")
    assert dc.KIVIConfig.from_dict(config.to_dict()) == config
    assert config.summary == "naive (4 bits, groups of 32, float8 scales, 16 newest tokens kept, 3 first tokens kept)"
    for wrong, message in [
        ({"bits": 3}, "bits must be 2, 4 or 8, got 3"),
        ({"bits": True}, "bits must be 2, 4 or 8, got True"),
        ({"group_size": 12}, "multiple of 8, got 12"),
        ({"residual_length": -1}, "residual_length must be .* got -1"),
        ({"num_sink_tokens": 1.5}, "num_sink_tokens must be .* got 1.5"),
        ({"method": "kivy"}, "method='kivy': .*kivi"),
        ({"scale_dtype": "bf16"}, "scale_dtype='bf16'"),
    ]:
        with pytest.raises(dc.ConfigError, match=message):
            dc.KIVIConfig(**wrong)
    with pytest.raises(dc.ConfigError, match="unknown key 'group'"):
        dc.KIVIConfig.from_dict({"group": 32})


def test_heads_that_groups_do_not_fit() -> None:
    with pytest.raises(dc.IncompatibleShapeError, match="does not divide heads of 96 channels; group_size=48"):
        dc.KIVIConfig().value_group(96)
    with pytest.raises(dc.IncompatibleShapeError, match="multiple of 64 tokens, got 65"):
        quantize_states(states(65), dc.KIVIConfig(), per_channel=True)
    assert dc.KIVIConfig().value_group(32) == 32
    assert math.isclose(dc.KIVIConfig().bits_per_element(32), 2 + (32 / 64 + 32 / 32) / 2)

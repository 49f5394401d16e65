"""GPTQ against a naive version of itself, against RTN, and its edges."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from diffuse_compress.errors import ConfigError, ModelStateError
from diffuse_compress.quantization.algorithms.gptq import GPTQConfig, round_columns
from diffuse_compress.quantization.algorithms.rtn import RTNConfig
from diffuse_compress.quantization.algorithms.rtn import quantize as rtn
from diffuse_compress.quantization.numerics import dequantize, quantize_weight
from diffuse_compress.quantization.packed import QuantizedWeight
from diffuse_compress.quantization.presets import PRESETS
from diffuse_compress.quantization.scheme import NumberFormat, PerChannel, PerGroup, WeightScheme

INT4 = WeightScheme(NumberFormat.INT4, PerChannel())
SCHEMES = {name: preset.scheme.weight for name, preset in PRESETS.items()} | {
    "w4-g64": WeightScheme(NumberFormat.INT4, PerGroup(64), symmetric=False),
    "w3-g64": WeightScheme(NumberFormat.INT3, PerGroup(64), symmetric=False),
    "w2-g64": WeightScheme(NumberFormat.INT2, PerGroup(64), symmetric=False),
    "float-zero": WeightScheme(NumberFormat.INT4, PerGroup(64), symmetric=False, float_zero_point=True),
    "additive": WeightScheme(NumberFormat.INT4, PerGroup(64), symmetric=False, additive_zero_point=True),
}


def quantize_columns(
    weight: torch.Tensor, hessian: torch.Tensor, scheme: WeightScheme, *more: GPTQConfig | torch.Tensor
) -> QuantizedWeight:
    result, qparams = round_columns(weight, hessian, scheme, *more)
    return quantize_weight(result, scheme, qparams)


def correlated(rows: int, columns: int, seed: int) -> torch.Tensor:
    """Inputs with a few strong directions and outlier channels."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.randn(columns // 8, columns, generator=generator)
    x = torch.randn(rows, columns // 8, generator=generator) @ basis + 0.3 * torch.randn(
        rows, columns, generator=generator
    )
    x[:, ::37] *= 8
    return x


def output_error(weight: torch.Tensor, quantized: torch.Tensor, x: torch.Tensor) -> float:
    return float(((weight - quantized) @ x.t()).norm() / (weight @ x.t()).norm())


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("scheme", list(SCHEMES))
def test_beats_rounding_on_correlated_inputs(scheme: str, act_order: bool) -> None:
    x = correlated(600, 256, seed=1)
    weight = torch.randn(96, 256, generator=torch.Generator().manual_seed(2))
    hessian = x.t() @ x * (2 / len(x))
    found = quantize_columns(weight.clone(), hessian.clone(), SCHEMES[scheme], GPTQConfig(act_order=act_order))
    plain = rtn(weight, SCHEMES[scheme], RTNConfig())
    ours, theirs = (output_error(weight, dequantize(q), x) for q in (found, plain))
    factor = 1.0 if scheme == "fp8" else 0.75
    assert ours < factor * theirs, (ours, theirs)


@pytest.mark.parametrize("scheme", list(SCHEMES))
def test_uncorrelated_inputs_give_plain_rounding(scheme: str) -> None:
    weight = torch.randn(40, 256)
    found = quantize_columns(weight.clone(), torch.eye(256), SCHEMES[scheme], GPTQConfig(act_order=False))
    plain = rtn(weight, SCHEMES[scheme], RTNConfig())
    assert torch.equal(dequantize(found), dequantize(plain))


def test_second_column_makes_up_for_the_first() -> None:
    """By hand: with H = [[2, 1], [1, 2]] an error e of column 0 moves column 1 by e * H01 / H11 = e / 2."""
    weight = torch.tensor([[0.30, 0.52], [7.0, 7.0]])
    scheme = WeightScheme(NumberFormat.INT4, PerChannel())
    config = GPTQConfig(act_order=False, damping=1e-6, observer="minmax")
    hessian = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
    found = dequantize(quantize_columns(weight.clone(), hessian, scheme, config))
    scale = 0.52 / 7
    first = round(0.30 / scale) * scale
    moved = 0.52 + (0.30 - first) / 2
    assert torch.allclose(found[0], torch.tensor([first, min(7, round(moved / scale)) * scale]))


def naive(weight: torch.Tensor, hessian: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Algorithm 1 with an explicit inverse, downdated after each column, in float64."""
    w, h = weight.double().clone(), hessian.double().clone()
    h += 0.01 * h.diagonal().mean() * torch.eye(len(h), dtype=torch.float64)
    inverse, result = torch.linalg.inv(h), torch.zeros_like(w)
    for j in range(w.shape[1]):
        result[:, j] = (w[:, j] / scale).round().clamp(-7, 7) * scale
        error = (w[:, j] - result[:, j]) / inverse[j, j]
        w -= error[:, None] * inverse[j][None]
        inverse = inverse - inverse[:, j : j + 1] @ inverse[j : j + 1] / inverse[j, j]
    return result


@pytest.mark.parametrize("block_size", [1, 16, 128])
def test_equals_the_naive_algorithm(block_size: int) -> None:
    x = correlated(500, 96, seed=3)
    weight, hessian = torch.randn(24, 96), x.t() @ x * (2 / 500)
    config = GPTQConfig(block_size=block_size, act_order=False, observer="minmax")
    found = dequantize(quantize_columns(weight.clone(), hessian.clone(), INT4, config))
    scale = weight.abs().amax(dim=1).double() / 7
    expected = naive(weight, hessian, scale)
    # A tie may fall either way between fp32 and float64, and moves what comes after it.
    assert (found.double() - expected).abs().gt(1e-5).float().mean() < 0.02
    assert output_error(weight, found, x) == pytest.approx(output_error(weight, expected.float(), x), rel=0.02)


def test_asymmetric_equals_the_naive_algorithm() -> None:
    """Column by column: what the columns still to come take over of the rounding error, and of w_q D_q."""
    x = correlated(500, 64, seed=6)
    difference = 0.2 * correlated(500, 64, seed=7) + 0.1 * x
    weight, hessian, cross = torch.randn(24, 64), x.t() @ x * (2 / 500), difference.t() @ x * (2 / 500)
    w, h, c = weight.double().clone(), hessian.double(), cross.double()
    h = h + 0.01 * h.diagonal().mean() * torch.eye(64, dtype=torch.float64)
    scale, expected = weight.abs().amax(dim=1).double() / 7 * 1.5, torch.zeros_like(w)
    for j in range(64):
        expected[:, j] = (w[:, j] / scale).round().clamp(-7, 7) * scale
        rest = torch.linalg.inv(h[j + 1 :, j + 1 :])
        error = w[:, j] - expected[:, j]
        w[:, j + 1 :] += torch.outer(error, h[j, j + 1 :] @ rest)
        w[:, j + 1 :] += 0.5 * torch.outer(weight[:, j].double(), c[j, j + 1 :] @ rest)
    for act_order in (False, True):
        config = GPTQConfig(act_order=act_order, observer="minmax", asymmetric=True, asymmetric_share=0.5)
        ranges = scale.float()[:, None] * 7 * torch.ones_like(weight)
        found = dequantize(quantize_columns(weight.clone(), hessian.clone(), INT4, config, ranges, cross.clone()))
        if not act_order:
            assert (found.double() - expected).abs().gt(1e-5).float().mean() < 0.02

        def missed(value: torch.Tensor) -> float:
            return float((value.double() @ x.t().double() - weight.double() @ (x + difference).t().double()).norm())

        assert missed(found) == pytest.approx(missed(expected), rel=0.05)
        plain = quantize_columns(weight.clone(), hessian.clone(), INT4, GPTQConfig(act_order=act_order), ranges)
        assert missed(found) < 0.9 * missed(dequantize(plain))


def test_columns_that_no_input_reaches_are_rounded_to_nearest() -> None:
    x = correlated(300, 128, seed=4)
    x[:, 5::9] = 0
    weight = torch.randn(16, 128)
    found = dequantize(quantize_columns(weight.clone(), x.t() @ x, INT4, GPTQConfig()))
    plain = dequantize(rtn(weight, INT4, RTNConfig()))
    assert torch.equal(found[:, 5::9], plain[:, 5::9])
    assert not torch.equal(found, plain)


@pytest.mark.parametrize("act_order", [False, True])
def test_unit_of_inputs_does_not_matter(act_order: bool) -> None:
    """A power of two changes no digit; channels that are always zero must not make up the mean that damping is of."""
    x = correlated(300, 64, seed=8)
    x[:, 5::9] = 0
    weight, hessian = torch.randn(16, 64), x.t() @ x
    first, second = (
        quantize_columns(weight.clone(), hessian * factor, INT4, GPTQConfig(act_order=act_order))
        for factor in (1.0, 2.0**-40)
    )
    assert torch.equal(first.qweight, second.qweight)


def test_singular_hessian_is_damped() -> None:
    x = torch.randn(3, 128)  # fewer rows than columns
    weight = torch.randn(16, 128)
    found = dequantize(quantize_columns(weight.clone(), x.t() @ x, INT4, GPTQConfig(damping=1e-8)))
    assert output_error(weight, found, x) < output_error(weight, dequantize(rtn(weight, INT4, RTNConfig())), x)
    with pytest.raises(ModelStateError, match="not finite"):
        quantize_columns(weight.clone(), torch.full((128, 128), float("nan")), INT4, GPTQConfig())


@pytest.mark.parametrize("fields", [{"block_size": 0}, {"damping": 0.0}, {"damping": 1.0}, {"observer": "hqq"},
                                    {"asymmetric_share": 0.0}])  # fmt: skip
def test_config_refuses(fields: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="GPTQConfig"):
        GPTQConfig(**fields)


def test_equal_inputs_give_equal_bytes() -> None:
    x = correlated(200, 128, seed=5)
    weight = nn.Linear(128, 32).weight.detach()
    first, second = (quantize_columns(weight.clone(), x.t() @ x, INT4, GPTQConfig()) for _ in range(2))
    assert torch.equal(first.qweight, second.qweight)

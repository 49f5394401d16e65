"""HQQ against the error it minimises, and against its baseline."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from diffuse_compress.errors import ConfigError, IncompatibleShapeError, ModelStateError
from diffuse_compress.quantization.algorithms import hqq
from diffuse_compress.quantization.algorithms.base import quantize_with
from diffuse_compress.quantization.algorithms.hqq import HQQConfig
from diffuse_compress.quantization.algorithms.rtn import RTNConfig
from diffuse_compress.quantization.numerics import dequantize
from diffuse_compress.quantization.packed import QuantizedWeight
from diffuse_compress.quantization.scheme import NumberFormat, PerChannel, PerGroup, PerTensor, WeightScheme
from tolerance import assert_snr, snr_db

INT4, INT3, INT2 = NumberFormat.INT4, NumberFormat.INT3, NumberFormat.INT2


def _scheme(fmt: NumberFormat, granularity: object, float_zero_point: bool = True) -> WeightScheme:
    return WeightScheme(fmt, granularity, symmetric=False, float_zero_point=float_zero_point)  # type: ignore[arg-type]


GRANULARITIES = [PerTensor(), PerChannel(), PerGroup(32, pad=True), PerGroup(128, pad=True)]
SCHEMES = [_scheme(fmt, g, z) for fmt in (INT4, INT2) for g in GRANULARITIES for z in (True, False)]
every_scheme = pytest.mark.parametrize(
    "scheme",
    SCHEMES,
    ids=lambda s: f"{s.format.value}-{type(s.granularity).__name__}{s.group_size or ''}-{s.float_zero_point}",
)


def _weight(rows: int = 24, cols: int = 330) -> torch.Tensor:
    return torch.randn(rows, cols) * torch.rand(rows, cols).pow(-0.3) * 0.02 + 0.004


def _lp_errors(weight: torch.Tensor, quantized: QuantizedWeight, p: float) -> torch.Tensor:
    error = (dequantize(quantized).double() - weight.double()).abs().pow(p)
    scheme = quantized.scheme
    if isinstance(scheme.granularity, PerTensor):
        return error.sum().reshape(1, 1)
    parts = error.split(scheme.group_size or weight.shape[1], dim=1)
    return torch.stack([part.sum(dim=1) for part in parts], dim=1)


def _bytes(quantized: QuantizedWeight) -> list[bytes]:
    assert quantized.zero_point is not None
    return [t.numpy().tobytes() for t in (quantized.qweight, quantized.scale, quantized.zero_point)]


@every_scheme
@pytest.mark.parametrize("p", [0.7, 1.0])
def test_lp_error_of_every_group_is_at_most_that_of_minmax_rounding(scheme: WeightScheme, p: float) -> None:
    weight = _weight()
    baseline = _lp_errors(weight, quantize_with(RTNConfig("minmax"), weight, scheme), p)
    found = _lp_errors(weight, quantize_with(HQQConfig(lp_norm=p), weight, scheme), p)
    assert (found <= baseline * (1 + 1e-4)).all()


@pytest.mark.parametrize(("fmt", "gain"), [(INT4, 0.97), (INT3, 0.97), (INT2, 0.97)])
def test_lp_error_with_float_zero_points_is_clearly_below_minmax_rounding(fmt: NumberFormat, gain: float) -> None:
    weight, scheme = _weight(64, 512), _scheme(fmt, PerGroup(64))
    baseline = _lp_errors(weight, quantize_with(RTNConfig("minmax"), weight, scheme), 0.7).sum()
    found = _lp_errors(weight, quantize_with(HQQConfig(), weight, scheme), 0.7).sum()
    assert found < baseline * gain


@pytest.mark.parametrize(("fmt", "size", "measured"), [(INT4, 128, 20.25), (INT3, 64, 14.7), (INT2, 64, 7.3)])
def test_snr_of_gaussian_weights_is_the_measured_one(fmt: NumberFormat, size: int, measured: float) -> None:
    weight, scheme = torch.randn(64, 2048), _scheme(fmt, PerGroup(size))
    found = dequantize(quantize_with(HQQConfig(), weight, scheme))
    assert_snr(weight, found, measured)
    assert snr_db(weight, found) > snr_db(weight, dequantize(quantize_with(RTNConfig("minmax"), weight, scheme)))


def test_result_does_not_depend_on_the_magnitude_of_the_weights() -> None:
    weight, scheme = _weight(), _scheme(INT4, PerGroup(64, pad=True))
    small, large = (quantize_with(HQQConfig(), weight * 2.0**e, scheme) for e in (-20, 20))
    assert torch.equal(small.qweight, large.qweight)
    assert torch.equal(small.zero_point, large.zero_point)


@pytest.mark.parametrize("float_zero_point", [True, False])
def test_padding_takes_no_part(float_zero_point: bool) -> None:
    weight, scheme = _weight(24, 330), _scheme(INT4, PerGroup(64, pad=True), float_zero_point)
    whole = quantize_with(HQQConfig(), weight, scheme)
    tail = quantize_with(HQQConfig(), weight[:, 320:].contiguous(), _scheme(INT4, PerChannel(), float_zero_point))
    assert torch.equal(whole.scale[:, 5:], tail.scale)
    assert torch.allclose(whole.zero_point[:, 5:].float(), tail.zero_point.float(), atol=1e-4)


@every_scheme
def test_equal_input_gives_equal_bytes_and_chunks_do_not_matter(
    scheme: WeightScheme, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = _weight()
    before = weight.clone()
    first = quantize_with(HQQConfig(), weight, scheme)
    monkeypatch.setattr("diffuse_compress.quantization.numerics._CHUNK_CPU", 1000)
    assert _bytes(quantize_with(HQQConfig(), weight.clone(), scheme)) == _bytes(first)
    assert torch.equal(weight, before)


def test_no_random_number_is_drawn(untouched_rng: None) -> None:
    weight = torch.linspace(-1, 1, 4 * 128).sin().reshape(4, 128)
    quantize_with(HQQConfig(), weight, _scheme(INT4, PerGroup(128)))


@pytest.mark.parametrize("fmt", [INT4, INT2])
def test_zero_point_has_the_dtype_and_range_of_the_scheme(fmt: NumberFormat) -> None:
    weight = _weight() + 0.3
    as_float = quantize_with(HQQConfig(), weight, _scheme(fmt, PerGroup(32, pad=True)))
    as_int = quantize_with(HQQConfig(), weight, _scheme(fmt, PerGroup(32, pad=True), False))
    assert as_float.zero_point.dtype == torch.float32
    assert (as_float.zero_point != as_float.zero_point.round()).any()
    assert as_int.zero_point.dtype == torch.int8
    assert fmt.qmin <= as_int.zero_point.amin() <= as_int.zero_point.amax() <= fmt.qmax


@every_scheme
def test_zero_constant_and_extreme_rows_stay_finite(scheme: WeightScheme) -> None:
    weight = torch.zeros(5, 256)
    weight[1], weight[2], weight[3], weight[4] = 0.5, -0.5, torch.randn(256) * 1e-30, torch.randn(256) * 1e37
    quantized = quantize_with(HQQConfig(), weight, scheme)
    values = dequantize(quantized)
    assert values.isfinite().all()
    assert quantized.zero_point.isfinite().all()
    if not isinstance(scheme.granularity, PerTensor):
        assert not values[0].any()
        assert torch.allclose(values[1:3], weight[1:3], rtol=1e-4)


def test_empty_and_half_precision_weights() -> None:
    scheme = _scheme(INT4, PerGroup(64))
    assert quantize_with(HQQConfig(), torch.zeros(0, 128), scheme).qweight.shape == (0, 64)
    weight = _weight(8, 128).bfloat16()
    assert _bytes(quantize_with(HQQConfig(), weight, scheme)) == _bytes(
        quantize_with(HQQConfig(), weight.float(), scheme)
    )


@pytest.mark.parametrize(("field", "value"), [("iterations", 1), ("lp_norm", 1.0), ("beta", 1.0), ("kappa", 2.0)])
def test_every_field_changes_the_result(field: str, value: float) -> None:
    weight, scheme = _weight(), _scheme(INT4, PerGroup(64, pad=True))
    changed = dataclasses.replace(HQQConfig(), **{field: value})
    assert _bytes(quantize_with(changed, weight, scheme)) != _bytes(quantize_with(HQQConfig(), weight, scheme))


def test_step_is_the_mean_of_codes_minus_shrunk_weights() -> None:
    w = torch.tensor([[[0.3, -1.2, 2.0, 0.0]]])
    z = torch.tensor([[0.25]])
    found = hqq._step(w, z, _scheme(INT4, PerGroup(32)), beta=10.0, p=0.7, valid=None)
    total = 0.0
    for value in w.flatten().tolist():
        code = min(max(round(value + 0.25), -8), 7)
        residual = value - (code - 0.25)
        shrunk = max(abs(residual) - abs(residual) ** -0.3 / 10, 0.0) * (1 if residual > 0 else -1)
        total += code - (value - shrunk)
    assert found.item() == pytest.approx(total / 4, rel=1e-5)


def test_what_it_cannot_do_is_refused() -> None:
    with pytest.raises(ConfigError, match="HQQ: needs asymmetric integer weights, got symmetric int4"):
        quantize_with(HQQConfig(), _weight(), WeightScheme(INT4))
    with pytest.raises(IncompatibleShapeError, match="got in_features=330"):
        quantize_with(HQQConfig(), _weight(), _scheme(INT4, PerGroup(64)))
    with pytest.raises(ModelStateError, match="finite in float32"):
        quantize_with(HQQConfig(), _weight().log(), _scheme(INT4, PerChannel()))
    for options in ({"iterations": 0}, {"lp_norm": 0.0}, {"lp_norm": 1.5}, {"beta": 0.0}, {"kappa": 0.5}):
        with pytest.raises(ConfigError, match="HQQConfig: need iterations >= 1, 0 < lp_norm <= 1"):
            HQQConfig(**options)  # type: ignore[arg-type]

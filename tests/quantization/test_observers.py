"""Observers: the error they claim to minimise, exact merging, and what they refuse."""

from __future__ import annotations

import math

import pytest
import torch

from diffuse_compress.errors import ConfigError, ModelStateError
from diffuse_compress.quantization import numerics
from diffuse_compress.quantization.numerics import (
    choose_qparams,
    dequantize,
    dequantize_activation,
    quantize_activation,
    quantize_weight,
)
from diffuse_compress.quantization.observers import (
    HistogramObserver,
    MinMaxObserver,
    MSEObserver,
    PercentileObserver,
)
from diffuse_compress.quantization.qparams import QParams
from diffuse_compress.quantization.scheme import (
    ActivationScheme,
    NumberFormat,
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
    ScaleRule,
    TwoLevel,
    WeightScheme,
)
from tolerance import assert_snr, snr_db

INT8, INT4, INT3, INT2 = NumberFormat.INT8, NumberFormat.INT4, NumberFormat.INT3, NumberFormat.INT2
STATIC = ActivationScheme(INT8, PerTensor(), dynamic=False)
STATIC_ASYMMETRIC = ActivationScheme(INT8, PerTensor(), dynamic=False, symmetric=False)
STATIC_INT4 = ActivationScheme(INT4, PerTensor(), dynamic=False)
STATIC_FP8 = ActivationScheme(NumberFormat.FLOAT8_E4M3, PerTensor(), dynamic=False)
WEIGHTS = {
    "int8-channel": WeightScheme(INT8),
    "int4-tensor": WeightScheme(INT4, PerTensor()),
    "int4-channel": WeightScheme(INT4),
    "int4-group128-asymmetric": WeightScheme(INT4, PerGroup(128, pad=True), False),
    "int4-group64-half": WeightScheme(INT4, PerGroup(64, pad=True), scale_rule=ScaleRule.AMAX_OVER_HALF_RANGE),
    "int3-group32-additive-zero": WeightScheme(INT3, PerGroup(32, pad=True), False, additive_zero_point=True),
    "int3-group32-float-zero": WeightScheme(INT3, PerGroup(32, pad=True), False, float_zero_point=True),
    "int2-channel-asymmetric": WeightScheme(INT2, PerChannel(), False),
    "two-level": WeightScheme(INT4, TwoLevel()),
}
every_weight = pytest.mark.parametrize("scheme", WEIGHTS.values(), ids=WEIGHTS.keys())


def _weight(rows: int = 24, cols: int = 330) -> torch.Tensor:
    weight = torch.randn(rows, cols)
    weight[::3] *= 0.02
    weight[:, ::41] *= 4
    return weight


def _element_errors(weight: torch.Tensor, qparams: QParams, scheme: WeightScheme, norm: float) -> torch.Tensor:
    """Error of every element of the granularity (two-level: of every row), from the stored weight."""
    error = (dequantize(quantize_weight(weight, scheme, qparams)).double() - weight.double()).abs() ** norm
    if isinstance(scheme.granularity, PerTensor):
        return error.sum().reshape(1)
    if not isinstance(scheme.granularity, PerGroup):
        return error.sum(dim=1)
    return torch.stack([part.sum(dim=1) for part in error.split(scheme.granularity.group_size, dim=1)], dim=1)


def _search(weight: torch.Tensor, scheme: WeightScheme, **options: float) -> QParams:
    observer = MSEObserver(scheme, **options)  # type: ignore[arg-type]
    observer.update(weight)
    return observer.qparams()


@every_weight
@pytest.mark.parametrize("norm", [2.0, 2.4, 1.0])
def test_mse_never_exceeds_minmax_in_its_norm_and_beats_it_in_sum(scheme: WeightScheme, norm: float) -> None:
    weight = _weight()
    full = _element_errors(weight, choose_qparams(weight, scheme), scheme, norm)
    best = _element_errors(weight, _search(weight, scheme, norm=norm), scheme, norm)
    assert (best <= full * (1 + 1e-4)).all()
    if scheme.format is not INT8:  # at 8 bits a clip seldom pays
        assert best.sum() < full.sum() * 0.96


def test_mse_norm_2_gives_less_squared_error_than_norm_3_and_the_reverse() -> None:
    weight, scheme = _weight(), WeightScheme(INT4)
    by_norm = {norm: _search(weight, scheme, norm=norm) for norm in (2.0, 3.0)}
    for norm, other in ((2.0, 3.0), (3.0, 2.0)):
        own = _element_errors(weight, by_norm[norm], scheme, norm).sum()
        assert own < _element_errors(weight, by_norm[other], scheme, norm).sum()


@pytest.mark.parametrize("name", ["int4-channel", "int4-group128-asymmetric", "int2-channel-asymmetric"])
def test_mse_two_stages_are_close_to_a_dense_grid(name: str) -> None:
    weight, scheme = _weight(), WEIGHTS[name]
    grid = [choose_qparams(weight, scheme, ratio.item()) for ratio in torch.linspace(0.2, 1.0, 321)]
    dense = torch.stack([_element_errors(weight, qparams, scheme, 2.0) for qparams in grid]).amin(dim=0)
    found = _element_errors(weight, _search(weight, scheme), scheme, 2.0)
    assert found.sum() <= dense.sum() * 1.02
    # With ratios 0.16 apart the second stage has to find the minimum between them.
    refined = _element_errors(weight, _search(weight, scheme, num_ratios=6), scheme, 2.0)
    assert refined.sum() <= dense.sum() * 1.02


def test_mse_two_level_is_close_to_all_sixteen_group_scales() -> None:
    weight = torch.randn(16, 640) * torch.rand(16, 640).pow(-0.5)
    scheme = WeightScheme(INT4, TwoLevel())
    found = _element_errors(weight, _search(weight, scheme), scheme, 2.0)
    best = torch.full_like(found, math.inf)
    groups = weight.double().view(16, 5, 128)
    for ratio in (1.0, 0.9, 0.8, 0.7, 0.6):
        scale = (weight.abs().amax(1, keepdim=True) * ratio / 112).double()[..., None]
        errors = []
        for integer in range(1, 17):
            codes = (groups / (scale * integer)).round().clamp(-7, 7)
            errors.append((codes * scale * integer - groups).square().sum(-1))
        best = torch.minimum(best, torch.stack(errors).amin(0).sum(-1))
    assert (found <= best * 1.01).all()


@pytest.mark.parametrize(
    ("name", "measured"),
    [("int4-channel", 18.9), ("int4-group128-asymmetric", 20.4), ("two-level", 19.4), ("int8-channel", 41.7)],
)
def test_mse_snr_of_gaussian_weights_is_the_measured_one(name: str, measured: float) -> None:
    weight = torch.randn(128, 2048)
    assert_snr(weight, dequantize(quantize_weight(weight, WEIGHTS[name], _search(weight, WEIGHTS[name]))), measured)


def test_mse_two_level_is_within_a_third_of_a_decibel_of_group_scales() -> None:
    for weight in (torch.randn(128, 2048), torch.randn(128, 2048).pow(3)):
        scheme, group = WEIGHTS["two-level"], WeightScheme(INT4, PerGroup(128))
        two_level = snr_db(weight, dequantize(quantize_weight(weight, scheme, _search(weight, scheme))))
        assert two_level >= snr_db(weight, dequantize(quantize_weight(weight, group))) - 0.3
        assert two_level >= snr_db(weight, dequantize(quantize_weight(weight, group, _search(weight, group)))) - 0.3


@every_weight
def test_mse_result_does_not_depend_on_chunks(scheme: WeightScheme, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = _weight()
    whole = _search(weight, scheme)
    monkeypatch.setattr(numerics, "_CHUNK_CPU", 1000)
    parts = _search(weight, scheme)
    assert torch.equal(whole.scale, parts.scale)
    for name in ("zero_point", "group_scale"):
        a, b = getattr(whole, name), getattr(parts, name)
        assert a is b is None or torch.equal(a, b)


@every_weight
@pytest.mark.parametrize("exponent", [-80, 80])
def test_mse_result_does_not_depend_on_the_magnitude(scheme: WeightScheme, exponent: int) -> None:
    weight = _weight()
    plain, scaled = _search(weight, scheme), _search(weight * 2.0**exponent, scheme)
    assert torch.equal(scaled.scale, plain.scale * 2.0**exponent)


@every_weight
def test_mse_compute_range_is_what_the_codes_reach(scheme: WeightScheme) -> None:
    weight = _weight()
    observer = MSEObserver(scheme)
    observer.update(weight)
    low, high = observer.compute_range()
    values = dequantize(quantize_weight(weight, scheme, observer.qparams()))
    size = scheme.group_size or weight.shape[1]
    for g, part in enumerate(values.split(size, dim=1)):
        assert (part >= low[:, g, None] - 1e-5).all()
        assert (part <= high[:, g, None] + 1e-5).all()


def test_mse_leaves_float8_and_zeros_alone() -> None:
    weight = _weight()
    scheme = WeightScheme(NumberFormat.FLOAT8_E4M3)
    assert torch.equal(_search(weight, scheme).scale, choose_qparams(weight, scheme).scale)
    for scheme in WEIGHTS.values():
        qparams = _search(torch.zeros(3, 200), scheme)
        assert torch.equal(qparams.scale, choose_qparams(torch.zeros(3, 200), scheme).scale)
        assert _search(torch.zeros(0, 200), scheme).scale.shape[0] in (0, 1)


@every_weight
def test_minmax_weight_equals_choose_qparams(scheme: WeightScheme) -> None:
    weight = _weight()
    observer = MinMaxObserver(scheme)
    observer.update(weight)
    reference = choose_qparams(weight, scheme)
    found = observer.qparams()
    assert torch.equal(found.scale, reference.scale)
    assert found.zero_point is reference.zero_point is None or torch.equal(found.zero_point, reference.zero_point)
    assert found.group_scale is reference.group_scale is None or torch.equal(found.group_scale, reference.group_scale)


# --- activations ------------------------------------------------------------------------------------------------


def _batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    batches = [torch.randn(4, 9, 64, generator=generator) * scale + 0.5 for scale in (0.01, 1.0, 3.0, 0.3)]
    batches[2][0, 0, 0] = 60.0
    return batches


def _observe(observer, batches):  # type: ignore[no-untyped-def]
    for batch in batches:
        observer.update(batch)
    return observer


ACTIVATION_OBSERVERS = [MinMaxObserver, HistogramObserver, PercentileObserver]
activation_observers = pytest.mark.parametrize("observer_type", ACTIVATION_OBSERVERS)
static_schemes = pytest.mark.parametrize(
    "scheme", [STATIC, STATIC_ASYMMETRIC, STATIC_INT4, STATIC_FP8], ids=["int8", "int8-asymmetric", "int4", "fp8"]
)


@activation_observers
@static_schemes
def test_merge_and_order_give_the_same_range(observer_type, scheme: ActivationScheme) -> None:  # type: ignore[no-untyped-def]
    batches = _batches()
    together = _observe(observer_type(scheme), batches).qparams()
    backwards = _observe(observer_type(scheme), batches[::-1]).qparams()
    first, second = _observe(observer_type(scheme), batches[:1]), _observe(observer_type(scheme), batches[1:])
    from_empty = observer_type(scheme)
    for part in (second, first):  # the finer histogram last
        from_empty.merge(part)
    first.merge(second)
    first.merge(observer_type(scheme))
    for other in (backwards, first.qparams(), from_empty.qparams()):
        assert torch.equal(together.scale, other.scale)
        assert together.zero_point is other.zero_point is None or torch.equal(together.zero_point, other.zero_point)
    assert together.scale.shape == (1,)
    assert (together.zero_point is None) == scheme.symmetric


def test_minmax_activation_is_the_exact_range() -> None:
    low, high = _observe(MinMaxObserver(STATIC_ASYMMETRIC), _batches()).compute_range()
    everything = torch.cat([batch.flatten() for batch in _batches()])
    assert (low.item(), high.item()) == (everything.amin().item(), everything.amax().item())
    low, high = _observe(MinMaxObserver(STATIC_ASYMMETRIC), [torch.full((3,), 2.0)]).compute_range()
    assert (low.item(), high.item()) == (0.0, 2.0)


def test_histogram_counts_equal_a_direct_count_at_the_final_width() -> None:
    observer = _observe(HistogramObserver(STATIC, num_bins=64), _batches())
    values = torch.cat([batch.flatten() for batch in _batches()]).double()
    width = 2.0**observer._exponent
    assert 32 * width > 60 >= 16 * width
    for i, count in enumerate(observer._counts.tolist()):
        edge = (i - 32) * width
        assert count == int(((values >= edge) & (values < edge + width)).sum())


@static_schemes
def test_histogram_error_is_near_the_best_of_all_clips_and_below_minmax(scheme: ActivationScheme) -> None:
    x = torch.randn(64, 512)
    x[0, :4] = torch.tensor([30.0, -20.0, 25.0, 8.0])

    def error(qparams: QParams) -> float:
        codes, scale, zero = quantize_activation(x, scheme, qparams.scale, qparams.zero_point)
        return (dequantize_activation(codes, scale, zero) - x).square().sum().item()

    histogram, full = HistogramObserver(scheme), MinMaxObserver(scheme)
    for observer in (histogram, full):
        observer.update(x)
    found = error(histogram.qparams())
    if scheme.symmetric:
        scales = [QParams(full.qparams().scale * ratio) for ratio in torch.linspace(0.005, 1, 400)]
        assert found <= min(error(qparams) for qparams in scales) * 1.02
    assert found <= error(full.qparams()) * 1.001
    if scheme.format is INT4:
        assert found < error(full.qparams()) * 0.5


def test_histogram_asymmetric_clips_each_end_by_itself() -> None:
    x = torch.rand(200_000) * 4 - 1
    x[0] = 50.0
    low, high = _observe(HistogramObserver(STATIC_ASYMMETRIC, norm=1.0), [x]).compute_range()
    assert low.item() == pytest.approx(-1, abs=0.05)
    assert 2.9 < high.item() < 5


def test_histogram_norm_changes_the_clip() -> None:
    x = torch.randn(4096).pow(3)
    scales = [_observe(HistogramObserver(STATIC_INT4, norm=norm), [x]).qparams().scale.item() for norm in (1, 2, 4)]
    assert scales[0] < scales[1] < scales[2]


def test_percentile_range_holds_that_share() -> None:
    x = torch.randn(100_000)
    low, high = _observe(PercentileObserver(STATIC, 99.0), [x]).compute_range()
    assert high.item() == pytest.approx(x.abs().quantile(0.99).item(), abs=2e-3)
    assert low.item() == -high.item()
    x = torch.rand(100_000) ** 2 - 0.2
    low, high = _observe(PercentileObserver(STATIC_ASYMMETRIC, 90.0), [x]).compute_range()
    assert high.item() == pytest.approx(x.quantile(0.95).item(), abs=2e-3)
    assert low.item() == pytest.approx(x.quantile(0.05).item(), abs=2e-3)
    low, high = _observe(PercentileObserver(STATIC, 100.0), [x]).compute_range()
    assert (low.item(), high.item()) == (x.amin().item(), x.amax().item())


@activation_observers
def test_zeros_tiny_and_huge_values(observer_type) -> None:  # type: ignore[no-untyped-def]
    for batches in ([torch.zeros(9)], [torch.zeros(9), torch.tensor([1e-38, 1e37])], [torch.tensor([-1e-42])]):
        qparams = _observe(observer_type(STATIC), batches).qparams()
        assert qparams.scale.isfinite().all()
        assert (qparams.scale > 0).all()
    observer = _observe(observer_type(STATIC), [torch.zeros(0)])
    with pytest.raises(ModelStateError, match=f"{observer_type.__name__}: need at least one update with values"):
        observer.qparams()


@activation_observers
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_activations_are_refused(observer_type, bad: float) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ModelStateError, match="observer: need values that are finite in float32, got inf or nan"):
        observer_type(STATIC).update(torch.tensor([1.0, bad]))


def test_wrong_uses_are_refused() -> None:
    with pytest.raises(ConfigError, match="static activation ranges are per tensor"):
        MinMaxObserver(ActivationScheme(INT8, PerToken()))
    with pytest.raises(ConfigError, match="MSEObserver: for weights only"):
        MSEObserver(STATIC)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"got norm=2\.0, num_ratios=1, min_ratio=0\.2"):
        MSEObserver(WeightScheme(INT8), num_ratios=1)
    with pytest.raises(ConfigError, match="HistogramObserver: for activations only"):
        HistogramObserver(WeightScheme(INT8))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="power of two of at least 4, got 100"):
        HistogramObserver(STATIC, num_bins=100)
    with pytest.raises(ConfigError, match=r"percentile must be in \(50, 100\], got 0.99"):
        PercentileObserver(STATIC, 0.99)
    with pytest.raises(ConfigError, match="two observers of one class and scheme"):
        HistogramObserver(STATIC).merge(PercentileObserver(STATIC))
    with pytest.raises(ConfigError, match="two observers of one class and scheme"):
        MinMaxObserver(STATIC).merge(MinMaxObserver(STATIC_INT4))
    with pytest.raises(ConfigError, match="equal num_bins, got 64 and 128"):
        HistogramObserver(STATIC, 64).merge(HistogramObserver(STATIC, 128))
    observer = MSEObserver(WeightScheme(INT8))
    with pytest.raises(ModelStateError, match="MSEObserver: need at least one update"):
        observer.qparams()
    observer.update(_weight())
    with pytest.raises(ConfigError, match="it searches one weight, got a second update"):
        observer.update(_weight())
    with pytest.raises(ModelStateError, match="finite in float32"):
        _search(torch.tensor([[1.0, math.nan]]), WeightScheme(INT8))

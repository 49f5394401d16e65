"""Observers: from the values that were seen to the range, and so the qparams, that a scheme should cover.

Each observer is made for one scheme, is shown tensors with ``update`` and answers with ``qparams``. MinMaxObserver
serves weights and static activations, MSEObserver weights, HistogramObserver and PercentileObserver static
activations: these count values over any number of batches, and observers of several processes merge exactly.
:class:`ObserverConfig` names the one that a model's static inputs get.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Protocol

import torch

from diffuse_compress.errors import ConfigError, ModelStateError, nearest
from diffuse_compress.quantization.numerics import (
    FLOAT8,
    FLOAT8_MAX,
    choose_qparams,
    qparams_from_range,
    qparams_from_weight_range,
    row_chunks,
    split_groups,
    valid_columns,
    weight_range,
)
from diffuse_compress.quantization.qparams import QParams, effective_scale, expanded
from diffuse_compress.quantization.scheme import ActivationScheme, PerTensor, TwoLevel, WeightScheme

__all__ = [
    "HistogramObserver",
    "MSEObserver",
    "MinMaxObserver",
    "Observer",
    "ObserverConfig",
    "PercentileObserver",
    "weight_qparams",
]

_ROW_RATIOS = (1.0, 0.9, 0.8, 0.7, 0.6)
_GROUP_SCALE_STEPS = 8
_HISTOGRAM_RATIOS = 256
_HISTOGRAM_ROUNDS = 3
_CACHED_ELEMENTS = 1 << 16


_KINDS = ("minmax", "mse", "percentile")


@dataclass(frozen=True)
class ObserverConfig:
    """How the range of a static input follows from the values that calibration shows.

    Args:
        kind: "minmax" takes the whole range (:class:`MinMaxObserver`), "mse" the one with the least expected rounding
            error (:class:`HistogramObserver`), "percentile" clips a fixed share (:class:`PercentileObserver`).
        norm: exponent of the error that "mse" minimises; above 2, what is clipped weighs more.
        percentile: percent of the values that "percentile" keeps, in (50, 100].
    """

    kind: str = "minmax"
    norm: float = 2.4
    percentile: float = 99.99

    def __post_init__(self) -> None:
        if self.kind not in _KINDS:
            raise ConfigError(f"observer: unknown kind {self.kind!r}; {nearest(str(self.kind), _KINDS)}")
        if not self.norm > 0 or not 50 < self.percentile <= 100:
            raise ConfigError(
                f"observer: need norm > 0 and percentile in (50, 100], got norm={self.norm}, "
                f"percentile={self.percentile}."
            )

    @classmethod
    def of(cls, value: ObserverConfig | str | Mapping[str, Any]) -> ObserverConfig:
        """``value`` itself, the config of this kind, or that of a :meth:`to_dict`. Raises ConfigError for others."""
        if isinstance(value, ObserverConfig):
            return value
        if isinstance(value, str):
            return cls(value)
        if not isinstance(value, Mapping):
            raise ConfigError(
                f"observer: ObserverConfig(), its kind or its dict, got {type(value).__name__} {value!r}."
            )
        known = [field.name for field in fields(cls)]
        unknown = [name for name in value if name not in known]
        if unknown:
            raise ConfigError(f"observer: unknown field {unknown[0]!r}; {nearest(str(unknown[0]), known)}")
        return cls(**value)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return asdict(self)

    def make(self, scheme: ActivationScheme) -> Observer:
        """A new observer for inputs of this static scheme."""
        if self.kind == "minmax":
            return MinMaxObserver(scheme)
        if self.kind == "percentile":
            return PercentileObserver(scheme, self.percentile)
        return HistogramObserver(scheme, norm=self.norm)


class Observer(Protocol):
    """What observers have in common."""

    def update(self, x: torch.Tensor) -> None:
        """Take in a tensor; it is not modified."""

    def compute_range(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(low, high) fp32 of each element of the granularity, ``low <= 0 <= high``."""

    def qparams(self) -> QParams:
        """Scale and zero point for the values seen. Raises ModelStateError if there were none."""


def weight_qparams(weight: torch.Tensor, scheme: WeightScheme, observer: str = "mse", **options: Any) -> QParams:
    """Scale and zero point of a weight within the range that an observer chooses.

    Args:
        weight: [N, K] floating point; not modified.
        scheme: of the weight.
        observer: "mse" (:class:`MSEObserver`) or "minmax" (:class:`MinMaxObserver`).
        options: of :class:`MSEObserver`.

    Raises:
        ModelStateError: the weight holds inf or nan.
    """
    found: Observer = MSEObserver(scheme, **options) if observer == "mse" else MinMaxObserver(scheme)
    found.update(weight)
    return found.qparams()


class MinMaxObserver:
    """The full range of the values seen, per element of the granularity.

    Args:
        scheme: a weight's, or a static (per-tensor) activation's.
    """

    def __init__(self, scheme: WeightScheme | ActivationScheme) -> None:
        _check_static(scheme)
        self.scheme = scheme
        self._range: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(self, x: torch.Tensor) -> None:
        """Widen the range by ``x``: a weight [N, K] or an input of any shape. Raises ModelStateError on inf or nan."""
        if isinstance(self.scheme, WeightScheme):
            low, high = weight_range(x, self.scheme)
        elif x.numel() == 0:
            return
        else:
            low = x.detach().amin().float().clamp(max=0).reshape(1)
            high = x.detach().amax().float().clamp(min=0).reshape(1)
        _check_finite(low, high)
        self._widen(low, high)

    def merge(self, other: MinMaxObserver) -> None:
        """Take in everything ``other`` has seen."""
        _check_same(self, other)
        if other._range is not None:
            self._widen(*other._range)

    def compute_range(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(low, high) in fp32, of the shape of the scale (two-level weights: per group)."""
        if self._range is None:
            raise _nothing_seen(self)
        return self._range

    def qparams(self) -> QParams:
        """Qparams that clip nothing."""
        if isinstance(self.scheme, WeightScheme):
            return qparams_from_weight_range(*self.compute_range(), self.scheme)
        return qparams_from_range(*self.compute_range(), self.scheme)

    def _widen(self, low: torch.Tensor, high: torch.Tensor) -> None:
        if self._range is not None:
            low, high = torch.minimum(self._range[0], low), torch.maximum(self._range[1], high)
        self._range = low, high


class MSEObserver:
    """The clipped range of a weight that minimises the quantization error ``sum |w - dequantize(quantize(w))|**norm``.

    Each element of the granularity is searched on its own: its range is multiplied by ratios from 1 down to
    ``min_ratio``, then by ratios four times as dense around the best one. Ratio 1 is among them, so the error never
    exceeds that of MinMaxObserver. For two-level scales the row's range is multiplied by 1.0, 0.9, ..., 0.6 and every
    group tries its integer scale and the seven below. float8 ranges are not clipped: the format's relative precision
    does not depend on the scale.

    Source: the grid search over clipping ratios is common practice (e.g. LLMC, Gong et al. 2024, arXiv 2405.06001,
    with norm 2.4 and 80 ratios); differs: two stages instead of one dense grid, squared error by default.

    Args:
        scheme: the weight's.
        norm: exponent of the error. 2.0 minimises the noise power (the highest SNR); larger ones, such as 2.4, weigh
            clipped outliers more.
        num_ratios: ratios of the first stage.
        min_ratio: smallest of them, in (0, 1).

    Cost:
        ``num_ratios + 6`` (two-level: 40) passes over the weight; extra memory 64 MiB at most besides the result.
    """

    def __init__(self, scheme: WeightScheme, norm: float = 2.0, num_ratios: int = 20, min_ratio: float = 0.2) -> None:
        if not isinstance(scheme, WeightScheme):
            raise ConfigError("MSEObserver: for weights only. Use HistogramObserver for activations.")
        if norm <= 0 or num_ratios < 2 or not 0 < min_ratio < 1:
            raise ConfigError(
                "MSEObserver: need norm > 0, num_ratios >= 2 and 0 < min_ratio < 1, "
                f"got norm={norm}, num_ratios={num_ratios}, min_ratio={min_ratio}."
            )
        self.scheme = scheme
        self.norm = norm
        self.num_ratios = num_ratios
        self.min_ratio = min_ratio
        self._weight: torch.Tensor | None = None

    def update(self, x: torch.Tensor) -> None:
        """Take the weight [N, K]; it is kept by reference. Raises ConfigError the second time."""
        if self._weight is not None:
            raise ConfigError("MSEObserver: it searches one weight, got a second update. Make one observer each.")
        self._weight = x.detach()

    def compute_range(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(low, high) that the codes of the best qparams reach, per element (two-level weights: per group)."""
        qparams = expanded(self.qparams(), self.scheme)
        step = effective_scale(qparams)
        low, high = self.scheme.range if self.scheme.format.is_integer else (-FLOAT8_MAX, FLOAT8_MAX)
        zero_point = 0.0 if qparams.zero_point is None else qparams.zero_point.float()
        if self.scheme.additive_zero_point:
            return step * low + zero_point, step * high + zero_point
        return step * (low - zero_point), step * (high - zero_point)

    def qparams(self) -> QParams:
        """The best qparams found."""
        if self._weight is None:
            raise _nothing_seen(self)
        weight, scheme = self._weight, self.scheme
        full = choose_qparams(weight, scheme)
        if not scheme.format.is_integer or weight.numel() == 0 or weight.is_meta:
            return full
        if isinstance(scheme.granularity, PerTensor):
            return self._search(weight)
        if scheme.transposed is not None:
            turned = MSEObserver(scheme.transposed, self.norm, self.num_ratios, self.min_ratio)
            turned.update(weight.t())
            return turned.qparams()
        search = self._search_two_level if isinstance(scheme.granularity, TwoLevel) else self._search
        parts = [search(weight[rows]) for rows in row_chunks(weight)]
        return QParams(
            torch.cat([part.scale for part in parts]),
            _cat_optional([part.zero_point for part in parts]),
            _cat_optional([part.group_scale for part in parts]),
        )

    def _search(self, weight: torch.Tensor) -> QParams:
        low, high = weight_range(weight, self.scheme)
        unit = qparams_from_range(low, high, self.scheme).scale

        def error(ratio: torch.Tensor) -> torch.Tensor:
            return self._error(weight, qparams_from_range(low * ratio, high * ratio, self.scheme), unit)

        best_ratio = torch.ones_like(low)
        best_error = error(best_ratio)
        step = (1 - self.min_ratio) / (self.num_ratios - 1)
        for i in range(1, self.num_ratios):
            _keep_better(best_ratio, best_error, torch.full_like(low, 1 - i * step), error)
        coarse = best_ratio.clone()
        for i in (-3, -2, -1, 1, 2, 3):
            _keep_better(best_ratio, best_error, (coarse + i * step / 4).clamp_(max=1), error)
        return qparams_from_weight_range(low * best_ratio, high * best_ratio, self.scheme)

    def _search_two_level(self, weight: torch.Tensor) -> QParams:
        low, high = weight_range(weight, self.scheme)
        unit = qparams_from_weight_range(low, high, self.scheme).scale
        best: QParams | None = None
        best_row_error = low.new_zeros(())
        for ratio in _ROW_RATIOS:
            qparams = qparams_from_weight_range(low, high, self.scheme, ratio)
            assert qparams.group_scale is not None
            first = qparams.group_scale.float()
            group_scale = first.clone()
            scale = qparams.scale

            def error(candidate: torch.Tensor, scale: torch.Tensor = scale) -> torch.Tensor:
                return self._error(weight, QParams(scale * candidate), unit)

            group_error = error(group_scale)
            for i in range(1, _GROUP_SCALE_STEPS):
                _keep_better(group_scale, group_error, (first - i).clamp_(min=1), error)
            row_error = group_error.sum(dim=1, keepdim=True)
            if best is None or best.group_scale is None:
                best, best_row_error = QParams(scale, None, group_scale.to(torch.int8)), row_error
                continue
            better = row_error < best_row_error
            best_row_error = torch.where(better, row_error, best_row_error)
            best = QParams(
                torch.where(better, scale, best.scale),
                None,
                torch.where(better, group_scale.to(torch.int8), best.group_scale),
            )
        assert best is not None
        return best

    def _error(self, weight: torch.Tensor, qparams: QParams, unit: torch.Tensor) -> torch.Tensor:
        """fp32 error of each element, of the shape of ``qparams.scale``; with ``unit`` as unit nothing overflows."""
        if isinstance(self.scheme.granularity, PerTensor):
            chunks = [self._chunk_error(weight[rows], qparams, unit) for rows in row_chunks(weight)]
            return torch.stack(chunks).double().sum(dim=0).float()
        return self._chunk_error(weight, qparams, unit)

    def _chunk_error(self, weight: torch.Tensor, qparams: QParams, unit: torch.Tensor) -> torch.Tensor:
        scale = qparams.scale.unsqueeze(-1)
        steps = torch.div(split_groups(weight, self.scheme), scale).float()
        if qparams.zero_point is not None:
            zero_point = qparams.zero_point.unsqueeze(-1)
            steps.sub_(zero_point / scale) if self.scheme.additive_zero_point else steps.add_(zero_point)
        error = steps.round().clamp_(*self.scheme.range).sub_(steps)
        error = error.square_() if self.norm == 2 else error.abs_().pow_(self.norm)
        valid = valid_columns(weight, self.scheme) if self.scheme.stores_float_zero_point else None
        if valid is not None:
            error.mul_(valid)
        return error.sum(dim=-1).mul_((qparams.scale / unit).pow(self.norm))


class HistogramObserver:
    """The range of a static activation that minimises the expected quantization error of the values seen.

    Values are counted in ``num_bins`` bins, symmetric about 0, whose width is a power of two that doubles when larger
    values come: adjacent bins are added up, so that counts are exact and neither the order of the batches nor merging
    changes the result. The search multiplies the observed range by 256 ratios from 1 to 2**-10, then for asymmetric
    schemes each end by itself, three times in turn, and takes the smallest
    ``sum count * |center - fake_quantize(center)|**norm``.

    Source: common practice; the threshold search by squared error resembles torch.ao's HistogramObserver; differs:
    exact power-of-two bins instead of interpolated ones.

    Args:
        scheme: static activation.
        num_bins: power of two; the largest value seen lies in the outer half of the bins of its side.
        norm: exponent of the error.
    """

    def __init__(self, scheme: ActivationScheme, num_bins: int = 8192, norm: float = 2.0) -> None:
        _check_static(scheme)
        if isinstance(scheme, WeightScheme):
            raise ConfigError(f"{type(self).__name__}: for activations only. Use MSEObserver for weights.")
        if num_bins < 4 or num_bins & (num_bins - 1):
            raise ConfigError(f"{type(self).__name__}: num_bins must be a power of two of at least 4, got {num_bins}.")
        self.scheme = scheme
        self.num_bins = num_bins
        self.norm = norm
        self.low = 0.0
        self.high = 0.0
        self._exponent = 0
        self._counts: torch.Tensor | None = None

    def update(self, x: torch.Tensor) -> None:
        """Count the values of ``x``, of any shape. Raises ModelStateError on inf or nan."""
        if x.numel() == 0:
            return
        x = x.detach().float().flatten()
        low, high = float(x.amin()), float(x.amax())
        if not (math.isfinite(low) and math.isfinite(high)):
            raise _not_finite()
        half = self.num_bins // 2
        # frexp: value < 2**exponent, the smallest such. The floor keeps x * 2**-exponent inside float32.
        exponent = max(math.frexp(max(high, -low) / half)[1], -100)
        if self._counts is not None:
            exponent = max(exponent, self._exponent)
        index = (x * 2.0**-exponent).floor_().to(torch.int64).add_(half).clamp_(0, self.num_bins - 1)
        self._add(torch.bincount(index, minlength=self.num_bins).cpu(), exponent, low, high)

    def merge(self, other: HistogramObserver) -> None:
        """Take in everything ``other`` has seen; equal to having seen both streams in one observer."""
        _check_same(self, other)
        if other.num_bins != self.num_bins:
            raise ConfigError(f"merge: need equal num_bins, got {self.num_bins} and {other.num_bins}.")
        if other._counts is not None:
            self._add(other._counts, other._exponent, other.low, other.high)

    def compute_range(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(low, high), fp32 [1]."""
        self._seen()
        low, high = torch.tensor(self.low), torch.tensor(self.high)
        ratios = 2.0 ** -torch.linspace(0, 10, _HISTOGRAM_RATIOS)
        best = ratios[self._error(low * ratios, high * ratios).argmin()]
        low, high = low * best, high * best
        for _ in range(0 if self.scheme.symmetric else _HISTOGRAM_ROUNDS):
            ends = ratios * self.low
            low = ends[self._error(ends, high.expand_as(ends)).argmin()]
            ends = ratios * self.high
            high = ends[self._error(low.expand_as(ends), ends).argmin()]
        return low.reshape(1), high.reshape(1)

    def qparams(self) -> QParams:
        """Qparams of :meth:`compute_range`; scale and zero_point [1] on the CPU."""
        return qparams_from_range(*self.compute_range(), self.scheme)

    def _seen(self) -> torch.Tensor:
        if self._counts is None:
            raise _nothing_seen(self)
        return self._counts

    def _centers(self) -> torch.Tensor:
        half = self.num_bins // 2
        return (torch.arange(-half, half, dtype=torch.float64) + 0.5) * 2.0**self._exponent

    def _add(self, counts: torch.Tensor, exponent: int, low: float, high: float) -> None:
        self.low, self.high = min(self.low, low), max(self.high, high)
        if self._counts is None:
            self._counts, self._exponent = counts, exponent
            return
        common = max(exponent, self._exponent)
        self._counts = _rebin(self._counts, common - self._exponent) + _rebin(counts, common - exponent)
        self._exponent = common

    def _error(self, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
        """Expected error of ranges [C], each over all bins."""
        counts, centers = self._seen(), self._centers()
        centers, counts = centers[counts > 0], counts[counts > 0].double()
        # A few ranges at a time: what stands between stays in the cache.
        few = max(1, _CACHED_ELEMENTS // max(1, centers.numel()))
        parts = zip(low.split(few), high.split(few), strict=True)
        return torch.cat(
            [self._expected_error(qparams_from_range(*part, self.scheme), centers, counts) for part in parts]
        )

    def _expected_error(self, qparams: QParams, centers: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        scale = qparams.scale.double().unsqueeze(-1)
        steps = centers / scale
        fmt = self.scheme.format
        if fmt.is_integer:
            zero_point = 0.0 if qparams.zero_point is None else qparams.zero_point.double().unsqueeze(-1)
            bottom = -fmt.qmax if self.scheme.symmetric else fmt.qmin
            values = (steps.round() + zero_point).clamp_(bottom, fmt.qmax) - zero_point
        else:
            values = steps.float().clamp_(-FLOAT8_MAX, FLOAT8_MAX).to(FLOAT8).double()
        return ((values * scale - centers).abs_().pow_(self.norm) * counts).sum(dim=-1)


class PercentileObserver(HistogramObserver):
    """The range that holds ``percentile`` percent of the values seen; the rest, half on either side, is clipped.

    Symmetric schemes take the percentile of the magnitudes. It is read from the histogram of HistogramObserver, so
    its resolution is one bin.

    Args:
        scheme: static activation.
        percentile: in (50, 100]; 100 keeps everything.
        num_bins: as in HistogramObserver.
    """

    def __init__(self, scheme: ActivationScheme, percentile: float = 99.99, num_bins: int = 8192) -> None:
        super().__init__(scheme, num_bins=num_bins)
        if not 50 < percentile <= 100:
            raise ConfigError(f"PercentileObserver: percentile must be in (50, 100], got {percentile}.")
        self.percentile = percentile

    def compute_range(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(low, high), fp32 [1]; the outer edge of the bin in which the percentile falls."""
        counts = self._seen()
        half, width = self.num_bins // 2, 2.0**self._exponent
        share = self.percentile / 100
        if self.scheme.symmetric:
            magnitudes = counts[half:] + counts[:half].flip(0)
            edge = (_first_reaching(magnitudes, share) + 1) * width
            low, high = max(self.low, -edge), min(self.high, edge)
        else:
            tail = (1 - share) / 2
            high = min(self.high, max(0.0, (_first_reaching(counts, 1 - tail) + 1 - half) * width))
            low = max(self.low, min(0.0, -(_first_reaching(counts.flip(0), 1 - tail) + 1 - half) * width))
        return torch.tensor([low], dtype=torch.float32), torch.tensor([high], dtype=torch.float32)


def _keep_better(best: torch.Tensor, best_error: torch.Tensor, candidate: torch.Tensor, error: _ErrorOf) -> None:
    """Replace, in place, the elements of ``best`` whose candidate has the smaller error; ties keep the older."""
    new_error = error(candidate)
    better = new_error < best_error
    best.copy_(torch.where(better, candidate, best))
    best_error.copy_(torch.where(better, new_error, best_error))


class _ErrorOf(Protocol):
    def __call__(self, candidate: torch.Tensor, /) -> torch.Tensor: ...


def _cat_optional(parts: list[torch.Tensor | None]) -> torch.Tensor | None:
    present = [part for part in parts if part is not None]
    return torch.cat(present) if present else None


def _rebin(counts: torch.Tensor, doublings: int) -> torch.Tensor:
    """Counts in bins ``2**doublings`` times as wide, still symmetric about 0."""
    if doublings == 0:
        return counts
    half = counts.numel() // 2
    factor = min(2**doublings, half)
    merged = counts.reshape(-1, factor).sum(dim=1)
    padding = half - merged.numel() // 2
    return torch.nn.functional.pad(merged, (padding, padding))


def _first_reaching(counts: torch.Tensor, share: float) -> int:
    """Index of the first bin at which the running sum reaches ``share`` of all counts."""
    running = counts.cumsum(0)
    return int((running < share * float(running[-1])).sum())


def _check_static(scheme: WeightScheme | ActivationScheme) -> None:
    if isinstance(scheme, ActivationScheme) and not isinstance(scheme.granularity, PerTensor):
        raise ConfigError("observer: static activation ranges are per tensor; use granularity=PerTensor().")


def _check_same(observer: MinMaxObserver | HistogramObserver, other: MinMaxObserver | HistogramObserver) -> None:
    if type(observer) is not type(other) or observer.scheme != other.scheme:
        raise ConfigError(f"merge: need two observers of one class and scheme, got {observer!r} and {other!r}.")


def _check_finite(low: torch.Tensor, high: torch.Tensor) -> None:
    if not low.is_meta and not bool((low.isfinite() & high.isfinite()).all()):
        raise _not_finite()


def _not_finite() -> ModelStateError:
    return ModelStateError(
        "observer: need values that are finite in float32, got inf or nan. Check the model's output without "
        "quantization, and its dtype: float16 overflows beyond 65504."
    )


def _nothing_seen(observer: object) -> ModelStateError:
    return ModelStateError(f"{type(observer).__name__}: need at least one update with values, got none.")

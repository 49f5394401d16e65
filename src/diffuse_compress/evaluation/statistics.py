"""Intervals for paired comparisons: the same prompts and seeds, one pipeline against another.

Every interval is two-sided. The unit that is resampled is the prompt, never the pixel.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

from diffuse_compress.errors import ConfigError

__all__ = [
    "Interval",
    "bootstrap_mean",
    "bootstrap_ratio",
    "paired_bootstrap",
    "paired_proportion_difference",
    "standard_interval",
    "wilson_interval",
]


@dataclass(frozen=True)
class Interval:
    """An estimate with its interval.

    Attributes:
        value: the plain estimate.
        low: lower end.
        high: upper end.
        count: number of pairs or trials.
    """

    value: float
    low: float
    high: float
    count: int

    def __str__(self) -> str:
        if not (math.isfinite(self.low) and math.isfinite(self.high)):
            return f"{self.value:.4g}"
        return f"{self.value:.4g} [{self.low:.4g}, {self.high:.4g}]"


def bootstrap_mean(
    values: Sequence[float] | Any, *, confidence: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> Interval:
    """Mean of independent values with a percentile bootstrap interval.

    Source: Efron & Tibshirani 1993, "An Introduction to the Bootstrap", chapter 13.

    Args:
        values: [n] finite numbers, one per prompt, n >= 2.
        confidence: of the interval.
        resamples: number of bootstrap samples.
        seed: of a NumPy generator of its own; global random states are not touched.

    Raises:
        ConfigError: fewer than two values, or one that is not finite.
    """
    data = np.asarray(values, dtype=np.float64).reshape(-1)
    if data.size < 2 or not np.isfinite(data).all():
        raise ConfigError(
            f"bootstrap_mean: need at least 2 finite values, got {data.size} with {int((~np.isfinite(data)).sum())} "
            "not finite. Clamp infinite PSNR to PSNR_CAP_DB first."
        )
    means = np.concatenate([data[drawn].mean(axis=1) for drawn in _drawn(data.size, resamples, seed)])
    low, high = _percentiles(means, confidence)
    return Interval(float(data.mean()), low, high, int(data.size))


def bootstrap_ratio(
    sums: Sequence[float] | Any,
    weights: Sequence[float] | Any,
    *,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """``sum(sums) / sum(weights)`` of independent units with a percentile bootstrap interval over the units.

    For means whose members come in groups: negative log-likelihoods by window, answers by conversation. The group is
    what is drawn, with all its members. Source as :func:`bootstrap_mean`; the ratio estimator is Cochran 1977,
    "Sampling Techniques", chapter 6.

    Args:
        sums: [n] sum of each unit's values, finite, n >= 1. Of one unit the interval is unknown (infinite).
        weights: [n] number of each unit's values, positive.
        confidence: of the interval.
        resamples: number of bootstrap samples.
        seed: of a NumPy generator of its own; global random states are not touched.

    Returns:
        The ratio; its ``count`` is the number of units.

    Raises:
        ConfigError: no units, unequal lengths, sums that are not finite, or weights that are not positive.
    """
    top, bottom = (np.asarray(values, dtype=np.float64).reshape(-1) for values in (sums, weights))
    if top.size != bottom.size or top.size == 0 or not (np.isfinite(top).all() and (bottom > 0).all()):
        raise ConfigError(
            f"bootstrap_ratio: need finite sums and positive weights of the same units, got {top.size} sums and "
            f"{bottom.size} weights."
        )
    value = float(top.sum() / bottom.sum())
    if top.size < 2:
        return Interval(value, -math.inf, math.inf, 1)
    ratios = [top[drawn].sum(axis=1) / bottom[drawn].sum(axis=1) for drawn in _drawn(top.size, resamples, seed)]
    low, high = _percentiles(np.concatenate(ratios), confidence)
    return Interval(value, low, high, int(top.size))


def _drawn(size: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Bootstrap samples as [block, size] indices; blocks bound the memory."""
    generator = np.random.default_rng(seed)
    block = max(1, 2_000_000 // size)
    for start in range(0, resamples, block):
        yield generator.integers(0, size, (min(block, resamples - start), size))


def _percentiles(values: np.ndarray, confidence: float) -> tuple[float, float]:
    tail = (1 - confidence) / 2
    low, high = np.quantile(values, [tail, 1 - tail])
    return float(low), float(high)


def paired_bootstrap(
    first: Sequence[float] | Any,
    second: Sequence[float] | Any,
    *,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """Mean of ``second - first`` with a bootstrap interval over pairs; arguments as :func:`bootstrap_mean`."""
    a, b = (np.asarray(values, dtype=np.float64).reshape(-1) for values in (first, second))
    if a.size != b.size:
        raise ConfigError(f"paired_bootstrap: need pairs, got {a.size} and {b.size} values.")
    return bootstrap_mean(b - a, confidence=confidence, resamples=resamples, seed=seed)


def standard_interval(value: float, resampled: Sequence[float] | Any, count: int, confidence: float = 0.95) -> Interval:
    """An estimate with the interval of its bootstrap standard error, ``value ± z s``.

    Source: Efron & Tibshirani 1993, chapter 13.3. For distances between sets, whose bootstrap values lie above the
    estimate (a set drawn with replacement repeats samples): their spread is right, their place is not. It says how far
    the estimate would move with other samples of the same number, and nothing of its bias at that number.

    Args:
        value: the estimate on the set itself.
        resampled: [n] estimates on resampled sets; under two, the interval is unknown (infinite).
        count: number of samples.
        confidence: of the interval.
    """
    data = np.asarray(resampled, dtype=np.float64).reshape(-1)
    half = NormalDist().inv_cdf(0.5 + confidence / 2) * float(data.std(ddof=1)) if data.size > 1 else math.inf
    return Interval(value, value - half, value + half, count)


def wilson_interval(successes: int, count: int, confidence: float = 0.95) -> Interval:
    """A proportion with its score interval.

    Source: Wilson 1927 (JASA 22(158)). Inside [0, 1] and of sensible width at 0 and at ``count`` successes.

    Raises:
        ConfigError: not 0 <= successes <= count with count >= 1.
    """
    if not (count >= 1 and 0 <= successes <= count):
        raise ConfigError(f"wilson_interval: need 0 <= successes <= count and count >= 1, got {successes} of {count}.")
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    share = successes / count
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return Interval(share, max(0.0, centre - half), min(1.0, centre + half), count)


def paired_proportion_difference(
    first: Sequence[bool] | Any, second: Sequence[bool] | Any, confidence: float = 0.95
) -> Interval:
    """Difference of two proportions on the same items, ``mean(second) - mean(first)``, from the discordant pairs.

    Source: Bonett & Price 2012 (J. Educational and Behavioral Statistics 37(4)): the Wald interval after one
    discordant pair was added to either side, so that it has width even when no pair disagrees; the estimate itself
    is not adjusted.

    Args:
        first: [n] booleans, e.g. whether the dense pipeline's picture is named right.
        second: [n] booleans on the same items.
        confidence: of the interval.

    Raises:
        ConfigError: lengths differ, or there is nothing to compare.
    """
    a, b = (np.asarray(values, dtype=bool).reshape(-1) for values in (first, second))
    if a.size != b.size or a.size == 0:
        raise ConfigError(f"paired_proportion_difference: need pairs, got {a.size} and {b.size} values.")
    gained, lost, count = int((~a & b).sum()), int((a & ~b).sum()), int(a.size)
    p_gained, p_lost = (gained + 1) / (count + 2), (lost + 1) / (count + 2)
    centre = p_gained - p_lost
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    half = z * math.sqrt((p_gained + p_lost - centre * centre) / (count + 2))
    return Interval((gained - lost) / count, max(-1.0, centre - half), min(1.0, centre + half), count)

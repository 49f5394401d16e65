"""Intervals: closed forms, coverage on synthetic data, refusals."""

from __future__ import annotations

import numpy as np
import pytest

from diffuse_compress.errors import ConfigError
from diffuse_compress.evaluation.statistics import (
    bootstrap_mean,
    paired_bootstrap,
    paired_proportion_difference,
    wilson_interval,
)

RUNS = 400
# 95 % of 400 runs hold the truth; three standard deviations of that share are 3.3 points.
LOWEST, HIGHEST = 0.91, 0.99


def test_bootstrap_mean_covers_the_truth_of_skewed_data() -> None:
    generator = np.random.default_rng(1)
    covered = 0
    for run in range(RUNS):
        interval = bootstrap_mean(generator.gamma(4.0, 0.5, 200), resamples=400, seed=run)
        covered += interval.low <= 2.0 <= interval.high
    assert LOWEST <= covered / RUNS <= HIGHEST


def test_paired_bootstrap_is_narrower_than_unpaired_on_correlated_data() -> None:
    generator = np.random.default_rng(2)
    prompt = generator.normal(30, 5, 256)
    first, second = prompt + generator.normal(0, 0.3, 256), prompt + 0.2 + generator.normal(0, 0.3, 256)
    paired = paired_bootstrap(first, second)
    alone = bootstrap_mean(second)
    assert paired.value == pytest.approx((second - first).mean())
    assert paired.low < 0.2 < paired.high
    assert paired.high - paired.low < 0.2 * (alone.high - alone.low)


def test_bootstrap_is_seeded_and_leaves_numpy_alone() -> None:
    values = np.arange(50.0)
    before = np.random.get_state()[1].copy()
    assert bootstrap_mean(values, seed=3) == bootstrap_mean(values, seed=3)
    assert bootstrap_mean(values, seed=3) != bootstrap_mean(values, seed=4)
    assert (np.random.get_state()[1] == before).all()
    assert bootstrap_mean(values, confidence=0.5).high < bootstrap_mean(values).high


@pytest.mark.parametrize(
    ("successes", "count", "low", "high"),
    # Closed form evaluated by hand: (p + z2/2n +- z sqrt(p q / n + z2/4n2)) / (1 + z2/n).
    [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (5, 10, 0.2366, 0.7634), (81, 263, 0.2553, 0.3662)],
)
def test_wilson_interval_known_values(successes: int, count: int, low: float, high: float) -> None:
    interval = wilson_interval(successes, count)
    assert (interval.low, interval.high) == pytest.approx((low, high), abs=1e-4)
    assert interval.value == successes / count


def test_wilson_interval_covers_the_truth() -> None:
    generator = np.random.default_rng(3)
    draws = generator.binomial(256, 0.9, RUNS)
    covered = sum(wilson_interval(int(k), 256).low <= 0.9 <= wilson_interval(int(k), 256).high for k in draws)
    assert LOWEST <= covered / RUNS <= HIGHEST


def test_paired_proportion_difference_covers_the_truth() -> None:
    generator = np.random.default_rng(4)
    covered = 0
    for _ in range(RUNS):
        kind = generator.choice(4, 256, p=[0.8, 0.08, 0.03, 0.09])  # both, lost, gained, neither
        interval = paired_proportion_difference(kind <= 1, (kind == 0) | (kind == 2))
        covered += interval.low <= -0.05 <= interval.high
    assert LOWEST <= covered / RUNS <= HIGHEST


def test_paired_proportion_difference_has_width_without_disagreement() -> None:
    same = np.array([True] * 250 + [False] * 6)
    interval = paired_proportion_difference(same, same)
    assert interval.value == 0
    assert interval.low < 0 < interval.high
    assert interval.high < 0.02


def test_intervals_refuse_what_is_not_data() -> None:
    with pytest.raises(ConfigError, match="Clamp infinite PSNR"):
        bootstrap_mean([1.0, float("inf")])
    with pytest.raises(ConfigError, match="need pairs, got 2 and 3"):
        paired_bootstrap([1, 2], [1, 2, 3])
    with pytest.raises(ConfigError, match="got 3 of 2"):
        wilson_interval(3, 2)
    with pytest.raises(ConfigError, match="need pairs, got 0 and 0"):
        paired_proportion_difference([], [])

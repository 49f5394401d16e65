"""KID, CMMD, precision and recall, and the Inception Score against slow, obvious references."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from diffuse_compress.errors import ConfigError
from diffuse_compress.evaluation import discrepancy
from diffuse_compress.evaluation.discrepancy import (
    cmmd,
    inception_score,
    kernel_distance,
    kernel_distance_subsets,
    precision_recall,
)


def normal(count: int, dims: int, seed: int, shift: float = 0.0) -> torch.Tensor:
    return torch.randn(count, dims, generator=torch.Generator().manual_seed(seed)) + shift


def naive_kernel_distance(x: torch.Tensor, y: torch.Tensor, paired: bool = False) -> float:
    def k(a: torch.Tensor, b: torch.Tensor) -> float:
        return (float(a.double() @ b.double()) / len(a) + 1) ** 3

    n, m = len(x), len(y)
    xx = sum(k(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    yy = sum(k(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    cross = [k(x[i], y[j]) for i in range(n) for j in range(m) if not (paired and i == j)]
    return xx + yy - 2 * sum(cross) / len(cross)


@pytest.mark.parametrize("block", [7, 1 << 20])
def test_kernel_distance_is_the_double_sum(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(discrepancy, "_BLOCK_PAIRS", block)
    x, y = normal(9, 4, 0), normal(12, 4, 1, shift=0.5)
    assert kernel_distance(x, y).value == pytest.approx(naive_kernel_distance(x, y), rel=1e-10)
    y = x + 0.1 * normal(9, 4, 2)
    assert kernel_distance(x, y, paired=True).value == pytest.approx(naive_kernel_distance(x, y, True), rel=1e-10)
    assert kernel_distance(x, x, paired=True).value == pytest.approx(0, abs=1e-12)
    with pytest.raises(ConfigError, match="at least 2 samples a side, got 1 and 9"):
        kernel_distance(x[:1], x)


def test_kernel_distance_resamples_are_those_of_drawn_sets() -> None:
    x, y = normal(20, 3, 0), normal(20, 3, 1)
    found = kernel_distance(x, y, resamples=5, seed=3)
    counts = np.random.default_rng(3).multinomial(20, np.full(20, 1 / 20), size=5)
    other = np.random.default_rng(3)
    other.multinomial(20, np.full(20, 1 / 20), size=5)
    second = other.multinomial(20, np.full(20, 1 / 20), size=5)
    drawn_x, drawn_y = (
        x.repeat_interleave(torch.from_numpy(counts[4]), 0),
        y.repeat_interleave(torch.from_numpy(second[4]), 0),
    )
    assert found.resampled[4] == pytest.approx(naive_kernel_distance(drawn_x, drawn_y), rel=1e-9)


def test_kernel_distance_over_subsets_scatters_around_all_pairs() -> None:
    x, y = normal(400, 8, 0), normal(400, 8, 1, shift=0.3)
    mean, deviation = kernel_distance_subsets(x, y, subsets=40, subset_size=150)
    assert abs(mean - kernel_distance(x, y).value) < deviation
    assert kernel_distance_subsets(x, y, subsets=3, subset_size=1000)[1] < 1e-9  # no more than there are


def test_cmmd_is_the_published_formula() -> None:
    x, y = normal(30, 6, 0), 3 * normal(25, 6, 1, shift=1.0)
    unit = [side.double() / side.double().norm(dim=1, keepdim=True) for side in (x, y)]

    def mean_kernel(a: torch.Tensor, b: torch.Tensor) -> float:
        return torch.exp(-torch.cdist(a, b).square() / (2 * 10**2)).mean().item()

    expected = 1000 * (mean_kernel(unit[0], unit[0]) + mean_kernel(unit[1], unit[1]) - 2 * mean_kernel(*unit))
    assert cmmd(x, y).value == pytest.approx(expected, rel=1e-7)
    assert cmmd(x, x).value == pytest.approx(0, abs=1e-9)


def test_precision_and_recall_tell_missing_modes_from_bad_samples() -> None:
    modes = torch.cat([normal(60, 5, 0), normal(60, 5, 1, shift=20.0)])
    one_mode = normal(80, 5, 2)
    precision, recall = precision_recall(modes, one_mode)
    assert precision > 0.8
    assert 0.3 < recall <= 0.5
    precision, recall = precision_recall(modes, torch.cat([modes, normal(120, 5, 3, shift=-40.0)]))
    assert precision == 0.5
    assert recall == 1.0

    x, y = normal(12, 3, 4), normal(15, 3, 5, shift=0.8)

    def inside(points: torch.Tensor, centres: torch.Tensor) -> float:
        own = torch.cdist(centres.double(), centres.double()).sort(dim=1).values[:, 3]
        return (torch.cdist(points.double(), centres.double()) <= own).any(1).double().mean().item()

    assert precision_recall(x, y) == pytest.approx((inside(y, x), inside(x, y)))
    with pytest.raises(ConfigError, match="at least 4 samples"):
        precision_recall(x[:3], y)


def test_inception_score_of_known_distributions() -> None:
    certain = torch.eye(10).repeat(50, 1) * 1000
    assert inception_score(certain, splits=1)[0] == pytest.approx(10)
    assert inception_score(torch.zeros(200, 7))[0] == pytest.approx(1)
    logits = normal(40, 5, 0)
    p = logits.double().softmax(1)
    expected = math.exp((p * (p / p.mean(0)).log()).sum(1).mean().item())
    assert inception_score(logits, splits=1)[0] == pytest.approx(expected, rel=1e-10)

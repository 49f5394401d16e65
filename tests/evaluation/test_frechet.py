"""Fréchet distances against closed forms, against exact values of low rank, and through files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from diffuse_compress.errors import ConfigError
from diffuse_compress.evaluation.frechet import (
    GaussianStatistics,
    feature_statistics,
    frechet_distance,
    frechet_infinity,
    load_statistics,
)


def rotation(dims: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(dims, dims, dtype=torch.float64, generator=generator))[0]


def features(count: int, dims: int, seed: int, shift: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(dims, dims, generator=generator) / dims**0.5
    return torch.randn(count, dims, generator=generator) @ mix + shift


@pytest.mark.parametrize("dims", [3, 64, 512])
def test_frechet_distance_of_commuting_covariances_is_the_closed_form(dims: int) -> None:
    generator = torch.Generator().manual_seed(dims)
    one, two = (torch.rand(dims, dtype=torch.float64, generator=generator) * 5 for _ in range(2))
    one[: dims // 3] = 0  # singular
    shift = torch.randn(dims, dtype=torch.float64, generator=generator)
    q = rotation(dims, 1)
    first = GaussianStatistics(torch.zeros_like(shift), q @ one.diag() @ q.T)
    second = GaussianStatistics(shift, q @ two.diag() @ q.T)
    expected = float(shift.square().sum() + (one.sqrt() - two.sqrt()).square().sum())
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-9, abs=1e-6)
    assert frechet_distance(second, first) == pytest.approx(expected, rel=1e-9, abs=1e-6)
    assert abs(frechet_distance(first, first)) < 1e-6


@pytest.mark.parametrize(("count", "dims"), [(40, 128), (400, 64)])
def test_frechet_distance_of_samples_is_exact_at_any_rank(count: int, dims: int) -> None:
    """tr((C1 C2)^½) is the nuclear norm of the centred samples' product, which needs no covariance."""
    x, y = features(count, dims, 0), features(count, dims, 1, shift=0.3)
    centred = [side.double() - side.double().mean(0) for side in (x, y)]
    shared = torch.linalg.svdvals(centred[0] @ centred[1].T).sum() / (count - 1)
    parts = [side.square().sum() / (count - 1) for side in centred]
    shift = (x.double().mean(0) - y.double().mean(0)).square().sum()
    expected = float(shift + sum(parts) - 2 * shared)
    assert frechet_distance(feature_statistics(x), feature_statistics(y)) == pytest.approx(expected, rel=1e-10)


def test_frechet_distance_matches_the_matrix_square_root_where_that_is_sound() -> None:
    linalg = pytest.importorskip("scipy.linalg")
    first, second = (feature_statistics(features(900, 48, seed, shift=seed)) for seed in (0, 1))
    root = np.trace(np.real(linalg.sqrtm((first.covariance @ second.covariance).numpy())))
    shift = (first.mean - second.mean).square().sum()
    expected = float(shift + first.covariance.trace() + second.covariance.trace()) - 2 * root
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-9)


def test_feature_statistics_are_those_of_numpy_over_several_blocks() -> None:
    x = features(9000, 7, 3, shift=100.0)
    found = feature_statistics(x, "made up")
    assert found.count == 9000
    np.testing.assert_allclose(found.mean.numpy(), x.double().numpy().mean(0), rtol=1e-13)
    np.testing.assert_allclose(
        found.covariance.numpy(), np.cov(x.double().numpy(), rowvar=False), rtol=1e-9, atol=1e-12
    )
    assert found.sha256 == feature_statistics(x.clone(), "made up").sha256
    changed = x.clone()
    changed[17, 3] += 1e-3
    assert found.sha256 != feature_statistics(changed).sha256


def test_statistics_files_round_trip_and_hold_what_pytorch_fid_reads(tmp_path: Path) -> None:
    statistics, spatial = feature_statistics(features(50, 5, 0), "made up"), feature_statistics(features(50, 3, 1))
    path = tmp_path / "deep" / "stats.npz"
    statistics.save(path, spatial)
    with np.load(path) as file:
        assert {"mu", "sigma", "mu_s", "sigma_s"} <= set(file.files)
        np.testing.assert_array_equal(file["mu"], statistics.mean.numpy())
    again = load_statistics(path)
    assert (again.sha256, again.count, again.extractor) == (statistics.sha256, 50, "made up")
    assert load_statistics(path, spatial=True).sha256 == spatial.sha256

    np.savez(tmp_path / "theirs.npz", mu=statistics.mean.numpy(), sigma=statistics.covariance.numpy())
    theirs = load_statistics(tmp_path / "theirs.npz")
    assert theirs.count is None
    assert abs(frechet_distance(theirs, statistics)) < 1e-9


def test_statistics_of_the_wrong_kind_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "other.npz", mean=np.zeros(3))
    with pytest.raises(ConfigError, match="need the arrays mu and sigma, got mean"):
        load_statistics(tmp_path / "other.npz")
    (tmp_path / "broken.npz").write_bytes(b"PK no zip")
    with pytest.raises(ConfigError, match="not a readable"):
        load_statistics(tmp_path / "broken.npz")
    np.savez(tmp_path / "odd.npz", mu=np.zeros(3), sigma=np.zeros((2, 2)))
    with pytest.raises(ConfigError, match=r"mu \[D\] and sigma \[D, D\], got \[3\] and \[2, 2\]"):
        load_statistics(tmp_path / "odd.npz")
    with pytest.raises(ConfigError, match="N >= 2"):
        feature_statistics(torch.zeros(1, 4))
    with pytest.raises(ConfigError, match="must be finite"):
        feature_statistics(torch.tensor([[0.0, float("nan")], [1.0, 2.0]]))
    a, b = feature_statistics(features(9, 4, 0), "one"), feature_statistics(features(9, 4, 1), "other")
    with pytest.raises(ConfigError, match="of one extractor, got 'one' and 'other'"):
        frechet_distance(a, b)
    with pytest.raises(ConfigError, match="got 4 and 3 dimensions"):
        frechet_distance(a, feature_statistics(features(9, 3, 1)))


def test_frechet_infinity_takes_the_bias_out() -> None:
    """Two halves of one distribution: the distance of N samples is bias, which the extrapolation removes."""
    whole = features(60_000, 48, 5)
    reference = feature_statistics(whole[:50_000])
    samples = whole[50_000:56_000]
    plain = frechet_distance(reference, feature_statistics(samples[:600]))
    assert plain > 0.02
    assert abs(frechet_infinity(samples, reference)) < 0.1 * plain
    with pytest.raises(ConfigError, match="at least 30 samples"):
        frechet_infinity(samples[:20], reference)

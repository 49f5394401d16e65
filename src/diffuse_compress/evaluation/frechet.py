"""Fréchet distance between feature sets seen as normal distributions: statistics, files, distance, extrapolation.

All arithmetic is float64. Statistics of features depend on the features and their order alone, so that features
gathered from any number of processes in index order give the same bits.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffuse_compress.errors import ConfigError

__all__ = ["GaussianStatistics", "feature_statistics", "frechet_distance", "frechet_infinity", "load_statistics"]

_CHUNK_ROWS = 4096
INFINITY_POINTS = 15
INFINITY_SMALLEST = 5000


@dataclass(frozen=True)
class GaussianStatistics:
    """Mean and covariance of a feature set.

    Attributes:
        mean: [D] float64.
        covariance: [D, D] float64, with the divisor N - 1.
        count: N, or None where a file does not say.
        extractor: what made the features, as text; empty where a file does not say.
    """

    mean: torch.Tensor
    covariance: torch.Tensor
    count: int | None = None
    extractor: str = ""

    @property
    def sha256(self) -> str:
        """First 16 digits of the hash of the values: equal for equal bits."""
        digest = hashlib.sha256()
        for tensor in (self.mean, self.covariance):
            digest.update(np.ascontiguousarray(tensor.cpu().numpy()).tobytes())
        return digest.hexdigest()[:16]

    def save(self, path: str | Path, spatial: GaussianStatistics | None = None) -> None:
        """Write ``.npz`` with ``mu`` and ``sigma``, which pytorch-fid and clean-fid read.

        Beside them lie ``count`` and ``extractor``, and ``mu_s`` and ``sigma_s`` of ``spatial`` features, as in
        guided-diffusion's files.
        """
        arrays: dict[str, Any] = {"mu": self.mean.cpu().numpy(), "sigma": self.covariance.cpu().numpy()}
        if spatial is not None:
            arrays |= {"mu_s": spatial.mean.cpu().numpy(), "sigma_s": spatial.covariance.cpu().numpy()}
        arrays["extractor"] = np.str_(self.extractor)
        if self.count is not None:
            arrays["count"] = np.int64(self.count)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with Path(path).open("wb") as file:
            np.savez_compressed(file, **arrays)


def load_statistics(path: str | Path, *, spatial: bool = False) -> GaussianStatistics:
    """Read an ``.npz`` written by :meth:`GaussianStatistics.save`, pytorch-fid, clean-fid or guided-diffusion.

    Args:
        path: of the file.
        spatial: read ``mu_s`` and ``sigma_s``, the statistics of sFID.

    Raises:
        ConfigError: not such a file, or without the arrays.
    """
    keys = ("mu_s", "sigma_s") if spatial else ("mu", "sigma")
    try:
        with np.load(path, allow_pickle=False) as file:
            missing = [key for key in keys if key not in file.files]
            if missing:
                raise ConfigError(
                    f"{path}: statistics need the arrays {' and '.join(keys)}, got {', '.join(file.files) or 'none'}. "
                    "Write them with diffuse-compress eval fid FOLDER --save-stats FILE.npz, or with pytorch-fid."
                )
            mean, covariance = (torch.from_numpy(np.asarray(file[key], dtype=np.float64)) for key in keys)
            count = int(file["count"]) if "count" in file.files else None
            extractor = str(file["extractor"]) if "extractor" in file.files else ""
    except (OSError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path}: not a readable .npz file of statistics ({error}).") from error
    if mean.dim() != 1 or covariance.shape != (mean.numel(), mean.numel()):
        raise ConfigError(
            f"{path}: need {keys[0]} [D] and {keys[1]} [D, D], got {list(mean.shape)} and {list(covariance.shape)}."
        )
    return GaussianStatistics(mean, covariance, count, extractor)


def feature_statistics(features: torch.Tensor, extractor: str = "") -> GaussianStatistics:
    """Mean and covariance of ``features`` [N, D], any float dtype and device, N >= 2.

    Two passes in blocks of 4096 rows, in row order: no cancellation, one float64 copy of a block.

    Raises:
        ConfigError: fewer than two rows, or values that are not finite.
    """
    if features.dim() != 2 or features.shape[0] < 2:
        raise ConfigError(f"feature_statistics: need features [N, D] with N >= 2, got {list(features.shape)}.")
    count, dims = features.shape
    mean = torch.zeros(dims, dtype=torch.float64, device=features.device)
    for block in features.split(_CHUNK_ROWS):
        mean += block.double().sum(dim=0)
    mean /= count
    if not torch.isfinite(mean).all():
        raise ConfigError("feature_statistics: features must be finite, got NaN or infinity. Check the extractor.")
    covariance = torch.zeros(dims, dims, dtype=torch.float64, device=features.device)
    for block in features.split(_CHUNK_ROWS):
        centred = block.double() - mean
        covariance.addmm_(centred.T, centred)
    return GaussianStatistics(mean, covariance / (count - 1), count, extractor)


def frechet_distance(first: GaussianStatistics, second: GaussianStatistics) -> float:
    """Squared Fréchet distance ``|m1 - m2|² + tr(C1) + tr(C2) - 2 tr((C1 C2)^½)`` of two normal distributions.

    Source: Dowson & Landau 1982; as a score of pictures Heusel et al. 2017, arXiv 1706.08500, eq. 6. The trace of the
    root is the sum of the roots of the eigenvalues of the symmetric ``C1^½ C2 C1^½``, which are those of ``C1 C2``:
    real by construction, also for covariances of low rank, where a matrix square root of the product turns complex.

    Args:
        first: statistics; its device is used.
        second: of the same D.

    Raises:
        ConfigError: other D, or features of another extractor.

    Cost:
        Two symmetric eigenvalue problems and two products of D x D in float64.
    """
    if first.mean.shape != second.mean.shape:
        raise ConfigError(
            f"frechet_distance: need features of one size, got {first.mean.numel()} and {second.mean.numel()} "
            "dimensions. Take both from the same extractor and layer."
        )
    if first.extractor and second.extractor and first.extractor != second.extractor:
        raise ConfigError(
            f"frechet_distance: need features of one extractor, got {first.extractor!r} and {second.extractor!r}."
        )
    c1, c2 = first.covariance, second.covariance.to(first.covariance)
    shift = (first.mean - second.mean.to(first.mean)).square().sum()
    root = _symmetric_root(c1)
    shared = _clean(torch.linalg.eigvalsh(_symmetric(root @ c2 @ root))).sqrt().sum()
    return max(0.0, float(shift + c1.trace() + c2.trace() - 2 * shared))


def frechet_infinity(
    features: torch.Tensor, reference: GaussianStatistics, *, points: int = INFINITY_POINTS, seed: int = 0
) -> float:
    """Fréchet distance extrapolated to infinitely many samples.

    Source: Chong & Forsyth 2020, arXiv 1911.07023: distances at ``points`` numbers of samples N, evenly spaced from
    5000 to all, a line fitted over 1/N, its intercept. Differs: under 10,000 samples the smallest N is half of them;
    random subsets without the quasi-Monte-Carlo noise, which compression does not get to choose.

    Args:
        features: [N, D] of the samples.
        reference: statistics to compare with; its own bias stays.
        points: of the fit.
        seed: of the generator that draws the subsets.

    Raises:
        ConfigError: fewer than ``2 * points`` samples.
    """
    count = features.shape[0]
    if count < 2 * points:
        raise ConfigError(f"frechet_infinity: need at least {2 * points} samples, got {count}.")
    generator = np.random.default_rng(seed)
    sizes = np.linspace(min(INFINITY_SMALLEST, count // 2), count, points).astype(np.int64)
    distances = []
    for size in sizes.tolist():
        rows = torch.from_numpy(generator.permutation(count)[:size]).to(features.device)
        distances.append(frechet_distance(reference, feature_statistics(features[rows], reference.extractor)))
    slope_and_intercept = np.polyfit(1.0 / sizes, np.asarray(distances), 1)
    return float(slope_and_intercept[1])


def _symmetric(matrix: torch.Tensor) -> torch.Tensor:
    return (matrix + matrix.T) / 2


def _clean(eigenvalues: torch.Tensor) -> torch.Tensor:
    """Eigenvalues of a positive semidefinite matrix, rounding noise set to zero: the root would magnify it."""
    noise = eigenvalues.numel() * torch.finfo(torch.float64).eps * eigenvalues.abs().max().clamp_min(0)
    return torch.where(eigenvalues > noise, eigenvalues, torch.zeros_like(eigenvalues))


def _symmetric_root(covariance: torch.Tensor) -> torch.Tensor:
    values, vectors = torch.linalg.eigh(_symmetric(covariance))
    return (vectors * _clean(values).sqrt()) @ vectors.T

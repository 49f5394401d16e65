"""Distances between a reference set of pictures and the sets of one or more pipelines, ready to report.

The published names (FID, sFID, KID, CMMD) are given only to what is computed from the published weights; anything else
is named after its features. A distance to the pictures of an uncompressed pipeline is named so: FID-to-dense.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from diffuse_compress.errors import ConfigError, DiffuseCompressWarning, nearest
from diffuse_compress.evaluation.discrepancy import (
    MeanDiscrepancy,
    cmmd,
    inception_score,
    kernel_distance,
    kernel_distance_subsets,
    precision_recall,
)
from diffuse_compress.evaluation.features import FeatureExtractor, extract_features
from diffuse_compress.evaluation.frechet import (
    GaussianStatistics,
    feature_statistics,
    frechet_distance,
    frechet_infinity,
    load_statistics,
)
from diffuse_compress.evaluation.records import Metric
from diffuse_compress.evaluation.samples import PictureSet
from diffuse_compress.evaluation.statistics import Interval, standard_interval, wilson_interval
from diffuse_compress.progress import track

__all__ = ["FULL_RANK_COUNT", "METRICS", "SetScorer", "default_resamples", "save_statistics"]

FULL_RANK_COUNT = 2048
"""Under as many samples the covariance of 2048 features has no full rank, and FID is mostly its own bias."""
METRICS = ("fid", "fid_infinity", "sfid", "kid", "kid_subsets", "cmmd", "precision_recall", "is")


@dataclass
class _Side:
    """Features of one set, and statistics taken when they are first asked for."""

    name: str
    features: dict[str, torch.Tensor]
    extractor: str

    @property
    def count(self) -> int:
        return len(self.features["features"])

    @cached_property
    def statistics(self) -> GaussianStatistics:
        return feature_statistics(self.features["features"], self.extractor)

    @cached_property
    def spatial(self) -> GaussianStatistics:
        return feature_statistics(self.features["spatial"], self.extractor)


class SetScorer:
    """A reference, with which any number of sets can be compared.

    Args:
        reference: pictures, or the path of an ``.npz`` of statistics (then distances between distributions of single
            pictures, KID and the like, cannot be had).
        extractor: what makes the features.
        metrics: names of :data:`METRICS`.
        resamples: bootstrap resamples of each interval; None picks by size, 0 leaves intervals out.
        allow_unequal: compare sets of other N than the reference; recorded with the score.
        allow_other_prompts: compare runs that were asked for other pictures.
        batch_size: pictures a call of the extractor.
        workers: processes that decode pictures; None picks.
        state: accelerate's ``PartialState`` of a run on several processes.
        seed: of everything drawn here.

    Raises:
        ConfigError: unknown metrics, or such that the reference or the extractor cannot give; resamples under 0.
    """

    def __init__(
        self,
        reference: PictureSet | str | Path,
        extractor: FeatureExtractor,
        metrics: Sequence[str] = ("fid", "kid"),
        *,
        resamples: int | None = None,
        allow_unequal: bool = False,
        allow_other_prompts: bool = False,
        batch_size: int = 64,
        workers: int | None = None,
        state: Any = None,
        seed: int = 0,
    ) -> None:
        unknown = [name for name in metrics if name not in METRICS]
        if unknown or not metrics:
            raise ConfigError(f"metrics: {nearest(unknown[0] if unknown else '', METRICS)}.")
        if resamples is not None and resamples < 0:
            raise ConfigError(f"resamples: need 0 or more, got {resamples}.")
        self.extractor, self.metrics, self.seed = extractor, tuple(metrics), seed
        self._resamples, self._allow_unequal, self._allow_other = resamples, allow_unequal, allow_other_prompts
        self._extraction = {"batch_size": batch_size, "workers": workers, "state": state}
        self._quiet = state is not None and state.process_index != 0
        self._pictures = reference if isinstance(reference, PictureSet) else None
        self._path = None if isinstance(reference, PictureSet) else Path(reference)
        pairwise = [name for name in metrics if name in ("kid", "kid_subsets", "cmmd", "precision_recall")]
        if self._path is not None and pairwise:
            raise ConfigError(
                f"{self._path}: {', '.join(pairwise)} need pictures as reference, got statistics. Give the folder, or "
                "--metrics fid."
            )
        self._side: _Side | None = None

    def check(self, samples: PictureSet) -> None:
        """Refuse what cannot be compared, before anything is computed.

        Raises:
            ConfigError: other N than the reference; other prompts, classes or order.
        """
        reference = self._pictures
        count = self._file_statistics.count if reference is None else len(reference)
        if count is not None and count != len(samples) and not self._allow_unequal:
            raise ConfigError(
                f"{samples.folder}: sets must have the same N, got {len(samples)} pictures against {count} in "
                f"{self._reference_name}. Distances depend on N, so that unequal ones favour the larger set. Take "
                "--limit of both, or --allow-unequal where the protocol is such."
            )
        different = None if reference is None else reference.mismatch(samples)
        if different is not None and not self._allow_other:
            raise ConfigError(
                f"{samples.folder}: runs must be of the same prompts or classes in the same order, but {different}. "
                "Generate both with one prompt file, or give --allow-other-prompts."
            )

    def score(self, samples: PictureSet) -> list[Metric]:
        """The scores of a set, in the order of ``metrics``; on the first process of several, elsewhere none.

        Raises:
            ConfigError: see :meth:`check`; a metric that the extractor has no features for; unreadable pictures.
        """
        self.check(samples)
        frechet = {"fid", "fid_infinity", "sfid"} & set(self.metrics)
        if len(samples) < FULL_RANK_COUNT and self.extractor.is_published and frechet:
            warnings.warn(
                f"FID of {len(samples)} pictures: under N = {FULL_RANK_COUNT} it is mostly bias. Compare sets of this "
                "same N only, and look at KID or CMMD.",
                DiffuseCompressWarning,
                stacklevel=2,
            )
        if self._side is None and self._pictures is not None:
            self._side = self._extract(self._pictures)
        side = self._extract(samples)
        if self._quiet:
            return []
        paired = self._pictures is not None and self._pictures.is_paired_with(samples)
        found: list[Metric] = []
        for name in self.metrics:
            found += self._one(name, side, paired)
        return found

    def _extract(self, pictures: PictureSet) -> _Side:
        features = extract_features(pictures, self.extractor, **self._extraction)
        needed = {"sfid": "spatial", "is": "logits"}
        for name in self.metrics:
            if needed.get(name, "features") not in features:
                raise ConfigError(f"{name}: {self.extractor.name} has no {needed[name]}; leave the metric out.")
        return _Side(pictures.name, features, self.extractor.name)

    @cached_property
    def _file_statistics(self) -> GaussianStatistics:
        assert self._path is not None
        return load_statistics(self._path)

    @property
    def _reference_name(self) -> str:
        return self._path.name if self._path is not None else self._pictures.name if self._pictures is not None else ""

    def _one(self, name: str, side: _Side, paired: bool) -> list[Metric]:
        functions: dict[str, Callable[[_Side, bool], list[Metric]]] = {
            "fid": self._fid,
            "fid_infinity": self._fid_infinity,
            "sfid": self._sfid,
            "kid": self._kid,
            "kid_subsets": self._kid_subsets,
            "cmmd": self._cmmd,
            "precision_recall": self._precision_recall,
            "is": self._inception_score,
        }
        return functions[name](side, paired)

    # --- single metrics -----------------------------------------------------------------------------------------

    def _reference_statistics(self, *, spatial: bool = False) -> GaussianStatistics:
        if self._side is not None:
            return self._side.spatial if spatial else self._side.statistics
        assert self._path is not None
        found = load_statistics(self._path, spatial=True) if spatial else self._file_statistics
        device = self.extractor.device
        return GaussianStatistics(found.mean.to(device), found.covariance.to(device), found.count, found.extractor)

    def _fid(self, side: _Side, paired: bool) -> list[Metric]:
        return [self._frechet("FID", "Fréchet distance", side, "features", paired)]

    def _sfid(self, side: _Side, paired: bool) -> list[Metric]:
        return [self._frechet("sFID", "Fréchet distance of spatial features", side, "spatial", paired)]

    def _frechet(self, published: str, plain: str, side: _Side, key: str, paired: bool) -> Metric:
        reference = self._reference_statistics(spatial=key == "spatial")
        own = side.spatial if key == "spatial" else side.statistics
        value = frechet_distance(reference, own)
        first = self._side.features[key] if self._side is not None else None
        values = self._resampled_frechet(first, reference, side.features[key], paired)
        return self._metric(
            self._named(published, plain),
            _not_negative(standard_interval(value, values, side.count)),
            "Fréchet distance from eigenvalues, float64",
            reference=self._reference(reference),
            statistics_sha256=own.sha256,
        )

    def _resampled_frechet(
        self, first: torch.Tensor | None, reference: GaussianStatistics, second: torch.Tensor, paired: bool
    ) -> list[float]:
        generator = np.random.default_rng(self.seed)
        resamples = default_resamples(second) if self._resamples is None else self._resamples
        values = []
        bar = SimpleNamespace(_progress_bar_config={"disable": self._quiet or resamples < 1})
        for _ in track(range(resamples), "bootstrap", bar, None, {}):
            rows = _drawn(generator, len(second), second.device)
            one = reference
            if first is not None:
                drawn = rows if paired else _drawn(generator, len(first), first.device)
                one = feature_statistics(first[drawn], reference.extractor)
            values.append(frechet_distance(one, feature_statistics(second[rows], reference.extractor)))
        return values

    def _fid_infinity(self, side: _Side, paired: bool) -> list[Metric]:
        reference = self._reference_statistics()
        value = frechet_infinity(side.features["features"], reference, seed=self.seed)
        return [
            self._metric(
                self._named("FID∞", "Fréchet distance extrapolated to N = ∞"),
                standard_interval(value, [], side.count),
                "line over 1/N through 15 Fréchet distances, float64",
                reference=self._reference(reference),
                statistics_sha256=side.statistics.sha256,
            )
        ]

    def _kid(self, side: _Side, paired: bool) -> list[Metric]:
        text = "unbiased, all pairs" + (" but those of one prompt and seed" if paired else "")
        return [self._discrepancy("KID", "Kernel distance", kernel_distance, text, side, paired)]

    def _cmmd(self, side: _Side, paired: bool) -> list[Metric]:
        text = "Gaussian kernel, sigma 10, diagonal kept, times 1000"
        return [self._discrepancy("CMMD", "Mean discrepancy", cmmd, text, side, paired)]

    def _discrepancy(
        self,
        published: str,
        plain: str,
        function: Callable[..., MeanDiscrepancy],
        text: str,
        side: _Side,
        paired: bool,
    ) -> Metric:
        assert self._side is not None
        resamples = 100 if self._resamples is None else self._resamples
        x, y = self._side.features["features"], side.features["features"]
        found = function(x, y, resamples=resamples, paired=paired, seed=self.seed)
        return self._metric(
            self._named(published, plain),
            standard_interval(found.value, found.resampled, side.count),
            f"{text}, float64",
            reference=self._reference(self._side.statistics),
            statistics_sha256=side.statistics.sha256,
        )

    def _kid_subsets(self, side: _Side, paired: bool) -> list[Metric]:
        assert self._side is not None
        x, y = self._side.features["features"], side.features["features"]
        size = min(1000, len(x), len(y))
        mean, deviation = kernel_distance_subsets(x, y, seed=self.seed)
        return [
            self._metric(
                self._named("KID", "Kernel distance") + ", mean over subsets",
                standard_interval(mean, [], side.count),
                f"unbiased, 100 subsets of {size}, float64",
                reference=self._reference(self._side.statistics),
                statistics_sha256=side.statistics.sha256,
                details={"standard_deviation_of_subsets": deviation},
            )
        ]

    def _precision_recall(self, side: _Side, paired: bool) -> list[Metric]:
        assert self._side is not None
        x, y = self._side.features["features"], side.features["features"]
        reference = self._reference(self._side.statistics)
        values = precision_recall(x, y)
        return [
            self._metric(
                self._named(name, name),
                wilson_interval(round(value * len(points)), len(points)),
                "3 nearest neighbours, float64; interval with the manifold held fixed",
                higher_is_better=True,
                reference=reference,
                statistics_sha256=side.statistics.sha256,
            )
            for name, value, points in (("Precision", values[0], y), ("Recall", values[1], x))
        ]

    def _inception_score(self, side: _Side, paired: bool) -> list[Metric]:
        mean, deviation = inception_score(side.features["logits"], seed=self.seed)
        published = self.extractor.is_published
        return [
            self._metric(
                "Inception Score" if published else f"Exponentiated class divergence, {self.extractor.label}",
                standard_interval(mean, [], side.count),
                "10 splits after a seeded shuffle, float64",
                higher_is_better=True,
                statistics_sha256=side.statistics.sha256,
                details={"standard_deviation_of_splits": deviation},
            )
        ]

    # --- naming -------------------------------------------------------------------------------------------------

    def _named(self, published: str, plain: str) -> str:
        run = self._pictures is not None and self._pictures.samples is not None
        if self.extractor.is_published:
            return f"{published}-to-{self._reference_name}" if run else published
        to = f" to {self._reference_name}" if run else ""
        return f"{plain}{to}, {self.extractor.label}"

    def _reference(self, statistics: GaussianStatistics) -> dict[str, Any]:
        return {"name": self._reference_name, "count": statistics.count, "statistics_sha256": statistics.sha256}

    def _metric(
        self, name: str, interval: Interval, formula: str, *, higher_is_better: bool = False, **more: Any
    ) -> Metric:
        details = (
            {**more.pop("details", {}), "unequal_n_allowed": True} if self._allow_unequal else more.pop("details", {})
        )
        return Metric.from_interval(
            name,
            interval,
            f"{self.extractor.name}; {formula}",
            higher_is_better=higher_is_better,
            details=details,
            **more,
        )


def default_resamples(features: torch.Tensor) -> int:
    """Bootstrap resamples of a Fréchet distance: 100 where each takes a second at most, else 20."""
    return 100 if features.is_cuda or features.shape[1] <= 512 else 20


def save_statistics(
    pictures: PictureSet, extractor: FeatureExtractor, path: str | Path, **extraction: Any
) -> GaussianStatistics | None:
    """Write the statistics of a set as ``.npz``; pytorch-fid and clean-fid read it. Arguments as `extract_features`.

    Returns:
        The statistics; None on processes other than the first, which write nothing.
    """
    features = extract_features(pictures, extractor, **extraction)
    state = extraction.get("state")
    if state is not None and state.process_index != 0:
        return None
    statistics = feature_statistics(features["features"], extractor.name)
    spatial = feature_statistics(features["spatial"]) if "spatial" in features else None
    statistics.save(path, spatial)
    return statistics


def _not_negative(interval: Interval) -> Interval:
    low = max(0.0, interval.low) if np.isfinite(interval.low) else interval.low
    return Interval(interval.value, low, interval.high, interval.count)


def _drawn(generator: np.random.Generator, count: int, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(generator.integers(0, count, count)).to(device)


def default_metrics(extractor: FeatureExtractor, from_file: bool) -> Iterable[str]:
    """What is scored where nothing was asked for."""
    if from_file:
        return ("fid",)
    return ("cmmd",) if extractor.label.startswith("CLIP") else ("fid", "kid")

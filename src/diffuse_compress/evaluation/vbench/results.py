"""What a dimension gave, and the scores of a record that come of it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffuse_compress.evaluation.records import Metric
from diffuse_compress.evaluation.statistics import bootstrap_mean
from diffuse_compress.evaluation.vbench.dimensions import DIMENSIONS, aggregate

__all__ = ["ANY_PROMPTS", "COMPATIBLE", "DimensionResult", "metrics_of"]

COMPATIBLE = "diffuse_compress, 1 - mean |difference of neighbouring frames| / 255"
ANY_PROMPTS = "any prompts"
_RESULT_VERSION = 1


@dataclass(frozen=True)
class DimensionResult:
    """What one dimension gave.

    Attributes:
        dimension: name.
        score: as vbench returns it.
        videos: {name of the video: its own value, in the dimension's own unit}.
        implementation: "vbench 0.1.5", or the formula of what was computed without the package.
        qualifiers: what keeps the score from being VBench's own, as it is shown.
        details: versions, environment, seconds and more.
        key: hash of everything that decides about the score.
    """

    dimension: str
    score: float
    videos: Mapping[str, float]
    implementation: str
    qualifiers: tuple[str, ...] = ()
    details: Mapping[str, Any] = field(default_factory=dict)
    key: str = ""

    @property
    def is_published(self) -> bool:
        """Computed by the vbench package itself."""
        return self.implementation != COMPATIBLE

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return {"result_version": _RESULT_VERSION, **vars(self)}

    @classmethod
    def load(cls, path: Path, key: str) -> DimensionResult | None:
        """A result that was kept, if it is of this key; else None."""
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            if data.pop("result_version") != _RESULT_VERSION or data["key"] != key:
                return None
            return cls(**{**data, "qualifiers": tuple(data["qualifiers"])})
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return None


def metrics_of(results: Sequence[DimensionResult]) -> list[Metric]:
    """Scores for a record: of each dimension, and quality, semantic and total where all their dimensions are there.

    "VBench" names what the package computed; what this package computed by the same formula, and a sum that has such a
    part, is named "vbench-compatible". Intervals are of a bootstrap over prompts, where the score is the mean of its
    videos' values.
    """
    metrics = []
    for result in results:
        name = f"{_brand([result])} {result.dimension}"
        low, high = _interval(result)
        metrics.append(
            Metric(
                ", ".join([name, *result.qualifiers]),
                result.score,
                low,
                high,
                len(result.videos),
                result.implementation,
                higher_is_better=True,
                details=result.details,
            )
        )
    if any(ANY_PROMPTS in result.qualifiers for result in results):
        return metrics  # the ranges of the sums are those of the suite's prompts
    for group, value in aggregate({result.dimension: result.score for result in results}).items():
        parts = [result for result in results if group == "total" or DIMENSIONS[result.dimension].group == group]
        count = sum(len(result.videos) for result in parts)
        own = dict.fromkeys(text for result in parts for text in result.qualifiers)
        names = sorted({result.implementation for result in parts})
        metrics.append(
            Metric(
                ", ".join([f"{_brand(parts)} {group} score", *own]),
                value,
                None,
                None,
                count,
                "; ".join(names),
                higher_is_better=True,
            )
        )
    return metrics


def _brand(results: Sequence[DimensionResult]) -> str:
    return "VBench" if all(result.is_published for result in results) else "vbench-compatible"


def _interval(result: DimensionResult) -> tuple[float | None, float | None]:
    """95 % interval over prompts, where the score is the mean of the videos' values (of imaging_quality in percent)."""
    scale = 100 if result.dimension == "imaging_quality" else 1
    by_prompt: dict[str, list[float]] = {}
    for name, value in result.videos.items():
        by_prompt.setdefault(name.rpartition("-")[0], []).append(value / scale)
    means = [math.fsum(values) / len(values) for values in by_prompt.values()]
    if len(means) < 2 or not math.isclose(math.fsum(means) / len(means), result.score, rel_tol=1e-4, abs_tol=1e-6):
        return None, None
    found = bootstrap_mean(means)
    return found.low, found.high

"""The 16 dimensions of VBench: which weights they need, and how their scores become quality, semantic and total.

Source: Huang et al. 2023, arXiv 2311.17982; ranges and weights as in the repository's ``scripts/constant.py`` and
``scripts/cal_final_score.py`` at 45e79ec (2026-03-23).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from diffuse_compress.errors import ConfigError, nearest

__all__ = [
    "DIMENSIONS",
    "FLICKERING",
    "FLICKERING_SAMPLES",
    "SAMPLES",
    "Dimension",
    "aggregate",
    "resolve_dimensions",
]

FLICKERING = "temporal_flickering"
SAMPLES = 5
"""Videos of each prompt."""
FLICKERING_SAMPLES = 25
"""Of each prompt of temporal_flickering, of which the static filter keeps five at most."""
_QUALITY_SHARE, _SEMANTIC_SHARE = 4, 1


@dataclass(frozen=True)
class Dimension:
    """What is published about a dimension.

    Attributes:
        name: of vbench's module.
        group: "quality" or "semantic".
        low: score that counts as 0 in the sums.
        high: score that counts as 1.
        weight: in its group.
        weights: keys of :data:`diffuse_compress.evaluation.vbench.weights.WEIGHTS`.
        any_prompt: VBench allows it for videos of other prompts than its own.
        needs_detectron2: besides the isolated environment's lock file.
    """

    name: str
    group: str
    low: float = 0.0
    high: float = 1.0
    weight: float = 1.0
    weights: tuple[str, ...] = ()
    any_prompt: bool = False
    needs_detectron2: bool = False

    def normalised(self, score: float) -> float:
        """The score as it enters its group; not clipped, as published."""
        return (score - self.low) / (self.high - self.low)


_ALL = (
    Dimension("subject_consistency", "quality", 0.1462, weights=("dino", "dino-code"), any_prompt=True),
    Dimension("background_consistency", "quality", 0.2615, weights=("clip-b32",), any_prompt=True),
    Dimension(FLICKERING, "quality", 0.6293),
    Dimension("motion_smoothness", "quality", 0.706, 0.9975, weights=("amt",), any_prompt=True),
    Dimension("dynamic_degree", "quality", weight=0.5, weights=("raft",), any_prompt=True),
    Dimension("aesthetic_quality", "quality", weights=("clip-l14", "aesthetic"), any_prompt=True),
    Dimension("imaging_quality", "quality", weights=("musiq",), any_prompt=True),
    Dimension("object_class", "semantic", weights=("grit", "bert"), needs_detectron2=True),
    Dimension("multiple_objects", "semantic", weights=("grit", "bert"), needs_detectron2=True),
    Dimension("human_action", "semantic", weights=("umt",)),
    Dimension("color", "semantic", weights=("grit", "bert"), needs_detectron2=True),
    Dimension("spatial_relationship", "semantic", weights=("grit", "bert"), needs_detectron2=True),
    Dimension("scene", "semantic", 0.0, 0.8222, weights=("tag2text", "bert")),
    Dimension("appearance_style", "semantic", 0.0009, 0.2855, weights=("clip-b32",)),
    Dimension("temporal_style", "semantic", 0.0, 0.364, weights=("viclip", "viclip-words")),
    Dimension("overall_consistency", "semantic", 0.0, 0.364, weights=("viclip", "viclip-words")),
)
DIMENSIONS: Mapping[str, Dimension] = {dimension.name: dimension for dimension in _ALL}
"""In the order of the leaderboard."""


def resolve_dimensions(names: Sequence[str]) -> tuple[Dimension, ...]:
    """Dimensions of names and of ``quality``, ``semantic`` and ``all``, each once, in the leaderboard's order.

    Raises:
        ConfigError: a name that is none of these, or none at all.
    """
    groups = {"all": set(DIMENSIONS)}
    for group in ("quality", "semantic"):
        groups[group] = {name for name, dimension in DIMENSIONS.items() if dimension.group == group}
    wanted: set[str] = set()
    for name in names:
        if name not in DIMENSIONS and name not in groups:
            raise ConfigError(f"VBench has no dimension {name!r}: {nearest(name, [*DIMENSIONS, *groups])}.")
        wanted |= groups.get(name, {name})
    if not wanted:
        raise ConfigError("VBench: need at least one dimension, got none.")
    return tuple(dimension for name, dimension in DIMENSIONS.items() if name in wanted)


def aggregate(scores: Mapping[str, float]) -> dict[str, float]:
    """Quality, semantic and total score.

    Each group is the weighted mean of its normalised dimensions, and the total is (4 quality + semantic) / 5. The
    published script counts a missing dimension as score 0; here a sum that lacks one is left out instead.

    Args:
        scores: {dimension: score as vbench returns it}.

    Returns:
        ``quality``, ``semantic`` and ``total``, those that can be formed.
    """
    found = {}
    for group in ("quality", "semantic"):
        members = [dimension for dimension in _ALL if dimension.group == group]
        if not missing_of(group, scores):
            weighted = sum(dimension.weight * dimension.normalised(scores[dimension.name]) for dimension in members)
            found[group] = weighted / sum(dimension.weight for dimension in members)
    if len(found) == 2:
        shares = _QUALITY_SHARE + _SEMANTIC_SHARE
        found["total"] = (_QUALITY_SHARE * found["quality"] + _SEMANTIC_SHARE * found["semantic"]) / shares
    return found


def missing_of(group: str, scores: Iterable[str]) -> list[str]:
    """Dimensions of ``quality`` or ``semantic`` that ``scores`` lacks."""
    present = set(scores)
    return [name for name, dimension in DIMENSIONS.items() if dimension.group == group and name not in present]

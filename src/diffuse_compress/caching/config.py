"""How a feature cache is made and kept: the configurations of the kind "cache", and their presets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

import torch

from diffuse_compress.caching.store import Placement
from diffuse_compress.caching.units import Granularity
from diffuse_compress.errors import ConfigError, nearest

__all__ = ["CACHE_KIND", "CACHE_PRESETS", "CacheConfig", "FeatureCacheConfig", "cache_config_from_dict"]

CACHE_KIND = "cache"
MIN_STEPS = 10
"""Loops of fewer steps change too much from one to the next."""
MAX_TRAJECTORIES = 8


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """How features are kept; by itself the configuration of a cache whose schedule was given.

    Args:
        cache_dtype: of what is kept ("bfloat16"); by default that of the streams.
        cache_device: where it is kept ("cpu"); by default where it was computed.
        memory_budget: bytes that may be kept for each call of a step. Whatever saves least time for its memory is
            computed instead.
        strict: raise where less than 90 % of the schedule was achieved, instead of warning.
        embed: write the schedule into the checkpoint of a dense model, too, which then needs this package to load.

    Raises:
        ConfigError: a value that is none of these.
    """

    cache_dtype: str | torch.dtype | None = None
    cache_device: str | torch.device | None = None
    memory_budget: int | None = None
    strict: bool = False
    embed: bool = False

    kind: ClassVar[str] = CACHE_KIND
    method: ClassVar[str] = "given"

    def __post_init__(self) -> None:
        if self.cache_dtype is not None:
            name = str(self.cache_dtype).removeprefix("torch.")
            if not isinstance(getattr(torch, name, None), torch.dtype):
                raise ConfigError(
                    f"{type(self).__name__}: cache_dtype is a dtype of torch or its name, got {self.cache_dtype!r}."
                )
            object.__setattr__(self, "cache_dtype", name)
        if self.cache_device is not None:
            try:
                object.__setattr__(self, "cache_device", str(torch.device(self.cache_device)))
            except (RuntimeError, TypeError) as error:
                raise ConfigError(f"{type(self).__name__}: cache_device={self.cache_device!r}: {error}.") from error
        if self.memory_budget is not None and (not isinstance(self.memory_budget, int) or self.memory_budget < 0):
            raise ConfigError(f"{type(self).__name__}: memory_budget are bytes, got {self.memory_budget!r}.")

    @property
    def summary(self) -> str:
        """In a few words, for plans."""
        return "feature cache of a given schedule"

    @property
    def placement(self) -> Placement:
        """dtype and device of what is kept."""
        dtype = None if self.cache_dtype is None else getattr(torch, str(self.cache_dtype))
        return Placement(dtype, None if self.cache_device is None else torch.device(self.cache_device))

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form; :func:`cache_config_from_dict` reads it."""
        return {"method": self.method, **asdict(self)}


@dataclass(frozen=True)
class FeatureCacheConfig(CacheConfig):
    """A feature cache, its schedule found by the fast calibration (``calibrate.py``): a few trajectories, no gradients.

    Args:
        target_speedup: of the denoisers' part of the sampling loop: its time without a cache over that with it.
        granularity: units that are computed or reused: "block" (whole blocks) or "branch".
        num_inference_steps: to calibrate for; the pipeline's own number by default.
        guidance_scale: to calibrate with; the pipeline's own by default.
        num_trajectories: to calibrate on, at most 8.
        history: past changes that a forecast is made of; 1 copies the last one.
        longest_reuse: most steps in a row in which a unit may be reused.
        seed: of the starting noise.
        force: calibrate for fewer than 10 steps, too.

    and those of :class:`CacheConfig`.

    Raises:
        ConfigError: a value that is none of these.
    """

    target_speedup: float = 1.6
    granularity: Granularity | str = Granularity.BLOCK
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    num_trajectories: int = MAX_TRAJECTORIES
    history: int = 2
    longest_reuse: int | None = None
    seed: int = 0
    force: bool = False

    method: ClassVar[str] = "calibrated"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.target_speedup, int | float) or not self.target_speedup > 1:
            raise ConfigError(f"FeatureCacheConfig: target_speedup must be above 1, got {self.target_speedup!r}.")
        known = [member.value for member in Granularity]
        if self.granularity not in known:
            raise ConfigError(
                f"FeatureCacheConfig: granularity={self.granularity!r}; {nearest(str(self.granularity), known)}"
            )
        object.__setattr__(self, "granularity", Granularity(self.granularity).value)
        if not 1 <= self.num_trajectories <= MAX_TRAJECTORIES:
            raise ConfigError(
                f"FeatureCacheConfig: num_trajectories must be 1 to {MAX_TRAJECTORIES}, got {self.num_trajectories}."
            )
        if self.num_inference_steps is not None and self.num_inference_steps < MIN_STEPS and not self.force:
            raise too_few_steps(self.num_inference_steps)

    @property
    def summary(self) -> str:
        """In a few words, for plans."""
        return f"feature cache for {self.target_speedup:g}x, {self.granularity}s, by fast calibration"


CACHE_PRESETS: dict[str, FeatureCacheConfig] = {
    "cache-safe": FeatureCacheConfig(target_speedup=1.3),
    "cache": FeatureCacheConfig(target_speedup=1.6),
    "cache-fast": FeatureCacheConfig(target_speedup=2.2),
}
"""What the names stand for in ``compress("cache")``."""

_METHODS: dict[str, type[CacheConfig]] = {cls.method: cls for cls in (CacheConfig, FeatureCacheConfig)}


def cache_config_from_dict(data: Mapping[str, Any]) -> CacheConfig:
    """Read a ``to_dict()``. Raises ConfigError for an unknown method or field."""
    values = dict(data)
    method = values.pop("method", FeatureCacheConfig.method)
    if method not in _METHODS:
        raise ConfigError(f"feature cache: unknown method {method!r}; {nearest(str(method), list(_METHODS))}")
    cls = _METHODS[method]
    names = [field.name for field in fields(cls)]
    unknown = next((name for name in values if name not in names), None)
    if unknown is not None:
        raise ConfigError(f"{cls.__name__}: unknown field {unknown!r}; {nearest(unknown, names)}")
    return cls(**values)


def too_few_steps(steps: int) -> ConfigError:
    """The error for loops that are too short."""
    return ConfigError(
        f"cache calibration: loops of fewer than {MIN_STEPS} steps change too much from one to the next for a cache, "
        f"got {steps}. Run fewer steps instead, or pass force=True."
    )

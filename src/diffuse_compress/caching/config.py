"""How a feature cache is made and kept: the configurations of the kind "cache", and their presets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import Enum
from typing import Any, ClassVar

import torch

from diffuse_compress.caching.schedule import CachePoint
from diffuse_compress.caching.store import Placement
from diffuse_compress.caching.units import Granularity
from diffuse_compress.errors import ConfigError, known_fields, nearest

__all__ = [
    "CACHE_KIND",
    "CACHE_PRESETS",
    "CacheConfig",
    "FeatureCacheConfig",
    "HarmoniCaConfig",
    "LambdaEstimator",
    "LoopCacheConfig",
    "cache_config_from_dict",
]

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
        values = {name: value.value if isinstance(value, Enum) else value for name, value in asdict(self).items()}
        return {"method": self.method, **values}


@dataclass(frozen=True, kw_only=True)
class LoopCacheConfig(CacheConfig):
    """Base of the configurations whose schedule is found in the sampling loop of a pipeline.

    Args:
        granularity: units that are computed or reused: "model" (steps as wholes), "block" (whole blocks), "branch", or
            "level" (of UNets: all below the first resolution level as one, and blocks above it).
        num_inference_steps: of these loops; the pipeline's own number by default.
        guidance_scale: in them; the pipeline's own by default.
        seed: of the starting noise, and of whatever else is drawn.
        force: loops of fewer than 10 steps, too.

    and those of :class:`CacheConfig`.
    """

    granularity: Granularity = Granularity.BLOCK
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    seed: int = 0
    force: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        known = [member.value for member in Granularity]
        if self.granularity not in known:
            raise ConfigError(
                f"{type(self).__name__}: granularity={self.granularity!r}; {nearest(str(self.granularity), known)}"
            )
        object.__setattr__(self, "granularity", Granularity(self.granularity))
        if self.num_inference_steps is not None and self.num_inference_steps < MIN_STEPS and not self.force:
            raise too_few_steps(self.num_inference_steps)

    @property
    def call_arguments(self) -> dict[str, Any]:
        """Of the pipeline's calls, as far as they are given."""
        given = {"num_inference_steps": self.num_inference_steps, "guidance_scale": self.guidance_scale}
        return {name: value for name, value in given.items() if value is not None}


@dataclass(frozen=True)
class FeatureCacheConfig(LoopCacheConfig):
    """A feature cache, its schedule found by the fast calibration (``calibrate.py``): a few trajectories, no gradients.

    Args:
        granularity: whole steps by default ("model"); "block", "branch" or "level" look within them.
        target_speedup: of the denoisers' part of the sampling loop: its time without a cache over that with it.
        num_trajectories: to calibrate on, at most 8.
        history: past changes that a forecast is made of; 1 copies the last one.
        longest_reuse: most steps in a row in which a unit may be reused.

    and those of :class:`LoopCacheConfig`.

    Raises:
        ConfigError: a value that is none of these.
    """

    granularity: Granularity = field(default=Granularity.MODEL, kw_only=True)
    target_speedup: float = 1.6
    num_trajectories: int = MAX_TRAJECTORIES
    history: int = 2
    longest_reuse: int | None = None

    method: ClassVar[str] = "calibrated"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.target_speedup, int | float) or not self.target_speedup > 1:
            raise ConfigError(f"FeatureCacheConfig: target_speedup must be above 1, got {self.target_speedup!r}.")
        if not 1 <= self.num_trajectories <= MAX_TRAJECTORIES:
            raise ConfigError(
                f"FeatureCacheConfig: num_trajectories must be 1 to {MAX_TRAJECTORIES}, got {self.num_trajectories}."
            )
        for name, least in (("history", 1), ("longest_reuse", 1)):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, int) and value >= least):
                raise ConfigError(f"FeatureCacheConfig: {name} must be at least {least}, got {value!r}.")

    @property
    def summary(self) -> str:
        """In a few words, for plans."""
        units = "whole steps" if self.granularity is Granularity.MODEL else f"{self.granularity.value}s"
        return f"feature cache for {self.target_speedup:g}x, {units}, by fast calibration"


class LambdaEstimator(str, Enum):
    """How much the error of a step counts: by how much the picture changes.

    LEAVE_ONE_OUT, the paper's: if this step alone is computed. CUMULATIVE, its released code's: if this step is cached,
    too, after those before it. GAIN, ours: if this step alone reuses everything, divided by the error that it makes
    then, so that the error of a step is turned into that of the picture, and how much is cached already does not
    matter. NONE: all steps count alike (the loss of Learning-to-Cache).
    """

    LEAVE_ONE_OUT = "leave_one_out"
    CUMULATIVE = "cumulative"
    GAIN = "gain"
    NONE = "none"


@dataclass(frozen=True)
class HarmoniCaConfig(LoopCacheConfig):
    """A feature cache, its schedule learned by gradients (``training.py``); give either ``beta`` or ``target_speedup``.

    Source: HarmoniCa (Huang et al. 2024, arXiv 2410.01723), whose loss in step t is ``lambda_t * MSE_t + beta * sum_k
    r_tk``. Differs: the error is relative to the power of the prediction and lambda has a mean of 1, so that beta means
    the same for every model (the paper's 7e-8 holds for raw values of DiT-XL/2).

    Args:
        beta: price of a unit in one step; the larger, the more is reused.
        target_speedup: of the denoisers' part of the loop: units have a price by their time, which is raised as long as
            the loop takes too long.
        trajectories: sampling runs of each process; the paper's are about 2000.
        batch_size: items of a run.
        learning_rate: of Adam.
        threshold: scores above it compute.
        estimator: of lambda.
        refresh_every: denoising steps between two estimates of lambda.
        cache_point: "pre_gate" keeps branches before their gates, as the paper does.
        history: past changes that a forecast is made of; 1 copies the last one, as the paper does.

    and those of :class:`LoopCacheConfig`; the seed is that of the initial scores and the choice of items, too.

    Raises:
        ConfigError: a value that is none of these.
    """

    beta: float | None = None
    target_speedup: float | None = None
    trajectories: int = 2000
    batch_size: int = 1
    learning_rate: float = 0.01
    threshold: float = 0.1
    estimator: LambdaEstimator = LambdaEstimator.LEAVE_ONE_OUT
    refresh_every: int = 500
    cache_point: CachePoint = CachePoint.POST_GATE
    history: int = 2

    method: ClassVar[str] = "trained"

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.beta is None) == (self.target_speedup is None):
            raise ConfigError(
                f"router training: either beta or target_speedup is needed, got beta={self.beta} and "
                f"target_speedup={self.target_speedup}."
            )
        kinds: dict[str, type[Enum]] = {
            "estimator": LambdaEstimator,
            "cache_point": CachePoint,
        }
        for name, kind in kinds.items():
            try:
                object.__setattr__(self, name, kind(getattr(self, name)))
            except ValueError:
                known = ", ".join(repr(member.value) for member in kind)
                raise ConfigError(f"router training: {name} must be {known}, got {getattr(self, name)!r}.") from None
        if self.granularity is Granularity.MODEL:
            raise ConfigError(
                'router training: scores are of units within the model: granularity="block", "branch" or "level". '
                'Which steps to leave out as wholes is what FeatureCacheConfig(granularity="model") finds.'
            )
        if self.cache_point is CachePoint.PRE_GATE and self.granularity is not Granularity.BRANCH:
            raise ConfigError('router training: cache_point="pre_gate" is about branches: needs granularity="branch".')
        limits = {
            "beta": self.beta is None or self.beta > 0,
            "target_speedup": self.target_speedup is None or self.target_speedup > 1,
            "trajectories": self.trajectories >= 1,
            "batch_size": self.batch_size >= 1,
            "learning_rate": self.learning_rate > 0,
            "threshold": 0 < self.threshold < 1,
            "refresh_every": self.refresh_every >= 1,
            "history": self.history >= 1,
        }
        for name, holds in limits.items():
            if not holds:
                least = {"beta": "above 0", "target_speedup": "above 1", "learning_rate": "above 0"}
                wanted = "between 0 and 1" if name == "threshold" else least.get(name, "at least 1")
                raise ConfigError(f"router training: {name} must be {wanted}, got {getattr(self, name)}.")

    @property
    def summary(self) -> str:
        """In a few words, for plans."""
        aim = f"for {self.target_speedup:g}x" if self.target_speedup is not None else f"of beta {self.beta:g}"
        return f"feature cache {aim}, {self.granularity.value}s, learned on {self.trajectories} trajectories"


CACHE_PRESETS: dict[str, FeatureCacheConfig] = {
    "cache-safe": FeatureCacheConfig(target_speedup=1.3),
    "cache": FeatureCacheConfig(target_speedup=1.6),
    "cache-fast": FeatureCacheConfig(target_speedup=2.2),
}
"""What the names stand for in ``compress("cache")``."""

_METHODS: dict[str, type[CacheConfig]] = {cls.method: cls for cls in (CacheConfig, FeatureCacheConfig, HarmoniCaConfig)}


def cache_config_from_dict(data: Mapping[str, Any]) -> CacheConfig:
    """Read a ``to_dict()``. Raises ConfigError for an unknown method or field."""
    values = dict(data)
    method = values.pop("method", FeatureCacheConfig.method)
    if method not in _METHODS:
        raise ConfigError(f"feature cache: unknown method {method!r}; {nearest(str(method), list(_METHODS))}")
    cls = _METHODS[method]
    return cls(**known_fields(cls, values))


def too_few_steps(steps: int) -> ConfigError:
    """The error for loops that are too short."""
    return ConfigError(
        f"cache calibration: loops of fewer than {MIN_STEPS} steps change too much from one to the next for a cache, "
        f"got {steps}. Run fewer steps instead, or pass force=True."
    )

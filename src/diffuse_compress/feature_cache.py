"""The verbs of feature caches: turn them on and off, and save, load and publish their schedules alone, like a LoRA.

Each takes a diffusers pipeline or one of its denoisers, and is attached to their classes as a method of the same name.
``enable_cache`` and ``disable_cache`` pass diffusers' own cache configurations on to diffusers.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from diffuse_compress.api import compress
from diffuse_compress.caching.artefact import FILE_NAME, load_schedules, save_schedules, schedules_of
from diffuse_compress.caching.calibrate import CacheCalibration
from diffuse_compress.caching.config import CACHE_PRESETS, CacheConfig, LoopCacheConfig
from diffuse_compress.caching.runtime import FeatureCache, apply_cache, cache_of, caches_off, remove_cache
from diffuse_compress.caching.schedule import Schedule
from diffuse_compress.components import GROUPS, SELF, is_pipeline, model_components
from diffuse_compress.errors import ConfigError, nearest
from diffuse_compress.integrations.hub import file_of
from diffuse_compress.integrations.stock_caches import disable_stock_cache, enable_stock_cache, has_stock_cache
from diffuse_compress.plan_text import format_bytes

__all__ = [
    "CACHE_METHODS",
    "cache_disabled",
    "cache_summary",
    "disable_cache",
    "enable_cache",
    "load_cache",
    "push_cache_to_hub",
    "save_cache",
]

_Target = TypeVar("_Target")
_OFFER = 'compress("cache") calibrates one, load_cache(path or repository) loads one'


def enable_cache(target: Any, cache: Any = None, **placement: Any) -> None:
    """Let the denoisers follow a cache schedule from their next run on.

    Args:
        target: a diffusers pipeline, or a denoiser.
        cache: None for the one that is there (after ``disable_cache``); a Schedule, ``{component: Schedule}`` or what
            ``calibrate_cache`` returned; a preset's name ("cache"), a FeatureCacheConfig or a HarmoniCaConfig, which
            are made on the pipeline now; or a cache configuration of diffusers.
        placement: arguments of CacheConfig (``cache_dtype``, ``cache_device``, ``memory_budget``, ``strict``) for a
            schedule.

    Raises:
        ConfigError: there is no cache; the schedule is not of this model; or a cache of diffusers is on.
    """
    if cache is None:
        for model, found in _caches(target).values():
            found.enable(model, True)
        return
    if isinstance(cache, str) and cache not in CACHE_PRESETS:
        raise ConfigError(f"enable_cache: {nearest(cache, list(CACHE_PRESETS))}, got {cache!r}. {_OFFER}.")
    if isinstance(cache, str | LoopCacheConfig):
        denoisers = _denoisers(target)
        _require_no_stock_cache(denoisers)
        for model in denoisers.values():
            remove_cache(model)
        compress(target, cache)
        return
    if isinstance(cache, Schedule | CacheCalibration | Mapping):
        schedules = cache.schedules if isinstance(cache, CacheCalibration) else cache
        _apply(target, schedules if isinstance(schedules, Mapping) else {SELF: schedules}, CacheConfig(**placement))
        return
    for name, model in _denoisers(target).items():
        if cache_of(model) is not None:
            raise ConfigError(
                f"{name or type(model).__name__}: follows a cache schedule of this package already. "
                "disable_cache(remove=True) first."
            )
        enable_stock_cache(model, cache)


def disable_cache(target: Any, *, remove: bool = False) -> None:
    """Compute everything from the next call on; ``enable_cache()`` goes on with the same schedule.

    Args:
        target: a diffusers pipeline, or a denoiser.
        remove: take the schedule off, so that it is not saved with the model either. A cache of diffusers is always
            taken off.

    Raises:
        ConfigError: there is no cache.
    """
    denoisers = _denoisers(target)
    stock = [model for model in denoisers.values() if has_stock_cache(model)]
    for model in stock:
        disable_stock_cache(model)
    ours = {model: found for model in denoisers.values() if (found := cache_of(model)) is not None}
    if not ours and not stock:
        raise ConfigError(f"{type(target).__name__} has no feature cache; {_OFFER}.")
    for model, found in ours.items():
        if remove:
            remove_cache(model)
        else:
            found.enable(model, False)


@contextlib.contextmanager
def cache_disabled(target: Any) -> Iterator[None]:
    """Inside, everything is computed, with the schedules in place; without a cache nothing changes."""
    with caches_off(_denoisers(target).values()):
        yield


def save_cache(target: Any, path: str | os.PathLike[str]) -> Path:
    """Write the schedules of all denoisers into one file of a few kilobytes, and return its path.

    Args:
        target: a diffusers pipeline, or a denoiser.
        path: a file name ending in ``.safetensors``, or a folder for ``feature_cache.safetensors``.

    Raises:
        ConfigError: there is no cache, or what it carries is larger than 100 KB.
    """
    _caches(target)
    return save_schedules(_file(path), schedules_of(target))


def load_cache(
    target: _Target,
    source: str | os.PathLike[str],
    *,
    weight_name: str = FILE_NAME,
    subfolder: str = "",
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | None = None,
    **placement: Any,
) -> _Target:
    """Put saved schedules on the denoisers, in place of those that are there, and return ``target``.

    Args:
        target: a diffusers pipeline, or a denoiser.
        source: a file or folder of :func:`save_cache`, or a Hub repository.
        weight_name: the file's name in a folder or repository.
        subfolder: of the repository or folder.
        revision: of the repository.
        token: for it.
        cache_dir: of huggingface_hub.
        placement: arguments of CacheConfig (``cache_dtype``, ``cache_device``, ``memory_budget``, ``strict``).

    Raises:
        CheckpointError: there is no such file, or it is not one of these.
        ConfigError: the schedules are not of these models.
    """
    hub = {"revision": revision, "token": token, "cache_dir": cache_dir}
    file = file_of(source, weight_name, subfolder=subfolder, **hub)
    _apply(target, load_schedules(file), CacheConfig(**placement))
    return target


def push_cache_to_hub(
    target: Any,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    commit_message: str = "Upload feature cache",
    create_pr: bool = False,
) -> Any:
    """Upload the schedules alone, to a repository that is made if need be; returns the commit.

    Raises:
        ConfigError: there is no cache.
    """
    from huggingface_hub import HfApi

    with tempfile.TemporaryDirectory() as folder:
        file = save_cache(target, folder)
        api = HfApi(token=token)
        repo = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        return api.upload_file(
            path_or_fileobj=str(file),
            path_in_repo=FILE_NAME,
            repo_id=repo,
            commit_message=commit_message,
            create_pr=create_pr,
        )


def cache_summary(target: Any) -> str:
    """For each denoiser with a cache the picture of its schedule, the share reused, FLOPs, and the memory it took.

    Raises:
        ConfigError: there is no cache.
    """
    parts = []
    for name, (_, found) in _caches(target).items():
        state = "" if found.enabled else " (off)"
        kept = f"\nkept between calls: at most {format_bytes(found.peak_bytes)} so far" if found.peak_bytes else ""
        title = f"{name}{state}\n" if name else ""
        parts.append(f"{title}{found.schedule.summary()}{kept}")
    return "\n\n".join(parts)


CACHE_METHODS = {
    function.__name__: function
    for function in (
        enable_cache,
        disable_cache,
        cache_disabled,
        save_cache,
        load_cache,
        push_cache_to_hub,
        cache_summary,
    )
}
"""What is attached to the classes of diffusers."""


def _denoisers(target: Any) -> dict[str, nn.Module]:
    models = model_components(target)
    if not is_pipeline(target):
        return models
    found = {name: model for name, model in models.items() if GROUPS["denoisers"].match(name)}
    if not found:
        raise ConfigError(f"{type(target).__name__} has no denoiser among {', '.join(models) or 'its components'}.")
    return found


def _caches(target: Any) -> dict[str, tuple[nn.Module, FeatureCache]]:
    """Denoisers with their caches, by component name; ConfigError without any."""
    denoisers = _denoisers(target)
    found = {name: (model, cache) for name, model in denoisers.items() if (cache := cache_of(model)) is not None}
    if not found:
        raise ConfigError(f"{type(target).__name__} has no feature cache; {_OFFER}.")
    return found


def _apply(target: Any, schedules: Mapping[str, Schedule], config: CacheConfig) -> None:
    """Put each schedule on its denoiser, or all or none of them."""
    denoisers = _denoisers(target)
    _require_no_stock_cache(denoisers)
    placed = _matched(target, denoisers, schedules)
    before = {model: cache_of(model) for model in placed}
    try:
        for model, schedule in placed.items():
            remove_cache(model)
            apply_cache(model, schedule, config)
    except BaseException:
        for model, found in before.items():
            remove_cache(model)
            if found is not None:
                apply_cache(model, found.schedule, found.config).enable(model, found.enabled)
        raise


def _matched(
    target: Any, denoisers: Mapping[str, nn.Module], schedules: Mapping[str, Schedule]
) -> dict[nn.Module, Schedule]:
    """The denoiser of each schedule: by name, or the one that there is."""
    if len(schedules) == 1 and len(denoisers) == 1:
        return {next(iter(denoisers.values())): next(iter(schedules.values()))}
    if len(denoisers) == 1:  # a bare model, and a file of several denoisers: whichever fits
        model = next(iter(denoisers.values()))
        fitting = [schedule for schedule in schedules.values() if schedule.model == type(model).__name__]
        if len(fitting) == 1:
            return {model: fitting[0]}
    unknown = [name for name in schedules if name not in denoisers]
    if unknown:
        raise ConfigError(
            f"{type(target).__name__}: schedules are for {', '.join(map(repr, schedules))}, its denoisers are "
            f"{', '.join(map(repr, denoisers))}. Give them by these names: enable_cache({{name: schedule}})."
        )
    return {denoisers[name]: schedule for name, schedule in schedules.items()}


def _require_no_stock_cache(denoisers: Mapping[str, nn.Module]) -> None:
    for name, model in denoisers.items():
        if has_stock_cache(model):
            raise ConfigError(
                f"{name or type(model).__name__}: a cache of diffusers is on; two caches would skip on top of each "
                "other. disable_cache() first."
            )


def _file(path: str | os.PathLike[str]) -> Path:
    path = Path(path)
    if path.suffix == ".safetensors":
        return path
    if path.suffix and not path.is_dir():
        raise ConfigError(f"save_cache: a file ending in .safetensors or a folder, got {path.name!r}.")
    return path / FILE_NAME

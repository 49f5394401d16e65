"""The file of a pipeline's cache schedules: one safetensors file of a few kilobytes, whatever the pipeline's size."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from diffuse_compress.caching.runtime import cache_of
from diffuse_compress.caching.schedule import Schedule
from diffuse_compress.components import model_components
from diffuse_compress.errors import CheckpointError, ConfigError

__all__ = ["FILE_NAME", "load_schedules", "save_schedules", "schedules_of"]

FILE_NAME = "feature_cache.safetensors"
_METADATA_KEY = "diffuse_compress_cache"
_MAX_BYTES = 100_000


def schedules_of(target: Any) -> dict[str, Schedule]:
    """The schedules that the models of a pipeline (or a model) follow, by component name; {} if none does."""
    caches = {name: cache_of(model) for name, model in model_components(target).items()}
    return {name: cache.schedule for name, cache in caches.items() if cache is not None}


def save_schedules(path: str | Path, schedules: Mapping[str, Schedule]) -> Path:
    """Write the schedules of some denoisers.

    Args:
        path: of the file; its folder is made.
        schedules: by component name, "" for a bare model's.

    Raises:
        ConfigError: their ``details`` are so large that the file would not stay below 100 KB.
    """
    from safetensors.torch import save

    tensors: dict[str, torch.Tensor] = {}
    described = {}
    for component, schedule in schedules.items():
        own, described[component] = schedule.to_tensors()
        tensors |= {f"{component}:{name}": value.contiguous() for name, value in own.items()}
    data = save(tensors, {_METADATA_KEY: json.dumps(described)})
    if len(data) > _MAX_BYTES:
        raise ConfigError(
            f"cache schedule: at most {_MAX_BYTES} bytes, got {len(data)}. Keep less in details, or a shorter "
            "history of coefficients."
        )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def load_schedules(path: str | Path) -> dict[str, Schedule]:
    """Read a file of :func:`save_schedules`. Raises CheckpointError if it is not one."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as handle:
            described = json.loads((handle.metadata() or {})[_METADATA_KEY])
            tensors = {key: handle.get_tensor(key) for key in handle.keys()}
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise CheckpointError(f"{path}: not a cache schedule ({type(error).__name__}: {error}).") from error
    if not isinstance(described, dict):
        raise CheckpointError(f"{path}: not a cache schedule (its metadata is no table of components).")
    found: dict[str, dict[str, torch.Tensor]] = {component: {} for component in described}
    for key, value in tensors.items():
        component, _, name = key.rpartition(":")
        found.setdefault(component, {})[name] = value
    return {component: Schedule.from_tensors(found[component], described[component]) for component in described}

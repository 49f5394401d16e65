"""Carrying out the methods beside weights, once these are quantized."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffuse_compress.apply_step_scales import apply_step_scales
from diffuse_compress.apply_temporal import TemporalWork, attach_temporal
from diffuse_compress.caching.calibrate import CacheCalibration, calibrate_cache
from diffuse_compress.caching.config import FeatureCacheConfig, HarmoniCaConfig, LoopCacheConfig
from diffuse_compress.caching.runtime import apply_cache, remove_cache
from diffuse_compress.caching.training import RouterTraining, train_cache
from diffuse_compress.calibration.recording import items_of
from diffuse_compress.components import compute_dtype_of
from diffuse_compress.integrations.component import ComponentState, get_state
from diffuse_compress.integrations.doors import marks_of
from diffuse_compress.integrations.kv_cache import attach_kv_cache, detach_kv_cache
from diffuse_compress.integrations.methods import live_methods
from diffuse_compress.integrations.origin import repository_of
from diffuse_compress.integrations.quantization_config import QuantizationConfig
from diffuse_compress.logging import get_logger
from diffuse_compress.method_plan import MethodPlan
from diffuse_compress.progress import Callback
from diffuse_compress.quantization.kv_config import KVCacheConfig
from diffuse_compress.quantization.spec import QuantizationSpec
from diffuse_compress.temporal.config import TFMQConfig
from diffuse_compress.transaction import Transaction

__all__ = ["apply_methods"]

_LOGGER = get_logger(__name__)


def apply_methods(
    target: Any,
    models: Mapping[str, nn.Module],
    plans: Sequence[MethodPlan],
    temporal: Mapping[str, TemporalWork],
    calibration: Any,
    spill: Transaction,
    work_dir: str | Path | None,
    callback: Callback | None,
) -> None:
    """Put the methods on the models, in the order of the plans; ``spill`` takes them off if anything fails."""
    for plan in plans:
        if isinstance(plan.config, TFMQConfig):
            attach_temporal(models[plan.component], plan.config, temporal[plan.component], spill)
    stepped = {p.component: p.config for p in plans if isinstance(p.config, TFMQConfig) and p.config.scope is not None}
    apply_step_scales(target, models, stepped, temporal, calibration, spill, callback)
    caches: dict[LoopCacheConfig, list[str]] = {}
    for plan in plans:
        if isinstance(plan.config, LoopCacheConfig):
            caches.setdefault(plan.config, []).append(plan.component)
    for config, names in caches.items():
        result = _found_cache(target, config, names, calibration, work_dir, callback)
        _LOGGER.info("%s", result)
        for name in names:
            measured = {"measured_speedup": result.measured_speedup, "error": result.error}
            schedule = result.schedules[name]
            schedule = replace(schedule, details={**schedule.details, **measured})
            spill.on_rollback(functools.partial(remove_cache, models[name]))
            apply_cache(models[name], schedule, config)
    for plan in plans:
        if isinstance(plan.config, KVCacheConfig):
            spill.on_rollback(functools.partial(detach_kv_cache, models[plan.component]))
            attach_kv_cache(models[plan.component], plan.config)
    for name in dict.fromkeys(plan.component for plan in plans):
        _mark_dense(models[name], spill)


def _found_cache(
    pipe: Any,
    config: LoopCacheConfig,
    names: Sequence[str],
    calibration: Any,
    work_dir: str | Path | None,
    callback: Callback | None,
) -> CacheCalibration | RouterTraining:
    if isinstance(config, HarmoniCaConfig):
        items = items_of(pipe, calibration, None)
        # Gradients of the table only; compress is called without any.
        with torch.enable_grad():
            return train_cache(pipe, items, config, work_dir=work_dir, components=names, callback=callback)
    assert isinstance(config, FeatureCacheConfig)
    items = items_of(pipe, calibration, config.num_trajectories)
    return calibrate_cache(pipe, items, config, components=names, callback=callback)


def _mark_dense(model: nn.Module, spill: Transaction) -> None:
    """A dense model whose checkpoint must hold a method is marked like a compressed one."""
    if get_state(model) is not None or not any(m.is_embedded(model) for m in live_methods(model).values()):
        return
    mark, unmark = marks_of(model)
    spill.on_rollback(lambda: unmark(model))
    config = QuantizationConfig.from_spec(QuantizationSpec.dense(), compute_dtype_of(model))
    mark(model, ComponentState(config, {}, base_model=repository_of(model)))

"""Carrying out the methods beside weights: tables of the dense weights first, all else once these are quantized."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffuse_compress.caching.calibrate import CacheCalibration, calibrate_cache
from diffuse_compress.caching.config import FeatureCacheConfig, HarmoniCaConfig, LoopCacheConfig
from diffuse_compress.caching.runtime import apply_cache, remove_cache
from diffuse_compress.caching.training import RouterTraining, train_cache
from diffuse_compress.calibration.items import pipeline_arguments
from diffuse_compress.calibration.recording import Calibration
from diffuse_compress.components import compute_dtype_of, is_pipeline
from diffuse_compress.errors import ConfigError
from diffuse_compress.integrations.component import ComponentState, get_state
from diffuse_compress.integrations.doors import marks_of
from diffuse_compress.integrations.methods import live_methods
from diffuse_compress.integrations.origin import repository_of
from diffuse_compress.integrations.quantization_config import QuantizationConfig
from diffuse_compress.logging import get_logger
from diffuse_compress.method_plan import MethodPlan
from diffuse_compress.pipeline_call import CannotCallError, bundled_items, small_output
from diffuse_compress.progress import Callback
from diffuse_compress.quantization.spec import QuantizationSpec
from diffuse_compress.temporal.config import TFMQConfig, WeightPlace
from diffuse_compress.temporal.persist import load_table_state, table_state
from diffuse_compress.temporal.prepare import LoopCalls, calls_of_schedule, prepare_schedule
from diffuse_compress.temporal.table import attach_table, detach_table, table_of
from diffuse_compress.transaction import Transaction

__all__ = ["apply_methods", "put_tables_back", "rounded_bytes", "tables_of_dense_weights", "take_tables_off"]

_LOGGER = get_logger(__name__)
_ROUNDED = (WeightPlace.INT8, WeightPlace.INT4)
_BUNDLED = 64
_TableState = tuple[dict[str, torch.Tensor], dict[str, Any]]


def tables_of_dense_weights(
    target: Any, models: Mapping[str, nn.Module], plans: Iterable[MethodPlan], calibration: Any
) -> dict[str, _TableState]:
    """{component: rows of the schedules that are to be stored}; the models stay as they are."""
    configs = {plan.component: plan.config for plan in plans if isinstance(plan.config, TFMQConfig)}
    calls = _calls_of_schedules(target, models, configs, calibration)
    states = {}
    for name, config in configs.items():
        # Where weights are to be rounded or moved is no matter yet.
        table = attach_table(models[name], replace(config.table, weights=WeightPlace.DEVICE))
        try:
            for found in calls[name]:
                prepare_schedule(table, found, type(target.scheduler).__name__)
            states[name] = table_state(table)
        finally:
            detach_table(models[name])
    return states


def _calls_of_schedules(
    target: Any, models: Mapping[str, nn.Module], configs: Mapping[str, TFMQConfig], calibration: Any
) -> dict[str, list[LoopCalls]]:
    """How the components are called in the loops of the schedules that are asked for."""
    numbers = {name: (None,) if c.num_inference_steps is None else c.num_inference_steps for name, c in configs.items()}
    wanted: dict[int | None, list[str]] = {}
    for name, steps in numbers.items():
        for number in steps:
            wanted.setdefault(number, []).append(name)
    arguments = _call_of(target, calibration) if wanted else None
    found: dict[str, list[LoopCalls]] = {name: [] for name in configs}
    if arguments is None:
        return found
    for number, names in wanted.items():
        for name, own in calls_of_schedule(target, {n: models[n] for n in names}, number, arguments).items():
            found[name].append(own)
    return found


def take_tables_off(models: Mapping[str, nn.Module], spill: Transaction) -> dict[str, tuple[TFMQConfig, _TableState]]:
    """Detach the tables of models whose layers are about to be replaced, and return what they hold."""
    found = {}
    for name, model in models.items():
        table = table_of(model)
        if table is None:
            continue
        config = TFMQConfig(table.config, table.prepared)
        found[name] = (config, table_state(table))
        detach_table(model)
        # Undone after the layers are back, so registered before they go.
        spill.after_rollback(functools.partial(_restore_table, model, *found[name]))
    return found


def put_tables_back(models: Mapping[str, nn.Module], tables: Mapping[str, tuple[TFMQConfig, _TableState]]) -> None:
    """Attach these tables again; they stay those of the dense weights."""
    for name, (config, state) in tables.items():
        _restore_table(models[name], config, state)


def _restore_table(model: nn.Module, config: TFMQConfig, state: _TableState) -> None:
    detach_table(model)
    table = attach_table(model, config.table)
    table.prepared = config.num_inference_steps
    load_table_state(table, *state, adopt=True)


def rounded_bytes(models: Mapping[str, nn.Module], plans: Iterable[MethodPlan]) -> int:
    """Bytes of the weights that tables round in their place, at most."""
    rounding = {p.component for p in plans if isinstance(p.config, TFMQConfig) and p.config.table.weights in _ROUNDED}
    return sum(
        module.weight.numel() * module.weight.element_size()
        for name in rounding
        for module in models[name].modules()
        if type(module) is nn.Linear
    )


def apply_methods(
    target: Any,
    models: Mapping[str, nn.Module],
    plans: Sequence[MethodPlan],
    states: Mapping[str, _TableState],
    calibration: Any,
    spill: Transaction,
    work_dir: str | Path | None,
    callback: Callback | None,
) -> None:
    """Put the methods on the models, in the order of the plans; ``spill`` takes them off if anything fails."""
    for plan in plans:
        if isinstance(plan.config, TFMQConfig):
            _attach(models[plan.component], plan.config, states[plan.component], spill)
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
    for name in dict.fromkeys(plan.component for plan in plans):
        _mark_dense(models[name], spill)


def _attach(model: nn.Module, config: TFMQConfig, state: _TableState, spill: Transaction) -> None:
    spill.on_rollback(lambda: detach_table(model))
    if config.table.weights in _ROUNDED:
        with_tables = attach_table(model, replace(config.table, weights=WeightPlace.DEVICE)).lookups.values()
        detach_table(model)
        for lookup in with_tables:
            if type(lookup.layer) is nn.Linear:
                spill.keep(lookup.layer.weight)  # type: ignore[arg-type]
    _restore_table(model, config, state)


def _found_cache(
    pipe: Any,
    config: LoopCacheConfig,
    names: Sequence[str],
    calibration: Any,
    work_dir: str | Path | None,
    callback: Callback | None,
) -> CacheCalibration | RouterTraining:
    if isinstance(config, HarmoniCaConfig):
        items = _items(pipe, calibration, None)
        # Gradients of the table only; compress is called without any.
        with torch.enable_grad():
            return train_cache(pipe, items, config, work_dir=work_dir, components=names, callback=callback)
    assert isinstance(config, FeatureCacheConfig)
    return calibrate_cache(
        pipe,
        _items(pipe, calibration, config.num_trajectories),
        target_speedup=config.target_speedup,
        granularity=config.granularity,
        num_trajectories=config.num_trajectories,
        history=config.history,
        longest_reuse=config.longest_reuse,
        seed=config.seed,
        force=config.force,
        components=names,
        callback=callback,
        **config.call_arguments,
    )


def _items(pipe: Any, calibration: Any, count: int | None) -> list[Any]:
    """What the pipeline is asked for: the first items that were given, else some of this package's; None for all."""
    if calibration is not None and not isinstance(calibration, Calibration):
        return list(itertools.islice(calibration, count))
    try:
        return bundled_items(pipe, count or _BUNDLED)
    except CannotCallError as error:
        raise ConfigError(
            f"feature cache: needs things to ask the pipeline for: {error}. Pass calibration=, a list of dicts of its "
            "arguments."
        ) from error


def _call_of(target: Any, calibration: Any) -> dict[str, Any] | None:
    """Arguments of a call of the pipeline; None where there is none or they cannot be made up."""
    if not is_pipeline(target):
        return None
    try:
        item = _items(target, calibration, 1)[0]
    except (ConfigError, IndexError) as error:
        _LOGGER.warning("%s: temporal tables are made in the first run: %s", type(target).__name__, error)
        return None
    # Some schedulers shift their timesteps by the size of the picture; of the others any will do.
    shifts = getattr(getattr(target, "scheduler", None), "config", {}).get("use_dynamic_shifting", False)
    return {**({} if shifts else small_output(target)), **pipeline_arguments(target, item, {})}


def _mark_dense(model: nn.Module, spill: Transaction) -> None:
    """A dense model whose checkpoint must hold a method is marked like a compressed one."""
    if get_state(model) is not None or not any(m.is_embedded(model) for m in live_methods(model).values()):
        return
    mark, unmark = marks_of(model)
    spill.on_rollback(lambda: unmark(model))
    config = QuantizationConfig.from_spec(QuantizationSpec.dense(), compute_dtype_of(model))
    mark(model, ComponentState(config, {}, base_model=repository_of(model)))

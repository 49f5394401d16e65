"""Carrying out finite-set calibration: ranges of static inputs at each step, from timesteps and from trajectories."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from diffuse_compress.apply_temporal import TemporalWork
from diffuse_compress.calibration.items import pipeline_arguments
from diffuse_compress.calibration.recording import Calibration, items_of
from diffuse_compress.components import compute_dtype_of
from diffuse_compress.errors import ConfigError
from diffuse_compress.failures import failures_explained
from diffuse_compress.integrations.component import get_state
from diffuse_compress.pipeline_call import from_noise, untouched
from diffuse_compress.progress import Callback, track
from diffuse_compress.runtime.stats import unchecked
from diffuse_compress.temporal.config import Scope, TFMQConfig
from diffuse_compress.temporal.finite_set import StepRanges, see_path, see_samples
from diffuse_compress.temporal.layout import layout_of
from diffuse_compress.temporal.step_scales import attach_step_scales, detach_step_scales, static_layers
from diffuse_compress.transaction import Transaction

__all__ = ["apply_step_scales"]

# Trajectories that ranges are seen in, at most; each calls the denoiser in every step.
_TRAJECTORIES = 16


def apply_step_scales(
    target: Any,
    models: Mapping[str, nn.Module],
    configs: Mapping[str, TFMQConfig],
    work: Mapping[str, TemporalWork],
    calibration: Any,
    spill: Transaction,
    callback: Callback | None,
) -> None:
    """Let these components have input scales for every step; ``spill`` takes them off if anything fails.

    Args:
        target: the pipeline.
        models: its models, quantized and with their tables.
        configs: of the components whose ``scope`` is set.
        work: how they are called, by component.
        calibration: items, recorded calls, or None.
        spill: of this compression.
        callback: ``callback(stage, done, total, metrics)``.
    """
    ranges, timesteps = {}, {}
    for name, config in configs.items():
        layers, state = static_layers(models[name]), get_state(models[name])
        if config.scope is Scope.TIB:
            path = layout_of(models[name], config.table).layers
            layers = {layer: module for layer, module in layers.items() if layer in path}
        ranges[name] = StepRanges(layers, None if state is None else state.config.spec.observer)
        timesteps[name] = work[name].timesteps
    everything = {name: config for name, config in configs.items() if config.scope is Scope.ALL}
    if isinstance(calibration, Calibration):
        for name in everything:
            _see_recorded(ranges[name], models[name], name, calibration)
    elif everything:
        _see_trajectories(target, models, everything, ranges, calibration, callback)
    timesteps |= {name: ranges[name].timesteps for name in everything}
    for name, config in configs.items():
        see_path(ranges[name], layout_of(models[name], config.table), models[name], work[name].loops, timesteps[name])
        spill.on_rollback(functools.partial(detach_step_scales, models[name]))
        attach_step_scales(models[name], ranges[name].qparams(config.scope or Scope.TIB))


def _see_recorded(ranges: StepRanges, model: nn.Module, name: str, calibration: Calibration) -> None:
    """Make recorded calls again."""
    if name not in calibration.components:
        raise ConfigError(
            f'{name}: TFMQConfig(scope="all") needs its calls at every step, and the calibration holds none. Record it '
            f'with components="{name}", or pass items.'
        )
    device = next(parameter.device for parameter in model.parameters())
    see_samples(ranges, model, calibration.of(name, compute_dtype_of(model)), device)


def _see_trajectories(
    target: Any,
    models: Mapping[str, nn.Module],
    configs: Mapping[str, TFMQConfig],
    ranges: Mapping[str, StepRanges],
    calibration: Any,
    callback: Callback | None,
) -> None:
    """Run the pipeline on its items, once for each schedule."""
    wanted: dict[int | None, list[str]] = {}
    for name, config in configs.items():
        for number in config.num_inference_steps or (None,):
            wanted.setdefault(number, []).append(name)
    items = items_of(target, calibration, _TRAJECTORIES)
    calls = [(steps, index) for steps in wanted for index in range(len(items))]
    with untouched(target), unchecked():
        for steps, index in track(calls, "Calibrating each step", target, callback, {}):
            shared = {} if steps is None else {"num_inference_steps": steps}
            given = {**pipeline_arguments(target, items[index], shared, index), **shared}
            what = f"item {index} cannot be run: {type(target).__name__} called with {', '.join(given)}"
            with _watched(models, {name: ranges[name] for name in wanted[steps]}), failures_explained(what):
                target(**from_noise(target, given, index))


@contextlib.contextmanager
def _watched(models: Mapping[str, nn.Module], ranges: Mapping[str, StepRanges]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for name, own in ranges.items():
            stack.enter_context(own.watching(models[name]))
        yield

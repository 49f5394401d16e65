"""The verbs: compression_plan, compress, decompress, compression_report, compression_recipe, compression_stats.

Each takes a diffusers pipeline, a diffusers model or a transformers model, and is attached to their classes as a
method of the same name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from diffuse_compress.apply import apply_plan, require_consumer
from diffuse_compress.calibration.recording import Calibration
from diffuse_compress.components import GROUPS, is_pipeline, model_components
from diffuse_compress.errors import ConfigError
from diffuse_compress.integrations.component import get_state
from diffuse_compress.plan import CompressionPlan, make_plan
from diffuse_compress.plan_text import format_bytes
from diffuse_compress.progress import Callback
from diffuse_compress.quantization.algorithms.base import AlgorithmConfig
from diffuse_compress.quantization.presets import PRESETS
from diffuse_compress.quantization.scheme import Scheme
from diffuse_compress.recipe import Recipe, as_recipe
from diffuse_compress.report import CompressionReport, report_of
from diffuse_compress.runtime.stats import CompressionStats
from diffuse_compress.runtime.steps import stats_of

__all__ = [
    "METHODS",
    "compress",
    "compression_plan",
    "compression_recipe",
    "compression_report",
    "compression_stats",
    "decompress",
]

_Target = TypeVar("_Target")


def compression_plan(
    target: Any,
    *methods: Any,
    modules_to_not_convert: str | Sequence[str] | None = None,
    overrides: Mapping[str, str | Scheme | None] | None = None,
    algorithm: AlgorithmConfig | str | None = None,
    seed: int | None = None,
    device: torch.device | str | None = None,
    calibration: Calibration | Iterable[Any] | None = None,
) -> CompressionPlan:
    """What :func:`compress` would do with the same arguments; touches nothing and works on meta-device models.

    Returns:
        A plan: print it, edit it with ``plan.set(pattern, scheme)`` and ``plan.keep(pattern)``, pass it to compress.

    Raises:
        ConfigError: see :func:`compress`.
    """
    if not methods:
        raise ConfigError(_choices(target))
    calibration = calibration if calibration is not None else _calibration_of(methods)
    # A plan is looked at again: the model may have changed since, or it was made on a meta-device twin.
    methods = tuple(method.request() if isinstance(method, CompressionPlan) else method for method in methods)
    recipe = as_recipe(
        *methods,
        modules_to_not_convert=modules_to_not_convert,
        overrides=overrides,
        algorithm=algorithm,
        seed=seed,
    )
    plan = make_plan(target, recipe, _as_device(device))
    plan.calibration = require_consumer(plan, calibration)
    return plan


def compress(
    target: _Target,
    *methods: Any,
    modules_to_not_convert: str | Sequence[str] | None = None,
    overrides: Mapping[str, str | Scheme | None] | None = None,
    algorithm: AlgorithmConfig | str | None = None,
    seed: int | None = None,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    work_dir: str | Path | None = None,
    preview: Sequence[Any] | None = None,
    callback: Callback | None = None,
    measure: bool = True,
    calibration: Calibration | Iterable[Any] | None = None,
) -> _Target:
    """Make a pipeline or model smaller and faster, in place, and return it; it saves and reloads as before.

    Args:
        target: a diffusers pipeline or model, or a transformers model.
        methods: a preset name ("w8a8", "fp8", "w8a16", "w4a16", "w4a8", "w4a4"), a QuantizationConfig, a
            CompressionPlan, a Recipe, or a dict ``{component or group: preset | config | None}``. A bare preset means
            the denoisers (transformer, unet, prior, ...).
        modules_to_not_convert: patterns of modules that stay dense (see QuantizationConfig).
        overrides: {pattern: preset, Scheme or None} for single layers.
        algorithm: instead of the preset's: a config, or its kind ("hqq").
        seed: of algorithms that draw random numbers; global random states are never touched.
        generator: source of that seed.
        device: compute here, layer by layer; every layer returns to where it was.
        work_dir: folder for the file that restores the model if the call fails, and for what calibration has finished:
            the same call goes on from there after a crash. Delete it once the model is saved.
        preview: prompts (or dicts of pipeline arguments) to generate before and after, for the report.
        callback: ``callback(stage, done, total, metrics)``; raising in it cancels and restores.
        measure: run the denoiser at four timesteps before and after to report its output error.
        calibration: for algorithms that need it: a Calibration, or the items to record one from.

    Raises:
        ConfigError: unknown names, nothing given (it lists the presets), or ``work_dir`` is of another calibration.
        CompressionConflictError: a component already carries another configuration of the same kind.
        IncompatibleShapeError: a layer cannot take the scheme asked for it.
        ModelStateError: meta tensors, offload hooks, foreign quantization, or too little disk.
    """
    if generator is not None:
        if seed is not None:
            raise ConfigError("compress: give seed= or generator=, not both.")
        seed = int(torch.randint(2**31, (1,), generator=generator, device=generator.device))
    if callback is not None and not callable(callback):
        raise ConfigError(f"compress: callback= is called as callback(stage, done, total, metrics), got {callback!r}.")
    plan = compression_plan(
        target,
        *methods,
        modules_to_not_convert=modules_to_not_convert,
        overrides=overrides,
        algorithm=algorithm,
        seed=seed,
        device=device,
        calibration=calibration,
    )
    if plan.components:
        apply_plan(target, plan, device=device, callback=callback, work_dir=work_dir, preview=preview, measure=measure)
    return target


def _calibration_of(methods: tuple[Any, ...]) -> Calibration | Iterable[Any] | None:
    """That of a plan which is among the methods."""
    plans = [method for method in methods if isinstance(method, CompressionPlan)]
    return plans[0].calibration if plans else None


def decompress(target: _Target) -> _Target:
    """Back to dense layers whose weights are rounded to the grid they were stored on; returns ``target``.

    Same act as a component's stock ``dequantize()``. Nothing of this package stays in config or hooks. The rounding
    is not undone: reload the original checkpoint for that.
    """
    models: dict[str, Any] = {**model_components(target)}
    for model in models.values():
        if get_state(model) is not None:
            model.dequantize()
    return target


def compression_report(target: Any) -> CompressionReport:
    """What was done, what it saved and what it cost; survives save and reload.

    Raises:
        ConfigError: nothing is compressed.
    """
    return report_of(target)


def compression_recipe(target: Any) -> Recipe:
    """The resolved recipe: save it, or apply it to another fine-tune with ``other.compress(recipe)``.

    Raises:
        ConfigError: nothing is compressed.
    """
    states = {name: get_state(model) for name, model in model_components(target).items()}
    found = {name or "denoisers": (state.config,) for name, state in states.items() if state is not None}
    if not found:
        raise ConfigError(f'{type(target).__name__} is not compressed; call compress("w8a8") first.')
    return Recipe(found)


def compression_stats(target: Any, *, strict: bool = False) -> CompressionStats:
    """What the last call did of what was planned, by component, with a reason for everything computed after all.

    Args:
        target: a pipeline, or a model that is called without one.
        strict: raise where less than 90 % of a plan was achieved.

    Raises:
        PlanMissedError: with ``strict``; the message gives the reason and the fix.
    """
    stats = stats_of(model_components(target), target if is_pipeline(target) else None)
    return stats.require() if strict else stats


METHODS = {
    function.__name__: function
    for function in (
        compress,
        compression_plan,
        compression_recipe,
        compression_report,
        compression_stats,
        decompress,
    )
}
"""What is attached to pipeline and model classes."""


def _as_device(device: torch.device | str | None) -> torch.device | None:
    try:
        return None if device is None else torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ConfigError(f"device={device!r} is no device: use 'cpu', 'cuda' or 'cuda:1' ({error}).") from error


def _choices(target: Any) -> str:
    """Message of a bare ``compress()``: the presets with their bytes for this model, and a recommendation."""
    whose = "this pipeline's denoisers" if is_pipeline(target) else "this model"
    lines = [f"{type(target).__name__}.compress() needs a preset. For {whose}:"]
    first = next(iter(model_components(target).values()))
    device = next((p.device for p in first.parameters() if p.device.type != "meta"), torch.device("cpu"))
    for name, preset in PRESETS.items():
        try:
            plan = make_plan(target, as_recipe(name, algorithm=preset.algorithm))
            size = f"{format_bytes(plan.bytes_before)} -> {format_bytes(plan.bytes_after)}"
        except ConfigError as error:
            if not is_pipeline(target) or any(GROUPS["denoisers"].match(n) for n in model_components(target)):
                size = f"not possible: {error}"
            else:
                raise
        needs = " (needs calibration)" if preset.needs_calibration else ""
        lines.append(f"  {name:6s} {size}: {preset.summary}{needs}")
    lines.append(_recommendation(device))
    return "\n".join(lines)


def _recommendation(device: torch.device) -> str:
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9):
        return f'On {torch.cuda.get_device_name(device)}: compress("fp8") for speed, compress("w4a8") for memory.'
    if device.type == "cuda":
        return f'On {torch.cuda.get_device_name(device)}: compress("w8a16") for memory at almost no loss.'
    return f'On {device.type}: compress("w8a8") for speed, compress("w4a8") for memory.'

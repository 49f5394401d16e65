"""The verbs: compression_plan, compress, decompress, compression_report, compression_recipe, compression_stats.

Each takes a diffusers pipeline, a diffusers model or a transformers model, and is attached to their classes as a
method of the same name.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import torch

from diffuse_compress.apply import apply_plan, needs_calibration, require_consumer
from diffuse_compress.apply_training import train_models, training_among
from diffuse_compress.caching.config import CacheConfig
from diffuse_compress.calibration.recording import Calibration
from diffuse_compress.components import GROUPS, is_pipeline, model_components, resolve_names
from diffuse_compress.errors import ConfigError
from diffuse_compress.integrations.component import get_state
from diffuse_compress.integrations.methods import live_methods, remove_methods
from diffuse_compress.integrations.quantization_config import QuantizationConfig
from diffuse_compress.layer_sensitivity import Measurements, SensitivityReport
from diffuse_compress.mixed_precision import candidate_schemes, meet_target, parse_size
from diffuse_compress.plan import CompressionPlan, make_plan
from diffuse_compress.plan_text import format_bytes
from diffuse_compress.progress import Callback
from diffuse_compress.quantization.algorithms.base import AlgorithmConfig
from diffuse_compress.quantization.presets import PRESETS, resolve_preset
from diffuse_compress.quantization.scheme import Scheme
from diffuse_compress.quantization.spec import resolve_scheme
from diffuse_compress.recipe import MethodConfig, Recipe, as_recipe
from diffuse_compress.report import CompressionReport, report_of
from diffuse_compress.runtime.stats import CompressionStats
from diffuse_compress.runtime.steps import stats_of
from diffuse_compress.training.clips import InputClips

__all__ = [
    "METHODS",
    "compress",
    "compression_plan",
    "compression_recipe",
    "compression_report",
    "compression_stats",
    "decompress",
    "sensitivity",
]

DEFAULT_FAMILY = "w4a16"
"""Preset whose formats are mixed where a size is asked for and no preset: their inputs stay as they are."""

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
    target_size: str | int | None = None,
    target_bits: float | None = None,
    sensitivity: SensitivityReport | None = None,
    callback: Callback | None = None,
) -> CompressionPlan:
    """What :func:`compress` would do with the same arguments; changes nothing and works on meta-device models.

    With ``target_size`` ("11GB", "10GiB" or bytes that the planned components may take, what stays dense included) or
    ``target_bits`` (average bits of a layer's weight, scales included) each layer gets its own of the preset's formats
    (``QuantizationPreset.mixed``, or dense) so that the output error is least; "w4a16" if there is no preset. This
    needs loaded weights, and takes minutes where it runs the model; ``sensitivity`` is what :func:`sensitivity`
    measured, so that it is not measured anew, and only its formats are used. With samples the choice is tried against
    one format for all layers on a held-out half of them, which takes two calibrations, and the better one is planned.

    Returns:
        A plan: print it, edit it with ``plan.set(pattern, scheme)`` and ``plan.keep(pattern)``, pass it to compress.

    Raises:
        ConfigError: unknown names, a target that cannot be met (the message says what can), or nothing given (the
            message lists presets with their bytes for this model).
        CompressionConflictError: a component already carries another configuration of the same kind.
        IncompatibleShapeError: a layer cannot take the scheme asked for it.
    """
    if callback is not None and not callable(callback):
        raise ConfigError(f"compress: callback= is called as callback(stage, done, total, metrics), got {callback!r}.")
    searches = _check_search(target_size, target_bits, sensitivity)
    if not methods and not searches:
        raise ConfigError(_choices(target))
    methods, _ = training_among(target, methods or (DEFAULT_FAMILY,))
    plans = [m for m in methods if isinstance(m, CompressionPlan)]
    calibration = _for_target(target, plans[0].calibration if calibration is None and plans else calibration)
    # A plan is looked at again: the model may have changed since, or it was made on a meta-device twin.
    methods = tuple(m.request(found=not searches) if isinstance(m, CompressionPlan) else m for m in methods)
    recipe = as_recipe(
        *methods,
        is_calibrated=lambda key: _is_calibrated(target, key, calibration),
        modules_to_not_convert=modules_to_not_convert,
        overrides=overrides,
        algorithm=algorithm,
        seed=seed,
    )
    plan = make_plan(target, recipe, _as_device(device))
    plan.calibration = require_consumer(plan, calibration, searches=searches)
    for given in () if searches else plans:
        plan.follow(given)
    if searches and plan.components:
        measurements = Measurements(target, plan, device, callback)
        meet_target(plan, target, measurements, sensitivity, size=target_size, bits=target_bits)
        # A calibration that only the search has looked at is done with.
        plan.calibration = plan.calibration if needs_calibration(plan) else None
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
    target_size: str | int | None = None,
    target_bits: float | None = None,
    sensitivity: SensitivityReport | None = None,
    data: Any = None,
) -> _Target:
    """Make a pipeline or model smaller and faster, in place, and return it; it saves and reloads as before.

    Args:
        target: a diffusers pipeline or model, or a transformers model.
        methods: presets ("w8a8", ...), QuantizationConfig, CompressionPlan, Recipe, or a dict {component or group:
            preset | config | None}; a bare preset means the denoisers (transformer, unet, ...).
        modules_to_not_convert: patterns of modules that stay dense (see QuantizationConfig).
        overrides: {pattern: preset, Scheme or None} for single layers.
        algorithm: instead of the preset's: a config, or its kind ("hqq").
        seed: of algorithms that draw random numbers; global random states are never touched.
        generator: source of that seed.
        device: compute here, layer by layer; every layer returns to where it was.
        work_dir: folder for what restores the model if the call fails, and for finished blocks of one calibration or
            checkpoints of one training, from which the same call goes on after a crash. Delete it at the end.
        preview: prompts (or dicts of pipeline arguments) to generate before and after, for the report.
        callback: ``callback(stage, done, total, metrics)``; raising in it cancels and restores.
        measure: run the denoiser at four timesteps before and after to report its output error.
        calibration: a Calibration, or the items to record one from. A preset then means its calibrated algorithm.
        target_size: "11GB" that the result may take; each layer gets its own format.
        target_bits: the same by average bits per weight.
        sensitivity: of the layers, if known.
        data: of a training (QVGenConfig); see ``training_data``.

    Raises:
        DiffuseCompressError: see :func:`compression_plan`; also offload hooks, meta tensors, too little disk.
    """
    training = training_among(target, methods, data)[1]
    layers: Any = dict(modules_to_not_convert=modules_to_not_convert, overrides=overrides, algorithm=algorithm)
    search: Any = dict(target_size=target_size, target_bits=target_bits, sensitivity=sensitivity)
    source, seed = None if training else calibration, _seed_of(seed, generator)
    plan = compression_plan(
        target, *methods, **layers, **search, seed=seed, device=device, calibration=source, callback=callback
    )
    if training:
        train_models(target, plan, training, calibration if data is None else data, work_dir, callback)
    elif plan.components or plan.methods:
        apply_plan(target, plan, device=device, callback=callback, work_dir=work_dir, preview=preview, measure=measure)
    return target


def sensitivity(
    target: Any,
    schemes: str | Scheme | Sequence[str | Scheme] = DEFAULT_FAMILY,
    *,
    calibration: Calibration | Iterable[Any] | None = None,
    algorithm: AlgorithmConfig | str | None = None,
    components: str | Sequence[str] = "denoisers",
    modules_to_not_convert: str | Sequence[str] | None = None,
    device: torch.device | str | None = None,
    callback: Callback | None = None,
) -> SensitivityReport:
    """How much of the output error each layer causes in each format, the most sensitive layers first.

    Args:
        target: a pipeline or model; not changed.
        schemes: a preset, for the formats that a search under a size mixes; or a list of presets and Schemes.
        calibration: samples, or the items to record some from. Without, a pipeline that can be is called with a prompt
            of this package; of other models the weights alone are looked at.
        algorithm: that the layers are quantized by: what ``compress`` will be given. By default the preset's, with
            ``calibration`` its calibrated one; that of "w4a16" where only Schemes are listed.
        components: names or groups of a pipeline's components.
        modules_to_not_convert: layers to leave out.
        device: run and quantize here, block by block; the model stays where it is.
        callback: ``callback(stage, done, total, metrics)``.

    Raises:
        ConfigError: unknown preset, component or pattern; a calibrated algorithm without calibration.
        ModelStateError: weights on the meta device, or already compressed.
    """
    calibration = _for_target(target, calibration)
    listed = [schemes] if isinstance(schemes, Scheme) else schemes
    first = listed if isinstance(listed, str) else next(iter(listed), None)
    if first is None:
        raise ConfigError("sensitivity: schemes= names at least one preset or Scheme, got none.")
    names = [components] if isinstance(components, str) else list(components)
    presets = [scheme for scheme in ([listed] if isinstance(listed, str) else listed) if isinstance(scheme, str)]
    family = resolve_preset(presets[0] if presets else DEFAULT_FAMILY)
    parts = {}
    for name in names:
        own = family.calibrated if _is_calibrated(target, name, calibration) else family.algorithm
        parts[name] = (QuantizationConfig(first, algorithm or own, modules_to_not_convert=modules_to_not_convert),)
    plan = make_plan(target, Recipe(parts), _as_device(device))
    formats = None if isinstance(listed, str) else [cast(Scheme, resolve_scheme(scheme)) for scheme in listed]
    candidates = candidate_schemes(plan, target, formats)
    plan.calibration = require_consumer(plan, calibration, searches=True)
    return Measurements(target, plan, device, callback).sensitivity(candidates)


def _seed_of(seed: int | None, generator: torch.Generator | None) -> int | None:
    if generator is None:
        return seed
    if seed is not None:
        raise ConfigError("compress: give seed= or generator=, not both.")
    return int(torch.randint(2**31, (1,), generator=generator, device=generator.device))


def _check_search(target_size: Any, target_bits: Any, sensitivity: Any) -> bool:
    """Whether formats are to be searched for."""
    if target_size is not None and target_bits is not None:
        raise ConfigError("compress: give target_size= or target_bits=, not both.")
    if target_bits is not None and (
        isinstance(target_bits, bool) or not isinstance(target_bits, int | float) or not 0 < target_bits < math.inf
    ):
        raise ConfigError(f"target_bits: average bits per weight, a number above 0, got {target_bits!r}.")
    if target_size is not None:
        parse_size(target_size)
    searches = target_size is not None or target_bits is not None
    if sensitivity is not None and not (searches and isinstance(sensitivity, SensitivityReport)):
        raise ConfigError(
            "sensitivity: the report of diffuse_compress.sensitivity(), for target_size= or target_bits=; got "
            f"{type(sensitivity).__name__}" + ("." if searches else " and no target.")
        )
    return searches


def _for_target(target: Any, calibration: Any) -> Any:
    """``calibration``, which may be of a pipeline whose only recorded component ``target`` is: the pipeline with its
    text encoders need not be there any more."""
    if not isinstance(calibration, Calibration) or is_pipeline(target) or len(calibration.components) != 1:
        return calibration
    (component,) = calibration.components
    return calibration.only(component) if component else calibration


def _is_calibrated(target: Any, key: str, calibration: Any) -> bool:
    """Whether ``calibration`` is for a component or group; one that is recorded already may hold others."""
    if not isinstance(calibration, Calibration):
        return calibration is not None
    return any(name in calibration.components for name in resolve_names([key], target)[key])


def decompress(target: _Target) -> _Target:
    """Back to dense layers whose weights are rounded to the grid they were stored on; returns ``target``.

    Same act as a component's stock ``dequantize()``. Nothing of this package stays in config or hooks. The rounding
    is not undone: reload the original checkpoint for that.
    """
    models: dict[str, Any] = {**model_components(target)}
    for model in models.values():
        if get_state(model) is not None:
            model.dequantize()
        remove_methods(model)
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
    found: dict[str, tuple[MethodConfig, ...]] = {}
    for name, model in model_components(target).items():
        state, methods = get_state(model), live_methods(model).values()
        weights: tuple[MethodConfig, ...] = ()
        if state is not None and not state.config.spec.is_dense:
            weights = (QuantizationConfig.from_spec(state.config.spec, state.config.compute_dtype),)
        # A schedule that was given is no recipe: it was made for this very model, as clips are that were learned.
        own = (CacheConfig, InputClips)
        others = (config for m in methods if (config := m.config_of(model)) and type(config) not in own)
        configs = (*weights, *others)
        if configs:
            found[name or "denoisers"] = configs
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

"""Carrying out a plan: validate, convert layer by layer inside a transaction, mark, report."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffuse_compress.apply_methods import apply_methods
from diffuse_compress.apply_rotation import rotate
from diffuse_compress.apply_temporal import (
    TemporalWork,
    put_tables_back,
    rounded_bytes,
    take_tables_off,
    temporal_work,
)
from diffuse_compress.caching.config import LoopCacheConfig
from diffuse_compress.caching.runtime import caches_off
from diffuse_compress.calibration.engine import Quantized, calibrate_layers
from diffuse_compress.calibration.recording import Calibration
from diffuse_compress.calibration.samples import Samples
from diffuse_compress.calibration.work_folder import (
    FinishedBlocks,
    WorkFolder,
    digest_of_items,
    digest_of_weights,
)
from diffuse_compress.components import generates_text, is_pipeline, model_components
from diffuse_compress.errors import ConfigError, DiffuseCompressError
from diffuse_compress.evaluation.environment import device_name
from diffuse_compress.integrations.component import ComponentState, get_state, layer_entries, quantized_layers
from diffuse_compress.integrations.doors import marks_of
from diffuse_compress.integrations.origin import repository_of
from diffuse_compress.integrations.placement import require_free
from diffuse_compress.logging import get_logger
from diffuse_compress.measurement import LayerMeasurement, PipelineProbe, measure_layer
from diffuse_compress.plan import ComponentPlan, CompressionPlan, stored_bytes
from diffuse_compress.progress import Callback, bar, track
from diffuse_compress.quantization.algorithms.base import algorithm_to_dict
from diffuse_compress.quantization.convert import module_aliases, quantize_module
from diffuse_compress.quantization.split import split_conv
from diffuse_compress.report import component_report
from diffuse_compress.temporal.config import TFMQConfig
from diffuse_compress.transaction import Transaction
from diffuse_compress.versions import installed_versions

__all__ = ["apply_plan", "needs_calibration", "require_consumer"]

_logger = get_logger(__name__)


def needs_calibration(plan: CompressionPlan) -> list[ComponentPlan]:
    """Parts of ``plan`` whose algorithm or static input scales follow from inputs."""
    return [part for part in plan.components.values() if part.needs_calibration]


def require_consumer(plan: CompressionPlan, calibration: Any, *, searches: bool = False) -> Any:
    """``calibration``, or ConfigError if an algorithm of ``plan`` needs one and there is none, or none takes it.

    A search for formats (``searches``) takes it, too.
    """
    needing = needs_calibration(plan)
    if needing and calibration is None:
        part = needing[0]
        what, instead = part.spec.algorithm.summary, 'take an algorithm that needs none: algorithm="rtn"'
        if not part.spec.algorithm.needs_calibration:
            static = next(scheme for scheme in part.layers.values() if scheme.has_static_inputs)
            what, instead = (
                f"a static input scale ({static.name})",
                "let inputs be dynamic: ActivationScheme(...) alone",
            )
        raise ConfigError(
            f"{part.name or part.class_name}: {what} needs calibration data, got none. Pass calibration=, a list of "
            "prompts (of texts, of forward arguments for a model without pipeline) or a Calibration; or "
            f"{instead}."
        )
    caches = any(isinstance(method.config, LoopCacheConfig) for method in plan.methods)
    stepped = any(isinstance(m.config, TFMQConfig) and m.config.scope is not None for m in plan.methods)
    if (caches or stepped) and not isinstance(calibration, Calibration | Sequence | None):
        calibration = list(calibration)  # both a method and an algorithm may read it
    consumed = needing or searches or stepped or (caches and not isinstance(calibration, Calibration))
    if calibration is not None and (plan.components or plan.methods) and not consumed:
        found = ", ".join(sorted({part.spec.algorithm.summary for part in plan.components.values()}))
        if caches:
            raise ConfigError(
                "calibration: a feature cache runs the whole sampling loop, for which it needs prompts (class labels, "
                "dicts of arguments), got recorded calls of the denoiser. Pass the items themselves, or nothing."
            )
        raise ConfigError(
            f"calibration: given, but nothing uses it ({found or 'what is asked for'} is data-free). Leave it out, or "
            "name an algorithm that does, algorithm=GPTQConfig(), or none: a preset then takes its calibrated one."
        )
    return calibration


def apply_plan(
    target: Any,
    plan: CompressionPlan,
    *,
    device: torch.device | str | None = None,
    callback: Callback | None = None,
    work_dir: str | Path | None = None,
    preview: Sequence[Any] | None = None,
    measure: bool = True,
) -> None:
    """Convert the layers of ``plan`` in place, all or nothing. Global random states are left as they were.

    Raises:
        ConfigError: ``work_dir`` holds blocks of another calibration.
        ModelStateError: meta tensors, offload hooks, or too little disk for the spill file.
        DiffuseCompressError: a layer could not be converted; the message names it.
    """
    models = model_components(target)
    for name in dict.fromkeys([*plan.components, *(method.component for method in plan.methods)]):
        _check_ready(name or type(models[name]).__name__, models[name])
    with (
        torch.inference_mode(False),  # parameters made in it could never be trained beside, nor written to
        _keep_random_state(),
        torch.no_grad(),
        _buffers_kept(models.values()),
        caches_off(models.values()),
        Transaction(_spilled_bytes(models, plan), work_dir) as spill,
    ):
        temporal = temporal_work(target, models, plan, device)
        kept = take_tables_off({name: models[name] for name in plan.components}, spill)
        for name, part in plan.components.items():
            _split(models[name], part.splits, spill)
        calibration, finished = _prepared(target, models, plan, device, work_dir, callback)
        probe = PipelineProbe(target, plan, preview=preview, enabled=measure, callback=callback)
        probe.record_dense()
        layers: dict[str, dict[str, LayerMeasurement]] = {}
        seconds: dict[str, float] = {}
        for name, part in plan.components.items():
            began = time.perf_counter()
            path = temporal.get(name, TemporalWork(None))
            measured = _quantize(
                target, models[name], part, path, spill, probe, device, calibration, finished.get(name), callback
            )
            layers[name] = {layer: measured[layer] for layer in part.layers}
            seconds[name] = time.perf_counter() - began
        for name, part in plan.components.items():
            given = calibration if part.needs_calibration else None
            _mark(models[name], part, given, spill)
        put_tables_back(models, kept)
        probe.record_compressed()
        apply_methods(target, models, plan.methods, temporal, plan.calibration, spill, work_dir, callback)
        for name, part in plan.components.items():
            state = get_state(models[name])
            assert state is not None  # marked above
            state.report = component_report(
                models[name], part, layers[name], probe, seconds=seconds[name], search=plan.outcome
            )
            _logger.info("%s: %d layers converted in %.1f s", name or part.class_name, len(layers[name]), seconds[name])
        probe.keep_preview(target)


def _spilled_bytes(models: Mapping[str, nn.Module], plan: CompressionPlan) -> int:
    """Bytes that are written out, to be put back if the call fails."""
    found = sum(row.bytes_before for row in plan.rows if row.scheme is not None)
    found += rounded_bytes(models, plan.methods)
    for name, part in plan.components.items():
        # A rotation writes out what it changes beside, and a convolution that is split goes before its parts do.
        found += part.bytes_before if part.residual is not None else 0
        found += sum(stored_bytes(models[name].get_submodule(conv)) for conv in part.splits)
    return found


def _split(model: nn.Module, splits: Mapping[str, int], spill: Transaction) -> None:
    """Take these convolutions apart; what follows finds ordinary layers in their places."""
    aliases = module_aliases(model)
    for name, channels in splits.items():
        convert = functools.partial(split_conv, channels=channels)
        spill.replace(model, aliases[id(model.get_submodule(name))], convert)


def _install(
    model: nn.Module, part: ComponentPlan, layers: Mapping[str, Quantized], spill: Transaction, probe: PipelineProbe
) -> dict[str, LayerMeasurement]:
    """Put these layers, quantized already, in their places."""
    aliases, measured = module_aliases(model), {}
    for name, layer in layers.items():

        def convert(dense: nn.Module, name: str = name, layer: Quantized = layer) -> nn.Module:
            measured[name] = measure_layer(dense, layer, probe.layer_inputs(part.name, name))  # type: ignore[arg-type]
            return layer

        spill.replace(model, aliases[id(model.get_submodule(name))], convert)
    return measured


def _quantize(
    target: Any,
    model: nn.Module,
    part: ComponentPlan,
    path: TemporalWork,
    spill: Transaction,
    probe: PipelineProbe,
    device: torch.device | str | None,
    calibration: Calibration | None,
    finished: FinishedBlocks | None,
    callback: Callback | None,
) -> dict[str, LayerMeasurement]:
    if part.residual is not None:
        rotate(target, model, part, spill, calibration, finished, device, callback)
    if not part.needs_calibration:
        measured = _install(model, part, path.ready, spill, probe)
        measured |= _convert(target, model, part, spill, probe, device, callback)
    else:
        assert calibration is not None
        measured = _calibrate(target, model, part, path.ready, spill, probe, device, calibration, finished, callback)
    measured |= _install(model, part, path.late, spill, probe)
    layers = quantized_layers(model)
    part.take_over({name: layers[name].scheme for name, scheme in part.layers.items() if layers[name].scheme != scheme})
    return measured


def _convert(
    target: Any,
    model: nn.Module,
    part: ComponentPlan,
    spill: Transaction,
    probe: PipelineProbe,
    device: torch.device | str | None,
    callback: Callback | None,
) -> dict[str, LayerMeasurement]:
    aliases, measured = module_aliases(model), {}
    metrics: dict[str, Any] = {"component": part.name}
    todo = list(part.own_layers.items())
    stage = f"Compressing {part.name or part.class_name}"
    for name, scheme in track(todo, stage, target, callback, metrics):

        def convert(dense: nn.Module, name: str = name, scheme: Any = scheme) -> nn.Module:
            layer = quantize_module(
                dense, scheme, part.spec.algorithm, device=device, name=name, generator=part.spec.generator(name)
            )
            measured[name] = measure_layer(dense, layer, probe.layer_inputs(part.name, name))
            return layer

        names = aliases[id(model.get_submodule(name))]
        spill.replace(model, names, convert)
        metrics.update(layer=name, scheme=scheme.name, relative_weight_error=measured[name].weight_error)
    return measured


def _prepared(
    target: Any,
    models: Mapping[str, nn.Module],
    plan: CompressionPlan,
    device: torch.device | str | None,
    work_dir: str | Path | None,
    callback: Callback | None,
) -> tuple[Calibration | None, dict[str, FinishedBlocks]]:
    """Samples of every component that needs them, recorded now where only items are given; and what is done already.

    What can differ from the run that ``work_dir`` is of is compared before anything is recorded.
    """
    needing = {part.name: part for part in needs_calibration(plan)}
    if not needing:
        return None, {}
    folder = None if work_dir is None else WorkFolder(work_dir)
    fingerprints: dict[str, dict[str, Any]] = {}
    digest = functools.cache(lambda name: digest_of_weights(models[name]))  # a second for a gigabyte
    if folder is not None:
        for name, part in needing.items():
            fingerprints[name] = {"weights": digest(name), **_fingerprint(models[name], part, device)}
        for name, fingerprint in fingerprints.items():
            folder.require_same(name, fingerprint)
    found = _recorded(target, models, digest, plan.calibration, list(needing), folder, callback)
    finished = {}
    for name in needing:
        samples = found.of(name)
        if folder is not None:
            data = Samples({name: samples}).fingerprint
            finished[name] = folder.blocks(name, {**fingerprints[name], "calibration": data})
    return found, finished


def _fingerprint(model: nn.Module, part: ComponentPlan, device: torch.device | str | None) -> dict[str, Any]:
    """What the codes of a component follow from, but for weights and samples."""
    versions = installed_versions()
    device = device if device is not None else next(parameter.device for parameter in model.parameters())
    return {
        "recipe": {
            "algorithm": algorithm_to_dict(part.spec.algorithm),
            "seed": part.spec.seed,
            **({"observer": part.spec.observer.to_dict()} if part.spec.has_static_inputs else {}),
            **{name: scheme.to_dict() for name, scheme in part.layers.items()},
            **({"timestep path": [*part.path_layers, *part.path_work]} if part.path_layers else {}),
        },
        "versions": {
            **{name: versions.get(name) for name in ("diffuse-compress", "torch")},
            "device": device_name(device),
        },
    }


def _recorded(
    target: Any,
    models: Mapping[str, nn.Module],
    digest: Callable[[str], str],
    given: Any,
    needing: Sequence[str],
    folder: WorkFolder | None,
    callback: Callback | None,
) -> Calibration:
    if isinstance(given, Calibration):
        return given
    components = list(needing) if is_pipeline(target) else None
    key = None
    if folder is not None and isinstance(given, Sequence):
        items = digest_of_items(given)
        if items is not None:
            schedule = repr(dict(getattr(getattr(target, "scheduler", None), "config", {})))
            weights = [f"{name} {digest(name)}" for name in models]
            known = [type(target).__name__, items, schedule, *needing, *weights]
            key = hashlib.sha256("\n".join(known).encode()).hexdigest()[:16]

    def record() -> Calibration:
        return Calibration.record(target, given, components=components, callback=callback)

    return record() if folder is None else folder.recording(key, record)


def _calibrate(
    target: Any,
    model: nn.Module,
    part: ComponentPlan,
    ready: Mapping[str, Quantized],
    spill: Transaction,
    probe: PipelineProbe,
    device: torch.device | str | None,
    calibration: Calibration,
    finished: FinishedBlocks | None,
    callback: Callback | None,
) -> dict[str, LayerMeasurement]:
    """As :func:`_convert`, block by block on recorded inputs."""
    aliases, measured = module_aliases(model), {}

    def replace(name: str, convert: Callable[[nn.Module], nn.Module]) -> nn.Module:
        def converted(dense: nn.Module) -> nn.Module:
            layer = convert(dense)
            measured[name] = measure_layer(dense, layer, probe.layer_inputs(part.name, name))  # type: ignore[arg-type]
            return layer

        return spill.replace(model, aliases[id(model.get_submodule(name))], converted)

    stage = f"Calibrating {part.name or part.class_name}"
    with bar(stage, len(part.own_layers), target, callback) as advance:

        def on_block(block: str, done: int, total: int) -> None:
            advance(done, {"component": part.name, "block": block})

        missed = calibrate_layers(
            model,
            part.own_layers,
            part.spec.algorithm,
            calibration.of(part.name, part.compute_dtype),
            replace,
            generator=part.spec.generator,
            observer=part.spec.observer,
            keep=spill.keep,
            # Adapters for a pipeline's denoiser come from the Hub, where they were made for the model as it was.
            folds=not part.name and generates_text(model),
            device=device,
            finished=finished,
            ready=ready,
            on_block=on_block,
        )
    if missed:
        _logger.info("%s: no sample reached %d layers, e.g. %s; rounded to nearest", stage, len(missed), missed[0])
    return measured


def _mark(model: nn.Module, part: ComponentPlan, calibration: Calibration | None, spill: Transaction) -> None:
    mark, unmark = marks_of(model)
    before = get_state(model)
    if before is not None:  # of a dense model that carries a method
        spill.on_rollback(lambda: mark(model, before))
    spill.on_rollback(lambda: unmark(model))
    config = part.resolved_config
    config.calibration = None if calibration is None else calibration.settings_of(part.name)
    mark(model, ComponentState(config, layer_entries(model), base_model=repository_of(model)))


def _check_ready(where: str, model: nn.Module) -> None:
    marks_of(model)
    require_free(where, model)
    if not any(True for _ in model.parameters()):
        raise DiffuseCompressError(f"{where}: has no parameters.")


@contextlib.contextmanager
def _buffers_kept(models: Iterable[nn.Module]) -> Iterator[None]:
    """Buffers hold the same afterwards: what runs in between is no use of the models that they should count."""
    kept = [
        (module, name, buffer.detach().clone())
        for model in models
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and not buffer.is_meta
    ]
    try:
        yield
    finally:
        for module, name, value in kept:
            present = module._buffers.get(name)
            if present is None or present.shape != value.shape or present.is_inference():
                module._buffers[name] = value if present is None else value.to(present.device)
            elif not torch.equal(present, value.to(present.device)):
                present.copy_(value)


class _keep_random_state:
    """Global generators (CPU and every CUDA device in use) read the same before and after."""

    def __enter__(self) -> None:
        initialized = torch.cuda.is_available() and torch.cuda.is_initialized()
        self._fork = torch.random.fork_rng(devices=list(range(torch.cuda.device_count())) if initialized else [])
        self._fork.__enter__()

    def __exit__(self, *exc: Any) -> None:
        self._fork.__exit__(*exc)

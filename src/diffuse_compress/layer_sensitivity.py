"""How much each layer suffers in each format: measured, and as a report."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from diffuse_compress.calibration.recording import Calibration
from diffuse_compress.calibration.samples import Sample
from diffuse_compress.calibration.sensitivity import layer_sensitivities
from diffuse_compress.components import GROUPS, compute_dtype_of, is_pipeline, model_components
from diffuse_compress.errors import ConfigError, ModelStateError
from diffuse_compress.logging import get_logger
from diffuse_compress.measurement import measure_layer
from diffuse_compress.pipeline_call import CannotCallError, cheap_arguments
from diffuse_compress.plan import ComponentPlan, CompressionPlan
from diffuse_compress.plan_text import align, scheme_labels
from diffuse_compress.progress import Callback, bar
from diffuse_compress.quantization.algorithms.base import AlgorithmConfig
from diffuse_compress.quantization.algorithms.rtn import RTNConfig
from diffuse_compress.quantization.convert import quantize_module
from diffuse_compress.quantization.scheme import Scheme

__all__ = ["LayerSensitivity", "SensitivityReport", "measure_sensitivity", "own_calibration"]

NUM_SAMPLES = 16
"""Samples of a calibration that are looked at: enough to rank layers, each costs dozens of forwards."""
OWN_SAMPLES = 8
OWN_STEPS = 8
_SHOWN_ROWS = 20
_logger = get_logger(__name__)


@dataclass(frozen=True)
class LayerSensitivity:
    """One layer.

    Attributes:
        component: "" for a bare model.
        layer: qualified name.
        shape: (out_features, in_features).
        errors: {format: squared relative error of the model's output that this layer alone causes in it}.
    """

    component: str
    layer: str
    shape: tuple[int, int]
    errors: Mapping[Scheme, float]


class SensitivityReport:
    """Made by :func:`diffuse_compress.sensitivity`; print it, or give it to ``compress(sensitivity=...)``.

    Attributes:
        target_class: class of the pipeline or model.
        layers: most sensitive first: in their coarsest format, whose errors are the largest.
        basis: what was looked at, in words.
    """

    def __init__(self, target_class: str, layers: Iterable[LayerSensitivity], basis: str) -> None:
        self.target_class, self.basis = target_class, basis
        self.layers = sorted(layers, key=lambda item: -max(item.errors.values()))

    @property
    def schemes(self) -> list[Scheme]:
        """Every format that was tried, the coarsest first."""
        found = dict.fromkeys(scheme for item in self.layers for scheme in item.errors)
        return sorted(found, key=lambda scheme: (scheme.weight.format.bits, scheme.bits_per_weight((128, 4096))))

    def of(self, component: str) -> dict[str, Mapping[Scheme, float]]:
        """{layer: errors} of a component."""
        return {item.layer: item.errors for item in self.layers if item.component == component}

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form: formats under "schemes", and layers with relative errors by their labels there."""
        labels = scheme_labels(self.schemes)
        return {
            "target": self.target_class,
            "basis": self.basis,
            "schemes": {label: scheme.to_dict() for scheme, label in labels.items()},
            "layers": [
                {
                    "component": item.component,
                    "layer": item.layer,
                    "shape": list(item.shape),
                    "relative_error": {labels[scheme]: error**0.5 for scheme, error in item.errors.items()},
                }
                for item in self.layers
            ],
        }

    def __str__(self) -> str:
        schemes = self.schemes
        labels = scheme_labels(schemes)
        table = [("layer", "weights", *(labels[scheme] for scheme in schemes))]
        for item in self.layers[:_SHOWN_ROWS]:
            cells = (f"{100 * item.errors[s] ** 0.5:.3g} %" if s in item.errors else "-" for s in schemes)
            name = f"{item.component}.{item.layer}" if item.component else item.layer
            table.append((name, f"{item.shape[0] * item.shape[1]:,}", *cells))
        lines = [f"Sensitivity of {self.target_class}, most sensitive layers first: {self.basis}", *align(table)]
        more = len(self.layers) - _SHOWN_ROWS
        return "\n".join([*lines, f"  ... and {more} layers more"] if more > 0 else lines)

    __repr__ = __str__


def measure_sensitivity(
    target: Any,
    plan: CompressionPlan,
    candidates: Mapping[str, Mapping[str, Sequence[Scheme]]],
    calibration: Calibration | None,
    callback: Callback | None = None,
) -> SensitivityReport:
    """Sensitivity of the layers in ``candidates`` {component: {layer: formats}}, all of them planned by ``plan``.

    With samples of a component, the error of its output; without, of its weights. Layers are quantized by the plan's
    algorithm if that is data-free, else rounded to nearest: what a calibrated one gains in one format says little of
    what it gains in another, and scaling by it made worse choices.

    Raises:
        ModelStateError: weights are on the meta device.
    """
    models, found, described = model_components(target), [], {}
    for name, wanted in candidates.items():
        part, model = plan.components[name], models[name]
        if any(parameter.is_meta for parameter in model.parameters()):
            raise ModelStateError(
                f"{name or part.class_name}: a search for the formats of its layers looks at their weights, which are "
                "on the meta device. Load the model first."
            )
        stage = f"Measuring the sensitivity of {name or part.class_name}"
        samples = _samples_of(name, calibration, compute_dtype_of(model))
        with bar(stage, len(wanted), target, callback) as advance:
            if samples:
                errors, basis = _output_errors(model, part, wanted, samples, advance)
            else:
                errors, basis = _weight_errors(model, part, wanted, advance), "error of weights, by their share"
        described[basis] = None
        shapes = {layer: part.assigned[layer].shape for layer in wanted}
        found += [LayerSensitivity(name, layer, shapes[layer], errors[layer]) for layer in wanted]
    return SensitivityReport(plan.target_class, found, "; ".join(described))


def own_calibration(target: Any, components: Sequence[str], callback: Callback | None) -> Calibration | None:
    """A few calls of the denoisers of a pipeline that can be called without being told how; else None."""
    denoisers = [name for name in components if GROUPS["denoisers"].match(name)]
    if not is_pipeline(target) or not denoisers:
        return None
    try:
        arguments = cheap_arguments(target, OWN_STEPS, seed=0, decode=False)
        arguments.pop("generator", None)
        return Calibration.record(target, [arguments], num_samples=OWN_SAMPLES, components=denoisers, callback=callback)
    except (CannotCallError, ConfigError) as error:
        _logger.info("sensitivity: %s cannot be called by itself (%s): weights alone", type(target).__name__, error)
        return None


def _samples_of(component: str, calibration: Calibration | None, dtype: torch.dtype) -> Sequence[Sample]:
    if calibration is None or component not in calibration.components:
        return ()
    return calibration.of(component, dtype)[:NUM_SAMPLES]


def _output_errors(
    model: nn.Module,
    part: ComponentPlan,
    wanted: Mapping[str, Sequence[Scheme]],
    samples: Sequence[Sample],
    advance: Any,
) -> tuple[dict[str, dict[Scheme, float]], str]:
    errors = layer_sensitivities(
        model,
        wanted,
        _data_free(part.spec.algorithm),
        samples,
        generator=part.spec.generator,
        on_block=lambda block, done, total: advance(done, {"component": part.name, "block": block}),
    )
    missed = {layer: schemes for layer, schemes in wanted.items() if layer not in errors}
    if missed:
        _logger.info("%s: no sample reached %d layers: their weights alone", part.name or part.class_name, len(missed))
        errors |= _weight_errors(model, part, missed, lambda done, metrics: None)
    return errors, f"error of the output, {len(samples)} calls"


def _weight_errors(
    model: nn.Module, part: ComponentPlan, wanted: Mapping[str, Sequence[Scheme]], advance: Any
) -> dict[str, dict[Scheme, float]]:
    """Squared relative errors of the weights times the layer's share of them: no layer counts for more than its size.

    Relative errors alone would give the bits to the smallest layers, absolute ones to those with the largest weights,
    and neither says what the model does with them.
    """
    total = sum(part.assigned[name].shape[0] * part.assigned[name].shape[1] for name in part.layers)
    errors: dict[str, dict[Scheme, float]] = {}
    for name, schemes in wanted.items():
        dense, shape = model.get_submodule(name), part.assigned[name].shape
        errors[name] = {}
        for scheme in schemes:
            generator, algorithm = part.spec.generator(name), _data_free(part.spec.algorithm)
            layer = quantize_module(dense, scheme, algorithm, name=name, generator=generator)
            errors[name][scheme] = measure_layer(dense, layer, None).weight_error ** 2 * shape[0] * shape[1] / total
        advance(len(errors), {"component": part.name, "layer": name})
    return errors


def _data_free(algorithm: AlgorithmConfig) -> AlgorithmConfig:
    return RTNConfig() if algorithm.needs_calibration else algorithm

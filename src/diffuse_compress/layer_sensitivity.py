"""How much each layer suffers in each format: measured, and as a report."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn

from diffuse_compress.caching.runtime import caches_off
from diffuse_compress.calibration.recording import Calibration
from diffuse_compress.calibration.samples import Sample
from diffuse_compress.calibration.sensitivity import layer_sensitivities, output_error, split_samples
from diffuse_compress.components import GROUPS, compute_dtype_of, is_pipeline, model_components
from diffuse_compress.errors import ConfigError, ModelStateError
from diffuse_compress.logging import get_logger
from diffuse_compress.measurement import measure_layer
from diffuse_compress.pipeline_call import CannotCallError, cheap_arguments
from diffuse_compress.plan import ComponentPlan, CompressionPlan
from diffuse_compress.plan_text import align, scheme_labels
from diffuse_compress.progress import Callback, bar
from diffuse_compress.quantization.algorithms.rtn import RTNConfig
from diffuse_compress.quantization.convert import quantize_module
from diffuse_compress.quantization.scheme import Scheme

__all__ = ["LayerSensitivity", "Measurements", "SensitivityReport", "own_calibration"]

_Result = TypeVar("_Result")

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


def _without_caches(method: Callable[..., _Result]) -> Callable[..., _Result]:
    @functools.wraps(method)
    def measured(self: Measurements, *args: Any) -> _Result:
        with caches_off(model_components(self._target).values()):
            return method(self, *args)

    return measured


class Measurements:
    """What a search looks at: a plan's model on its calibration, run as often as it takes.

    Calibrated algorithms quantize on one half of the samples and are judged on the other (``split_samples``), so a
    format that only fits its calibration is not taken for a good one.

    Args:
        target: the pipeline or model of ``plan``.
        plan: whose components, algorithms and calibration are used; items are recorded first, and the plan keeps what
            was recorded.
        device: where blocks are run and calibrated; by default where the model is.
        callback: ``callback(stage, done, total, metrics)``.
    """

    def __init__(
        self,
        target: Any,
        plan: CompressionPlan,
        device: torch.device | str | None = None,
        callback: Callback | None = None,
    ) -> None:
        self._target, self._plan, self._device, self._callback = target, plan, device, callback
        self._models = model_components(target)
        self._own: Calibration | None = None

    @_without_caches
    def sensitivity(self, candidates: Mapping[str, Mapping[str, Sequence[Scheme]]]) -> SensitivityReport:
        """Of the layers in ``candidates`` {component: {layer: formats}}, all of them planned.

        With samples of a component, the error of its output with the layers quantized by the plan's algorithm; without,
        of its weights, rounded to nearest where that algorithm is a calibrated one.

        Raises:
            ModelStateError: weights are on the meta device.
        """
        for name in candidates:
            if _is_meta(self._models[name]):
                raise ModelStateError(
                    f"{name or self._plan.components[name].class_name}: a search for the formats of its layers looks "
                    "at their weights, which are on the meta device. Load the model first."
                )
        if self._plan.calibration is None:
            self._own = own_calibration(self._target, list(self._plan.components), self._callback)
        found: list[LayerSensitivity] = []
        described: dict[str, None] = {}
        for name, wanted in candidates.items():
            part, model = self._plan.components[name], self._models[name]
            samples = self._samples_of(name)
            stage = f"Measuring the sensitivity of {name or part.class_name}"
            with bar(stage, len(wanted) * (2 if samples else 1), self._target, self._callback) as advance:
                if samples:
                    errors, basis = _output_errors(model, part, wanted, samples, self._device, advance)
                else:
                    errors, basis = _weight_errors(model, part, wanted, advance), "error of weights, by their share"
            described[basis] = None
            shapes = {layer: part.assigned[layer].shape for layer in wanted}
            found += [LayerSensitivity(name, layer, shapes[layer], errors[layer]) for layer in wanted]
        return SensitivityReport(self._plan.target_class, found, "; ".join(described))

    @_without_caches
    def output_errors(self, schemes: Mapping[str, Mapping[str, Scheme | None]], label: str) -> dict[str, float]:
        """{component: squared relative error of its output with these formats}, of those that there are samples of.

        The model is as before afterwards.

        Args:
            schemes: {component: {layer: format or None}}; other layers are as the plan has them.
            label: what they are, for the progress bar.
        """
        found = {}
        for name, chosen in schemes.items():
            part, samples = copy.copy(self._plan.components[name]), self._samples_of(name)
            if not samples or _is_meta(self._models[name]):
                continue
            part.assign(chosen)
            layers = part.layers
            stage = f"Trying {label} on {name or part.class_name}"
            with bar(stage, len(layers), self._target, self._callback) as advance:
                found[name] = output_error(
                    self._models[name],
                    layers,
                    part.spec.algorithm,
                    split_samples(samples, part.spec.algorithm),
                    generator=part.spec.generator,
                    observer=part.spec.observer,
                    device=self._device,
                    advance=_by_block(name, advance),
                )
        return found

    def _samples_of(self, component: str) -> Sequence[Sample]:
        given = self._plan.calibration
        if given is not None and not isinstance(given, Calibration):
            components = list(self._plan.components) if is_pipeline(self._target) else None
            given = Calibration.record(self._target, given, components=components, callback=self._callback)
            self._plan.calibration = given
        found = given if given is not None else self._own
        if found is None or component not in found.components:
            return ()
        return found.of(component, compute_dtype_of(self._models[component]))


def _is_meta(model: nn.Module) -> bool:
    return any(parameter.is_meta for parameter in model.parameters())


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


def _output_errors(
    model: nn.Module,
    part: ComponentPlan,
    wanted: Mapping[str, Sequence[Scheme]],
    samples: Sequence[Sample],
    device: torch.device | str | None,
    advance: Any,
) -> tuple[dict[str, dict[Scheme, float]], str]:
    algorithm = part.spec.algorithm
    split = split_samples(samples, algorithm)
    errors = layer_sensitivities(
        model,
        wanted,
        algorithm,
        split,
        generator=part.spec.generator,
        device=device,
        advance=_by_block(part.name, advance),
    )
    missed = {layer: schemes for layer, schemes in wanted.items() if layer not in errors}
    if missed:
        _logger.info("%s: no sample reached %d layers: their weights alone", part.name or part.class_name, len(missed))
        errors |= _weight_errors(model, part, missed, lambda done, metrics: None)
    calls = f"{len(split.judge)} call{'s' if len(split.judge) > 1 else ''}"
    given = f" on {len(split.fit)} other{'s' if len(split.fit) > 1 else ''}" if algorithm.needs_calibration else ""
    return errors, f"error of the output, {calls}, {algorithm.for_search().summary}{given}"


def _by_block(component: str, advance: Any) -> Callable[[str, int, int], None]:
    return lambda block, done, total: advance(done, {"component": component, "block": block})


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
            generator = part.spec.generator(name)
            algorithm = RTNConfig() if part.spec.algorithm.needs_calibration else part.spec.algorithm
            layer = quantize_module(dense, scheme, algorithm, name=name, generator=generator)
            errors[name][scheme] = measure_layer(dense, layer, None).weight_error ** 2 * shape[0] * shape[1] / total
        advance(len(errors), {"component": part.name, "layer": name})
    return errors

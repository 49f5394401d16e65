"""A format for each layer so that a plan meets a size with the least error: ``target_size=`` and ``target_bits=``."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, TypeAlias

from torch import nn

from diffuse_compress.assignment import stock_name
from diffuse_compress.components import model_components
from diffuse_compress.errors import ConfigError, IncompatibleShapeError
from diffuse_compress.families.roles import LayerRole
from diffuse_compress.layer_sensitivity import Measurements, SensitivityReport
from diffuse_compress.patterns import matches
from diffuse_compress.plan import ComponentPlan, CompressionPlan, tensor_rows
from diffuse_compress.plan_text import scheme_labels
from diffuse_compress.quantization.allocation import allocate
from diffuse_compress.quantization.layers import supports
from diffuse_compress.quantization.presets import resolve_preset
from diffuse_compress.quantization.scheme import Scheme

__all__ = ["Candidates", "candidate_schemes", "meet_target", "parse_size"]

Candidates: TypeAlias = dict[str, dict[str, list[Scheme]]]
"""{component: {layer: formats it can take}}."""

_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b\s*\Z", re.IGNORECASE)
_POWER = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}


def parse_size(value: str | int | float) -> int:
    """Bytes of ``"11GB"`` (decimal), ``"10GiB"`` (binary) or a number. Raises ConfigError for another value."""
    if isinstance(value, str):
        found = _SIZE.match(value)
        if found:
            number, prefix, binary = found.groups()
            value = float(number) * (1024 if binary else 1000) ** _POWER[prefix.lower()]
    if isinstance(value, bool) or not isinstance(value, int | float) or not 1 <= value < math.inf:
        raise ConfigError(f'target_size: bytes, or a text such as "11GB" or "10.5GiB", got {value!r}.')
    return int(value)


def candidate_schemes(plan: CompressionPlan, target: Any, schemes: Sequence[Scheme] | None = None) -> Candidates:
    """Which layers a search may give which formats, the planned one first.

    Args:
        plan: layers that it converts, but for those named in its overrides, are candidates.
        target: pipeline or model.
        schemes: to choose from; by default those that the preset of the component mixes.

    Raises:
        ConfigError: a component follows a resolved recipe, or a format has static inputs.
    """
    models = model_components(target)
    found = {name: _of_component(part, models[name], schemes) for name, part in plan.components.items()}
    for name, layers in found.items():
        static = next((s for formats in layers.values() for s in formats if s.has_static_inputs), None)
        if static is not None:
            raise ConfigError(
                f"{name or plan.target_class}: a search tries formats with dynamic inputs, got {static.name}. Name the "
                "layers that are to be static in overrides=, which it leaves alone, or search without them."
            )
    return found


def _of_component(part: ComponentPlan, model: nn.Module, schemes: Sequence[Scheme] | None) -> dict[str, list[Scheme]]:
    if part.spec.rules is not None:
        start = part.spec.label
        raise ConfigError(
            f"{part.name or part.class_name}: a resolved recipe fixes the format of every layer, so there is nothing "
            f'to search. Start from the preset: compression_plan("{start}", target_size=...).'
        )
    preset = resolve_preset(part.spec.preset) if part.spec.preset else None
    found = {}
    for name, item in part.assigned.items():
        if item.scheme is None or any(matches(pattern, name) for pattern, _ in part.spec.overrides):
            continue
        family: Sequence[Scheme] = (item.scheme,)
        if schemes is not None:
            family = schemes
        elif preset is not None:
            family = preset.mixed_modulation if item.role is LayerRole.MODULATION else preset.mixed
        module = model.get_submodule(name)
        # As the algorithm will have them: rotated, say, unless what stands before the layer does that.
        arrives = item.scheme.activation is not None and item.scheme.input_rotation is None
        family = [part.spec.algorithm.format_of(module, scheme, arrives, stock_name(name)) for scheme in family]
        fitting = [scheme for scheme in family if _fits(part, module, item.shape, scheme)]
        first = [item.scheme] if item.scheme in fitting or schemes is None else []
        found[name] = list(dict.fromkeys([*first, *fitting])) or [item.scheme]
    return found


def _fits(part: ComponentPlan, module: nn.Module, shape: tuple[int, int], scheme: Scheme) -> bool:
    try:
        part.spec.algorithm.check(scheme.weight)
        scheme.weight.check_shape("", shape[1])
    except (ConfigError, IncompatibleShapeError):
        return False
    return supports(module, scheme) is None and part.spec.algorithm.unsupported(module, scheme) is None


def _require_whole_layers(plan: CompressionPlan) -> None:
    split = [part.name or part.class_name for part in plan.components.values() if part.splits]
    if split:
        raise ConfigError(
            f"{split[0]}: a search for formats looks at the layers that are there, and split_skips=True takes some of "
            "them apart. Leave one of the two out."
        )


def meet_target(
    plan: CompressionPlan,
    target: Any,
    measurements: Measurements,
    report: SensitivityReport | None = None,
    *,
    size: str | float | None = None,
    bits: float | None = None,
) -> None:
    """Edit ``plan`` so that it meets a size with the least sum of errors; "dense" is among every layer's formats.

    Where the plan has samples, the choice and the largest single format that fits in are both tried on the whole model,
    and the better one is taken: no mixture is worse than that on samples which its calibration was not given.

    Args:
        plan: of dense components.
        target: that it is of.
        measurements: on the plan, made only if the size can be met.
        report: errors of the candidate layers, so that they are not measured.
        size: of all planned components, what stays dense included, as :func:`parse_size` takes it; or
        bits: average for each weight of the candidate layers, scales included.

    Raises:
        ConfigError: the plan splits layers, no choice is that small (the message says how small it can be), everything
            is already, or the report does not know a layer.
    """
    _require_whole_layers(plan)
    size = None if size is None else parse_size(size)
    candidates = _known(plan, target, report) if report is not None else candidate_schemes(plan, target)
    items = _items(plan, model_components(target), candidates)
    if not items:
        raise ConfigError(
            f"{_asked(size, bits)}: every layer that is converted is named in overrides=, which leaves no format to "
            "search for. Name fewer."
        )
    budget = _budget(plan, items, size, bits)
    others = plan.bytes_after - sum(plan.components[item.component].assigned_bytes(item.layer) for item in items)
    report = report if report is not None else measurements.sensitivity(candidates)
    known = {name: report.of(name) for name in candidates}
    errors = [[known[i.component][i.layer][s] if s is not None else 0.0 for s in i.schemes] for i in items]
    mixture = allocate([item.costs for item in items], errors, budget)
    chosen, outcome = _better(measurements, items, errors, mixture, _one_for_all(items, budget))
    for name, schemes in _by_component(items, chosen).items():
        plan.components[name].assign(schemes)
    plan.search = f"mixed precision for {_asked(size, bits)} by {report.basis}{outcome}"
    plan.search_bytes, plan.edited = others + budget, False
    plan.sensitivity = report


def _better(
    measurements: Measurements,
    items: Sequence[_Item],
    errors: Sequence[Sequence[float]],
    mixture: list[int],
    uniform: _Uniform | None,
) -> tuple[list[int], str]:
    """``mixture``, or what is uniform where that has the smaller error on the whole model; and what was found."""
    if uniform is None or uniform.choice == mixture:
        return mixture, ""
    totals = []
    for choice, label in ((uniform.choice, uniform.name), (mixture, "the mixture")):
        found = measurements.output_errors(_by_component(items, choice), label)
        if not found:  # no samples
            return mixture, ""
        # Components without samples count by what the report expects of them.
        totals.append(sum(found.values()) + _expected(items, errors, choice, without=found))
    one, mixed = totals
    outcome = f"; tried, its error is {_percent(mixed)}, that of {uniform.name} for all {_percent(one)}"
    return (mixture, outcome) if mixed <= one else (uniform.choice, f"{outcome}, which is taken")


def _budget(plan: CompressionPlan, items: Sequence[_Item], size: int | None, bits: float | None) -> int:
    """Bytes that the layers of ``items`` may take, or ConfigError where no choice, or no search, is needed."""
    now = sum(plan.components[item.component].assigned_bytes(item.layer) for item in items)
    weights = sum(math.prod(item.shape) for item in items)
    budget = int(bits * weights / 8) if bits is not None else int(size or 0) - (plan.bytes_after - now)
    least, most = (sum(bound(item.costs) for item in items) for bound in (min, max))
    if budget < least:
        smallest = f"{8 * least / weights:.3f} bits" if bits is not None else _size(plan.bytes_after - now + least)
        formats = dict.fromkeys(scheme.name for item in items for scheme in item.schemes if scheme is not None)
        raise ConfigError(
            f"{_asked(size, bits)}: cannot be met, the smallest possible is {smallest} with {', '.join(formats)}. "
            "Ask for that, compress more components, or take a preset with coarser formats."
        )
    if budget >= most:
        raise ConfigError(
            f"{_asked(size, bits)}: it fits in as it is ({_size(plan.bytes_before)}); there is nothing to compress."
        )
    return budget


@dataclasses.dataclass
class _Uniform:
    """One format for all layers, as far as they can take it."""

    name: str
    choice: list[int]


def _one_for_all(items: Sequence[_Item], budget: int) -> _Uniform | None:
    """The largest format that fits into the budget if all layers get it; None if none does.

    A layer that does not know it takes its largest format that is no larger, or its smallest.
    """
    schemes = dict.fromkeys(scheme for item in items for scheme in item.schemes if scheme is not None)
    labels = scheme_labels(list(schemes))
    best: tuple[int, _Uniform | None] = (-1, None)
    for scheme in schemes:
        choice = [item.nearest(scheme) for item in items]
        cost = sum(item.costs[option] for item, option in zip(items, choice, strict=True))
        if best[0] < cost <= budget:
            best = cost, _Uniform(labels[scheme], choice)
    return best[1]


def _by_component(items: Sequence[_Item], choice: Sequence[int]) -> dict[str, dict[str, Scheme | None]]:
    found: dict[str, dict[str, Scheme | None]] = {}
    for item, option in zip(items, choice, strict=True):
        found.setdefault(item.component, {})[item.layer] = item.schemes[option]
    return found


def _expected(
    items: Sequence[_Item], errors: Sequence[Sequence[float]], choice: Sequence[int], *, without: Collection[str]
) -> float:
    return sum(
        e[option] for item, e, option in zip(items, errors, choice, strict=True) if item.component not in without
    )


def _percent(squared: float) -> str:
    return f"{100 * squared**0.5:.3g} %"


def _known(plan: CompressionPlan, target: Any, report: SensitivityReport) -> Candidates:
    """The candidates with the formats that ``report`` knows of each."""
    found: Candidates = {}
    for name, layers in candidate_schemes(plan, target).items():
        errors = report.of(name)
        shapes = {item.layer: item.shape for item in report.layers if item.component == name}
        for layer in layers:
            here = plan.components[name].assigned[layer].shape
            if shapes.get(layer) != here:
                known = f"has one of shape {shapes[layer]}" if layer in shapes else "knows nothing of it"
                raise ConfigError(
                    f"sensitivity: {name or 'this model'} has a layer {layer!r} of shape {here}, the report {known}. "
                    "Measure this model, with the same components and patterns."
                )
        found[name] = {layer: list(errors[layer]) for layer in layers}
    return found


@dataclasses.dataclass
class _Item:
    """A layer with its options; the last is to leave it dense."""

    component: str
    layer: str
    shape: tuple[int, int]
    schemes: list[Scheme | None]
    costs: list[int]

    def nearest(self, scheme: Scheme) -> int:
        """The option that is ``scheme``, else the largest that is no larger, else the smallest."""
        if scheme in self.schemes:
            return self.schemes.index(scheme)
        size = scheme.bits_per_weight(self.shape)
        fitting = [
            option
            for option, other in enumerate(self.schemes)
            if other is not None and other.bits_per_weight(self.shape) <= size
        ]
        return max(fitting, key=self.costs.__getitem__) if fitting else self.costs.index(min(self.costs))


def _items(plan: CompressionPlan, models: Mapping[str, nn.Module], candidates: Candidates) -> list[_Item]:
    items = []
    for name, layers in candidates.items():
        part = plan.components[name]
        sizes = _bytes_by_scheme(part, models[name], layers)
        for layer, formats in layers.items():
            schemes: list[Scheme | None] = [*formats, None]
            costs = [sizes[layer][scheme] for scheme in schemes]
            items.append(_Item(name, layer, part.assigned[layer].shape, schemes, costs))
    return items


def _bytes_by_scheme(
    part: ComponentPlan, model: nn.Module, layers: Mapping[str, Sequence[Scheme]]
) -> dict[str, dict[Scheme | None, int]]:
    """As the plan itself counts them."""
    sizes: dict[str, dict[Scheme | None, int]] = {layer: {} for layer in layers}
    for scheme in dict.fromkeys(scheme for formats in layers.values() for scheme in formats):
        takes = [layer for layer, formats in layers.items() if scheme in formats]
        assigned = {}
        for layer in takes:
            extra = part.spec.algorithm.extra_bytes(model.get_submodule(layer), scheme, stock_name(layer))
            assigned[layer] = dataclasses.replace(part.assigned[layer], scheme=scheme, extra_bytes=extra)
        for row in tensor_rows(model, assigned):
            if row.layer in assigned and row.scheme is not None:
                sizes[row.layer][scheme] = row.bytes_after
                sizes[row.layer][None] = row.bytes_before
    return sizes


def _asked(size: int | None, bits: float | None) -> str:
    return f"target_bits={bits:g}" if bits is not None else f"target_size={_size(int(size or 0))}"


def _size(count: float) -> str:
    """Decimal, as targets are written; never less than it is."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{math.ceil(1000 * count / scale) / 1000:.3f} {unit}"
    return f"{count:.0f} bytes"

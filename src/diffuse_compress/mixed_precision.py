"""A format for each layer so that a plan meets a size with the least error: ``target_size=`` and ``target_bits=``."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from torch import nn

from diffuse_compress.components import model_components
from diffuse_compress.errors import ConfigError, IncompatibleShapeError
from diffuse_compress.families.roles import LayerRole
from diffuse_compress.layer_sensitivity import SensitivityReport
from diffuse_compress.patterns import matches
from diffuse_compress.plan import ComponentPlan, CompressionPlan, tensor_rows
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
    if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 1:
        raise ConfigError(f'target_size: bytes, or a text such as "11GB" or "10.5GiB", got {value!r}.')
    return int(value)


def candidate_schemes(plan: CompressionPlan, target: Any, schemes: Sequence[Scheme] | None = None) -> Candidates:
    """Which layers a search may give which formats, the planned one first.

    Args:
        plan: layers that it converts, but for those named in its overrides, are candidates.
        target: pipeline or model.
        schemes: to choose from; by default those that the preset of the component mixes.

    Raises:
        ConfigError: a component follows a resolved recipe.
    """
    models = model_components(target)
    return {name: _of_component(part, models[name], schemes) for name, part in plan.components.items()}


def _of_component(part: ComponentPlan, model: nn.Module, schemes: Sequence[Scheme] | None) -> dict[str, list[Scheme]]:
    if part.spec.rules is not None:
        start = part.spec.preset or part.spec.scheme.name
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
        fitting = [scheme for scheme in family if _fits(part, model.get_submodule(name), item.shape, scheme)]
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


def meet_target(
    plan: CompressionPlan,
    target: Any,
    sensitivity: SensitivityReport | Callable[[Candidates], SensitivityReport],
    *,
    size: int | None = None,
    bits: float | None = None,
) -> None:
    """Edit ``plan`` so that it meets a size with the least sum of errors; "dense" is among every layer's formats.

    Args:
        plan: of dense components.
        target: that it is of.
        sensitivity: errors of the candidate layers, or what measures them: called only if the size can be met.
        size: bytes of all planned components, what stays dense included; or
        bits: average for each weight of the candidate layers, scales included.

    Raises:
        ConfigError: no choice is that small (the message says how small it can be), everything is already, or the
            report does not know a layer.
    """
    report = sensitivity if isinstance(sensitivity, SensitivityReport) else None
    candidates = _known(plan, target, report) if report is not None else candidate_schemes(plan, target)
    items = _items(plan, model_components(target), candidates)
    now = sum(plan.components[item.component].assigned_bytes(item.layer) for item in items)
    weights = sum(item.weights for item in items)
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
    report = report if report is not None else sensitivity(candidates)  # type: ignore[operator]
    known = {name: report.of(name) for name in candidates}
    errors = [[known[i.component][i.layer][s] if s is not None else 0.0 for s in i.schemes] for i in items]
    chosen = allocate([item.costs for item in items], errors, budget)
    schemes: dict[str, dict[str, Scheme | None]] = {name: {} for name in candidates}
    for item, choice in zip(items, chosen, strict=True):
        schemes[item.component][item.layer] = item.schemes[choice]
    for name, part in plan.components.items():
        part.assign(schemes[name])
    plan.search = f"mixed precision for {_asked(size, bits)} by {report.basis}"
    plan.sensitivity = report


def _known(plan: CompressionPlan, target: Any, report: SensitivityReport) -> Candidates:
    """The candidates with the formats that ``report`` knows of each."""
    found: Candidates = {}
    for name, layers in candidate_schemes(plan, target).items():
        errors = report.of(name)
        unknown = [layer for layer in layers if layer not in errors]
        if unknown:
            raise ConfigError(
                f"sensitivity: the report knows nothing of {unknown[0]!r} in {name or 'this model'}. Measure this "
                "model, with the same components and patterns."
            )
        found[name] = {layer: list(errors[layer]) for layer in layers}
    return found


@dataclasses.dataclass
class _Item:
    """A layer with its options; the last is to leave it dense."""

    component: str
    layer: str
    weights: int
    schemes: list[Scheme | None]
    costs: list[int]


def _items(plan: CompressionPlan, models: Mapping[str, nn.Module], candidates: Candidates) -> list[_Item]:
    items = []
    for name, layers in candidates.items():
        part = plan.components[name]
        sizes = _bytes_by_scheme(part, models[name], layers)
        for layer, formats in layers.items():
            rows, columns = part.assigned[layer].shape
            schemes: list[Scheme | None] = [*formats, None]
            items.append(_Item(name, layer, rows * columns, schemes, [sizes[layer][scheme] for scheme in schemes]))
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
            extra = part.spec.algorithm.extra_bytes(model.get_submodule(layer), scheme)
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

"""What a model is made of and how its pipeline steps: family, blocks, branches, what depends on the timestep."""

from __future__ import annotations

import inspect
import json
import re
from collections import Counter
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import nn

from diffuse_compress.components import GROUPS
from diffuse_compress.families.base import Dependence, Family
from diffuse_compress.families.registry import family_of
from diffuse_compress.families.roles import LayerRole, block_elements, has_matrix, layer_roles
from diffuse_compress.integrations.component import weight_elements
from diffuse_compress.patterns import without_indices
from diffuse_compress.runtime.blocks import why_not_composed

__all__ = ["GENERIC", "model_anatomy", "step_behaviour"]

_MAPPED = (Dependence.TIMESTEP, Dependence.TIMESTEP_AND_CONDITION, Dependence.CONDITION)
GENERIC = "generic"
"""Family of a class that no family file describes."""


def model_anatomy(model: nn.Module) -> dict[str, Any]:
    """Facts about a model, loaded or on the meta device. It is never run.

    Returns:
        family: its name; "generic" for a class without a family file, of which only the block lists are known.
        blocks: for each class of block its count, its branches in order, and why it is not composed (None if it is).
        roles: {part that layers play: their count and parameters}. parameters: of the whole model, tied ones once.
        modulation_share: of all parameters, those that see one row per sample. dependence: {what a layer depends on:
        parameters}, None without a family. temporal_map: {timestep, condition, or both: layers that depend on it alone,
        {name, with * for indices where several have it: count}}, None without a family. sensitive: patterns.
    """
    family = family_of(model)
    counts, total = _parameter_counts(model)
    roles: dict[str, dict[str, int]] = {}
    for name, role in layer_roles(model).items():
        entry = roles.setdefault(role.value, {"layers": 0, "parameters": 0})
        entry["layers"] += 1
        entry["parameters"] += counts[name]
    modulation = roles.get(LayerRole.MODULATION.value, {"parameters": 0})["parameters"]
    dependence: Counter[str] = Counter()
    kinds: dict[str, list[str]] = {kind.value: [] for kind in _MAPPED}
    if family is not None:
        temporal = family.temporal(model)
        for name, count in counts.items():
            kind = temporal.of(name)
            dependence[kind.value] += count
            if kind in _MAPPED:
                kinds[kind.value].append(name)
    return {
        "family": GENERIC if family is None else family.name,
        "blocks": _block_facts(model, family),
        "roles": roles,
        "parameters": total,
        "modulation_share": modulation / total if total else 0.0,
        "dependence": None if family is None else {d.value: dependence[d.value] for d in Dependence},
        "temporal_map": None if family is None else {kind: _shapes(found) for kind, found in kinds.items()},
        "sensitive": [] if family is None else list(family.sensitive),
    }


def _shapes(names: list[str]) -> dict[str, int]:
    counts = Counter(map(without_indices, names))
    return {
        (name if counts[shape] == 1 else shape): counts[shape] for name in names if (shape := without_indices(name))
    }


def _parameter_counts(model: nn.Module) -> tuple[dict[str, int], int]:
    """{linear or convolution: elements of its dense weight}, and all parameters of the model.

    A tied parameter counts once, and with a layer rather than with an embedding: the other layers have 0.
    """
    counts: dict[str, int] = {}
    seen: set[int] = set()
    layers = {name: module for name, module in model.named_modules() if has_matrix(module)}
    for name, layer in layers.items():
        weight = layer._parameters.get("qweight", layer._parameters.get("weight"))
        counts[name] = 0 if id(weight) in seen else weight_elements(layer)
        if weight is not None:
            seen.add(id(weight))
    # Embeddings, norms and biases count in the whole only; scales of a packed weight do not count.
    total = sum(counts.values())
    for name, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in seen and (name not in layers or key == "bias"):
                seen.add(id(parameter))
                total += parameter.numel()
    return counts, total


def _block_facts(model: nn.Module, family: Family | None) -> dict[str, dict[str, Any]]:
    blocks: dict[str, dict[str, Any]] = {}
    for name in family.blocks(model) if family is not None else block_elements(model):
        block = model.get_submodule(name)
        entry = blocks.setdefault(type(block).__name__, {"count": 0, "branches": [], "unfused": None})
        entry["count"] += 1
        kind = family.kind_of(block) if family is not None else None
        entry["unfused"] = entry["unfused"] or why_not_composed(block)
        if kind is not None:
            found = [f"{branch.name} ({branch.role.value})" for branch in kind.branches(block)]
            entry["branches"] += [branch for branch in found if branch not in entry["branches"]]
    return blocks


def step_behaviour(folder: Path) -> dict[str, Any] | None:
    """How the sampling loop of a pipeline folder goes, from its files and its class; None for a bare model.

    Returns:
        scheduler: class name. row: where the position in the schedule comes from, in the order that ``Run.place`` of
        ``runtime/steps.py`` asks; a pipeline that scales or casts the timestep (Flux) passes no element of the
        schedule. order: evaluations in a step of the solver. calls: what the source of the pipeline shows of calls in
        a step. denoisers: their names. boundary_ratio: where the first of two that share the schedule hands over.
    """
    index = folder / "model_index.json"
    if not index.is_file():
        return None
    entries = json.loads(index.read_text(encoding="utf-8"))
    scheduler = (entries.get("scheduler") or [None, None])[1]
    denoisers = [
        n for n, v in entries.items() if isinstance(v, list) and v[0] is not None and GROUPS["denoisers"].match(n)
    ]
    cls: Any = getattr(import_module("diffusers"), str(scheduler), None) if scheduler else None
    row = "the timestep where it is an element of the schedule, else "
    row += "the scheduler's step_index" if hasattr(cls, "step_index") else "counting the scheduler's steps"
    experts = len(denoisers) > 1 and entries.get("boundary_ratio") is not None
    return {
        "scheduler": scheduler,
        "row": None if cls is None else row,
        "order": None if cls is None else getattr(cls, "order", 1),
        "calls": _calls_in_a_step(str(entries.get("_class_name"))),
        "denoisers": denoisers,
        "boundary_ratio": entries.get("boundary_ratio") if experts else None,
    }


def _calls_in_a_step(pipeline: str) -> str:
    """What the source of a pipeline's ``__call__`` shows of classifier-free guidance."""
    cls: Any = getattr(import_module("diffusers"), pipeline, None)
    try:
        source = inspect.getsource(inspect.unwrap(cls.__call__))
    except (AttributeError, OSError, TypeError):
        return "unknown"
    names = list(dict.fromkeys(re.findall(r"cache_context\(\s*[\"'](\w+)[\"']", source)))
    if len(names) > 1:
        return f"one call each for {' and '.join(names)} with guidance"
    if re.search(r"torch\.cat\(\[\w+\] \* 2|torch\.cat\(\[half, half\]", source):
        return "one call, both halves of guidance in one batch"
    return "one call"

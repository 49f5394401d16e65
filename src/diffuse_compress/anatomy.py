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
from diffuse_compress.families.base import Dependence
from diffuse_compress.families.registry import family_of
from diffuse_compress.families.roles import LayerRole, block_elements, has_matrix, layer_roles
from diffuse_compress.integrations.component import weight_elements
from diffuse_compress.runtime.blocks import why_not_composed

__all__ = ["model_anatomy", "step_behaviour"]


def model_anatomy(model: nn.Module) -> dict[str, Any]:
    """Facts about a model, loaded or on the meta device.

    Returns:
        family: its name, or None for a class without a family file. blocks: for each class of block its count, its
        branches in order, and why it is not composed (None if it is). modulation_share: of all parameters, those that
        see one row per sample. dependence: {what a layer depends on: parameters}, None without a family. sensitive:
        patterns.
    """
    family = family_of(model)
    counts = {name: weight_elements(module) for name, module in model.named_modules() if has_matrix(module)}
    # Embeddings, norms and biases count in the whole only.
    others = (
        parameter.numel()
        for name, module in model.named_modules()
        for key, parameter in module.named_parameters(recurse=False)
        if name not in counts or key == "bias"
    )
    total = sum(counts.values()) + sum(others)
    roles = layer_roles(model)
    modulation = sum(count for name, count in counts.items() if roles.get(name) is LayerRole.MODULATION)
    names = family.blocks(model) if family is not None else block_elements(model)
    blocks: dict[str, dict[str, Any]] = {}
    for name in names:
        block = model.get_submodule(name)
        entry = blocks.setdefault(type(block).__name__, {"count": 0, "branches": [], "unfused": None})
        entry["count"] += 1
        kind = family.kind_of(block) if family is not None else None
        entry["unfused"] = entry["unfused"] or why_not_composed(block)
        if kind is not None:
            found = [f"{branch.name} ({branch.role.value})" for branch in kind.branches(block)]
            entry["branches"] += [branch for branch in found if branch not in entry["branches"]]
    dependence: Counter[str] | None = None
    if family is not None:
        temporal = family.temporal(model)
        dependence = Counter()
        for name, count in counts.items():
            dependence[temporal.of(name).value] += count
    return {
        "family": None if family is None else family.name,
        "blocks": blocks,
        "parameters": total,
        "modulation_share": modulation / total if total else 0.0,
        "dependence": None if dependence is None else {d.value: dependence[d.value] for d in Dependence},
        "sensitive": [] if family is None else list(family.sensitive),
    }


def step_behaviour(folder: Path) -> dict[str, Any] | None:
    """How the sampling loop of a pipeline folder goes, from its files and its class; None for a bare model.

    Returns:
        scheduler: class name. calls: what the source of the pipeline shows of calls in a step. row: where the position
        in the schedule comes from (``runtime/steps.py``). experts: (denoisers, boundary) if two share the schedule.
    """
    index = folder / "model_index.json"
    if not index.is_file():
        return None
    entries = json.loads(index.read_text(encoding="utf-8"))
    scheduler = (entries.get("scheduler") or [None, None])[1]
    denoisers = [
        n for n, v in entries.items() if isinstance(v, list) and v[0] is not None and GROUPS["denoisers"].match(n)
    ]
    cls = getattr(import_module("diffusers"), str(scheduler), None) if scheduler else None
    experts = len(denoisers) > 1 and entries.get("boundary_ratio") is not None
    return {
        "scheduler": scheduler,
        "row": None if cls is None else "its step_index" if hasattr(cls, "step_index") else "counting its steps",
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

"""Evaluation results of a compressed object: attached as records, published in its card's metadata and text.

The Hub reads ``model-index`` from a card's metadata, which huggingface_hub calls ``eval_results``. Results are of one
compression: another recipe, and they are gone from the card.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffuse_compress.components import model_components, resolve_names
from diffuse_compress.errors import ConfigError
from diffuse_compress.evaluation.records import Record, eval_results, load_record
from diffuse_compress.integrations.component import ComponentState, get_state
from diffuse_compress.integrations.origin import base_model_of
from diffuse_compress.quantization.spec import QuantizationSpec
from diffuse_compress.recipe import Recipe, weights_among

__all__ = ["SOURCE", "attach_results", "card_results", "foreign_results", "require_results_of", "results_text"]

SOURCE = "https://github.com/diffuse-compress/diffuse-compress"
"""Source of our results in a card; tells them from the owner's."""
_FINGERPRINT = "recipe_sha256"
_RecordOrPath = Record | str | Path


def attach_results(target: Any, records: _RecordOrPath | Sequence[_RecordOrPath]) -> Any:
    """Have the card that ``save_pretrained`` and ``push_to_hub`` write tell what evaluation found.

    Scores go into the card's metadata (``model-index``) and a table, each with device, date, N and interval. They
    replace what was attached before, and are forgotten with the compression: ``decompress``, or loading it anew.

    Args:
        target: compressed pipeline or model.
        records: of ``eval generate``, ``eval reproduce`` and what scores them: records, their files or runs' folders.

    Returns:
        ``target``.

    Raises:
        ConfigError: ``target`` is not compressed, or a record has no scores or is of another recipe or model.
        CheckpointError: a file that is no record.

    Example:
        >>> dc.attach_results(pipe, "reproduced/PixArt-Sigma/w4a8").push_to_hub("me/pixart-w4a8")  # doctest: +SKIP
    """
    states = _states(target)
    if not states:
        raise ConfigError(f'attach_results: {type(target).__name__} is not compressed; call compress("w8a8") first.')
    carried = Recipe({name: (state.config,) for name, state in states.items()})
    found = require_results_of(target, carried, records)
    models = model_components(target)
    bases = {str(base_model_of(models[name], state)) for name, state in states.items()}
    for record in found:
        named = record.model["id"]
        if "/" in named and "None" not in bases and named not in bases:
            raise ConfigError(
                f"attach_results: {record.name} is of {named}, and this {type(target).__name__} of "
                f"{', '.join(sorted(bases))}."
            )
    for state in states.values():
        state.results = tuple(found)
    return target


def require_results_of(target: Any, recipe: Recipe, records: _RecordOrPath | Sequence[_RecordOrPath]) -> list[Record]:
    """The records, if all are of ``recipe`` on an object like ``target`` and have scores.

    Raises:
        ConfigError: one is not, or has none; the message names it.
    """
    listed = [records] if isinstance(records, Record | str | Path) else list(records)
    wanted = _specs(recipe, target)
    found = []
    for entry in listed:
        record = entry if isinstance(entry, Record) else load_record(entry)
        if not record.metrics:
            raise ConfigError(f"results: {record.name} has no scores. Run eval paired or eval fid on its run first.")
        theirs = {} if record.recipe is None else _specs(Recipe.from_dict(record.recipe), target)
        if theirs.keys() != wanted.keys() or not all(_agree(theirs[name], wanted[name]) for name in wanted):
            raise ConfigError(
                f"results: {record.name} is of {_named(theirs)}, and this {type(target).__name__} of {_named(wanted)}. "
                "Scores of another recipe say nothing about it."
            )
        found.append(record)
    return found


def card_results(target: Any, existing: Sequence[Any] | None) -> list[Any]:
    """huggingface_hub's ``EvalResult`` of a card: the owner's, and ours of this compression.

    Args:
        target: compressed object.
        existing: results of the card that is there.
    """
    states = _states(target)
    fingerprint = _fingerprint(states)
    attached = next((state.results for state in states.values() if state.results), ())
    if attached:
        ours = [
            dataclasses.replace(
                result,
                metric_args={**(result.metric_args or {}), _FINGERPRINT: fingerprint},
                source_name="diffuse_compress",
                source_url=SOURCE,
            )
            for result in eval_results(attached)
        ]
    else:  # written by an earlier save, of the same compression
        kept = [result for result in existing or () if result.source_url == SOURCE]
        ours = [result for result in kept if (result.metric_args or {}).get(_FINGERPRINT) == fingerprint]
    return [*foreign_results(existing), *ours]


def foreign_results(existing: Sequence[Any] | None) -> list[Any]:
    """Those of a card's results that are not ours."""
    return [result for result in existing or () if result.source_url != SOURCE]


def results_text(results: Sequence[Any]) -> str:
    """Our results as a markdown section; "" if there are none."""
    rows = []
    for result in results:
        if result.source_url != SOURCE:
            continue
        args = result.metric_args or {}
        low, high = args.get("interval_95") or (None, None)
        value = f"{result.metric_value:.4g}{' ' + args['unit'] if args.get('unit') else ''}"
        interval = "–" if low is None or high is None else f"{low:.4g} to {high:.4g}"
        against = f", against {args['reference']['name']}" if args.get("reference") else ""
        cells = [result.metric_name, value, interval, str(args.get("count", "–")), f"{result.metric_config}{against}"]
        cells += [result.dataset_name, args.get("device", "–"), args.get("date", "–")]
        rows.append("| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |")
    if not rows:
        return ""
    header = ["| Score | Value | 95 % interval | N | How | Set | Device | Date |", "|" + "---|" * 8]
    return "\n".join(["## Evaluation", "", *header, *rows])


def _states(target: Any) -> dict[str, ComponentState]:
    states = {name: get_state(model) for name, model in model_components(target).items()}
    return {name: state for name, state in states.items() if state is not None}


def _specs(recipe: Recipe, target: Any) -> dict[str, QuantizationSpec]:
    """{component: what is asked of its weights}; of a bare model the one that there is."""
    weights = {name: weights_among(configs) for name, configs in recipe.components.items()}
    given = {name: configs[0].spec for name, configs in weights.items() if configs}
    if model_components(target).keys() == {""}:
        return dict.fromkeys([""], next(iter(given.values()))) if given else {}
    return {name: given[key] for key, names in resolve_names(given, target).items() for name in names}


def _agree(one: QuantizationSpec, other: QuantizationSpec) -> bool:
    """Equal requests; which layers that were is compared where both are resolved."""
    if None not in (one.rules, other.rules) and one.rules != other.rules:
        return False
    return dataclasses.replace(one, rules=None) == dataclasses.replace(other, rules=None)


def _named(specs: Mapping[str, QuantizationSpec]) -> str:
    found = [f"{name + ': ' if name else ''}{spec.label}" for name, spec in specs.items()]
    return ", ".join(found) or "the dense model"


def _fingerprint(states: Mapping[str, ComponentState]) -> str:
    """First 16 digits of a hash of what was asked of every component."""
    asked = {name: {**state.config.spec.to_dict(), "rules": None} for name, state in states.items()}
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:16]

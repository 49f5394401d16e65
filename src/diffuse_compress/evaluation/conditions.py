"""What pictures are asked for: prompt files of the common forms, class labels, or nothing."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from diffuse_compress.errors import ConfigError

__all__ = ["Condition", "class_conditions", "conditions_digest", "read_prompts", "unconditional"]

_TEXT_KEYS = ("prompt", "prompt_en", "caption", "text", "prompts", "captions")
_ENCODING = "utf-8-sig"  # spreadsheets write a byte order mark


@dataclass(frozen=True)
class Condition:
    """What one picture is asked for; unconditional if both are None.

    Attributes:
        prompt: text.
        class_label: number of a class.
        metadata: what the file says besides, for the manifest.
    """

    prompt: str | None = None
    class_label: int | None = None
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """The ``data.kind`` of a record."""
        return "prompts" if self.prompt is not None else "classes" if self.class_label is not None else "unconditional"


def read_prompts(
    path: str | Path, *, limit: int | None = None, shuffle: int | None = None, dimension: str | None = None
) -> list[Condition]:
    """Prompts of a file, by its suffix and form.

    * ``.txt``: a prompt a line; empty lines and those that begin with ``#`` are left out.
    * ``.csv``, ``.tsv`` with a header (DrawBench, PartiPrompts): the column ``Prompts``, ``Prompt`` or ``Caption``; the
      others are kept as metadata.
    * ``.jsonl`` (GenEval): an object a line, its key ``prompt``; the rest is metadata.
    * ``.json``: COCO captions (``{"annotations": [{"image_id", "caption"}]}``; of each image its first caption, in the
      order of the file), the VBench suite (a list of ``{"prompt_en", "dimension"}``), any list of texts or of such
      objects, or ``{name: text}``.

    Args:
        path: of the file.
        limit: take the first so many, after shuffling.
        shuffle: seed of an order of its own; None keeps the file's.
        dimension: of the VBench suite: take its prompts only.

    Raises:
        ConfigError: no such file, another form, or no prompts in it; the message names the place.
    """
    path = Path(path)
    readers = {".txt": _from_text, ".csv": _from_table, ".tsv": _from_table, ".jsonl": _from_lines, ".json": _from_json}
    if path.suffix.lower() not in readers:
        raise ConfigError(f"{path}: prompt files end with {', '.join(readers)}, got {path.suffix or 'no suffix'!r}.")
    try:
        found = readers[path.suffix.lower()](path)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"{path}: not a readable prompt file ({error}).") from error
    if dimension is not None:
        known = sorted({name for condition in found for name in condition.metadata.get("dimension", ())})
        found = [condition for condition in found if dimension in condition.metadata.get("dimension", ())]
        if not found:
            raise ConfigError(
                f"{path}: has no prompts of dimension {dimension!r}; it has {', '.join(known) or 'none'}."
            )
    if shuffle is not None:
        found = [found[i] for i in np.random.default_rng(shuffle).permutation(len(found))]
    if not found or (limit is not None and limit < 1):
        raise ConfigError(f"{path}: need at least one prompt, got {len(found)} with limit={limit}.")
    return found[:limit]


def class_conditions(classes: str | Iterable[int], count: int | None = None) -> list[Condition]:
    """Class labels in order, repeated from the start until there are ``count``.

    Args:
        classes: numbers, or text such as ``0-999`` or ``1,5,7-9``.
        count: how many; None takes each once.

    Raises:
        ConfigError: text of another form, or no classes.
    """
    labels = list(_parse_classes(classes) if isinstance(classes, str) else classes)
    if not labels or (count is not None and count < 1):
        raise ConfigError(f"classes: need at least one class and one sample, got {classes!r} and count={count}.")
    total = len(labels) if count is None else count
    return [Condition(class_label=labels[i % len(labels)]) for i in range(total)]


def unconditional(count: int) -> list[Condition]:
    """``count`` times nothing. Raises ConfigError for a count under one."""
    if count < 1:
        raise ConfigError(f"unconditional: need count >= 1, got {count}.")
    return [Condition()] * count


def conditions_digest(conditions: Sequence[Condition]) -> str:
    """First 16 digits of a hash of prompts and labels in order."""
    listed = [[condition.prompt, condition.class_label] for condition in conditions]
    return hashlib.sha256(json.dumps(listed).encode()).hexdigest()[:16]


def _parse_classes(text: str) -> Iterable[int]:
    for part in text.split(","):
        first, _, last = part.strip().partition("-")
        try:
            yield from range(int(first), int(last or first) + 1)
        except ValueError as error:
            raise ConfigError(f"classes: need numbers and ranges such as 0-999 or 1,5,7-9, got {text!r}.") from error


def _from_text(path: Path) -> list[Condition]:
    lines = (line.strip() for line in path.read_text(encoding=_ENCODING).splitlines())
    return [Condition(line) for line in lines if line and not line.startswith("#")]


def _from_table(path: Path) -> list[Condition]:
    with path.open(encoding=_ENCODING, newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ","))
    return [
        _from_object({str(k).strip(): v for k, v in row.items() if k}, f"{path}:{i}") for i, row in enumerate(rows, 2)
    ]


def _from_lines(path: Path) -> list[Condition]:
    found = []
    for number, line in enumerate(path.read_text(encoding=_ENCODING).splitlines(), start=1):
        if line.strip():
            found.append(_from_object(_json(line, f"{path}:{number}"), f"{path}:{number}"))
    return found


def _from_json(path: Path) -> list[Condition]:
    data = _json(path.read_text(encoding=_ENCODING), str(path))
    if isinstance(data, dict) and isinstance(data.get("annotations"), list):
        first: dict[Any, Condition] = {}
        for index, entry in enumerate(data["annotations"]):
            condition = _from_object(entry, f"{path}: annotations[{index}]")
            first.setdefault(condition.metadata.get("image_id", index), condition)
        return list(first.values())
    if isinstance(data, dict):
        lists = [value for value in data.values() if isinstance(value, list)]
        data = lists[0] if len(lists) == len(data) == 1 else [{"prompt": v, "id": k} for k, v in data.items()]
    if not isinstance(data, list):
        raise ConfigError(f"{path}: need a list of prompts or COCO captions, got {type(data).__name__}.")
    return [_from_object(entry, f"{path}: entry {index}") for index, entry in enumerate(data)]


def _from_object(entry: Any, where: str) -> Condition:
    if isinstance(entry, str) and entry.strip():
        return Condition(entry.strip())
    if isinstance(entry, dict):
        lower = {str(key).lower(): key for key in entry}
        for key in _TEXT_KEYS:
            value = entry.get(lower.get(key))
            if isinstance(value, str) and value.strip():
                rest = {k: v for k, v in entry.items() if k != lower[key]}
                return Condition(value.strip(), metadata=rest)
    raise ConfigError(
        f"{where}: need a text, or an object with one of {', '.join(_TEXT_KEYS[:4])}, got {entry!r:.120}."
    )


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{where}: not readable as JSON ({error}).") from error

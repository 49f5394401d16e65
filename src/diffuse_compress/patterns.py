"""Patterns over qualified module names: matching them, and writing a set of names as few patterns."""

from __future__ import annotations

import fnmatch
import re
from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping
from functools import lru_cache
from typing import TypeVar

from diffuse_compress.errors import ConfigError, nearest

__all__ = ["first_match", "generalize", "matches", "require_match", "without_indices"]

_Value = TypeVar("_Value", bound=Hashable)
_INDEX = re.compile(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.|$)")


def matches(pattern: str, name: str) -> bool:
    """True if ``pattern`` names the module ``name`` or one of its ancestors.

    Three forms: ``re:<regex>`` (full match); a glob if it holds ``*``, ``?`` or ``[``, where ``*`` spans dots;
    else whole dotted components anywhere in the name, so ``"attn1"`` and ``"attn1.to_q"`` match
    ``blocks.0.attn1.to_q`` and ``"attn"`` does not.
    """
    return _compiled(pattern).search(name) is not None


@lru_cache(maxsize=4096)
def _compiled(pattern: str) -> re.Pattern[str]:
    if pattern.startswith("re:"):
        try:
            return re.compile(rf"\A(?:{pattern[3:]})\Z")
        except re.error as error:
            raise ConfigError(f"Pattern {pattern!r}: not a regular expression ({error}).") from error
    if any(char in pattern for char in "*?["):
        body = fnmatch.translate(pattern).removesuffix(r"\Z").removesuffix(r"\z")
        return re.compile(rf"\A{body}(?:\..*)?\Z", re.DOTALL)
    return re.compile(rf"(?:\A|\.){re.escape(pattern)}(?:\.|\Z)")


def without_indices(name: str) -> str:
    """``blocks.*.attn.to_q`` of ``blocks.3.attn.to_q``."""
    return _INDEX.sub("*", name)


def first_match(patterns: Iterable[tuple[str, _Value]], name: str) -> _Value | None:
    """Value of the last pair whose pattern matches (later patterns win), or None."""
    found = None
    for pattern, value in patterns:
        if matches(pattern, name):
            found = value
    return found


def require_match(patterns: Iterable[str], names: Iterable[str], what: str) -> None:
    """Raise ConfigError for a pattern that matches none of ``names``: a typo must not pass silently."""
    known = list(names)
    for pattern in patterns:
        if not any(matches(pattern, name) for name in known):
            parts = {part for name in known for part in name.split(".") if not part.isdigit()}
            raise ConfigError(
                f"{what}: pattern {pattern!r} matches no layer of this model; {nearest(pattern, sorted(parts)[:60])}."
            )


def generalize(assigned: Mapping[str, _Value]) -> list[tuple[str, _Value]]:
    """Write ``{layer name: value}`` as few ``re:`` patterns that together match exactly these layers.

    Indices become ``\\d+`` where every name of that shape has the same value; elsewhere they are listed.
    ``assigned`` must hold every layer of the model that could match (value None for those left alone): what is not
    listed cannot be told from what is. Pairs with value None are dropped from the result.
    """
    shapes: dict[str, dict[str, _Value]] = defaultdict(dict)
    for name, value in assigned.items():
        shapes[without_indices(name)][name] = value
    rules: list[tuple[str, _Value]] = []
    for shape, members in shapes.items():
        values = set(members.values())
        if len(values) == 1:
            value = values.pop()
            if value is not None:
                rules.append((_regex(shape), value))
            continue
        grouped: dict[_Value, list[str]] = defaultdict(list)
        for name, value in members.items():
            if value is not None:
                grouped[value].append(name)
        for value, names in grouped.items():
            rules.append(("re:" + "|".join(_listed(shape, names)), value))
    return rules


def _listed(shape: str, names: list[str]) -> list[str]:
    """Regular expressions that match these names of one shape: ``blocks\\.(?:0|2|7)\\.to_q``."""
    indices = [tuple(_INDEX.findall(name)) for name in names]
    # The index that differs most is listed; names that differ in another one get an expression of their own.
    place = max(range(len(indices[0])), key=lambda i: len({index[i] for index in indices}), default=0)
    alike: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for index in indices:
        alike[index[:place] + index[place + 1 :]].append(index[place] if index else "")
    found = []
    for others, listed in alike.items():
        pieces = [*others[:place], listed[0] if len(listed) == 1 else f"(?:{'|'.join(listed)})", *others[place:]]
        texts = [re.escape(part) for part in shape.split("*")]
        found.append(texts[0] + "".join(piece + text for piece, text in zip(pieces, texts[1:], strict=False)))
    return found


def _regex(shape: str) -> str:
    if "*" not in shape:
        return "re:" + re.escape(shape)
    return "re:" + r"\d+".join(re.escape(part) for part in shape.split("*"))

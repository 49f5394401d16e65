"""The errors users meet. Each message says what was required, what was found and what to do."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from typing import Any

__all__ = [
    "CheckpointError",
    "CompressionConflictError",
    "ConfigError",
    "DiffuseCompressError",
    "DiffuseCompressWarning",
    "IncompatibleShapeError",
    "MissingDependencyError",
    "ModelStateError",
    "UnsupportedHardwareError",
    "known_fields",
    "nearest",
    "reasons_text",
]


class DiffuseCompressError(Exception):
    """Base of every error raised on purpose by this package."""


class ConfigError(DiffuseCompressError, ValueError):
    """A preset, pattern, component or field that does not exist or does not fit the others."""


class IncompatibleShapeError(DiffuseCompressError, ValueError):
    """A scheme that cannot be applied to a layer of this shape."""


class ModelStateError(DiffuseCompressError, RuntimeError):
    """The model is in a state (meta tensors, hooks, foreign quantization) in which nothing can be converted."""


class CompressionConflictError(DiffuseCompressError, ValueError):
    """The component already carries another configuration of the same kind."""


class UnsupportedHardwareError(DiffuseCompressError, RuntimeError):
    """The device lacks what the scheme needs; the message names what it has."""


class MissingDependencyError(DiffuseCompressError, ImportError):
    """An optional package is needed; the message gives the pip command."""


class CheckpointError(DiffuseCompressError, RuntimeError):
    """A checkpoint that is corrupted, incomplete or written by a newer schema."""


class DiffuseCompressWarning(UserWarning):
    """Category of every warning of this package."""


def nearest(word: str, choices: Iterable[str], limit: int = 3) -> str:
    """Text listing the closest names, then all of them: ``did you mean 'w4a8'? Available: ...``."""
    known = sorted(choices)
    close = difflib.get_close_matches(word.lower(), known, n=limit, cutoff=0.5)
    hint = f"did you mean {' or '.join(repr(name) for name in close)}? " if close else ""
    return f"{hint}Available: {', '.join(known)}"


def known_fields(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """``values``, arguments of a dataclass; raises ConfigError for one that it does not have."""
    names = [field.name for field in dataclasses.fields(cls)]
    unknown = next((name for name in values if name not in names), None)
    if unknown is not None:
        raise ConfigError(f"{cls.__name__}: unknown field {unknown!r}; {nearest(unknown, names)}")
    return dict(values)


def reasons_text(reasons: Mapping[str, str]) -> str:
    """{layer: reason} as text, layers of one reason together: ``a, b, c and 5 more: reason; d: another``."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        by_reason.setdefault(reason, []).append(name)
    return "; ".join(
        f"{', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}: {reason}"
        for reason, names in by_reason.items()
    )

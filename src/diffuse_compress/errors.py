"""The errors users meet. Each message says what was required, what was found and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

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
    "nearest",
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

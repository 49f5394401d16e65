"""The package's logger, ``diffuse_compress``, and its verbosity.

As a library should, it writes nothing on its own but warnings: what it does is logged at INFO, and reaches whatever
handlers the application has. ``set_verbosity_info()`` also adds one that writes to standard error.
``DIFFUSE_COMPRESS_VERBOSITY`` (debug, info, warning, error, critical) sets the level when the package is imported.
Progress bars follow the switches of diffusers and transformers.
"""

from __future__ import annotations

import logging
import os

__all__ = [
    "get_logger",
    "get_verbosity",
    "set_verbosity",
    "set_verbosity_debug",
    "set_verbosity_error",
    "set_verbosity_from_environment",
    "set_verbosity_info",
    "set_verbosity_warning",
]

_ROOT = "diffuse_compress"
_VARIABLE = "DIFFUSE_COMPRESS_VERBOSITY"
_FORMAT = "[%(levelname)s|%(name)s] %(message)s"


class _UntilOthers(logging.StreamHandler):  # type: ignore[type-arg]
    """Writes to standard error, and falls silent once the application has set up handlers: they get every line."""

    def emit(self, record: logging.LogRecord) -> None:
        if not logging.getLogger().handlers:
            super().emit(record)


def get_logger(name: str = _ROOT) -> logging.Logger:
    """Logger of a module of the package (``__name__``), or the one above all of them."""
    return logging.getLogger(name)


def get_verbosity() -> int:
    """Level of the package's logger, as in the standard library: 10 debug, 20 info, 30 warning, 40 error."""
    return get_logger().getEffectiveLevel()


def set_verbosity(level: int) -> None:
    """Log what is at ``level`` or above; to standard error, unless the application has handlers of its own."""
    logger = get_logger()
    logger.setLevel(level)
    if not logger.hasHandlers():
        handler = _UntilOthers()
        handler.setFormatter(logging.Formatter(_FORMAT))
        logger.addHandler(handler)


def set_verbosity_debug() -> None:
    """Everything."""
    set_verbosity(logging.DEBUG)


def set_verbosity_info() -> None:
    """What is done, and what it took."""
    set_verbosity(logging.INFO)


def set_verbosity_warning() -> None:
    """The default."""
    set_verbosity(logging.WARNING)


def set_verbosity_error() -> None:
    """Errors only. Warnings of the package's own kind go through ``warnings`` and have their own filters."""
    set_verbosity(logging.ERROR)


def set_verbosity_from_environment() -> None:
    """Called once, on import. An unknown name is ignored: a logging switch should not stop a program."""
    level = logging.getLevelName(os.environ.get(_VARIABLE, "").upper())
    if isinstance(level, int):
        set_verbosity(level)

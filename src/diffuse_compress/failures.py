"""Errors of code that is not ours, told as what a user of calibration can act on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from diffuse_compress.errors import ConfigError, DiffuseCompressError, ModelStateError

__all__ = ["failures_explained", "is_out_of_memory"]


def is_out_of_memory(error: BaseException) -> bool:
    """On any device; the CPU's allocator has no class of error of its own."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


@contextlib.contextmanager
def failures_explained(what: str, memory: str | None = None) -> Iterator[None]:
    """What was being run, where something raises inside that is not an error of ours.

    Args:
        what: went wrong, for the message.
        memory: what to do where memory ran out; None lets that error pass.

    Raises:
        ConfigError: something was raised.
        ModelStateError: memory ran out.
    """
    try:
        yield
    except DiffuseCompressError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            if memory is None:
                raise
            raise ModelStateError(f"calibration: out of memory. {memory} ({str(error).splitlines()[0]})") from error
        raise ConfigError(f"calibration: {what}: {type(error).__name__}: {error}") from error

"""Methods of other libraries' classes, wrapped once: a second import or call of ``attach`` finds them wrapped."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

__all__ = ["is_wrapped", "mark_wrapped", "wrapping"]

_MARK = "_diffuse_compress_wrapped"
_Function = TypeVar("_Function", bound=Callable[..., Any])


def is_wrapped(function: Any) -> bool:
    """True for what :func:`mark_wrapped` marked; of a class method, what is inside."""
    return bool(getattr(getattr(function, "__func__", function), _MARK, False))


def mark_wrapped(function: _Function) -> _Function:
    """Mark a function that takes the place of a library's, and return it."""
    setattr(function, _MARK, True)
    return function


def wrapping(stock: Callable[..., Any]) -> Callable[[_Function], _Function]:
    """``functools.wraps(stock)``, marked."""

    def decorate(function: _Function) -> _Function:
        functools.update_wrapper(function, stock)
        return mark_wrapped(function)

    return decorate

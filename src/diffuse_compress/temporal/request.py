"""What a request's conditions are, told without reading a value from a device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

__all__ = ["Conditions", "copied"]


class Conditions:
    """The tensors and other values that a call was conditioned on, held, so that no other can take their place.

    Two calls have the same conditions if every tensor is the same one, or a view of the same that shows the same
    elements, and was not written to in between. Tensors made in inference mode do not count their writes: of those only
    the identity is compared.
    """

    def __init__(self, values: Any) -> None:
        self._items = [(path, value, _stamp(value)) for path, value in _leaves(values)]

    def match(self, values: Any) -> bool:
        """Are these the same conditions?"""
        items = self._items
        count = 0
        for count, (path, value) in enumerate(_leaves(values), start=1):
            if count > len(items) or items[count - 1][0] != path or not _same(*items[count - 1][1:], value):
                return False
        return count == len(items)


def copied(value: Any) -> Any:
    """Nested containers anew, tensors the same: a forward may pop what it has used from its arguments."""
    if isinstance(value, Mapping):
        return {key: copied(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(copied(item) for item in value)
    return value


def _leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _leaves(item, (*path, key))
    elif type(value) in (list, tuple):
        for index, item in enumerate(value):
            yield from _leaves(item, (*path, index))
    else:
        yield path, value


def _stamp(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return None
    writes = None if value.is_inference() else value._version
    return writes, value.data_ptr(), value.shape, value.stride(), value.dtype, value.device


def _same(held: Any, stamp: Any, value: Any) -> bool:
    if not isinstance(held, torch.Tensor):
        plain = isinstance(held, bool | int | float | str | None) and type(value) is type(held)
        return held is value or bool(plain and held == value)
    if not isinstance(value, torch.Tensor) or _stamp(value) != stamp:
        return False
    return held is value or (not held.is_inference() and _base(held) is _base(value))


def _base(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor._base is None else tensor._base

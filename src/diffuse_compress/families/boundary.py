"""Where a module's streams stand among its arguments and in what it returns.

Whole blocks can be left out of a forward without knowing what they compute, if it is known which returned tensor takes
the place of which argument. Of the classes that a family describes this is written down. Of any other it is found from
the first call: a residual block returns each of its streams in the shape it came in, and nearer to itself than to
another stream of that shape.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from diffuse_compress.families.base import BlockKind, Streams

__all__ = ["Boundary"]

_TEXT = ("encoder_hidden_states", "context")


class Boundary:
    """Streams of the calls of one module.

    Attributes:
        arguments: {stream: position in the forward's signature}; streams are called like the parameters.
        layout: names of what the module returns, "" for a None; None while that is not known.
        bare: it returns its one stream as it is, not in a tuple.
    """

    def __init__(self, module: nn.Module, kind: BlockKind | None = None) -> None:
        names = list(inspect.signature(type(module).forward).parameters)[1:]
        self.layout: tuple[str, ...] | None = None
        self.bare = True
        if kind is not None:
            self.layout = kind.returns(module)
            self.bare = len(self.layout) == 1
            wanted = _wanted(self.layout)
            self.arguments = {name: position for position, name in enumerate(names) if name in wanted} or {wanted[0]: 0}
        else:
            self.arguments = {name: position for position, name in enumerate(names) if position == 0 or name in _TEXT}

    def streams(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Streams:
        """The streams among a call's arguments."""
        given = {
            name: args[position] if position < len(args) else kwargs.get(name)
            for name, position in self.arguments.items()
        }
        return {name: value for name, value in given.items() if isinstance(value, torch.Tensor)}

    def replaced(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], streams: Streams
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with other streams."""
        positional, named = list(args), dict(kwargs)
        for name, value in streams.items():
            position = self.arguments[name]
            if position < len(positional):
                positional[position] = value
            else:
                named[name] = value
        return tuple(positional), named

    def returned(self, streams: Streams, output: Any) -> Streams | None:
        """The streams in what a call with these streams returned; None if it returns anything else as well."""
        bare = isinstance(output, torch.Tensor)
        values = (output,) if bare else output
        if type(values) is not tuple:
            return None
        if self.layout is None:
            layout = _matched(streams, values)
            if layout is None:
                return None
            self.layout, self.bare = layout, bare
        if len(values) != len(self.layout) or bare != self.bare:
            return None
        return {name: value for name, value in zip(self.layout, values, strict=True) if name}

    def packed(self, streams: Streams) -> Any:
        """What the module returns, made of its streams; the layout must be known."""
        assert self.layout is not None
        values = tuple(streams[name] if name else None for name in self.layout)
        return values[0] if self.bare else values


def _wanted(layout: tuple[str, ...]) -> tuple[str, ...]:
    # A block that returns no text any more (SD3's last one) is still given some.
    return (*layout, "encoder_hidden_states") if "" in layout else layout


def _matched(streams: Streams, values: tuple[Any, ...]) -> tuple[str, ...] | None:
    """The stream that each value continues, by shape and then by distance; None if one continues none."""
    names: list[str] = []
    for value in values:
        if value is None:
            names.append("")
            continue
        alike = [
            name
            for name, stream in streams.items()
            if name not in names
            and isinstance(value, torch.Tensor)
            and (value.shape, value.dtype) == (stream.shape, stream.dtype)
        ]
        if not alike:
            return None
        if len(alike) > 1:
            alike.sort(key=lambda name: float((value - streams[name]).float().norm()))
        names.append(alike[0])
    return tuple(names)

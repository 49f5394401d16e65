"""The arguments of one forward, as a value."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

__all__ = ["Call", "map_tensors"]


@dataclass(frozen=True)
class Call:
    """Arguments of one forward.

    Attributes:
        args: positional.
        kwargs: by name.
    """

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def run(self, module: nn.Module) -> Any:
        """``module`` called with these arguments."""
        return module(*self.args, **self.kwargs)

    def to(self, device: torch.device | str) -> Call:
        """The same with every tensor on ``device``."""

        def move(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(device)

        return Call(map_tensors(move, self.args), map_tensors(move, dict(self.kwargs)))


def map_tensors(function: Callable[[torch.Tensor], Any], tree: Any) -> Any:
    """``tree`` with ``function`` applied to the tensors in its dicts, lists and tuples; mappings become dicts."""
    if isinstance(tree, torch.Tensor):
        return function(tree)
    if isinstance(tree, Mapping):
        return {key: map_tensors(function, value) for key, value in tree.items()}
    if isinstance(tree, tuple | list):
        return type(tree)(map_tensors(function, value) for value in tree)
    return tree

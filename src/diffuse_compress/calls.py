"""The arguments of one forward, as a value."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

__all__ = ["NO_AUTOCAST", "Autocast", "Call", "autocast_as", "autocast_now", "map_tensors", "set_autocast"]

Autocast = tuple[tuple[str, bool, torch.dtype], ...]
"""(device type, whether it is enabled, dtype) of the autocast that a thread is in."""

NO_AUTOCAST: Autocast = (("cpu", False, torch.bfloat16), ("cuda", False, torch.float16))


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

    def copied(self, device: torch.device | str | None = "cpu") -> Call:
        """The same with copies of every tensor, for callers and modules that change theirs in place.

        Args:
            device: of the copies; None leaves each where its tensor is. A tensor that is there twice is copied once.
        """
        made: dict[int, torch.Tensor] = {}

        def copy(tensor: torch.Tensor) -> torch.Tensor:
            if id(tensor) not in made:
                made[id(tensor)] = tensor.detach().to(device or tensor.device, copy=True)
            return made[id(tensor)]

        with torch.inference_mode(False):  # for algorithms that need gradients
            return Call(map_tensors(copy, self.args), map_tensors(copy, dict(self.kwargs)))

    def versions(self) -> list[int]:
        """For each tensor a count of its changes in place; 0 for those of inference mode, which have none."""
        return [0 if tensor.is_inference() else tensor._version for tensor in self.tensors()]

    def tensors(self) -> list[torch.Tensor]:
        """Every tensor in it."""
        found: list[torch.Tensor] = []
        map_tensors(found.append, (self.args, dict(self.kwargs)))
        return found

    def to(self, device: torch.device | str) -> Call:
        """The same with every tensor on ``device``."""

        def move(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(device)

        return Call(map_tensors(move, self.args), map_tensors(move, dict(self.kwargs)))


def map_tensors(function: Callable[[torch.Tensor], Any], tree: Any) -> Any:
    """``tree`` with ``function`` applied to the tensors in its tuples, lists and dicts; other objects are passed on."""
    if isinstance(tree, torch.Tensor):
        return function(tree)
    if type(tree) in (list, tuple):
        return type(tree)(map_tensors(function, item) for item in tree)
    if type(tree) is dict:
        return {key: map_tensors(function, item) for key, item in tree.items()}
    return tree


def autocast_now() -> Autocast:
    """The autocast that surrounds the caller."""
    return tuple(
        (device, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)) for device, _, _ in NO_AUTOCAST
    )


@contextlib.contextmanager
def autocast_as(state: Autocast) -> Iterator[None]:
    """Inside, autocast is as it was, or off with :data:`NO_AUTOCAST`; casts of weights that were kept are forgotten."""
    before = autocast_now()
    # They would stand in for weights whose data are another by now.
    torch.clear_autocast_cache()
    try:
        set_autocast(state)
        yield
    finally:
        set_autocast(before)


def set_autocast(state: Autocast) -> None:
    """Let autocast be so from here on."""
    for device, enabled, dtype in state:
        torch.set_autocast_enabled(device, enabled)
        torch.set_autocast_dtype(device, dtype)

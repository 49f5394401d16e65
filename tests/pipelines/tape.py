"""A recorder for any device: operations are written down as they run, and run again on the same tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode


class Tape:
    """Like a CUDA graph: a replay runs no Python of the model, reads and writes where it did when it was recorded, and
    until the first replay nothing is computed."""

    def __init__(self) -> None:
        self.recorded = 0

    def serves(self, device: torch.device) -> bool:
        return True

    def record(self, run: Callable[[], Any], device: torch.device) -> tuple[Callable[[], object], Any]:
        self.recorded += 1
        operations = _Operations()
        with operations:
            output = run()
        for _, _, _, made in operations.tape:
            for value in made:
                if value.is_floating_point():
                    value.fill_(torch.nan)

        @torch.no_grad()
        def replay() -> None:
            for func, args, kwargs, made in operations.tape:
                found = _tensors(func(*args, **kwargs))
                for to, value in zip(made, found[: len(made)], strict=True):
                    to.copy_(value)

        return replay, output


class _Operations(TorchDispatchMode):
    """(operation, its arguments, and the tensors that it made), without those that are views."""

    def __init__(self) -> None:
        super().__init__()
        self.tape: list[tuple[Any, Any, Any, list[torch.Tensor]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        given = {value.untyped_storage().data_ptr() for value in _tensors((args, kwargs))}
        made = [value for value in _tensors(output) if value.untyped_storage().data_ptr() not in given]
        if func._schema.is_mutable:
            self.tape.append((func, args, kwargs, []))
        elif made:
            self.tape.append((func, args, kwargs, made))
        return output


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]

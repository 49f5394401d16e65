"""A model as it was: its tree, values and flags, to go back to if a training fails."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffuse_compress.transaction import Transaction

__all__ = ["Kept", "keep", "restored_on_failure"]

_TABLES = ("_parameters", "_buffers", "_modules", "_forward_pre_hooks", "_forward_hooks")
_WITH_KWARGS = ("_forward_pre_hooks_with_kwargs", "_forward_hooks_with_kwargs")


def restored_on_failure(model: nn.Module, work_dir: str | Path | None) -> Transaction:
    """A transaction, entered by the caller with :func:`keep`; any exception puts ``model`` back, bytes and tree.

    Raises:
        ModelStateError: too little disk for the weights.
    """
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    return Transaction(size, work_dir)


class Kept:
    """Everything of a module tree that a training changes, but for the bytes of parameters."""

    def __init__(self, model: nn.Module) -> None:
        self.tables = [
            (module, {name: dict(getattr(module, name)) for name in (*_TABLES, *_WITH_KWARGS)}, module.training)
            for module in model.modules()
        ]
        self.flags = [(p, p.requires_grad) for p in model.parameters()]
        self.buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers() if not buffer.is_meta]
        self.again = [
            (module, module.gradient_checkpointing, vars(module).get("_gradient_checkpointing_func"))
            for module in model.modules()
            if hasattr(module, "gradient_checkpointing")
        ]

    def put_back(self) -> None:
        """All of it."""
        for module, tables, training in self.tables:
            module.training = training
            for name, entries in tables.items():
                table = getattr(module, name)
                table.clear()
                table.update(entries)
        self.put_back_flags()
        with torch.no_grad():
            for buffer, values in self.buffers:
                buffer.copy_(values)

    def put_back_flags(self) -> None:
        """What no training leaves changed, successful or not."""
        for parameter, wanted in self.flags:
            parameter.requires_grad_(wanted)
            parameter.grad = None
        for module, flag, function in self.again:
            module.gradient_checkpointing = flag
            if function is None:
                vars(module).pop("_gradient_checkpointing_func", None)
            else:
                module._gradient_checkpointing_func = function


def keep(model: nn.Module, spill: Transaction) -> Kept:
    """Write what ``model`` is into ``spill``; returns its flags, for the end of a training that succeeds."""
    state = Kept(model)
    for parameter in _once(model.parameters()):
        spill.keep(parameter)
    spill.after_rollback(state.put_back)
    return state


def _once(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    found: dict[int, Any] = {id(p): p for p in parameters}
    return list(found.values())

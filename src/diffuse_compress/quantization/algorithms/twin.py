"""A module as it is now, kept while its layers are replaced."""

from __future__ import annotations

import copy

from torch import nn

__all__ = ["unchanged_twin"]


def unchanged_twin(module: nn.Module) -> nn.Module:
    """A module that goes on computing what ``module`` does now, whatever layers are replaced in that.

    It shares the memory of all tensors. A forward that someone else put on the instance is left out.
    """
    return _twin(module, {})


def _twin(module: nn.Module, made: dict[nn.Module, nn.Module]) -> nn.Module:
    if module not in made:
        twin = made[module] = type(module).__new__(type(module))
        # Dicts are copied: hooks that are registered later belong to the module alone.
        own = {key: copy.copy(value) if isinstance(value, dict) else value for key, value in vars(module).items()}
        own.pop("forward", None)
        vars(twin).update(own)
        for name, parameter in module._parameters.items():
            # Parameters of its own on the same memory: layers that are replaced have theirs emptied.
            twin._parameters[name] = (
                None if parameter is None else nn.Parameter(parameter.detach(), requires_grad=False)
            )
        for name, child in module._modules.items():
            twin._modules[name] = None if child is None else _twin(child, made)
    return made[module]

"""Where a model's forward has its timestep."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from torch import nn

from diffuse_compress.families.base import TIMESTEP_NAMES

__all__ = ["TimestepArgument"]


@dataclass(frozen=True)
class TimestepArgument:
    """The timestep among the arguments of a forward.

    Attributes:
        name: of the parameter, "" if none has a known name.
        position: among positional arguments, -1 if it cannot be one.
    """

    name: str
    position: int

    @classmethod
    def of(cls, model: nn.Module) -> TimestepArgument:
        """As the class of ``model`` declares it."""
        # The first parameter is the module itself, whatever it is called.
        parameters = list(inspect.signature(type(model).forward).parameters.values())[1:]
        names = [parameter.name for parameter in parameters]
        name = next((name for name in TIMESTEP_NAMES if name in names), "")
        hidden = any(parameter.kind is inspect.Parameter.VAR_POSITIONAL for parameter in parameters)
        return cls(name, names.index(name) if name else 1 if hidden else -1)

    def read(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The timestep of a call; None if it was not given."""
        for key in (self.name,) if self.name else TIMESTEP_NAMES:
            if key in kwargs:
                return kwargs[key]
        return args[self.position] if 0 <= self.position < len(args) else None

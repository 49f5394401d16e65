"""One layer's forward, which gives what was computed before instead of computing it.

The layer stays where it is, with its class and its parameters; only its instance has another forward, a bound method,
so that copies and pickles of the layer have their own. What it gives out was fetched by the model's root hook before
the call, so that nothing here asks for a value, and nothing is in the way of a compiler.
"""

from __future__ import annotations

import types
from enum import IntEnum

import torch
from torch import nn

from diffuse_compress.families.base import Dependence
from diffuse_compress.runtime import steps
from diffuse_compress.temporal.parking import Parking
from diffuse_compress.temporal.reasons import OTHER_SHAPE

__all__ = ["CONSUMER", "LayerLookup", "Mode"]

CONSUMER = "temporal table"


class Mode(IntEnum):
    """What a layer's forward does. PARTLY looks up where the table has a row, and computes where it is NaN: in every
    call, so that neither the host nor a compiler needs to know which it is."""

    LIVE = 0
    LOOKUP = 1
    RECORD = 2
    PARTLY = 3


class LayerLookup:
    """The forward of one layer.

    Attributes:
        layer: a linear.
        name: qualified, in the model.
        dependence: what the layer depends on.
        mode: set by the root hook for the time of a call.
        value: the layer's output in this call.
        recorded: outputs, in the order in which they were computed.
        parking: where its weights go meanwhile.
    """

    def __init__(self, layer: nn.Module, name: str, dependence: Dependence) -> None:
        self.layer = layer
        self.name = name
        self.dependence = dependence
        self.mode = Mode.LIVE
        self.value: torch.Tensor | None = None
        self.recorded: list[torch.Tensor] = []
        self.parking: Parking | None = None

    def install(self) -> None:
        """Become the layer's forward."""
        self.layer.forward = types.MethodType(LayerLookup.forward, self)  # type: ignore[method-assign,assignment]

    def remove(self) -> None:
        """Give the layer its class's forward, and its weights."""
        if self.parking is not None:
            self.parking.remove()
            self.parking = None
        if getattr(self.layer.__dict__.get("forward"), "__self__", None) is self:
            del self.layer.forward

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The layer's output, looked up or computed: [batch, out], or [..., out] of conditions."""
        if self.mode in (Mode.LOOKUP, Mode.PARTLY):
            if self.value is not None and self.value.shape[:-1] == x.shape[:-1]:
                value = self.value
                return value if self.mode == Mode.LOOKUP else torch.where(value.isnan(), self.live(x), value)
            self._mismatch()
        output = self.live(x)
        if self.mode == Mode.RECORD:
            self.recorded.append(output)
        return output

    def live(self, x: torch.Tensor) -> torch.Tensor:
        """What the layer computes."""
        if self.parking is not None and self.parking.away:
            self.parking.come_back()
        output: torch.Tensor = type(self.layer).forward(self.layer, x)
        return output

    def _mismatch(self) -> None:
        if not torch.compiler.is_compiling():
            context = steps.current()
            if context is not None:
                context.hit(CONSUMER, -1)
                context.miss(CONSUMER, OTHER_SHAPE)

"""Where the layers that do not see the sample get their input from, so that all timesteps can be computed ahead.

A model first makes an embedding of the timestep and the conditions, then runs its blocks. Layers of the first part
show what they compute when the model is run up to its first block. The others, which stand in the blocks or behind
them (modulations, a UNet's time projections, keys and values of the text), read something that the first block or the
model itself is given: a :class:`Reader` says what, and what is done with it on the way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

__all__ = ["ACTIVATIONS", "Entry", "Reader", "activated", "attended", "modulations"]


ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "": lambda x: x,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}
"""What may stand between an embedding and what reads it, by name; "" is nothing."""


class Entry:
    """What a model's first block is called with.

    Attributes:
        model: the denoiser.
        arguments: of the first block by name, and those of the model that the block has no argument of the same name
            for. Tensors that depend on the timestep may hold several timesteps one after the other along dimension 0.
        dtype: of the first block's hidden states.
    """

    def __init__(self, model: nn.Module, arguments: Mapping[str, Any], dtype: torch.dtype) -> None:
        self.model = model
        self.arguments = arguments
        self.dtype = dtype
        self._once: dict[Any, Any] = {}

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]

    def parent(self, layer: str) -> Any:
        """The module that holds a layer."""
        return self.model.get_submodule(layer.rpartition(".")[0])

    def once(self, key: Any, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        """``compute()`` at the first request of ``key``: what several layers read is made once."""
        if key not in self._once:
            self._once[key] = compute()
        found: torch.Tensor = self._once[key]
        return found


@dataclass(frozen=True)
class Reader:
    """Layers in or behind the blocks, and how their input is made.

    Attributes:
        patterns: of the layers.
        sources: arguments (:class:`Entry`) that the input is made of, [batch, ...] each.
        input: (entry, qualified name of the layer) -> what the layer is called with, its rows in the sources' order.
        processors: class names of the attention processors that this is true of; empty if none is in between.
        through: patterns of further layers that run while the input is made.
    """

    patterns: tuple[str, ...]
    sources: tuple[str, ...]
    input: Callable[[Entry, str], torch.Tensor]
    processors: frozenset[str] = frozenset()
    through: tuple[str, ...] = ()


def activated(entry: Entry, layer: str, source: str = "temb", by: str = "silu") -> torch.Tensor:
    """The embedding after the activation beside the layer, as adaptive norms read it."""
    found: torch.Tensor = getattr(entry.parent(layer), by)(entry[source]).to(entry.dtype)
    return found


def modulations(*patterns: str, by: str = "silu") -> Reader:
    """Linears of adaptive norms: they read ``temb`` [batch, width], activated by their neighbour ``by``."""
    return Reader(patterns, ("temb",), partial(activated, by=by))


def attended(entry: Entry, layer: str) -> torch.Tensor:
    """Text tokens [batch, tokens, width] as diffusers' ``Attention`` makes keys and values of them."""
    attention, text = entry.parent(layer), entry["encoder_hidden_states"]
    found: torch.Tensor = attention.norm_encoder_hidden_states(text) if attention.norm_cross else text
    return found

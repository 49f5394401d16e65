"""Whether the layers with tables are still those whose outputs the tables hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from diffuse_compress.families.base import Dependence
from diffuse_compress.quantization.layer_base import INPUT_QPARAMS
from diffuse_compress.temporal.layout import Layout
from diffuse_compress.temporal.lookup import LayerLookup
from diffuse_compress.temporal.parking import sample_of, weights_of

__all__ = ["Watch"]


class Watch:
    """Looks at the layers before every call, without reading a value from a device."""

    def __init__(self, model: nn.Module, lookups: Mapping[str, LayerLookup], layout: Layout) -> None:
        self._lookups = lookups
        self._stamps: list[Any] | None = None
        # (layer's name, its lookup, children of its parent, name among them): where an adapter would stand.
        self._slots: list[tuple[str, LayerLookup, dict[str, Any], str]] = []
        self._attentions: dict[str, tuple[Any, frozenset[str]]] = {}
        for name, lookup in lookups.items():
            parent, _, leaf = name.rpartition(".")
            module = model.get_submodule(parent)
            self._slots.append((name, lookup, module._modules, leaf))
            reader = layout.temporal.reader_of(name)
            if reader is not None and reader.processors:
                self._attentions[name] = (module, reader.processors)

    def look(self) -> tuple[list[str], bool]:
        """(layers that an adapter stands in for, whether weights were moved, replaced or written to since last time).

        Merging an adapter writes past torch's count of writes; :meth:`signature` sees it.
        """
        adapted: list[str] = []
        stamps: list[Any] = []
        for name, lookup, children, leaf in self._slots:
            layer = lookup.layer
            if children.get(leaf) is not layer:
                adapted.append(name)
            # Parked and offloaded parameters come and go; what changes the former shows when they leave.
            if lookup.parking is not None or "_hf_hook" in layer.__dict__:
                continue
            for kind, p in layer._parameters.items():
                if p is not None and kind not in INPUT_QPARAMS:
                    stamps += (id(p), p.data_ptr(), p._version, p.dtype)
        changed = self._stamps is not None and self._stamps != stamps
        self._stamps = stamps
        return adapted, changed

    def strange_processors(self) -> list[str]:
        """Layers whose attention runs a processor that nothing is known of."""
        return [
            name
            for name, (attention, known) in self._attentions.items()
            if type(getattr(attention, "processor", None)).__name__ not in known
        ]

    def signature(self) -> torch.Tensor:
        """Samples of the weights of all layers of the timestep alone, float64 on the CPU; waits for the device."""
        samples = [_sample(lookup) for lookup in self._lookups.values() if lookup.dependence is Dependence.TIMESTEP]
        return torch.cat([torch.zeros(0, dtype=torch.float64), *(s for sample in samples for s in sample)])


def _sample(lookup: LayerLookup) -> list[torch.Tensor]:
    if lookup.parking is not None and lookup.parking.away:
        return lookup.parking.samples()
    return [sample_of(p) for p in weights_of(lookup.layer).values() if not p.is_meta]

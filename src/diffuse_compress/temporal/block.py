"""The temporal information block: the layers of the timestep path as one module, which runs without the model.

Source: Huang et al. 2023, arXiv 2311.16503: a head that embeds the timestep, and the projections that read it. Which
layer reads which, through which activation and with what added, is found by comparing what the layers were seen to be
given and to give (``features.py``), so that one module stands for the block of every class: what is added is constant
over the timesteps (a label, the pooled text), and is taken as it was seen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from diffuse_compress.families.base import Dependence
from diffuse_compress.families.embedding import ACTIVATIONS
from diffuse_compress.temporal.features import Features, relative_error

__all__ = ["Edge", "TemporalBlock", "edges_of", "feature_layers", "given_of"]

# RMS of the difference over RMS. Batches of other sizes sum in another order; half precision rounds in between.
_EQUAL = {torch.float32: 1e-4, torch.float64: 1e-6}
_NEARLY_EQUAL = 1e-2
# Looked at first.
_SOME_ROWS = 16


@dataclass(frozen=True)
class Edge:
    """A layer reads ``activation(output of source + offset)``.

    Attributes:
        source: qualified name of a layer.
        activation: by name.
        beside: qualified name of the activation module whose input shows the offset; "" if nothing is added.
    """

    source: str
    activation: str
    beside: str = ""


class TemporalBlock(nn.Module):
    """The layers of the timestep path.

    ``forward({name: tensor})`` takes, for each layer without an edge, its input [rows, in], and for each with an
    offset this, [rows, in]; it returns the outputs [rows, out] of the layers that no other reads, by name.

    Args:
        layers: by qualified name; shared with the model they are of.
        edges: of those that read another.
    """

    def __init__(self, layers: Mapping[str, nn.Module], edges: Mapping[str, Edge]) -> None:
        super().__init__()
        self.names = _ordered(layers, edges)
        self.edges = dict(edges)
        self.layers = nn.ModuleList(layers[name] for name in self.names)

    def relative(self, name: str) -> str:
        """Name within this module of a layer of the model."""
        return f"layers.{self.names.index(name)}"

    def put(self, name: str, layer: nn.Module) -> None:
        """Let another module stand for a layer."""
        self.layers[self.names.index(name)] = layer

    def outputs(
        self, given: Mapping[str, torch.Tensor], known: Mapping[str, torch.Tensor] | None = None
    ) -> dict[str, torch.Tensor]:
        """Outputs [rows, out] of all layers, by name; ``known`` ones are not computed, but where they are NaN."""
        found: dict[str, torch.Tensor] = {}
        read: dict[Edge, torch.Tensor] = {}  # one tensor for all that read the same
        for name, layer in zip(self.names, self.layers, strict=True):
            edge, there = self.edges.get(name), None if known is None else known.get(name)
            if there is not None and not bool(there.isnan().any()):
                found[name] = there
                continue
            if edge is None:
                x = given[name]
            else:
                if edge not in read:
                    before = found[edge.source]
                    read[edge] = ACTIVATIONS[edge.activation](before + given[name] if edge.beside else before)
                x = read[edge]
            found[name] = layer(x) if there is None else torch.where(there.isnan(), layer(x), there)
        return found

    def forward(self, given: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        found = self.outputs(given)
        read = {edge.source for edge in self.edges.values()}
        return {name: value for name, value in found.items() if name not in read}


def _ordered(layers: Mapping[str, nn.Module], edges: Mapping[str, Edge]) -> list[str]:
    """Names, each after the one that it reads."""
    order: list[str] = []

    def add(name: str) -> None:
        if name not in order:
            if name in edges:
                add(edges[name].source)
            order.append(name)

    for name in layers:
        add(name)
    return order


def edges_of(features: Sequence[Features]) -> dict[str, Edge]:
    """Which layers read another one's output.

    Args:
        features: of calls with conditions of their own, at two timesteps or more each.
    """
    first = features[0]
    found: dict[str, Edge] = {}
    for name, x in first.inputs.items():
        near = [other for other, y in first.outputs.items() if other != name and y.shape[1] == x.shape[1]]
        # Equal copies of one embedder are told by where they stand.
        near.sort(key=lambda other: -_common(name, other))
        edge = _edge(features, name, [other for other in near if not _reaches(found, other, name)])
        if edge is not None:
            found[name] = edge
    return found


def _edge(features: Sequence[Features], name: str, sources: Sequence[str]) -> Edge | None:
    plain = [Edge(source, activation) for source in sources for activation in ACTIVATIONS]
    shape = features[0].inputs[name].shape
    modules = [module for module, z in features[0].activations.items() if z.shape == shape]
    modules.sort(key=lambda module: -_common(name, module))
    added = [
        Edge(source, activation, module)
        for source in sources
        for module in modules
        for activation in ACTIVATIONS
        if activation
    ]
    return next((edge for edge in (*plain, *added) if all(_explains(f, name, edge) for f in features)), None)


def _explains(features: Features, name: str, edge: Edge) -> bool:
    x, y = features.inputs[name], features.outputs[edge.source]
    limit = _EQUAL.get(x.dtype, _NEARLY_EQUAL)
    for rows in (slice(0, _SOME_ROWS * features.batch), slice(None)):
        before = y[rows]
        if edge.beside:
            z = features.activations[edge.beside][rows]
            added = _constant(z - before, features.batch)
            if _far(z, before + added, limit):
                return False
            before = before + added
        if _far(x[rows], ACTIVATIONS[edge.activation](before), limit):
            return False
    return True


def _constant(offset: torch.Tensor, batch: int) -> torch.Tensor:
    """[rows, width]: each sample's mean over the timesteps."""
    mean = offset.unflatten(0, (-1, batch)).mean(dim=0)
    return mean.repeat(offset.shape[0] // batch, 1)


def _far(x: torch.Tensor, y: torch.Tensor, limit: float) -> bool:
    return float(relative_error(x.flatten(), y.flatten())) > limit


def _common(one: str, other: str) -> int:
    """How many leading parts two names share."""
    count = 0
    for left, right in zip(one.split("."), other.split("."), strict=False):
        if left != right:
            break
        count += 1
    return count


def _reaches(edges: Mapping[str, Edge], name: str, target: str) -> bool:
    """Does ``name`` read ``target``, through whatever number of layers?"""
    while name in edges:
        name = edges[name].source
        if name == target:
            return True
    return False


def feature_layers(block: TemporalBlock, kinds: Mapping[str, Dependence]) -> list[str]:
    """Layers whose outputs are temporal features: nothing of the path reads them but to add a condition."""
    timestep = Dependence.TIMESTEP
    inner = {
        edge.source
        for name, edge in block.edges.items()
        if kinds[name] is timestep or kinds[edge.source] is not timestep
    }
    return [name for name in block.names if name not in inner]


def given_of(block: TemporalBlock, features: Features) -> dict[str, torch.Tensor]:
    """What :class:`TemporalBlock` needs for the rows of ``features``; equal inputs are one tensor."""
    distinct: list[torch.Tensor] = []

    def once(value: torch.Tensor) -> torch.Tensor:
        same = next((x for x in distinct if x.shape == value.shape and torch.equal(x, value)), None)
        if same is None:
            distinct.append(value)
        return value if same is None else same

    given = {}
    for name in block.names:
        edge = block.edges.get(name)
        if edge is None:
            given[name] = once(features.inputs[name])
        elif edge.beside:
            offset = features.activations[edge.beside] - features.outputs[edge.source]
            given[name] = once(_constant(offset, features.batch))
    return given

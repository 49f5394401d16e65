"""The vocabulary in which a family file says what a model class is made of.

A block is a residual network of *branches* over one or two *streams* (the hidden states, and in joint attention the
text tokens beside them)::

    streams, conditioning = kind.begin(block, *args, **kwargs)      # the block's own arguments
    for branch in kind.branches(block):
        streams = branch.add(block, streams, branch.compute(block, streams, conditioning))
    return kind.end(block, streams, conditioning)                   # what the block returns

Run like this, every supported class gives the bits of its stock forward. Fusion, caching and temporal tables replace
or skip single branches; ``runtime/blocks.py`` is the only place that does so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
from torch import nn

from diffuse_compress.families.embedding import Reader
from diffuse_compress.patterns import matches
from diffuse_compress.quantization.residual import ResidualStream

__all__ = [
    "SAMPLE_NAMES",
    "TIMESTEP_NAMES",
    "Below",
    "BlockKind",
    "Branch",
    "BranchRole",
    "Conditioning",
    "Dependence",
    "Family",
    "Smoothing",
    "Streams",
    "TemporalMap",
    "add_deltas",
    "single_stream",
]

Streams = dict[str, torch.Tensor]
"""Residual streams by name: "hidden_states" [batch, tokens, width] and, in joint blocks, "encoder_hidden_states"."""


TIMESTEP_NAMES = ("timestep", "timesteps", "t", "sigma", "r", "timestep_ratio")
"""What denoisers call their timestep, the usual names first: of several in one signature, the first is meant."""

SAMPLE_NAMES = ("hidden_states", "sample", "x", "latents", "latent_model_input", "input_ids")
"""What models call their sample."""


class BranchRole(str, Enum):
    """What a branch computes."""

    ATTENTION = "attention"
    CROSS_ATTENTION = "cross-attention"
    FEED_FORWARD = "feed-forward"
    RESNET = "resnet"
    WHOLE = "attention and feed-forward together"


class Dependence(str, Enum):
    """What the output of a layer depends on within a sampling run.

    A layer that does not see the sample has one output for each step, or for the whole run, so it can be looked up in a
    table and quantized by itself. TFMQ-DM (Huang et al. 2023, arXiv 2311.16503) treats the layers of the timestep
    alone like that; the conditions are told apart here because models mix them in.
    """

    TIMESTEP = "timestep"
    TIMESTEP_AND_CONDITION = "timestep and condition"
    CONDITION = "condition"
    SAMPLE = "sample"
    NOTHING = "nothing"


class Conditioning:
    """What a block is given beside its streams, and values computed from it once per call.

    Attributes are the stock forward's arguments under their own names. ``entry`` holds the streams as they came in.
    """

    def __init__(self, entry: Streams, **arguments: Any) -> None:
        self.entry = dict(entry)
        self.arguments = arguments
        self._once: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        arguments = self.__dict__.get("arguments", {})
        if name in arguments:
            return arguments[name]
        raise AttributeError(f"this block has no argument {name!r}; it has {', '.join(arguments)}")

    def once(self, name: str, compute: Callable[[], Any]) -> Any:
        """``compute()`` at the first request of ``name`` in this call."""
        if name not in self._once:
            self._once[name] = compute()
        return self._once[name]

    def preset(self, name: str, value: Any) -> None:
        """Make ``once(name, ...)`` return a value that was looked up instead (a temporal table's modulation)."""
        self._once[name] = value


def add_deltas(block: nn.Module, streams: Streams, deltas: Streams) -> Streams:
    """The usual residual addition."""
    return {**streams, **{name: streams[name] + delta for name, delta in deltas.items()}}


@dataclass(frozen=True)
class Branch:
    """One branch of a block.

    Attributes:
        name: as its main submodule is called ("attn1", "ff").
        role: what it computes.
        output: (block, streams, conditioning) -> what its layers make, by stream, before the gates.
        modules: submodules of the block that this branch alone runs.
        add: (block, streams, deltas) -> streams; differs where a class casts or rescales.
        gate: (block, outputs, conditioning) -> outputs times the gates of this step, for branches that have any.
        residual: ``add`` adds to the streams and does no more, up to casts; False where it also projects or rescales
            them.
    """

    name: str
    role: BranchRole
    output: Callable[[nn.Module, Streams, Conditioning], Streams]
    modules: tuple[str, ...]
    add: Callable[[nn.Module, Streams, Streams], Streams] = add_deltas
    gate: Callable[[nn.Module, Streams, Conditioning], Streams] | None = None
    residual: bool = True

    def compute(self, block: nn.Module, streams: Streams, conditioning: Conditioning) -> Streams:
        """What is added to the residual, by stream."""
        return self.gated(block, self.output(block, streams, conditioning), conditioning)

    def gated(self, block: nn.Module, outputs: Streams, conditioning: Conditioning) -> Streams:
        """Outputs, which may be of another step, times the gates of this one."""
        return outputs if self.gate is None else self.gate(block, outputs, conditioning)


@dataclass(frozen=True)
class Smoothing:
    """Layers that share an input, and what precedes them: where per-channel scales can move between the two.

    Attributes:
        consumers: names of layers, relative to the block.
        producer: name of a norm with weights or of a linear whose output the consumers read, relative to the block;
            None if nothing can take the inverse scale, which then stays with the consumers (``act_pre_scale``).
        modulation: for adaptive norms (AdaLN), the linear that makes shift and scale: x * (1 + scale) + shift is
            divided by s when rows of shift become shift / s, and those of scale (1 + scale) / s - 1.
        shift, scale: chunks of the modulation's output that hold them.
        chunks: into how many equal chunks it is cut.
        unit_offset: the producing norm multiplies by 1 + weight (Gemma).
    """

    consumers: tuple[str, ...]
    producer: str | None = None
    modulation: str | None = None
    shift: int = 0
    scale: int = 1
    chunks: int = 6
    unit_offset: bool = False


@dataclass(frozen=True)
class TemporalMap:
    """The layers that do not see the sample.

    Attributes:
        timestep, timestep_and_condition, condition, nothing: their patterns, by what they depend on.
        readers: how the input of those that run in the blocks, or behind them, is made.
        conditions: arguments of the model's forward that the conditions are.
        entry: the block whose arguments the readers' sources are; None for the first that runs.
        live: patterns of layers among these that no table serves: they see every token, so that their rows would be
            larger than their weights, or run several times in a call.
    """

    timestep: tuple[str, ...] = ()
    timestep_and_condition: tuple[str, ...] = ()
    condition: tuple[str, ...] = ()
    nothing: tuple[str, ...] = ()
    readers: tuple[Reader, ...] = ()
    conditions: tuple[str, ...] = ()
    entry: str | None = None
    live: tuple[str, ...] = ()

    def of(self, name: str) -> Dependence:
        """Dependence of a layer; the first list with a matching pattern decides, and SAMPLE is what is in none."""
        lists = (
            (Dependence.TIMESTEP, self.timestep),
            (Dependence.TIMESTEP_AND_CONDITION, self.timestep_and_condition),
            (Dependence.CONDITION, self.condition),
            (Dependence.NOTHING, self.nothing),
        )
        for dependence, patterns in lists:
            if any(matches(pattern, name) for pattern in patterns):
                return dependence
        return Dependence.SAMPLE

    def reader_of(self, name: str) -> Reader | None:
        """How the input of a layer is made; None if it runs before the blocks, or nobody knows."""
        return next((r for r in self.readers if any(matches(pattern, name) for pattern in r.patterns)), None)


@dataclass(frozen=True)
class BlockKind:
    """How the blocks of one class are composed.

    Attributes:
        class_name: of the block.
        fingerprints: of the stock forwards it was written against (``runtime/blocks.py``); any other version of the
            class runs its own forward.
        returns: names of the streams in what the block returns, "" for a None in the place of one; of one name alone
            the bare tensor. Its arguments are named like its streams.
        replaced: "module:Class" of further classes whose forward the composition takes apart (adaptive norms).
        begin, branches, end: see the module docstring. ``branches`` may depend on the block; ``begin`` returns None for
            arguments that the composition does not cover.
        processors: class names of the attention processors that the composition holds for.
        unsupported: why this block cannot be composed (an option of the class that is not covered), or None.
        smoothing: of a block.
    """

    class_name: str
    fingerprints: frozenset[str]
    begin: Callable[..., tuple[Streams, Conditioning] | None]
    branches: Callable[[nn.Module], tuple[Branch, ...]]
    end: Callable[[nn.Module, Streams, Conditioning], Any]
    returns: Callable[[nn.Module], tuple[str, ...]] = lambda block: ("hidden_states",)
    replaced: tuple[str, ...] = ()
    processors: frozenset[str] = frozenset()
    unsupported: Callable[[nn.Module], str | None] = lambda block: None
    smoothing: Callable[[nn.Module], tuple[Smoothing, ...]] = lambda block: ()


@dataclass(frozen=True)
class Below:
    """What a UNet runs for one value: everything below its first resolution level, skip connections included.

    Attributes:
        modules: qualified names in the order they run in; the last returns the value, and nobody else reads what the
            others return.
        idle: (module, its hidden states) -> what one of the others returns when it is left out.
        injected: arguments of the model's forward that are added to what these modules return.
        fingerprints: of the forwards (``runtime/blocks.py``) of which this is true.
    """

    modules: tuple[str, ...]
    idle: Callable[[nn.Module, torch.Tensor], Any]
    injected: tuple[str, ...]
    fingerprints: frozenset[str]


@dataclass(frozen=True)
class Family:
    """What we know of a model class.

    Attributes:
        name: of the family ("flux").
        classes: class names of its models.
        blocks: qualified names of the blocks of a model, in the order they run in.
        kinds: how they are composed, by class name of the block.
        wholes: qualified names of what a feature cache may leave out as a whole, in the order they run in: modules
            that return their streams changed. The blocks themselves, but where several stand in one such module.
        below: what is run for one value of a model with resolution levels; None for a model in which that is not known.
        temporal: which layers depend on the timestep, the condition or neither.
        sensitive: patterns of the layers that lose most when compressed.
        chained: fingerprints (``runtime/blocks.py``) of the models' forwards in which nothing but additions to the
            streams (a ControlNet's residuals) stands between one block of ``blocks`` and the next.
        residual: the stream that all blocks read through RMS norms and add to; raises ConfigError for a model that it
            cannot be told of. None where norms are adaptive, or not known.
    """

    name: str
    classes: tuple[str, ...]
    blocks: Callable[[nn.Module], list[str]]
    kinds: Mapping[str, BlockKind] = field(default_factory=dict)
    temporal: Callable[[nn.Module], TemporalMap] = lambda model: TemporalMap()
    sensitive: tuple[str, ...] = ()
    chained: frozenset[str] = frozenset()
    residual: Callable[[nn.Module], ResidualStream] | None = None
    wholes: Callable[[nn.Module], list[str]] | None = None
    below: Callable[[nn.Module], Below | None] = lambda model: None

    def kind_of(self, block: nn.Module) -> BlockKind | None:
        """Composition of a block, by its exact class."""
        return self.kinds.get(type(block).__name__)


def single_stream(block: nn.Module, streams: Streams, conditioning: Conditioning) -> torch.Tensor:
    """``end`` of a block that returns its hidden states."""
    return streams["hidden_states"]


def in_lists(*names: str) -> Callable[[nn.Module], list[str]]:
    """``Family.blocks`` for models that run whole ModuleLists one after the other."""

    def blocks(model: nn.Module) -> list[str]:
        return [f"{name}.{index}" for name in names for index in range(len(getattr(model, name, ())))]

    return blocks

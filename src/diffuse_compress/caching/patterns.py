"""One block with some of its branches reused: a pure function of its arguments, which compiles once for its class.

Which branches are computed is the *pattern*, a constant of the function; which tensors are added in the place of the
others is an argument. So there are as many graphs as there are patterns, however many blocks and steps use them.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Hashable
from enum import Enum
from typing import Any

import torch
from torch import nn

from diffuse_compress.families.base import BlockKind, Streams, add_deltas
from diffuse_compress.runtime.blocks import BlockOption, asked

__all__ = ["Op", "Pattern", "Variants", "run_pattern"]


class Op(Enum):
    """What is done with one branch."""

    COMPUTE = "compute"
    KEEP = "compute, and hand out what it adds"
    KEEP_RAW = "compute, and hand out its output before the gates"
    SKIP = "nothing"
    ADD = "add what is given to the streams"
    GIVE = "add what is given as the branch adds its own"
    GATE = "add what is given times the gates"


Pattern = tuple[Op, ...]
_GIVEN = (Op.ADD, Op.GIVE, Op.GATE)
_KEPT = (Op.KEEP, Op.KEEP_RAW)


def run_pattern(
    block: nn.Module,
    kind: BlockKind,
    options: list[BlockOption],
    pattern: Pattern,
    given: list[Streams],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[Any, list[Streams]] | None:
    """(what the block returns, what the branches that are kept have made), or None where ``kind`` does not hold.

    Args:
        block: of ``kind``.
        kind: its composition.
        options: asked for the branches that are computed; those kept raw are computed by their own layers.
        pattern: an operation for each branch.
        given: streams for each operation that adds what is given, in order.
        args: the block's own.
        kwargs: likewise.
    """
    begun = kind.begin(block, *args, **kwargs)
    if begun is None:
        return None
    streams, conditioning = begun
    for option in options:
        option.prepare(block, conditioning)
    kept: list[Streams] = []
    remaining = iter(given)
    for branch, op in zip(kind.branches(block), pattern, strict=True):
        if op is Op.SKIP:
            continue
        if op is Op.ADD:
            streams = add_deltas(block, streams, next(remaining))
            continue
        if op is Op.KEEP_RAW:
            kept.append(branch.output(block, streams, conditioning))
            deltas = branch.gated(block, kept[-1], conditioning)
        elif op in _GIVEN:
            deltas = next(remaining)
            deltas = branch.gated(block, deltas, conditioning) if op is Op.GATE else deltas
        else:
            deltas = asked(options, block, branch, streams, conditioning)
            if op is Op.KEEP:
                kept.append(deltas)
        streams = branch.add(block, streams, deltas)
    return kind.end(block, streams, conditioning), kept


class Variants:
    """The compiled functions of a model's blocks: one for each structure of a block, each pattern, and each layout of
    its arguments in memory (the first block after a list of others may be given views).

    Attributes:
        options: of ``torch.compile``.
    """

    def __init__(self, options: dict[str, Any]) -> None:
        self.options = {"fullgraph": True, **options}
        # The memory of a CUDA graph's outputs is used again in its next replay.
        self._copied = str(options.get("mode", "")) in ("reduce-overhead", "max-autotune")
        self._functions: dict[Hashable, Callable[..., Any]] = {}
        self._structures: dict[int, Hashable] = {}

    def __len__(self) -> int:
        return len(self._functions)

    def forward(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The stock forward."""
        stock = type(block).forward

        def run(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return stock(block, *args, **kwargs)

        args, kwargs, layouts = _laid_out(args, kwargs)
        return self._compiled((self._structure(block), None, layouts), run)(block, args, kwargs)

    def pattern(
        self,
        block: nn.Module,
        kind: BlockKind,
        options: list[BlockOption],
        pattern: Pattern,
        given: list[Streams],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> tuple[Any, list[Streams]] | None:
        """As :func:`run_pattern`."""
        # One graph that hands out what every branch makes serves for every choice of what is kept.
        asked_for = [op in _KEPT for op in pattern if op in _KEPT or op is Op.COMPUTE]
        if any(asked_for):
            keep = Op.KEEP_RAW if Op.KEEP_RAW in pattern else Op.KEEP
            pattern = tuple(keep if op is Op.COMPUTE else op for op in pattern)

        def run(block: nn.Module, options: list[BlockOption], given: list[Streams], args: Any, kwargs: Any) -> Any:
            return run_pattern(block, kind, options, pattern, given, args, kwargs)

        args, kwargs, layouts = _laid_out(args, kwargs)
        names = tuple(tuple(sorted(streams)) for streams in given)
        key = (self._structure(block), pattern, names, layouts, tuple(option.name for option in options))
        result = self._compiled(key, run)(block, options, given, args, kwargs)
        if result is None:
            return None
        output, made = result
        kept = [streams for streams, wanted in zip(made, asked_for, strict=False) if wanted]
        if self._copied:
            kept = [{name: value.clone() for name, value in streams.items()} for streams in kept]
        return output, kept

    def _structure(self, block: nn.Module) -> Hashable:
        """Equal for blocks that one graph can serve: class, submodules and shapes of the weights."""
        if id(block) not in self._structures:
            weights = tuple((name, tuple(p.shape), p.dtype) for name, p in block.named_parameters())
            modules = tuple((name, type(module)) for name, module in block.named_modules())
            self._structures[id(block)] = (modules, weights)
        return self._structures[id(block)]

    def _compiled(self, key: Hashable, function: Callable[..., Any]) -> Callable[..., Any]:
        if key not in self._functions:
            # Dynamo counts graphs, and gives up at a limit, by code object: each variant has one of its own.
            own = types.FunctionType(
                function.__code__.replace(), function.__globals__, function.__name__, None, function.__closure__
            )
            self._functions[key] = torch.compile(own, **self.options)
        return self._functions[key]


def _laid_out(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any], Hashable]:
    """The arguments, tokens with their channels apart (patch embeddings give such) brought together; and which of the
    tensors have plain strides, as graphs differ by that."""
    args = tuple(_dense(value) for value in args)
    kwargs = {name: _dense(value) for name, value in kwargs.items()}
    values = [*args, *kwargs.values()]
    return args, kwargs, tuple(_is_plain(value) if isinstance(value, torch.Tensor) else None for value in values)


def _is_plain(value: torch.Tensor) -> bool:
    # Not is_contiguous(), which does not look at the stride of a batch of one; Dynamo does.
    strides = value.stride()
    return all(strides[i - 1] == strides[i] * value.shape[i] for i in range(1, value.ndim))


def _dense(value: Any) -> Any:
    apart = isinstance(value, torch.Tensor) and value.ndim == 3 and value.stride(-1) != 1
    return value.contiguous() if apart else value

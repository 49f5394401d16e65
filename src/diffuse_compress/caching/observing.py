"""Every unit of a model handed to an observer, which sees what it adds and may say what is added instead.

Recording, profiling and the training of a router look at units one by one; what they do with a unit is the observer's
business (a router's soft mix is ``r * fresh + (1 - r) * kept``). The runtime of a schedule is another option, since it
must leave out what it does not compute.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from diffuse_compress.caching.outputs import ModelBoundary
from diffuse_compress.caching.units import Site, Unit, sites_of
from diffuse_compress.families.base import Branch, Conditioning, Streams
from diffuse_compress.families.boundary import Boundary
from diffuse_compress.runtime.blocks import BlockOption, disown, known_kind, own
from diffuse_compress.runtime.steps import Consumer, track, untrack

__all__ = ["Observer", "OutputOption", "UnitOption", "ValueOption", "observed"]

_NAME = "unit observer"


class Observer:
    """What sees the units."""

    def unit(self, index: int, streams: Streams, compute: Callable[[], Streams]) -> Streams:
        """What unit ``index`` adds to the streams it is given; ``compute()`` runs it. Of a unit that is run for a value
        this is the value, there are no streams, and the last of its modules is what is run."""
        raise NotImplementedError

    def part(self, index: int, compute: Callable[[], Any]) -> Any:
        """What another module of such a unit returns; ``compute()`` runs it."""
        return compute()


class ValueOption(BlockOption):
    """Of a module that is run for one value."""

    name, rank, wraps, composes = _NAME, 10, True, False

    def __init__(self, observer: Observer, index: int, is_last: bool) -> None:
        self.observer = observer
        self._index, self._is_last = index, is_last

    def around(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], run: Callable[..., Any]) -> Any:
        """The module, seen from outside."""
        if not self._is_last:
            return self.observer.part(self._index, lambda: run(*args, **kwargs))
        ran: list[tuple[torch.Tensor, Streams]] = []

        def compute() -> Streams:
            output = run(*args, **kwargs)
            # What follows may write to it (FreeU).
            ran.append((output, {"hidden_states": output.clone()}))
            return ran[-1][1]

        value = self.observer.unit(self._index, {}, compute)
        return ran[-1][0] if ran and value is ran[-1][1] else value["hidden_states"]


class OutputOption(BlockOption):
    """Of the denoiser as one unit."""

    name, rank, wraps, composes = _NAME, 10, True, False

    def __init__(self, observer: Observer, boundary: ModelBoundary) -> None:
        self.observer = observer
        self._boundary = boundary

    def around(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], run: Callable[..., Any]) -> Any:
        """The denoiser, seen from outside."""
        ran: list[tuple[Any, Streams]] = []

        def compute() -> Streams:
            output = run(*args, **kwargs)
            value = self._boundary.value(output)
            ran.append((output, {} if value is None else {"output": value}))
            return ran[-1][1]

        made = self.observer.unit(0, self._boundary.streams(args, kwargs), compute)
        output, computed = ran[-1]
        form = self._boundary.form(output)
        return output if made is computed or form is None else self._boundary.formed(made["output"], form)


class UnitOption(BlockOption):
    """Of one block. A block whose unit is all of it is seen from outside; bits change only if the observer's do."""

    name, rank = _NAME, 10

    def __init__(
        self, observer: Observer, site: Site, units: Sequence[Unit], boundary: Boundary, before_gates: bool
    ) -> None:
        self.observer = observer
        self._before_gates = before_gates
        self.composes = not site.whole
        self.wraps = site.whole
        self._first = site.first
        self._index = {unit.branch: site.first + number for number, unit in enumerate(units)}
        self._boundary = boundary

    def around(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], run: Callable[..., Any]) -> Any:
        """The block as one unit; of a block that does not return its streams nothing is seen."""
        boundary, ran = self._boundary, []
        streams = boundary.streams(args, kwargs)

        def compute() -> Streams:
            output = run(*args, **kwargs)
            returned = boundary.returned(streams, output) or {}
            made = {name: value - streams[name] for name, value in returned.items() if name in streams}
            ran.append((output, made))
            return made

        deltas = self.observer.unit(self._first, streams, compute)
        if ran and deltas is ran[-1][1]:
            return ran[-1][0]
        return boundary.packed({**streams, **{name: streams[name] + delta for name, delta in deltas.items()}})

    def branch(
        self,
        block: nn.Module,
        branch: Branch,
        streams: Streams,
        conditioning: Conditioning,
        compute: Callable[[], Streams],
    ) -> Streams:
        """A branch as a unit."""
        index = self._index[branch.name]
        if not self._before_gates:
            return self.observer.unit(index, streams, compute)
        outputs = self.observer.unit(index, streams, lambda: branch.output(block, streams, conditioning))
        return branch.gated(block, outputs, conditioning)


@contextmanager
def observed(
    model: nn.Module, units: Sequence[Unit], observer: Observer, *, in_a_loop: bool = True, before_gates: bool = False
) -> Iterator[tuple[Site, ...]]:
    """Inside, ``observer`` sees the units of ``model``, whose steps are followed if it is called in a loop.

    ``before_gates`` shows it what the layers of branches make, which their gates turn into what is added.
    """
    sites = sites_of(model, units)
    owned: list[nn.Module] = []
    try:
        for site in sites:
            for name in site.modules:
                part = model.get_submodule(name)
                own(part, ValueOption(observer, site.first, name == site.block))
                owned.append(part)
            if site.modules:
                continue
            module = model.get_submodule(site.block)
            if site.is_model:
                own(module, OutputOption(observer, ModelBoundary(module)))
                owned.append(module)
                continue
            members = units[site.first : site.first + site.count]
            option = UnitOption(observer, site, members, Boundary(module, known_kind(module)), before_gates)
            own(module, option)
            owned.append(module)
        if in_a_loop:
            track(model, Consumer(_NAME))
        yield sites
    finally:
        for module in owned:
            disown(module, _NAME)
        untrack(model, _NAME)

"""Computing every row of a table ahead: the model runs up to its first block, once for each timestep.

What runs before that block is recorded as it passes; what reads the block's arguments is computed from them. All of it
is the stock code, with the tensors that the pipeline passed, so the rows are those of the live path whatever a version
of the class does to its timestep.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from diffuse_compress.families.base import Dependence
from diffuse_compress.families.embedding import Entry, Reader
from diffuse_compress.temporal.layout import Layout
from diffuse_compress.temporal.lookup import LayerLookup, Mode
from diffuse_compress.temporal.request import copied
from diffuse_compress.temporal.step_scales import at_timestep

__all__ = ["Call", "Rows", "build", "run_to_block"]


@dataclass(frozen=True)
class Call:
    """One forward call of a model.

    Attributes:
        model: whose.
        arguments: by name, containers copied when they are handed on.
        timestep: name of the argument that is the timestep.
        batch: samples.
        device: of the sample.
    """

    model: nn.Module
    arguments: Mapping[str, Any]
    timestep: str
    batch: int
    device: torch.device

    def at(self, timestep: Any) -> dict[str, Any]:
        """Its arguments with another timestep."""
        return {**copied(self.arguments), self.timestep: timestep}


@dataclass(frozen=True)
class Rows:
    """What was computed, by layer.

    Attributes:
        timestep: [rows, out] of layers of the timestep alone.
        both: [rows * batch, out], sample after sample, of layers of timestep and condition.
        condition: [batch, ..., out] of layers of the condition alone.
        failed: layers of which it could not be computed, and why.
    """

    timestep: dict[str, torch.Tensor]
    both: dict[str, torch.Tensor]
    condition: dict[str, torch.Tensor]
    failed: dict[str, str]


def build(
    layout: Layout,
    lookups: Mapping[str, LayerLookup],
    call: Call,
    timesteps: Sequence[Any],
    wanted: frozenset[Dependence],
    exact: Mapping[Dependence, bool],
    known: Mapping[str, torch.Tensor] | None = None,
) -> Rows:
    """Rows of all layers of the wanted kinds.

    Args:
        layout: of ``call.model``.
        lookups: forwards of the layers; in RECORD mode for the time of this.
        call: the live call.
        timesteps: of the rows, as the pipeline would pass them; with conditions alone, the call's own.
        wanted: kinds of layers.
        exact: kinds of which every row is computed by itself, with the call's batch.
        known: [rows, out] of layers of the timestep alone, which are not computed again.
    """
    known = known or {}
    given = {name: lookups[name] for name in known}
    chosen = {name: lookups[name] for name, kind in layout.layers.items() if kind in wanted and name in lookups}
    rows = timesteps if wanted - {Dependence.CONDITION} else timesteps[:1]
    with torch.inference_mode(False), torch.no_grad(), _recording({**given, **chosen}):
        sources = {source for reader in layout.temporal.readers for source in reader.sources}
        entries = []
        for number, timestep in enumerate(rows):
            _give(known, lookups, call.batch, number)
            entries.append(run_to_block(call, layout.entry, timestep, sources))
            if len(entries) == 1:
                _serve_conditions(chosen)
        embeddings = _Embeddings(entries, call.batch, exact, lambda number: _give(known, lookups, call.batch, number))
        for name, lookup in lookups.items():
            reader = layout.temporal.reader_of(name)
            if reader is not None and embeddings.have(reader):
                _read(reader, lookup, embeddings, wanted, call.model, rows)
        return _collect(chosen, len(rows), call.batch)


class _Embeddings:
    """What the first block was called with in every row, as readers want it."""

    def __init__(
        self,
        entries: list[Entry],
        batch: int,
        exact: Mapping[Dependence, bool],
        give: Callable[[int | None], None],
    ) -> None:
        self._entries, self._batch, self.exact, self.give = entries, batch, exact, give
        self._joined: dict[Any, Entry] = {}

    def have(self, reader: Reader) -> bool:
        """Are the sources there, one row for each sample?"""
        values = [self._entries[0].arguments.get(source) for source in reader.sources]
        return all(isinstance(v, torch.Tensor) and v.ndim > 0 and v.shape[0] == self._batch for v in values)

    def entries(self, reader: Reader, kind: Dependence, one_by_one: bool) -> list[Entry]:
        """All rows, in one entry each or in one; the first row for what depends on no timestep."""
        if kind is Dependence.CONDITION:
            return self._entries[:1]
        if one_by_one:
            return self._entries
        # Every sample has the row's timestep: one of them is enough for what depends on it alone.
        samples = 1 if kind is Dependence.TIMESTEP else self._batch
        key = (reader.sources, samples)
        if key not in self._joined:
            first = self._entries[0]
            sources = {name: torch.cat([entry[name][:samples] for entry in self._entries]) for name in reader.sources}
            self._joined[key] = Entry(first.model, {**first.arguments, **sources}, first.dtype)
        return [self._joined[key]]


def _read(
    reader: Reader,
    lookup: LayerLookup,
    embeddings: _Embeddings,
    wanted: frozenset[Dependence],
    model: nn.Module,
    timesteps: Sequence[Any],
) -> None:
    """Compute one layer from the arguments of the first block, and record it; its weights leave again."""
    kind, exact = lookup.dependence, embeddings.exact
    # Embedders inside of a block's norm run while the norm's own input is made, and are recorded then.
    through = bool(reader.through) and Dependence.TIMESTEP in wanted
    if kind not in wanted and not through:
        return
    one_by_one = exact.get(kind, True)
    entries = embeddings.entries(reader, kind, one_by_one or (through and exact[Dependence.TIMESTEP]))
    inputs, recorded = [], []
    # Joined, all timesteps are one entry; of what depends on none, there is one.
    for number, (entry, timestep) in enumerate(zip(entries, timesteps, strict=False)):
        if reader.through:
            embeddings.give(number if len(entries) > 1 else None)
        with at_timestep(model, timestep):
            inputs.append(reader.input(entry, lookup.name))
            if kind in wanted and one_by_one:
                recorded.append(lookup.live(inputs[-1]))
    if kind in wanted:
        lookup.recorded = recorded if one_by_one else [lookup.live(torch.cat(inputs))]
    if lookup.parking is not None:
        lookup.parking.leave()


def _collect(chosen: Mapping[str, LayerLookup], rows: int, batch: int) -> Rows:
    found = Rows({}, {}, {}, {})
    for name, lookup in chosen.items():
        outputs, kind = lookup.recorded, lookup.dependence
        if not outputs:
            found.failed[name] = "it does not run before the first block, and what it reads is not known"
        elif kind is Dependence.CONDITION:
            # The same conditions in every row, so a further output is of a further call within one pass.
            if len(outputs) == 1:
                found.condition[name] = outputs[0]
            else:
                found.failed[name] = "it runs several times in a call"
        elif any(output.ndim != 2 for output in outputs):
            found.failed[name] = "it sees every token: its rows would be larger than its weights"
        else:
            table = torch.cat(outputs) if len(outputs) > 1 else outputs[0]
            if table.shape[0] == rows * batch:
                if kind is Dependence.TIMESTEP:
                    found.timestep[name] = table.view(rows, batch, -1)[:, 0].contiguous()
                else:
                    found.both[name] = table
            elif table.shape[0] == rows and kind is Dependence.TIMESTEP:
                found.timestep[name] = table
            else:
                found.failed[name] = "it runs several times in a call"
    return found


@contextmanager
def _recording(lookups: Mapping[str, LayerLookup]) -> Iterator[None]:
    before = {name: lookup.mode for name, lookup in lookups.items()}
    try:
        for lookup in lookups.values():
            lookup.mode, lookup.recorded = Mode.RECORD, []
        yield
    finally:
        for name, lookup in lookups.items():
            lookup.mode, lookup.recorded = before[name], []


def _give(
    known: Mapping[str, torch.Tensor], lookups: Mapping[str, LayerLookup], batch: int, number: int | None
) -> None:
    """Layers of the timestep alone give out this row, for every sample; with None, all rows one after the other."""
    for name, rows in known.items():
        chosen = rows if number is None else rows[number : number + 1]
        lookups[name].mode, lookups[name].value = Mode.LOOKUP, chosen.repeat_interleave(batch, dim=0)


def _serve_conditions(lookups: Mapping[str, LayerLookup]) -> None:
    """What the first row has shown of the conditions' layers is true of all rows."""
    for lookup in lookups.values():
        if lookup.dependence is Dependence.CONDITION and len(lookup.recorded) == 1:
            lookup.mode, lookup.value = Mode.LOOKUP, lookup.recorded[0]
        elif lookup.dependence is Dependence.CONDITION:
            lookup.mode = Mode.LIVE


class _Reached(BaseException):
    """The block was called: no forward catches this, and none goes on."""

    def __init__(self, arguments: dict[str, Any], dtype: torch.dtype) -> None:
        self.arguments, self.dtype = arguments, dtype


class _Stop(nn.Module):
    """Stands in for a block and ends the pass with the block's arguments; other threads get the block itself."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self._thread = threading.get_ident()
        self.__dict__["block"] = block

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["block"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        block = self.__dict__["block"]
        if threading.get_ident() != self._thread:
            return block(*args, **kwargs)
        stock = getattr(block, "_orig_mod", block)
        bound = inspect.signature(type(stock).forward).bind(stock, *args, **kwargs).arguments
        named = dict(list(bound.items())[1:])
        hidden = next(value for value in named.values() if isinstance(value, torch.Tensor))
        raise _Reached(named, hidden.dtype)


def run_to_block(call: Call, block: str, timestep: Any, sources: set[str]) -> Entry:
    """What the model gives its block ``block``, and was given itself, of these arguments; the block does not run."""
    parent_name, _, leaf = block.rpartition(".")
    parent = call.model.get_submodule(parent_name)
    stock = parent._modules[leaf]
    assert stock is not None
    parent._modules[leaf] = _Stop(stock)
    arguments = call.at(timestep)
    try:
        with at_timestep(call.model, timestep):
            call.model.forward(**arguments)
    except _Reached as reached:
        found = {**arguments, **reached.arguments}
        return Entry(call.model, {name: found[name] for name in sources if name in found}, reached.dtype)
    finally:
        parent._modules[leaf] = stock
    raise RuntimeError(f"the model did not run its block {block}")

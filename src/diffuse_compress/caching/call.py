"""One call of a denoiser that follows a schedule, on its way through the blocks.

A block that is left out returns its streams as they came in; the first of a run of such blocks adds what is kept of all
of them. What is computed for later steps is summed up on the way. Whenever anything is not as the schedule expects, the
block computes, and the reason is counted.

All that a call decides can be told before it runs, if the shapes of the streams are known (:meth:`Call.foresee`). Calls
that decide alike run the same operations, in whatever step, so they can be replayed as one CUDA graph: it is given
what each segment adds, and hands out what is to be kept (``pipelines/graphs.py``).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import nn

from diffuse_compress.caching.adapters import adapters_of
from diffuse_compress.caching.compiler import Atom, Program, Segment, SitePlan, StepPlan
from diffuse_compress.caching.patterns import Op, Pattern
from diffuse_compress.caching.store import Kept, Placement, Signature, Sum, plus, signature
from diffuse_compress.caching.units import Site
from diffuse_compress.errors import ModelStateError
from diffuse_compress.families.base import Below, Streams
from diffuse_compress.families.boundary import Boundary
from diffuse_compress.runtime.blocks import why_not_composed
from diffuse_compress.runtime.run import Run
from diffuse_compress.runtime.stats import Reason
from diffuse_compress.runtime.steps import StepContext

__all__ = [
    "ADAPTERS",
    "CHANGED",
    "INJECTED",
    "MISSING",
    "NAME",
    "NOT_COMPOSED",
    "NOT_RETURNED",
    "OVER_BUDGET",
    "Call",
    "Parts",
    "Plan",
    "State",
]

NAME = "feature cache"
"""In statistics, and of the blocks' option."""

MISSING = Reason(
    "what was to be reused had not been kept: the step that computes it was not seen",
    "nothing, if the loop starts in the middle of the schedule or a model takes over from another there",
)
CHANGED = Reason(
    "batch, resolution, dtype or device changed during the run",
    "keep them as they are from the first step to the last",
)
ADAPTERS = Reason("adapters changed during the run", "load, scale and switch adapters between runs")
NOT_COMPOSED = Reason(
    "a block cannot be run in part, since its attention processor or its arguments are not known",
    'use a schedule of whole blocks (granularity="block")',
)
NOT_RETURNED = Reason(
    "a block does not return the streams that it is given, or something else beside them",
    "leave that block out of the schedule",
)
INJECTED = Reason(
    "a ControlNet or an adapter adds to what is inside of the unit",
    'use a schedule of blocks (granularity="block")',
)
OVER_BUDGET = Reason("the memory budget did not allow to keep it", "raise memory_budget, or keep it on the CPU")


class Plan(Protocol):
    """What a call asks of the cache that it belongs to.

    Attributes:
        sites: the blocks, in order.
        boundaries: of each of them; what tells its streams.
        below: what is run for one value, if a site is that.
        merge: neighbouring units are one; False before the gates, where each is added by its own.
        placement: how atoms are kept.
        memory_budget: bytes that may be kept, or None.
    """

    sites: tuple[Site, ...]
    boundaries: list[Boundary]
    below: Below | None
    merge: bool
    placement: Placement
    memory_budget: int | None

    def program(self, run: Run, streams: Signature) -> Program:
        """The schedule compiled for a run of streams like these."""


@dataclass
class State:
    """What is kept for the later steps of one call of a step, why some is not, and the adapters it was made with."""

    kept: dict[int, Kept] = field(default_factory=dict)
    refused: dict[int, Reason] = field(default_factory=dict)
    adapters: Any = None


@dataclass
class Parts:
    """A block that is about to run in part; ``kept`` is filled when it has."""

    site: int
    pattern: Pattern
    given: list[Streams]
    kept: list[Streams] | None = None


Place = tuple[int, int]
"""First and last unit of an atom, by which one is known within a step."""


class Call:
    """One call of the denoiser on its way through the blocks.

    Attributes:
        given: once it is foreseen, what each segment adds, by its index.
        injected: something is added to what is inside of a unit.
        noted: where it writes down the streams of each site it reaches, if that is wanted.
    """

    def __init__(self, cache: Plan, context: StepContext, run: Run, row: int, module: nn.Module, wanted: int) -> None:
        self.cache = cache
        self.context = context
        self.run = run
        self.row = row
        self.module = module
        self._wanted = wanted
        self.parts: Parts | None = None
        self._program: Program | None = context.storage.get((NAME, "program"))
        self._decided: dict[int, bool] = {}
        self._added: set[int] = set()
        self._open: Sum | None = None
        self._saved = 0
        self.given: Mapping[int, Streams] = {}
        self.injected = False
        self.noted: dict[int, Signature] | None = None
        self._made: dict[Place, Streams | None] | None = None
        self._entered: dict[int, Signature] = {}
        self._places: Mapping[Place, int] = {}
        state: State = context.storage.setdefault((NAME, context.key), State())
        adapters = adapters_of(module)
        self._adapters_changed = bool(state.kept) and adapters != state.adapters
        if self._adapters_changed:
            state.kept.clear()
        state.adapters = adapters
        self._kept, self._refused = state.kept, state.refused

    def at(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any], run: Callable[..., Any]) -> Any:
        """A block is reached: what it returns."""
        boundary, site = self.cache.boundaries[index], self.cache.sites[index]
        streams = boundary.streams(args, kwargs)
        now = signature(streams)
        if self.noted is not None:
            self.noted[index] = now
        plan = self._planned(now).steps[self.row].sites[index]
        reused = [segment is not None and self._decide(segment, now) for segment in plan.segments]
        if all(reused) and site.residual and self.cache.merge:
            self._close(None)
            for number in dict.fromkeys(plan.segments):
                streams = self._plus(self._segment(number), streams)
            return boundary.packed(streams)
        keep = [self._keep(plan, unit, reused[unit]) for unit in range(site.count)]
        if not any(reused) and len(set(keep)) == 1 and site.residual and self.cache.merge:
            return self._whole(index, streams, keep[0], args, kwargs, run)
        return self._in_part(index, plan, streams, reused, keep, args, kwargs, run)

    def below(
        self,
        index: int,
        number: int,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        run: Callable[..., Any],
    ) -> Any:
        """A module is reached that is run for one value, which the last of them returns."""
        assert self.cache.below is not None
        hidden_states = args[0] if args else kwargs["hidden_states"]
        if number == 0:
            now = self._entered[index] = signature({"hidden_states": hidden_states})
            if self.noted is not None:
                self.noted[index] = now
        plan = self._planned(self._entered[index]).steps[self.row].sites[index]
        segment = plan.segments[0]
        reused = segment is not None and self._decide(segment, self._entered[index])
        last = number == len(self.cache.sites[index].modules) - 1
        if not reused:
            output = run(*args, **kwargs)
            atom = self._keep(plan, 0, False)
            if last and atom is not None:
                # What follows may write to it (FreeU).
                self._hand(atom, {"hidden_states": output.clone()}, self._entered[index])
            return output
        if not last:
            return self.cache.below.idle(module, hidden_states)
        return _weighted(self._terms(self._segment(segment)))["hidden_states"].clone()

    def end(self, failed: bool) -> int:
        """The call is over; bytes that are kept of it."""
        self._close(None)
        if not failed and self._program is not None:
            for atom in [a for a in self._kept if self._atom(a).release <= self.row]:
                del self._kept[atom]
            if self.context.step:
                self._count()
        return sum(kept.nbytes for kept in self._kept.values())

    def _count(self) -> None:
        """Of the calls of one step, the one that saved least counts."""
        saved: dict[Any, int] = self.context.storage.setdefault((NAME, "saved"), {})
        before = saved.get(self.context.step, 0)
        if self.context.step not in saved or self._saved < before:
            saved[self.context.step] = self._saved
            self.context.hit(NAME, self._saved - before)
        assert self._program is not None
        given_up = self._wanted - self._program.steps[self.row].reused
        if given_up > 0:
            self.context.miss(NAME, OVER_BUDGET, given_up)

    # --- what is planned and what is there ------------------------------------------------------------------------

    def _atom(self, index: int) -> Atom:
        assert self._program is not None
        return self._program.atoms[index]

    def _planned(self, streams: Signature) -> Program:
        """All calls of a run keep to one program: what is kept is known by its atoms."""
        if self._program is None:
            self._program = self.context.storage[NAME, "program"] = self.cache.program(self.run, streams)
        return self._program

    def _segment(self, number: int | None) -> Segment:
        assert self._program is not None
        assert number is not None
        return self._program.steps[self.row].segments[number]

    def _decide(self, number: int, streams: Signature) -> bool:
        """Whether a segment is reused: asked at the first of its blocks that is reached, and true for the others."""
        if number not in self._decided:
            segment = self._segment(number)
            reason = self._why_not(segment, streams)
            self._decided[number] = reason is None
            if reason is None:
                self._saved += segment.units
                self._prefetch(number + 1)
            elif self.context.step:
                self.context.miss(NAME, reason, segment.units)
        return self._decided[number]

    def _why_not(self, segment: Segment, streams: Signature) -> Reason | None:
        assert self._program is not None
        index = self._program.site_of[segment.first]
        site = self.cache.sites[index]
        if not all(name in streams for name in self.cache.boundaries[index].layout or () if name):
            return NOT_RETURNED
        if site.modules and self.injected:
            return INJECTED
        inside = self.cache.merge and site.residual and segment.first == site.first
        whole = inside and segment.last >= site.first + site.count - 1
        if not whole and not site.modules and why_not_composed(self.module.get_submodule(site.block)) is not None:
            return NOT_COMPOSED
        for atom, _ in segment.terms[: segment.latest]:
            kept = self._kept.get(atom)
            if kept is None:
                return self._refused.get(atom) or (ADAPTERS if self._adapters_changed else MISSING)
            if not kept.fits(streams):
                return CHANGED
        return None

    def _keep(self, plan: SitePlan, unit: int, reused: bool) -> int | None:
        """The atom that a unit is computed for."""
        atom = plan.keep[unit]
        return None if reused or atom is None or self._atom(atom).release <= self.row else atom

    def _terms(self, segment: Segment) -> list[tuple[Streams, float]]:
        """What a segment adds; without all of a forecast's history, the latest as it is."""
        if segment.index in self.given:
            return [(self.given[segment.index], 1.0)]
        kept, terms = self._kept, segment.terms
        if any(atom not in kept for atom, _ in terms):
            terms = tuple((atom, 1.0) for atom, _ in terms[: segment.latest])
        found = [(kept[atom].deltas(), weight) for atom, weight in terms]
        for atom, _ in terms:
            if self._atom(atom).release == self.row:
                del kept[atom]
        return found

    def _plus(self, segment: Segment, streams: Streams) -> Streams:
        """The streams with a segment added, at the first of its blocks."""
        if segment.index in self._added:
            return streams
        self._added.add(segment.index)
        for deltas, weight in self._terms(segment):
            streams = {**streams, **{n: plus(streams[n], delta, weight) for n, delta in deltas.items() if n in streams}}
        return streams

    def _prefetch(self, number: int) -> None:
        assert self._program is not None
        segments = self._program.steps[self.row].segments
        if self.cache.placement.device is None or number >= len(segments):
            return
        for atom, _ in segments[number].terms:
            if atom in self._kept:
                self._kept[atom].prefetch()

    # --- running ----------------------------------------------------------------------------------------------------

    def _whole(
        self,
        index: int,
        streams: Streams,
        atom: int | None,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        run: Callable[..., Any],
    ) -> Any:
        """All of a block is computed, and its units, if they are kept, belong to one atom."""
        total = self._close(atom, streams)
        output = run(*args, **kwargs)
        if total is not None:
            returned = self.cache.boundaries[index].returned(streams, output)
            if returned is None:
                total.broken = True
            else:
                total.block(streams, returned)
            self._finish(total, self.cache.sites[index].first + self.cache.sites[index].count - 1)
        return output

    def _in_part(
        self,
        index: int,
        plan: SitePlan,
        streams: Streams,
        reused: list[bool],
        keep: list[int | None],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        run: Callable[..., Any],
    ) -> Any:
        """Some of a block's branches are reused, or some are kept."""
        site, pattern, given = self.cache.sites[index], [], []
        for unit in range(site.count):
            op = self._op(site.residual, reused[unit], keep[unit])
            if reused[unit]:
                segment = self._segment(plan.segments[unit])
                if segment.index in self._added:
                    op = Op.SKIP
                else:
                    self._added.add(segment.index)
                    given.append(_weighted(self._terms(segment)))
            pattern.append(op)
        parts = self.parts = Parts(index, tuple(pattern), given)
        try:
            output = run(*args, **kwargs)
        finally:
            self.parts = None
        if parts.kept is None:
            self._undecide(plan, reused)
            return output
        made = iter(parts.kept)
        for unit, op in enumerate(pattern):
            if op in (Op.KEEP, Op.KEEP_RAW):
                total = self._close(keep[unit], streams)
                assert total is not None
                total.add(next(made))
                self._finish(total, site.first + unit)
        return output

    def _op(self, residual: bool, reused: bool, keep: int | None) -> Op:
        if not self.cache.merge:
            return Op.GATE if reused else Op.COMPUTE if keep is None else Op.KEEP_RAW
        if reused:
            return Op.ADD if residual else Op.GIVE
        return Op.COMPUTE if keep is None else Op.KEEP

    def _undecide(self, plan: SitePlan, reused: list[bool]) -> None:
        """The block ran as a whole after all: what begins in it is computed behind it, too."""
        if self._made is not None:
            raise ModelStateError("a block that was to run in part ran as a whole")
        for number in dict.fromkeys(n for n, was in zip(plan.segments, reused, strict=True) if was):
            segment = self._segment(number)
            self._decided[segment.index] = False
            self._saved -= segment.units
            if self.context.step:
                self.context.miss(NAME, NOT_COMPOSED, segment.units)

    def _close(self, atom: int | None, streams: Streams | None = None) -> Sum | None:
        """The sum for an atom, begun with these streams unless it is the open one; any other is closed."""
        if self._open is not None and self._open.atom != atom:
            self._store(self._open)
        if atom is not None and self._open is None:
            self._open = Sum(atom, streams or {})
        return self._open

    def _finish(self, total: Sum, unit: int) -> None:
        if self._atom(total.atom).last == unit:
            self._store(total)

    def _store(self, total: Sum) -> None:
        self._open = None
        self._hand(total.atom, total.result(), total.taken)

    def _hand(self, atom: int, deltas: Streams | None, taken: Signature) -> None:
        if self._made is not None:
            self._made[_place(self._atom(atom))] = deltas
        else:
            self._put(atom, deltas, taken)

    def _put(self, atom: int, deltas: Streams | None, taken: Signature) -> None:
        """Keep an atom, if it may be kept."""
        if deltas is None:
            self._refused[atom] = NOT_RETURNED
            return
        kept, budget = Kept(deltas, taken, self.cache.placement), self.cache.memory_budget
        if budget is not None and sum(other.nbytes for other in self._kept.values()) + kept.nbytes > budget:
            self._refused[atom] = OVER_BUDGET
            return
        self._kept[atom] = kept

    # --- as a graph ------------------------------------------------------------------------------------------------

    def foresee(self, streams: Mapping[int, Signature]) -> Hashable:
        """Decide all that is decided on the way, before a block is reached, and set ``given``; returns the pattern.

        Args:
            streams: at each site, as another call with arguments like these has noted them.
        """
        program = self._planned(streams[0])
        segments = program.steps[self.row].segments
        for segment in segments:
            self._decide(segment.index, streams[program.site_of[segment.first]])
        self.given = {s.index: _weighted(self._terms(s)) for s in segments if self._decided[s.index]}
        return self.pattern

    @property
    def pattern(self) -> Hashable:
        """What decides which operations run: equal for calls of any step that run the same ones. All is decided."""
        assert self._program is not None
        plan = self._program.steps[self.row]
        decided = tuple(self._decided[segment.index] for segment in plan.segments)
        known = self._program.patterns.get((self.row, decided))
        if known is None:
            known = self._program.patterns[self.row, decided] = self._told(plan, decided)
        pattern, self._places = known
        return pattern

    def _told(self, plan: StepPlan, decided: Sequence[bool]) -> tuple[Hashable, Mapping[Place, int]]:
        """(the pattern, which atom of this step is kept at which place)."""
        pattern: list[Hashable] = []
        places: dict[Place, int] = {}
        for site in plan.sites:
            reused = tuple(number if number is not None and decided[number] else None for number in site.segments)
            keep = [self._keep(site, unit, number is not None) for unit, number in enumerate(reused)]
            atoms = [None if atom is None else self._atom(atom) for atom in keep]
            places |= {_place(atom): atom.index for atom in atoms if atom is not None}
            pattern.append((reused, tuple(None if atom is None else _place(atom) for atom in atoms)))
        return tuple(pattern), places

    @contextlib.contextmanager
    def recording(self, given: Mapping[int, Streams]) -> Iterator[dict[Place, Streams | None]]:
        """Inside, the model adds what is ``given`` here, and what it makes for later steps is handed out, not kept."""
        before, self.given = self.given, given
        made: dict[Place, Streams | None] = {}
        self._made = made
        try:
            yield made
            self._close(None)
        finally:
            self.given, self._made, self._open = before, None, None
            self._added.clear()

    def deliver(self, made: Mapping[Place, Streams | None], streams: Mapping[int, Signature]) -> None:
        """Keep what a graph has made, in tensors that are nobody else's."""
        assert self._program is not None
        for place, deltas in made.items():
            self._put(self._places[place], deltas, streams[self._program.site_of[place[0]]])


def _place(atom: Atom) -> Place:
    return atom.first, atom.last


def _weighted(terms: list[tuple[Streams, float]]) -> Streams:
    """The sum of terms."""
    total: Streams = {}
    for deltas, weight in terms:
        for name, delta in deltas.items():
            if name in total:
                total[name] = plus(total[name], delta, weight)
            else:
                total[name] = delta if weight == 1.0 else delta * weight
    return total

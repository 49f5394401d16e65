"""A schedule compiled for execution: what is kept of which step, for how long, and where it is added.

Units that stand next to each other and are reused in the same steps need not be told apart: the sum of what they add to
the streams is one *atom*, kept as one tensor for each stream from the step that computes it to the last that reuses it.
What no step reuses is never kept. In a step, a run of reused units is a *segment*: its atoms are added where its first
unit stands, and nothing runs where the others stand.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from diffuse_compress.caching.schedule import Schedule
from diffuse_compress.caching.units import Site

__all__ = ["Atom", "Program", "Segment", "SitePlan", "StepPlan", "compile_schedule", "within_memory"]

Use = tuple[int, int, float]
"""(step, how many computations ago, weight): a step in which something kept is added."""


@dataclass(frozen=True)
class Atom:
    """Neighbouring units of one step that are kept as their sum.

    Attributes:
        index: in ``Program.atoms``.
        origin: the step that computes it.
        first, last: its units.
        uses: the steps that add it.
    """

    index: int
    origin: int
    first: int
    last: int
    uses: tuple[Use, ...]

    @property
    def release(self) -> int:
        """The last step that adds it."""
        return max(use[0] for use in self.uses)


@dataclass(frozen=True)
class Segment:
    """Neighbouring units that are reused in one step.

    Attributes:
        index: in ``StepPlan.segments``.
        first, last: its units.
        terms: (index of an atom, weight) to be added; the latest computations first.
        latest: how many of the terms are of the latest computation: without the others these are added as they are.
    """

    index: int
    first: int
    last: int
    terms: tuple[tuple[int, float], ...]
    latest: int

    @property
    def units(self) -> int:
        """How many units it reuses."""
        return self.last - self.first + 1


@dataclass(frozen=True)
class SitePlan:
    """What one site does in one step.

    Attributes:
        segments: for each of its units the segment it is reused in, or None to compute it.
        keep: for each of its units the atom that it is a part of: of this step if it is computed, else the one that
            it is reused from, to be filled if that is missing and wanted later.
        skipped: all of its units are reused.
    """

    segments: tuple[int | None, ...]
    keep: tuple[int | None, ...]
    skipped: bool


@dataclass(frozen=True)
class StepPlan:
    """What one step does: a plan for each site, and the segments that they speak of."""

    sites: tuple[SitePlan, ...]
    segments: tuple[Segment, ...]

    @property
    def reused(self) -> int:
        """Units that it reuses."""
        return sum(segment.units for segment in self.segments)


@dataclass(frozen=True)
class Program:
    """A compiled schedule.

    Attributes:
        schedule: as it was given.
        sites: of its units.
        atoms: all that is kept.
        steps: what each does.
        site_of: of each unit, its place among the sites.
        patterns: what calls remember of it (``call.py``), by step and by what they reuse.
    """

    schedule: Schedule
    sites: tuple[Site, ...]
    atoms: tuple[Atom, ...]
    steps: tuple[StepPlan, ...]
    site_of: tuple[int, ...] = field(repr=False, default=())
    patterns: dict[Hashable, Any] = field(repr=False, compare=False, default_factory=dict)

    def live(self, step: int) -> list[Atom]:
        """What is kept when this step is over."""
        return [atom for atom in self.atoms if atom.origin <= step < atom.release]

    def peak(self, atom_bytes: Sequence[float] | None = None) -> float:
        """Most that is kept between two steps: tensors, or the sum of ``atom_bytes`` by atom."""
        return max(
            sum(1.0 if atom_bytes is None else atom_bytes[atom.index] for atom in self.live(step))
            for step in range(len(self.steps))
        )


def compile_schedule(schedule: Schedule, sites: Sequence[Site], *, merge: bool = True) -> Program:
    """Compile ``schedule`` for units that stand at ``sites``; ``merge=False`` keeps every unit for itself."""
    tables = _Tables(schedule, sites, merge)
    steps = tuple(tables.step(step) for step in range(len(tables.mask)))
    return Program(schedule, tuple(sites), tuple(tables.atoms), steps, tables.site_of)


class _Tables:
    """What a compilation knows of every step and unit.

    Attributes:
        mask: [step][unit], True computes.
        skipped: [step][site], all of its units are reused.
        sources: [step][unit], of a reused unit (how many computations ago, in which step, weight).
        atoms: all of them.
        part_of: {(step that computes, unit): index of the atom}.
    """

    def __init__(self, schedule: Schedule, sites: Sequence[Site], merge: bool) -> None:
        self.sites, self.merge = sites, merge
        self.mask: list[list[bool]] = schedule.mask.bool().tolist()
        self.site_of = tuple(index for index, site in enumerate(sites) for _ in range(site.count))
        self.skipped = [[not any(row[s.first : s.first + s.count]) for s in sites] for row in self.mask]
        self.sources = _sources(self.mask, schedule.coefficients)
        self.atoms: list[Atom] = []
        self.part_of: dict[tuple[int, int], int] = {}
        self._make_atoms()

    def joined(self, unit: int, steps: Iterable[int]) -> bool:
        """Are a unit and the one before it one thing where both are reused in these steps?"""
        before, here = self.sites[self.site_of[unit - 1]], self.sites[self.site_of[unit]]
        if not self.merge or before.chain != here.chain or not here.residual:
            return False
        # A site that runs in part adds what it reuses itself: whether it can is known only when it is reached.
        return before is here or all(self.skipped[step][self.site_of[unit]] for step in steps)

    def step(self, step: int) -> StepPlan:
        """Plan of one step."""
        row = self.mask[step]
        segment_of: list[int | None] = [None] * len(row)
        bounds: list[tuple[int, int]] = []
        for unit, computes in enumerate(row):
            if computes:
                continue
            if unit and not row[unit - 1] and self.joined(unit, [step]):
                bounds[-1] = (bounds[-1][0], unit)
            else:
                bounds.append((unit, unit))
            segment_of[unit] = len(bounds) - 1
        plans = []
        for index, site in enumerate(self.sites):
            units = range(site.first, site.first + site.count)
            keep = tuple(self.part_of.get((self._latest(step, unit), unit)) for unit in units)
            plans.append(SitePlan(tuple(segment_of[unit] for unit in units), keep, self.skipped[step][index]))
        return StepPlan(tuple(plans), tuple(self._segment(step, i, *bound) for i, bound in enumerate(bounds)))

    def _latest(self, step: int, unit: int) -> int:
        """The step whose computation of a unit is the latest in ``step``."""
        return step if self.mask[step][unit] else self.sources[step][unit][0][1]

    def _segment(self, step: int, index: int, first: int, last: int) -> Segment:
        terms = {
            (lag, self.part_of[origin, unit]): weight
            for unit in range(first, last + 1)
            for lag, origin, weight in self.sources[step][unit]
        }
        ordered = sorted(terms)
        latest = sum(lag == 0 for lag, _ in ordered)
        return Segment(index, first, last, tuple((atom, terms[lag, atom]) for lag, atom in ordered), latest)

    def _make_atoms(self) -> None:
        uses: dict[tuple[int, int], list[Use]] = {}
        for step, row in enumerate(self.sources):
            for unit, found in enumerate(row):
                for lag, origin, weight in found:
                    uses.setdefault((origin, unit), []).append((step, lag, weight))
        for key in sorted(uses):
            origin, unit = key
            before = uses.get((origin, unit - 1))
            if before == uses[key] and self.joined(unit, [use[0] for use in before]):
                last = self.atoms[-1]
                self.atoms[-1] = replace(last, last=unit)
            else:
                self.atoms.append(Atom(len(self.atoms), origin, unit, unit, tuple(uses[key])))
            self.part_of[key] = self.atoms[-1].index


def _sources(mask: list[list[bool]], coefficients: torch.Tensor | None) -> list[list[list[tuple[int, int, float]]]]:
    """For each step and reused unit, what is added: the latest computation first."""
    weights = None if coefficients is None else coefficients.tolist()
    computed: list[list[int]] = [[] for _ in mask[0]]
    sources: list[list[list[tuple[int, int, float]]]] = []
    for step, row in enumerate(mask):
        sources.append([[] for _ in row])
        for unit, computes in enumerate(row):
            if computes:
                computed[unit].append(step)
                continue
            given = (1.0,) if weights is None else weights[step][unit]
            pairs = zip(given, reversed(computed[unit]), strict=False)
            sources[step][unit] = [(lag, o, w) for lag, (w, o) in enumerate(pairs) if w != 0.0 or lag == 0]
    return sources


def within_memory(schedule: Schedule, sites: Sequence[Site], site_bytes: Sequence[float], budget: float) -> Schedule:
    """The schedule with less reuse, so that what is kept between two steps stays within ``budget`` bytes.

    Time and again, of what is kept where most is kept, the atom that saves least time for the memory it takes up is
    given up: first the forecast of its units, which copy then what they computed last. What is kept of a unit is
    counted as all streams of its site.

    Args:
        schedule: to be changed.
        sites: of its units.
        site_bytes: of the streams of each site.
        budget: bytes.
    """
    cost = torch.ones(len(schedule.units)) if schedule.cost_ms is None else schedule.cost_ms
    while True:
        program = compile_schedule(schedule, sites)
        sizes = [site_bytes[program.site_of[atom.first]] for atom in program.atoms]
        if program.peak(sizes) <= budget:
            return schedule
        fullest = max(range(len(program.steps)), key=lambda s: sum(sizes[atom.index] for atom in program.live(s)))

        def worth(atom: Atom, sizes: list[float] = sizes) -> float:
            steps = {use[0] for use in atom.uses if use[1] == 0}
            return float(cost[atom.first : atom.last + 1].sum()) * len(steps) / max(sizes[atom.index], 1.0)

        least = min(program.live(fullest), key=worth)
        mask = schedule.mask.clone()
        units = slice(least.first, least.last + 1)
        coefficients = schedule.coefficients
        # A forecast is given up in any case, and without it less is kept.
        if coefficients is None or not bool(coefficients[:, units, 1:].any()):
            mask[[use[0] for use in least.uses], units] = 1
        if coefficients is not None:
            # They were fitted to other distances between computations.
            coefficients = coefficients.clone()
            coefficients[:, units] = 0.0
            coefficients[:, units, 0] = 1.0
        schedule = schedule.with_mask(mask, coefficients)

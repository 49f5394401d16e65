"""What a call planned, what it achieved, and why the rest was computed after all."""

from __future__ import annotations

import contextlib
import sys
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffuse_compress.errors import DiffuseCompressError, DiffuseCompressWarning
from diffuse_compress.runtime.sampling import SamplingLog

__all__ = [
    "ACHIEVED_SHARE",
    "CallStats",
    "CompressionStats",
    "MethodStats",
    "PlanMissedError",
    "Reason",
    "RunShare",
    "is_unchecked",
    "missed_message",
    "unchecked",
    "warn",
]

ACHIEVED_SHARE = 0.9
"""A call that achieves less than this share of its plan is worth a word to the user."""

_PACKAGE = str(Path(__file__).parents[1])


class PlanMissedError(DiffuseCompressError, RuntimeError):
    """``strict=True`` and less than 90 % of the planned work was saved; the message says why and what to do."""


@dataclass(frozen=True)
class Reason:
    """Why something was computed that might have been saved.

    Attributes:
        what: half a sentence, shown in statistics.
        fix: what the user can do about it.
    """

    what: str
    fix: str

    def __str__(self) -> str:
        return self.what


_NOT_REACHED = Reason(
    "the model ran, and the method was not reached in it",
    "remove what replaced the forward of its blocks (another library's cache or hooks), then compress again",
)


@dataclass
class MethodStats:
    """One method (a feature cache, a temporal table) over one call of a pipeline.

    Attributes:
        planned: units of work (branches, table rows) that it meant to save in the steps that came to pass, or None if
            that is unknown.
        hits: units that were saved.
        misses: units that were computed although the plan had them saved, by reason.
    """

    planned: int | None = None
    hits: int = 0
    misses: Counter[Reason] = field(default_factory=Counter)

    @property
    def achieved(self) -> float | None:
        """Share of the plan that was achieved, in [0, 1]; None without a plan."""
        return min(1.0, self.hits / self.planned) if self.planned else None

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable."""
        return {
            "planned": self.planned,
            "hits": self.hits,
            "misses": sum(self.misses.values()),
            "achieved": self.achieved,
            "reasons": {reason.what: count for reason, count in self.misses.most_common()},
        }


@dataclass
class RunShare:
    """One denoiser's part in one run.

    Attributes:
        seen: steps in which it ran.
        counted: steps whose plan counts: those seen at a known row, and lost ones.
        num_steps: of the run, or None while its start is unknown.
        plans: of each method, units to save in every step of the run.
    """

    seen: set[int] = field(default_factory=set)
    counted: set[int] = field(default_factory=set)
    num_steps: int | None = None
    plans: dict[str, Sequence[int]] = field(default_factory=dict)


@dataclass
class CallStats:
    """One denoiser over one run of the sampling loop.

    Attributes:
        planned_steps: length of the schedule, or None if none was seen; two experts share one.
        steps: iterations in which this denoiser ran.
        calls: its forward calls.
        unknown: calls whose place in the loop could not be told, by reason.
        lost: those of them whose step was not known either.
        methods: by name of the method.
        shares: its part in each run, by the run's number.
        sampling: the settings it was run with.
    """

    planned_steps: int | None = None
    steps: int = 0
    calls: int = 0
    unknown: Counter[Reason] = field(default_factory=Counter)
    lost: int = 0
    methods: dict[str, MethodStats] = field(default_factory=dict)
    shares: dict[int, RunShare] = field(default_factory=dict)
    sampling: SamplingLog = field(default_factory=SamplingLog, repr=False, compare=False)

    def method(self, name: str) -> MethodStats:
        """Statistics of a method, made on first use."""
        return self.methods.setdefault(name, MethodStats())

    def see(self, run: int, step: int, placed: bool) -> None:
        """The denoiser runs in this step of a run; what the methods plan there counts if its row is known."""
        share = self.shares.setdefault(run, RunShare())
        if step not in share.seen:
            share.seen.add(step)
            self.steps += 1
        if placed and step not in share.counted:
            share.counted.add(step)
            self._recount()

    def plan(self, run: int, num_steps: int, plans: Callable[[], Mapping[str, Sequence[int] | None]]) -> None:
        """The run has so many steps, and ``plans()`` are the units by method and step; until the first step of the
        scheduler that may change."""
        share = self.shares.setdefault(run, RunShare())
        if share.num_steps != num_steps:
            share.num_steps = num_steps
            share.plans = {name: units for name, units in plans().items() if units is not None}
            self._recount()

    def close(self, seen_by_others: Mapping[int, set[int]]) -> None:
        """The call is over. Plans of steps that no denoiser was seen in count too if calls were lost: an interrupted
        loop is no miss, and the other expert's steps are not this one's."""
        if self.lost:
            for run, share in self.shares.items():
                share.counted |= set(range(share.num_steps or 0)) - share.seen - seen_by_others.get(run, set())
            self._recount()

    def _recount(self) -> None:
        shares = self.shares.values()
        lengths = [share.num_steps for share in shares if share.num_steps is not None]
        self.planned_steps = sum(lengths) if lengths else None
        for name in {name for share in shares for name in share.plans}:
            plans = [(share.plans[name], share.counted) for share in shares if name in share.plans]
            self.method(name).planned = sum(sum(units[i] for i in steps if i < len(units)) for units, steps in plans)

    def missed(self, name: str) -> bool:
        """A method saved less than 90 % of its plan, or could not begin since no step was known."""
        method = self.method(name)
        if method.planned:
            return method.hits < ACHIEVED_SHARE * method.planned
        return not self.steps and bool(self.unknown)

    def explain(self, name: str) -> str:
        """What a method saved; why not more, most frequent reason first; and what to do about that one."""
        method = self.method(name)
        reasons = method.misses + self.unknown or Counter({_NOT_REACHED: max(1, self.calls)})
        ranked = reasons.most_common()
        causes = "; ".join(f"{reason.what} ({_times(count)})" for reason, count in ranked)
        share = "nothing"
        if method.planned:
            share = f"{method.hits} of {method.planned} planned units ({100 * (method.achieved or 0):.0f} %)"
        return f"saved {share}: {causes}. Fix: {ranked[0][0].fix}"

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable."""
        return {
            "planned_steps": self.planned_steps,
            "steps": self.steps,
            "calls": self.calls,
            "unknown_calls": {reason.what: count for reason, count in self.unknown.most_common()},
            "methods": {name: method.to_dict() for name, method in self.methods.items()},
        }


@dataclass(frozen=True)
class CompressionStats:
    """What the last call did, by component; ``str()`` for reading, ``to_dict()`` for machines."""

    components: dict[str, CallStats]

    def missed(self) -> list[tuple[str, str]]:
        """(component, method) of every plan achieved by less than 90 %."""
        return [(where, name) for where, call in self.components.items() for name in call.methods if call.missed(name)]

    def require(self) -> CompressionStats:
        """Itself.

        Raises:
            PlanMissedError: a plan was achieved by less than 90 %.
        """
        for where, name in self.missed():
            raise PlanMissedError(missed_message(where, name, self.components[where]))
        return self

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable."""
        return {name: call.to_dict() for name, call in self.components.items()}

    def __str__(self) -> str:
        if not self.components:
            return "No component follows the steps: nothing here is cached or looked up."
        lines = []
        for component, call in self.components.items():
            planned = "?" if call.planned_steps is None else call.planned_steps
            lines.append(
                f"{component or 'model'}: ran in {call.steps} of the schedule's {planned} steps, {call.calls} calls"
            )
            lines.extend(f"  step unknown in {count} calls: {reason}" for reason, count in call.unknown.most_common())
            for name, method in call.methods.items():
                share = "no plan" if method.achieved is None else f"{100 * method.achieved:.0f} % of {method.planned}"
                lines.append(f"  {name}: {method.hits} saved, {share}")
                lines.extend(f"    computed {count} times: {reason}" for reason, count in method.misses.most_common())
        return "\n".join(lines)


def missed_message(where: str, name: str, call: CallStats) -> str:
    """One sentence for warning and error."""
    return f"{where}: {name} {call.explain(name)}" if where else f"{name} {call.explain(name)}"


_thread = threading.local()


@contextlib.contextmanager
def unchecked() -> Iterator[None]:
    """Inside, this thread's calls are followed as ever, and nobody is told of what methods missed, nor that runs are
    far from a calibration: they are no runs of a user's."""
    before, _thread.unchecked = is_unchecked(), True
    try:
        yield
    finally:
        _thread.unchecked = before


def is_unchecked() -> bool:
    """Are this thread's calls inside of :func:`unchecked`?"""
    return bool(getattr(_thread, "unchecked", False))


def warn(message: str) -> None:
    """One warning at the user's line; the caller sees to it that it comes once."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_PACKAGE):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, DiffuseCompressWarning, stacklevel=level)


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"

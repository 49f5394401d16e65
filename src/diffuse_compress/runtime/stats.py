"""What a call planned, what it achieved, and why the rest was computed after all."""

from __future__ import annotations

import warnings
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from diffuse_compress.errors import DiffuseCompressError, DiffuseCompressWarning

__all__ = [
    "ACHIEVED_SHARE",
    "CallStats",
    "CompressionStats",
    "MethodStats",
    "PlanMissedError",
    "Reason",
]

ACHIEVED_SHARE = 0.9
"""A call that achieves less than this share of its plan is worth a word to the user."""


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


@dataclass
class MethodStats:
    """One method (a feature cache, a temporal table) over one call of a pipeline.

    Attributes:
        planned: units of work (branches, table rows) that it meant to save, or None if that is unknown.
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

    @property
    def missed(self) -> bool:
        """Less than 90 % was achieved of the plan, and of its part that came to pass: an interrupt is no miss."""
        share, tried = self.achieved, self.hits + sum(self.misses.values())
        return share is not None and share < ACHIEVED_SHARE and self.hits < ACHIEVED_SHARE * tried

    def add_plan(self, units: int | None) -> None:
        """Another run begins; without a plan of its own, nothing is known of the whole."""
        self.planned = None if units is None else (self.planned or 0) + units

    def explain(self) -> str:
        """Why the plan was missed, most frequent reason first, and what to do about that one."""
        ranked = self.misses.most_common()
        causes = "; ".join(f"{reason.what} ({count} times)" for reason, count in ranked)
        return f"{causes}. Fix: {ranked[0][0].fix}"

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
class CallStats:
    """One denoiser over one run of the sampling loop.

    Attributes:
        planned_steps: length of the scheduler's schedule, or None if no schedule was seen.
        steps: iterations in which this denoiser ran.
        calls: its forward calls.
        unknown: calls whose place in the loop could not be told, by reason.
        methods: by name of the method.
        runs: numbers of the runs that contributed.
    """

    planned_steps: int | None = None
    steps: int = 0
    calls: int = 0
    unknown: Counter[Reason] = field(default_factory=Counter)
    methods: dict[str, MethodStats] = field(default_factory=dict)
    runs: set[int] = field(default_factory=set)

    def method(self, name: str) -> MethodStats:
        """Statistics of a method, made on first use."""
        return self.methods.setdefault(name, MethodStats())

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

    def missed(self) -> list[tuple[str, str, MethodStats]]:
        """(component, method, statistics) of every plan achieved by less than 90 %."""
        return [
            (component, name, method)
            for component, call in self.components.items()
            for name, method in call.methods.items()
            if method.missed
        ]

    def require(self) -> CompressionStats:
        """Itself.

        Raises:
            PlanMissedError: a plan was achieved by less than 90 %.
        """
        for component, name, method in self.missed():
            raise PlanMissedError(missed_message(component, name, method))
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
            lines.append(f"{component or 'model'}: {call.steps} of {planned} steps, {call.calls} calls")
            lines.extend(f"  step unknown in {count} calls: {reason}" for reason, count in call.unknown.most_common())
            for name, method in call.methods.items():
                share = "no plan" if method.achieved is None else f"{100 * method.achieved:.0f} % of {method.planned}"
                lines.append(f"  {name}: {method.hits} saved, {share}")
                lines.extend(f"    computed {count} times: {reason}" for reason, count in method.misses.most_common())
        return "\n".join(lines)


def missed_message(component: str, name: str, method: MethodStats) -> str:
    """One sentence for warning and error."""
    where = f"{component}: " if component else ""
    return (
        f"{where}{name} saved {method.hits} of {method.planned} planned units "
        f"({100 * (method.achieved or 0):.0f} %): {method.explain()}"
    )


def warn_missed(component: str, name: str, method: MethodStats) -> None:
    """One warning; the caller sees to it that it comes once."""
    warnings.warn(missed_message(component, name, method), DiffuseCompressWarning, stacklevel=4)

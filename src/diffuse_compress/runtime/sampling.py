"""How a denoiser is run: scheduler, steps, guidance and size, told from its own calls and its scheduler's steps.

What is static in a compressed model (input scales, tables over timesteps) holds for runs like those it was calibrated
on. A calibration keeps their :class:`SamplingSettings`; a method that gives them to its ``Consumer`` (``steps.py``) has
every later run compared with them, and the user warned, once, of one that is far from all of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch

from diffuse_compress.families.base import SAMPLE_NAMES

if TYPE_CHECKING:
    from diffuse_compress.runtime.run import Run

__all__ = ["FAR", "SamplingLog", "SamplingSettings"]

FAR = 2.0
"""More than so many times the most, or less than that part of the least, steps or latent elements is far."""
_SHOWN = 4
_EMBEDDED = ("guidance", "timestep_cond")


@dataclass(frozen=True)
class SamplingSettings:
    """How a denoiser was run, once or in several runs. Empty where nothing told.

    Attributes:
        schedulers: class names.
        steps: of the schedule.
        guidance: "none"; "sequential", two calls or more in a step; "batched", more rows in a call than there are
            latents; "embedded", the scale is an argument of the model; or "embedded and sequential", "embedded and
            batched". Of a pipeline that steps the doubled latents (DiT's), guidance cannot be told from "none".
        sizes: shapes of one sample, without the batch.
    """

    schedulers: tuple[str, ...] = ()
    steps: tuple[int, ...] = ()
    guidance: tuple[str, ...] = ()
    sizes: tuple[tuple[int, ...], ...] = ()

    def __or__(self, other: SamplingSettings) -> SamplingSettings:
        pairs = ((getattr(self, field.name), getattr(other, field.name)) for field in fields(self))
        return SamplingSettings(*(tuple(sorted({*mine, *theirs})) for mine, theirs in pairs))

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form, without what is empty."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        return {
            name: [list(v) if isinstance(v, tuple) else v for v in values] for name, values in found.items() if values
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SamplingSettings:
        """Inverse of :meth:`to_dict`; what a newer release has added is left out."""
        known: dict[str, Any] = {field.name: data.get(field.name, ()) for field in fields(cls)}
        return cls(**{name: tuple(map(_frozen, values)) for name, values in known.items()})

    def far(self, run: SamplingSettings) -> list[tuple[str, str]]:
        """(these settings, those of ``run``) in words, wherever ``run`` is far from all of them.

        Another class of scheduler, another kind of guidance, and more than ``FAR`` times as many or as few steps, or
        elements of the latents, are far. What either side does not know is not.
        """
        names = [name for name in ("schedulers", "guidance") if self._lacks(name, run)]
        names += ["steps"] if _is_far(self.steps, run.steps) else []
        names += ["sizes"] if _is_far(map(math.prod, self.sizes), map(math.prod, run.sizes)) else []
        mine, theirs = self._words(), run._words()
        return [(mine[name], theirs[name]) for name in names]

    def _lacks(self, name: str, run: SamplingSettings) -> bool:
        known, seen = getattr(self, name), getattr(run, name)
        return bool(known) and not set(seen) <= set(known)

    def _words(self) -> dict[str, str]:
        """Of each attribute that is not empty."""
        words = {
            "schedulers": _listed(self.schedulers),
            "steps": f"{_listed(self.steps)} steps",
            "guidance": f"guidance {_listed(self.guidance)}",
            "sizes": f"latents of {_listed('x'.join(map(str, size)) for size in self.sizes)}",
        }
        return {name: text for name, text in words.items() if getattr(self, name)}

    def __str__(self) -> str:
        return ", ".join(self._words().values())


class SamplingLog:
    """Collects the :class:`SamplingSettings` of a denoiser call by call; no tensor's values are read."""

    def __init__(self) -> None:
        self._schedulers: set[str] = set()
        self._steps: set[int] = set()
        self._sizes: set[tuple[int, ...]] = set()
        self._calls = 0  # most of one step
        self._rows = 0  # most of one call
        self._share: float | None = None  # most rows for each of the latents
        self._embedded = False

    def see(self, run: Run, call: int, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """A call of the denoiser: the ``call``-th, from 0, in a step of ``run``."""
        self._calls = max(self._calls, call + 1)
        scheduler, steps = run.scheduler(), run.num_inference_steps
        if scheduler is not None:
            self._schedulers.add(type(scheduler).__name__)
        if steps is not None:
            self._steps.add(steps)
        self._embedded = self._embedded or any(isinstance(kwargs.get(name), torch.Tensor) for name in _EMBEDDED)
        sample = args[0] if args else next((kwargs[name] for name in SAMPLE_NAMES if name in kwargs), None)
        if isinstance(sample, torch.Tensor) and sample.ndim > 1:
            self._sizes.add(tuple(sample.shape[1:]))
            self._rows = max(self._rows, sample.shape[0])
            if run.num_latents:
                self._share = max(self._share or 0.0, sample.shape[0] / run.num_latents)

    def settings(self) -> SamplingSettings:
        """What was seen so far."""
        kind = self._kind()
        return SamplingSettings(
            tuple(sorted(self._schedulers)),
            tuple(sorted(self._steps)),
            () if kind is None else (kind,),
            tuple(sorted(self._sizes)),
        )

    def _kind(self) -> str | None:
        if self._calls == 0 or (self._calls == 1 and self._rows != 1 and self._share is None):
            return None
        kind = "sequential" if self._calls > 1 else "batched" if (self._share or 1.0) > 1 else "none"
        if not self._embedded:
            return kind
        return "embedded" if kind == "none" else f"embedded and {kind}"


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _is_far(calibrated: Iterable[int], run: Iterable[int]) -> bool:
    known, seen = list(calibrated), list(run)
    return bool(known) and any(value > FAR * max(known) or value * FAR < min(known) for value in seen)


def _listed(values: Iterable[Any]) -> str:
    texts = list(map(str, values))
    more = len(texts) - _SHOWN
    return " or ".join([*texts[:_SHOWN], f"{more} others"] if more > 0 else texts)

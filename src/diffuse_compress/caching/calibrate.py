"""A cache schedule in a minute, without gradients: record a few trajectories, search, check.

What each unit adds is recorded along a few trajectories of the pipeline (``recording.py``). The schedule of least error
within the budget of time is searched with these samples alone (``search.py``), under a few assumptions about which
steps matter most, beside the plain one of whole steps at even distances. Each is run once and compared with the
pictures without a cache; the best is taken.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from diffuse_compress.caching.config import MAX_TRAJECTORIES
from diffuse_compress.caching.forecast import with_forecast
from diffuse_compress.caching.noise import with_noise
from diffuse_compress.caching.recording import Recorder
from diffuse_compress.caching.rehearsal import (
    Rehearsal,
    arguments_of_items,
    loop_speedup,
)
from diffuse_compress.caching.schedule import Schedule
from diffuse_compress.caching.search import cheapest_within, reuse_errors
from diffuse_compress.caching.units import Granularity, sites_of
from diffuse_compress.errors import ConfigError
from diffuse_compress.progress import Callback
from diffuse_compress.progress import track as progress

__all__ = ["CacheCalibration", "Candidate", "calibrate_cache"]

# How much more an error in the first step counts than one in the last.
_SLOPES = {"even": 0.0, "early steps count more": 1.5}
_INTERVAL = "whole steps"


@dataclass(frozen=True)
class Candidate:
    """A way to meet the budget.

    Attributes:
        name: how it was found.
        schedules: by component.
        error: relative RMS distance of its output from that without a cache; None if it was not run.
        seconds: of the denoisers' part of the loop.
    """

    name: str
    schedules: Mapping[str, Schedule]
    error: float | None = None
    seconds: float = 0.0


@dataclass(frozen=True)
class CacheCalibration:
    """What a calibration found.

    Attributes:
        schedules: by component.
        predicted_speedup: of the denoisers' part of the loop, from the profile.
        measured_speedup: of the same, wall time from the first call of a denoiser in the loop to the end of the loop:
            runs without a cache over runs with the schedules taken, of the first prompt. They take turns on a warm
            model, as many as fit into ``MAX_CHECKS`` forwards; one of each if no more do.
        error: relative RMS distance of the output from that without a cache.
        candidates: all that were run.
        forwards: of the denoisers, spent on checking, runs without a cache included: at most ``MAX_CHECKS`` if two
            runs have no more.
    """

    schedules: Mapping[str, Schedule]
    predicted_speedup: float
    measured_speedup: float
    error: float
    candidates: tuple[Candidate, ...] = field(repr=False)
    forwards: int

    def summary(self) -> str:
        """Speed-up as predicted and as measured, what was compared, and the schedules."""
        tried = ", ".join(f"{c.name} {c.error:.4f}" for c in self.candidates if c.error is not None)
        lines = [
            f"feature cache: speed-up of the denoising loop {self.predicted_speedup:.2f}x predicted, "
            f"{self.measured_speedup:.2f}x measured; output changed by {self.error:.4f} of its RMS",
            f"checked with {self.forwards} forwards: {tried}",
        ]
        return "\n".join([*lines, *(f"{name}\n{schedule}" for name, schedule in self.schedules.items())])

    __str__ = summary


def calibrate_cache(
    pipe: Any,
    prompts: Iterable[Any],
    *,
    target_speedup: float,
    granularity: Granularity | str = Granularity.BLOCK,
    num_trajectories: int = MAX_TRAJECTORIES,
    history: int = 2,
    longest_reuse: int | None = None,
    seed: int = 0,
    force: bool = False,
    components: Sequence[str] = ("denoisers",),
    callback: Callback | None = None,
    **call_arguments: Any,
) -> CacheCalibration:
    """Find cache schedules for the denoisers of ``pipe``, which stays as it is.

    Args:
        pipe: a diffusers pipeline, compressed or not, on the device and in the dtype it will run in.
        prompts: prompts, class labels or dicts of arguments of ``pipe(...)``; the first ``num_trajectories`` are used.
        target_speedup: of the denoisers' part of the loop.
        granularity: "block" (whole blocks) or "branch".
        num_trajectories: at most 8.
        history: past changes that a forecast is made of; 1 copies the last one.
        longest_reuse: most steps in a row in which a unit may be reused.
        seed: of the starting noise; trajectory i has ``seed + i``.
        force: calibrate for fewer than 10 steps too.
        components: names or groups of the denoisers that get a schedule.
        callback: ``callback(stage, done, total, metrics)``.
        call_arguments: of every call: num_inference_steps, guidance_scale, height, ...

    Raises:
        ConfigError: no prompts, fewer than 10 steps, a speed-up that these units cannot give, or a model that has a
            cache already.
    """
    _check(target_speedup, num_trajectories)
    given = arguments_of_items(pipe, prompts, call_arguments, num_trajectories)
    rehearsal = Rehearsal(pipe, granularity, seed, force=force, components=components)
    rehearsal.require_steps(call_arguments)
    rehearsal.record(given, callback)
    recorders = rehearsal.recorders
    full = {name: rehearsal.full_schedule(name) for name in recorders}
    candidates = list(_candidates(full, recorders, rehearsal.models, target_speedup, history, longest_reuse))
    checked, best, measured = _checked(rehearsal, candidates, given[0], callback)
    return CacheCalibration(
        {name: with_noise(schedule, recorders[name].trajectories) for name, schedule in best.schedules.items()},
        loop_speedup(*rehearsal.loop_ms(best.schedules)),
        measured,
        best.error or 0.0,
        tuple(checked),
        rehearsal.forwards,
    )


def _checked(
    rehearsal: Rehearsal, candidates: Sequence[Candidate], arguments: Mapping[str, Any], callback: Callback | None
) -> tuple[list[Candidate], Candidate, float]:
    """(candidates that there was time to run, the best of them, its speed-up as measured)."""
    checked: list[Candidate] = []
    candidates = candidates[: _num_checked(rehearsal.runs_to_check)]
    with rehearsal.timed() as clock:
        for candidate in progress(candidates, "Checking schedules", rehearsal.pipe, callback, {}):
            error, seconds = rehearsal.checked(candidate.schedules, arguments, clock)
            checked.append(replace(candidate, error=error, seconds=seconds))
        best = min(checked, key=lambda candidate: candidate.error or 0.0)
        measured = rehearsal.measured_speedup(
            best.schedules, arguments, clock, seconds=best.seconds, spent=len(checked)
        )
    return checked, best, measured


def _num_checked(runs: int) -> int:
    """Candidates for which there is time: a run without a cache must fit in, and one more with the best if it may."""
    return max(1, runs - 1 if runs <= 3 else runs - 2)


def _check(target_speedup: float, num_trajectories: int) -> None:
    if not target_speedup > 1.0:
        raise ConfigError(f"cache calibration: target_speedup must be above 1, got {target_speedup}.")
    if not 1 <= num_trajectories <= MAX_TRAJECTORIES:
        raise ConfigError(
            f"cache calibration: num_trajectories must be 1 to {MAX_TRAJECTORIES}, got {num_trajectories}."
        )


def _candidates(
    full: Mapping[str, Schedule],
    recorders: Mapping[str, Recorder],
    models: Mapping[str, nn.Module],
    target: float,
    history: int,
    longest: int | None,
) -> Iterator[Candidate]:
    gaps = {name: None if history < 2 else _gap(schedule, target) for name, schedule in full.items()}
    errors = {name: reuse_errors(r.trajectories, gap=gaps[name]) for name, r in recorders.items()}

    def finished(name: str, masks: Mapping[str, torch.Tensor]) -> Candidate:
        schedules = {part: full[part].with_mask(mask) for part, mask in masks.items()}
        if history > 1:
            schedules = {
                part: with_forecast(s, sites_of(models[part], s.units), recorders[part].trajectories, history=history)
                for part, s in schedules.items()
            }
        return Candidate(name, schedules)

    # Whole steps come first: where there is time to check one candidate only, they were best on the reference models.
    whole = {part: _interval(schedule, recorders[part].seen, target) for part, schedule in full.items()}
    if all(mask is not None for mask in whole.values()):
        yield finished(_INTERVAL, {part: mask for part, mask in whole.items() if mask is not None})
    for name, slope in _SLOPES.items():
        masks = {}
        for part, schedule in full.items():
            assert schedule.cost_ms is not None
            seen = recorders[part].seen
            weights = torch.exp(-slope * torch.linspace(0, 1, schedule.num_steps, dtype=torch.float64))
            step_ms = float(schedule.cost_ms.sum()) + schedule.other_ms
            masks[part] = cheapest_within(
                errors[part],
                weights,
                schedule.cost_ms,
                int(seen.sum()) * step_ms * (1 - 1 / target),
                forced=~seen | _first(seen),
                longest=longest,
            )
        yield finished(name, masks)


def _gap(schedule: Schedule, target: float) -> int:
    """Steps between two computations of a unit, on the average, if the budget is met."""
    assert schedule.cost_ms is not None
    units_ms = float(schedule.cost_ms.sum())
    share = (units_ms + schedule.other_ms) * (1 - 1 / target) / max(units_ms, 1e-9)
    return max(1, round(1 / max(1 - share, 1e-3)))


def _first(seen: torch.Tensor) -> torch.Tensor:
    """The first step of those seen: of two experts, the second begins with nothing kept."""
    first = torch.zeros_like(seen)
    first[int(seen.nonzero()[0])] = True
    return first


def _interval(schedule: Schedule, seen: torch.Tensor, target: float) -> torch.Tensor | None:
    """Whole steps at even distances (FORA, Selvaraju et al. 2024, arXiv 2407.01425), as few as the budget asks for."""
    assert schedule.cost_ms is not None
    units_ms = float(schedule.cost_ms.sum())
    steps = int(seen.sum())
    reused = -int(-(steps * (units_ms + schedule.other_ms) * (1 - 1 / target)) // units_ms)
    if reused >= steps:
        return None
    mask = schedule.mask.clone()
    computed = {round(i * (steps - 1) / max(1, steps - reused - 1)) for i in range(steps - reused)}
    for number, step in enumerate(seen.nonzero().flatten().tolist()):
        if number not in computed and number:
            mask[step] = 0
    return mask

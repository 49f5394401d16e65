"""A cache schedule in a minute, without gradients: record a few trajectories, search, check.

What each unit adds is recorded along a few trajectories of the pipeline (``recording.py``). The schedule of least error
within the budget of time is searched with these samples alone (``search.py``), under a few assumptions about which
steps matter most, beside the plain one of whole steps at even distances. Each is run once and compared with the
pictures without a cache; the best is taken.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from diffuse_compress.caching.config import FeatureCacheConfig
from diffuse_compress.caching.forecast import with_forecast
from diffuse_compress.caching.loop_recorder import LoopRecorder
from diffuse_compress.caching.noise import with_noise
from diffuse_compress.caching.rehearsal import MAX_CHECKS, Rehearsal, arguments_of_items, distance, loop_speedup
from diffuse_compress.caching.schedule import Schedule
from diffuse_compress.caching.search import cheapest_within, reuse_errors
from diffuse_compress.caching.units import sites_of
from diffuse_compress.caching.whole_steps import (
    MOST_SEARCHED,
    StepErrors,
    StepFitter,
    error_weights,
    even_steps,
    fewest_error,
    first_steps,
    keeps_to,
    short_gaps,
)
from diffuse_compress.errors import ConfigError
from diffuse_compress.progress import Callback
from diffuse_compress.progress import track as progress

__all__ = ["CacheCalibration", "Candidate", "calibrate_cache"]

# Of whole steps: how much of an error in a sample the denoiser takes for noise, and how the computed steps are spaced.
_SEEN_AS_NOISE = {"errors half noise": 0.5, "errors as noise": 1.0, "errors as content": 0.0}
_DISTANCES = {"even distances": 1.0, "closer at the end": 0.8}
_STEP_ORDER = (
    "errors half noise",
    "errors as noise",
    "even distances",
    "closer at the end",
    "errors as content",
)
# How much more an error in the first step counts than one in the last.
_SLOPES = {"even": 0.0, "early steps count more": 1.5}
_INTERVAL = "whole steps"
_Fitters = dict[str, StepFitter]


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
            model, as many as fit into ``MAX_CHECKS`` forwards; one of each if no more do, or if they take seconds.
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
    config: FeatureCacheConfig | None = None,
    *,
    components: Sequence[str] = ("denoisers",),
    callback: Callback | None = None,
    **call_arguments: Any,
) -> CacheCalibration:
    """Find cache schedules for the denoisers of ``pipe``, which stays as it is.

    Args:
        pipe: a diffusers pipeline, compressed or not, on the device and in the dtype it will run in.
        prompts: prompts, class labels or dicts of arguments of ``pipe(...)``; the first ``num_trajectories`` are used.
        config: what to aim at.
        components: names or groups of the denoisers that get a schedule.
        callback: ``callback(stage, done, total, metrics)``.
        call_arguments: of every call: height, width, ...

    Raises:
        ConfigError: no prompts, fewer than 10 steps, a speed-up that these units cannot give, or a model that has a
            cache already.
    """
    config = config or FeatureCacheConfig()
    arguments = {**config.call_arguments, **call_arguments}
    given = arguments_of_items(pipe, prompts, arguments, config.num_trajectories)
    rehearsal = Rehearsal(pipe, config.granularity, config.seed, force=config.force, components=components)
    rehearsal.require_steps(arguments)
    if rehearsal.loop is not None:
        candidates, tried = _by_step(rehearsal, rehearsal.loop, given, config, callback)
    else:
        rehearsal.record(given, callback)
        candidates, tried = list(_by_unit(rehearsal, config)), []
    checked, best, measured = _checked(rehearsal, candidates, given[0], callback)
    trajectories = {name: recorder.trajectories for name, recorder in rehearsal.recorders.items()}
    return CacheCalibration(
        {name: with_noise(schedule, trajectories[name]) for name, schedule in best.schedules.items()},
        loop_speedup(*rehearsal.loop_ms(best.schedules)),
        measured,
        best.error or 0.0,
        (*tried, *checked),
        rehearsal.forwards,
    )


def _checked(
    rehearsal: Rehearsal, candidates: Sequence[Candidate], arguments: Mapping[str, Any], callback: Callback | None
) -> tuple[list[Candidate], Candidate, float]:
    """(candidates that there was time to run, the best of them, its speed-up as measured)."""
    checked: list[Candidate] = []
    candidates = candidates[: _num_checked(rehearsal, candidates)]
    with rehearsal.timed() as clock:
        for candidate in progress(candidates, "Checking schedules", rehearsal.pipe, callback, {}):
            error, seconds = rehearsal.checked(candidate.schedules, arguments, clock)
            checked.append(replace(candidate, error=error, seconds=seconds))
        best = min(checked, key=lambda candidate: candidate.error or 0.0)
        measured = rehearsal.measured_speedup(best.schedules, arguments, clock, seconds=best.seconds)
    return checked, best, measured


def _num_checked(rehearsal: Rehearsal, candidates: Sequence[Candidate]) -> int:
    """Candidates for which there is time: a run without a cache must fit in, and one more with the best if it may."""
    full = rehearsal.forwards_of_a_run
    cached = max(rehearsal.forwards_of_a_run_with(candidate.schedules) for candidate in candidates)
    runs = (MAX_CHECKS - full) // max(1, cached)
    return max(1, runs if runs <= 2 else runs - 1)


def _by_step(
    rehearsal: Rehearsal,
    loop: LoopRecorder,
    given: list[dict[str, Any]],
    config: FeatureCacheConfig,
    callback: Callback | None,
) -> tuple[list[Candidate], list[Candidate]]:
    """([the schedule of whole steps that did best], the others), each tried in a run that computes everything."""
    plain, refined = max(1, len(given) // 4), len(given) // 4
    rehearsal.record(given[:plain], callback)
    full = {name: rehearsal.full_schedule(name) for name in rehearsal.recorders}
    masks = _masks(loop, next(iter(rehearsal.recorders.values())).levels, config)
    masks = dict(list(masks.items())[: max(1, len(given) - plain - refined)])
    tried: dict[str, tuple[float, _Fitters]] = {}

    for name, mask in progress(list(masks.items()), "Trying schedules", rehearsal.pipe, callback, {}):
        fitters = {part: StepFitter(mask, config.history) for part in full}
        tried[name] = distance(rehearsal.observed_run(fitters, given[0], 0), rehearsal.references[0]), fitters
    best = min(tried, key=lambda name: tried[name][0])
    rest = range(plain, plain + refined) if config.history > 1 else range(0)
    for index in progress(list(rest), "Fitting the forecast", rehearsal.pipe, callback, {}):
        rehearsal.observed_run(tried[best][1], given[index], index)
    found = {
        name: Candidate(name, _by_component(full, loop, masks[name], fitters), error)
        for name, (error, fitters) in tried.items()
    }
    return [found[best]], [candidate for name, candidate in found.items() if name != best]


def _masks(loop: LoopRecorder, levels: torch.Tensor, config: FeatureCacheConfig) -> dict[str, torch.Tensor]:
    """Ways to spend the budget of steps, by name, the most promising first: bool [T], rows that no step takes are
    computed."""
    first = first_steps(loop.components)
    steps, firsts = len(first), int(first.sum())
    computed = steps - math.ceil(steps * (1 - 1 / config.target_speedup) - 1e-9)
    if computed < firsts:
        raise ConfigError(
            f"cache calibration: {steps} steps, of which the first of each denoiser must be computed, allow a speed-up "
            f"of {steps / firsts:.3g}, {config.target_speedup:g} is wanted. Lower target_speedup."
        )
    plain = _plain_masks(first, computed, config)
    masks: dict[str, torch.Tensor] = {}
    if steps <= MOST_SEARCHED:
        errors = StepErrors(*loop.features(), loop.components, config.history)
        shares = list(_SEEN_AS_NOISE.values())
        for name, weights in zip(_SEEN_AS_NOISE, error_weights(loop, levels[loop.rows], shares), strict=True):
            masks[name] = fewest_error(errors, weights, list(plain.values()), longest=config.longest_reuse)
    masks |= plain
    different: dict[str, torch.Tensor] = {}
    for name in sorted(masks, key=_STEP_ORDER.index):
        mask = torch.ones(len(levels), dtype=torch.bool)
        mask[loop.rows] = masks[name]
        if not any(torch.equal(mask, other) for other in different.values()):
            different[name] = mask
    return different


def _plain_masks(first: torch.Tensor, computed: int, config: FeatureCacheConfig) -> dict[str, torch.Tensor]:
    """Steps at even distances, as far as they keep to ``longest_reuse``."""
    plain = {name: even_steps(first, computed, power) for name, power in _DISTANCES.items()}
    plain = {name: mask for name, mask in plain.items() if keeps_to(mask, config.longest_reuse)}
    if plain or config.longest_reuse is None:
        return plain
    shortest = short_gaps(first, computed, config.longest_reuse)
    if shortest is None:
        raise ConfigError(
            f"cache calibration: target_speedup={config.target_speedup:g} leaves out {len(first) - computed} of "
            f"{len(first)} steps, which longest_reuse={config.longest_reuse} does not allow. Lower the one or "
            "raise the other."
        )
    return {next(iter(_DISTANCES)): shortest}


def _by_component(
    full: Mapping[str, Schedule], loop: LoopRecorder, mask: torch.Tensor, fitters: _Fitters
) -> dict[str, Schedule]:
    """A mask of steps as a schedule of each denoiser, which computes those that are not its own, too."""
    schedules = {}
    for part, schedule in full.items():
        own = [row for row, name in zip(loop.rows, loop.components, strict=True) if name == part]
        others = torch.ones_like(mask)
        others[own] = False
        schedules[part] = schedule.with_mask((mask | others)[:, None], *fitters[part].coefficients)
    return schedules


def _by_unit(rehearsal: Rehearsal, config: FeatureCacheConfig) -> Iterator[Candidate]:
    full = {name: rehearsal.full_schedule(name) for name in rehearsal.recorders}
    recorders, models = rehearsal.recorders, rehearsal.models
    target, history = config.target_speedup, config.history
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
                longest=config.longest_reuse,
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

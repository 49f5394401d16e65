"""A cache schedule in a minute, without gradients: record a few trajectories, search, check.

What each unit adds is recorded along a few trajectories of the pipeline (``recording.py``). The schedule of least error
within the budget of time is searched with these samples alone (``search.py``), under a few assumptions about which
steps matter most, beside the plain one of whole steps at even distances. Each is run once and compared with the
pictures without a cache; the best is taken.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from diffuse_compress.caching.config import MAX_TRAJECTORIES, MIN_STEPS, too_few_steps
from diffuse_compress.caching.forecast import with_forecast
from diffuse_compress.caching.observing import observed
from diffuse_compress.caching.recording import LoopClock, Profile, Recorder, profile_units
from diffuse_compress.caching.runtime import apply_cache, cache_of, remove_cache
from diffuse_compress.caching.schedule import Schedule
from diffuse_compress.caching.search import cheapest_within, reuse_errors
from diffuse_compress.caching.units import Granularity, Unit, sites_of, units_of
from diffuse_compress.calibration.items import pipeline_arguments
from diffuse_compress.components import is_pipeline, model_components, resolve_names
from diffuse_compress.errors import ConfigError
from diffuse_compress.pipeline_call import from_noise, outputs_of, untouched
from diffuse_compress.progress import Callback
from diffuse_compress.progress import track as progress

__all__ = ["CacheCalibration", "Candidate", "calibrate_cache"]

MAX_CHECKS = 100
"""Forwards spent on checking schedules."""
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
        measured_speedup: of the same, from the two runs that were compared.
        error: relative RMS distance of the output from that without a cache.
        candidates: all that were run.
        forwards: of the denoisers, spent on checking.
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
    models, given = _checked(pipe, prompts, target_speedup, num_trajectories, force, components, call_arguments)
    units = {name: units_of(model, granularity) for name, model in models.items()}
    recorders = {name: Recorder(found) for name, found in units.items()}
    runner = _Runner(pipe, models, seed)
    runner.record(units, recorders, given, force, callback)
    full = {
        name: _full_schedule(models[name], units[name], recorder, runner.profile(models[name], units[name], recorder))
        for name, recorder in recorders.items()
    }
    candidates = list(_candidates(full, recorders, models, target_speedup, history, longest_reuse))
    candidates = candidates[: max(1, MAX_CHECKS // max(1, sum(r.calls for r in recorders.values()) // len(given)))]
    with runner.timed() as clock:
        uncached = runner.seconds(given[0], clock)
        todo = progress(candidates, "Checking schedules", pipe, callback, {})
        checked = [runner.checked(candidate, given[0], clock) for candidate in todo]
    best = min(checked, key=lambda candidate: candidate.error or 0.0)
    return CacheCalibration(
        best.schedules,
        _speedup(best.schedules, recorders),
        uncached / max(best.seconds, 1e-9),
        best.error or 0.0,
        tuple(checked),
        runner.forwards,
    )


def _checked(
    pipe: Any,
    prompts: Iterable[Any],
    target_speedup: float,
    num_trajectories: int,
    force: bool,
    components: Sequence[str],
    call_arguments: dict[str, Any],
) -> tuple[dict[str, nn.Module], list[dict[str, Any]]]:
    """The denoisers and the arguments of each trajectory, or a ConfigError."""
    if not is_pipeline(pipe):
        raise ConfigError(f"cache calibration: needs a diffusers pipeline, got {type(pipe).__name__}.")
    if not target_speedup > 1.0:
        raise ConfigError(f"cache calibration: target_speedup must be above 1, got {target_speedup}.")
    if not 1 <= num_trajectories <= MAX_TRAJECTORIES:
        raise ConfigError(
            f"cache calibration: num_trajectories must be 1 to {MAX_TRAJECTORIES}, got {num_trajectories}."
        )
    if isinstance(prompts, str | Mapping):
        raise ConfigError("cache calibration: a list of prompts is needed, got one. Put it in a list.")
    steps = call_arguments.get("num_inference_steps")
    if isinstance(steps, int) and steps < MIN_STEPS and not force:
        raise too_few_steps(steps)
    items = itertools.islice(prompts, num_trajectories)
    given = [pipeline_arguments(pipe, item, call_arguments) for item in items]
    if not given:
        raise ConfigError("cache calibration: at least one prompt is needed, got none.")
    names = dict.fromkeys(name for found in resolve_names(components, pipe).values() for name in found)
    models = {name: model_components(pipe)[name] for name in names}
    cached = [name for name, model in models.items() if cache_of(model) is not None]
    if cached:
        raise ConfigError(f"cache calibration: {', '.join(cached)} has a cache; remove_cache(model) first.")
    return models, given


def _enough_steps(recorders: Mapping[str, Recorder], force: bool) -> None:
    steps = max(len(recorder.timesteps) for recorder in recorders.values())
    if steps < MIN_STEPS and not force:
        raise too_few_steps(steps)


def _full_schedule(model: nn.Module, units: Any, recorder: Recorder, profile: Profile) -> Schedule:
    """Everything computed, with what is known of it."""
    return Schedule.full(
        units,
        len(recorder.timesteps),
        type(model).__name__,
        timesteps=recorder.timesteps,
        levels=recorder.levels,
        scheduler=recorder.scheduler,
        guidance=recorder.guidance,
        cost_ms=profile.cost_ms,
        other_ms=profile.other_ms,
        flops=profile.flops,
        details={"trajectories": len(recorder.trajectories), "device": _device_name(model)},
    )


def _device_name(model: nn.Module) -> str:
    device = next(model.parameters()).device
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


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
    whole = {part: _interval(schedule, recorders[part].seen, target) for part, schedule in full.items()}
    if all(mask is not None for mask in whole.values()):
        yield finished(_INTERVAL, {part: mask for part, mask in whole.items() if mask is not None})


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


def _speedup(schedules: Mapping[str, Schedule], recorders: Mapping[str, Recorder]) -> float:
    full = saved = 0.0
    for name, schedule in schedules.items():
        assert schedule.cost_ms is not None
        full += int(recorders[name].seen.sum()) * (float(schedule.cost_ms.sum()) + schedule.other_ms)
        saved += float(((1 - schedule.mask.double()) @ schedule.cost_ms.double()).sum())
    return full / max(full - saved, 1e-9)


class _Runner:
    """Runs the pipeline on its items, always from the same noise."""

    def __init__(self, pipe: Any, models: Mapping[str, nn.Module], seed: int) -> None:
        self.pipe = pipe
        self.models = models
        self.seed = seed
        self.references: list[torch.Tensor] = []
        self.forwards = 0

    def run(self, arguments: Mapping[str, Any], index: int) -> torch.Tensor:
        """Output for an item, latents where the pipeline gives them, as float64 on the CPU."""
        return _values(outputs_of(self.pipe(**from_noise(self.pipe, arguments, self.seed + index))))

    def record(
        self,
        units: Mapping[str, tuple[Unit, ...]],
        recorders: Mapping[str, Recorder],
        given: list[dict[str, Any]],
        force: bool,
        callback: Callback | None,
    ) -> None:
        """Run all items under the recorders; raises ConfigError after the first if its loop is too short."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(untouched(self.pipe))
            for name, model in self.models.items():
                stack.enter_context(observed(model, units[name], recorders[name]))
                handle = model.register_forward_pre_hook(recorders[name].watch, with_kwargs=True)
                stack.callback(handle.remove)
            items = list(enumerate(given))
            for index, arguments in progress(items, "Recording what units add", self.pipe, callback, {}):
                self.references.append(self.run(arguments, index))
                for recorder in recorders.values():
                    recorder.end_run()
                _enough_steps(recorders, force)

    def profile(self, model: nn.Module, units: Any, recorder: Recorder) -> Profile:
        """Of a model in one call of the recorded loop."""
        assert recorder.call is not None
        return profile_units(model, units, recorder.call)

    @contextlib.contextmanager
    def timed(self) -> Iterator[LoopClock]:
        """Inside, the denoisers' part of a run is timed, and compiled blocks run compiled."""
        clock = LoopClock()
        with contextlib.ExitStack() as stack:
            stack.enter_context(untouched(self.pipe))
            stack.enter_context(torch.compiler.set_stance("default"))
            for model in self.models.values():
                stack.enter_context(clock.on(model))
            yield clock

    def seconds(self, arguments: Mapping[str, Any], clock: LoopClock) -> float:
        """Of the denoisers' part of a run of the first item, as they are."""
        self.run(arguments, 0)
        return clock.stop()

    def checked(self, candidate: Candidate, arguments: Mapping[str, Any], clock: LoopClock) -> Candidate:
        """The candidate after a run of the first item."""
        try:
            for name, schedule in candidate.schedules.items():
                apply_cache(self.models[name], schedule)
            clock.reset()
            output = self.run(arguments, 0)
            seconds = clock.stop()
        finally:
            for model in self.models.values():
                remove_cache(model)
        self.forwards += clock.calls
        reference = self.references[0]
        error = float((output - reference).norm() / reference.norm().clamp_min(1e-12))
        return Candidate(candidate.name, candidate.schedules, error, seconds)


def _values(outputs: Any) -> torch.Tensor:
    if isinstance(outputs, torch.Tensor):
        return outputs.detach().double().cpu()
    import numpy as np

    if isinstance(outputs, list | tuple):
        return torch.stack([_values(item) for item in outputs])
    return torch.from_numpy(np.asarray(outputs).copy()).double()

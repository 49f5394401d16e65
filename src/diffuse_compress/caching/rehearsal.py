"""Runs of a pipeline that a cache schedule is made from and checked with; they leave the pipeline as it was."""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from diffuse_compress.caching.config import MIN_STEPS, too_few_steps
from diffuse_compress.caching.loop_recorder import LoopRecorder
from diffuse_compress.caching.noise import exact_inputs, rounds_inputs
from diffuse_compress.caching.observing import Observer, observed
from diffuse_compress.caching.recording import LoopClock, Recorder, profile_units
from diffuse_compress.caching.runtime import apply_cache, cache_of, remove_cache
from diffuse_compress.caching.schedule import CachePoint, Schedule
from diffuse_compress.caching.units import Granularity, Unit, units_of
from diffuse_compress.calibration.items import pipeline_arguments
from diffuse_compress.components import is_pipeline, model_components, resolve_names
from diffuse_compress.errors import ConfigError
from diffuse_compress.pipeline_call import from_noise, outputs_of, untouched
from diffuse_compress.progress import Callback
from diffuse_compress.progress import track as progress

__all__ = [
    "MAX_CHECKS",
    "Rehearsal",
    "arguments_of_items",
    "distance",
    "loop_speedup",
    "values_of",
]


MAX_CHECKS = 100
"""Forwards spent on checking schedules, as long as a run with and one without a cache fit in."""
_MOST_TIMED = 6
# What disturbs a short run is lost in one of seconds.
_LONG_SECONDS = 5.0


def arguments_of_items(
    pipe: Any, items: Iterable[Any], call_arguments: Mapping[str, Any], limit: int | None = None
) -> list[dict[str, Any]]:
    """Arguments of a call for each of the first ``limit`` items; ConfigError without any."""
    if not is_pipeline(pipe):
        raise ConfigError(f"cache calibration: needs a diffusers pipeline, got {type(pipe).__name__}.")
    if isinstance(items, str | Mapping):
        raise ConfigError("cache calibration: a list of prompts is needed, got one. Put it in a list.")
    chosen = enumerate(itertools.islice(items, limit))
    given = [pipeline_arguments(pipe, item, call_arguments, index) for index, item in chosen]
    if not given:
        raise ConfigError("cache calibration: at least one prompt is needed, got none.")
    return given


class Rehearsal:
    """Runs the pipeline on its items, always from the same noise.

    Args:
        pipe: a diffusers pipeline.
        granularity: of the units.
        seed: of the noise; run i has ``seed + i``.
        cache_point: what the schedules keep of a unit.
        force: loops of fewer than ``MIN_STEPS`` steps, too.
        components: names or groups of the denoisers that get a schedule.

    Attributes:
        models: the denoisers by component; ``units`` of each and, once :meth:`record` is done, ``recorders``.
        loop: what the scheduler was given, if the units are whole models.
        references: output of each recorded run.
        forwards: of the denoisers, spent on checking, those without a cache included.

    Raises:
        ConfigError: a model has a cache already.
    """

    def __init__(
        self,
        pipe: Any,
        granularity: Granularity | str,
        seed: int,
        *,
        cache_point: CachePoint = CachePoint.POST_GATE,
        force: bool = False,
        components: Sequence[str] = ("denoisers",),
    ) -> None:
        names = dict.fromkeys(name for found in resolve_names(components, pipe).values() for name in found)
        self.pipe = pipe
        self.models: dict[str, nn.Module] = {name: model_components(pipe)[name] for name in names}
        cached = [name for name, model in self.models.items() if cache_of(model) is not None]
        if cached:
            raise ConfigError(f"cache calibration: {', '.join(cached)} has a cache; remove_cache(model) first.")
        self.units: dict[str, tuple[Unit, ...]] = {n: units_of(model, granularity) for n, model in self.models.items()}
        self.loop = LoopRecorder() if Granularity(granularity) is Granularity.MODEL else None
        self.seed, self.cache_point, self.force = seed, cache_point, force
        self.recorders: dict[str, Recorder] = {}
        self.references: list[torch.Tensor] = []
        self.forwards = 0

    def require_steps(self, call_arguments: Mapping[str, Any]) -> None:
        """Raise ConfigError for a loop that is known to be too short."""
        steps = call_arguments.get("num_inference_steps")
        if isinstance(steps, int) and steps < MIN_STEPS and not self.force:
            raise too_few_steps(steps)

    def run(self, arguments: Mapping[str, Any], index: int) -> torch.Tensor:
        """Output for an item, latents where the pipeline gives them, as float64 on the CPU."""
        return values_of(outputs_of(self.pipe(**from_noise(self.pipe, arguments, self.seed + index))))

    def record(self, given: list[dict[str, Any]], callback: Callback | None) -> None:
        """Run all items under recorders; raises ConfigError after the first if its loop is too short."""
        self.recorders = {name: Recorder(found) for name, found in self.units.items()}
        with contextlib.ExitStack() as stack:
            stack.enter_context(untouched(self.pipe))
            for name, model in self.models.items():
                stack.enter_context(self.observed(name, self.recorders[name]))
                handle = model.register_forward_pre_hook(self.recorders[name].watch, with_kwargs=True)
                stack.callback(handle.remove)
                if rounds_inputs(model):
                    # Before the hook that ends what is known of the place in the loop.
                    hook = functools.partial(_compare, self.recorders[name])
                    stack.callback(model.register_forward_hook(hook, with_kwargs=True, prepend=True).remove)
            if self.loop is not None:
                stack.enter_context(self.loop.listening(self.pipe, self.models))
            items = list(enumerate(given))
            for index, arguments in progress(items, "Recording what units add", self.pipe, callback, {}):
                self.references.append(self.run(arguments, index))
                for recorder in self.recorders.values():
                    recorder.end_run()
                if self.loop is not None:
                    self.loop.end_run()
                steps = max(len(recorder.timesteps) for recorder in self.recorders.values())
                if steps < MIN_STEPS and not self.force:
                    raise too_few_steps(steps)

    def observed_run(self, observers: Mapping[str, Observer], arguments: Mapping[str, Any], index: int) -> torch.Tensor:
        """Output for an item, if observers by component have a say in it."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(untouched(self.pipe))
            for name, observer in observers.items():
                stack.enter_context(self.observed(name, observer))
            return self.run(arguments, index)

    def observed(self, name: str, observer: Observer) -> contextlib.AbstractContextManager[Any]:
        """Inside, the observer sees what a cache would keep of the units of a model."""
        before_gates = self.cache_point is CachePoint.PRE_GATE
        return observed(self.models[name], self.units[name], observer, before_gates=before_gates)

    def full_schedule(self, name: str) -> Schedule:
        """Everything of a model computed, with its profile and what else the recorded runs told."""
        model, units, recorder = self.models[name], self.units[name], self.recorders[name]
        assert recorder.call is not None
        before_gates = self.cache_point is CachePoint.PRE_GATE
        profile = profile_units(model, units, recorder.call, before_gates=before_gates)
        return Schedule.full(
            units,
            len(recorder.timesteps),
            type(model).__name__,
            timesteps=recorder.timesteps,
            levels=recorder.levels,
            scheduler=recorder.scheduler,
            guidance=recorder.guidance,
            cache_point=self.cache_point,
            cost_ms=profile.cost_ms,
            other_ms=profile.other_ms,
            flops=profile.flops,
            details={"trajectories": len(recorder.trajectories), "device": _device_name(model)},
        )

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

    @property
    def forwards_of_a_run(self) -> int:
        """Of all denoisers, with everything computed."""
        return sum(recorder.calls for recorder in self.recorders.values()) // max(1, len(self.references))

    def forwards_of_a_run_with(self, schedules: Mapping[str, Schedule]) -> int:
        """The same with schedules: a step that leaves out the denoiser is no forward."""
        if self.loop is None:
            return self.forwards_of_a_run
        return math.ceil(sum(self._computed(name, schedule) for name, schedule in schedules.items()))

    def _computed(self, name: str, schedule: Schedule) -> float:
        recorder = self.recorders[name]
        calls = recorder.calls / max(1, len(self.references))
        return calls * (1 - float((schedule.mask[recorder.seen] == 0).float().mean()))

    def checked(
        self, schedules: Mapping[str, Schedule], arguments: Mapping[str, Any], clock: LoopClock
    ) -> tuple[float, float]:
        """(relative RMS distance of the first recorded item's output from that without a cache, seconds)."""
        try:
            for name, schedule in schedules.items():
                apply_cache(self.models[name], schedule)
            output, seconds = self._timed_run(arguments, clock, self.forwards_of_a_run_with(schedules))
        finally:
            for model in self.models.values():
                remove_cache(model)
        return distance(output, self.references[0]), seconds

    def measured_speedup(
        self,
        schedules: Mapping[str, Schedule],
        arguments: Mapping[str, Any],
        clock: LoopClock,
        *,
        seconds: float,
    ) -> float:
        """Median time of the denoisers' part of runs without a cache over that of runs with these schedules.

        Runs without and with take turns, so that what else the machine does slows both alike. The models are warm:
        they ran with and without a cache before. Long runs are not repeated.

        Args:
            schedules: by component.
            arguments: of the first recorded item.
            clock: of :meth:`timed`.
            seconds: of an earlier run with these schedules, the only one if no other fits into ``MAX_CHECKS``.
        """
        # One without a cache, which comes first, is run in any case.
        without, cached = [self._timed_run(arguments, clock)[1]], list[float]()
        for number in range(1, _MOST_TIMED):
            next_one = self.forwards_of_a_run_with(schedules) if number % 2 else self.forwards_of_a_run
            if self.forwards + next_one > MAX_CHECKS or (cached and sum(without + cached) > _LONG_SECONDS):
                break
            if number % 2:
                cached.append(self.checked(schedules, arguments, clock)[1])
            else:
                without.append(self._timed_run(arguments, clock)[1])
        return statistics.median(without) / max(statistics.median(cached or [seconds]), 1e-9)

    def _timed_run(
        self, arguments: Mapping[str, Any], clock: LoopClock, forwards: int | None = None
    ) -> tuple[torch.Tensor, float]:
        clock.reset()
        output = self.run(arguments, 0)
        seconds = clock.stop()
        self.forwards += clock.calls if forwards is None else min(forwards, clock.calls)
        return output, seconds

    def loop_ms(self, schedules: Mapping[str, Schedule]) -> tuple[float, float]:
        """(time of the denoisers' part of a loop with all computed, time of what the schedules reuse)."""
        full = saved = 0.0
        for name, schedule in schedules.items():
            assert schedule.cost_ms is not None
            full += int(self.recorders[name].seen.sum()) * (float(schedule.cost_ms.sum()) + schedule.other_ms)
            saved += float(((1 - schedule.mask.double()) @ schedule.cost_ms.double()).sum())
        return full, saved


def _compare(recorder: Recorder, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
    """Forward hook: the step once more, with activations as they are."""

    def exact() -> None:
        with exact_inputs(module):
            module.forward(*args, **kwargs)

    recorder.compare(exact)


def loop_speedup(full_ms: float, saved_ms: float) -> float:
    """Speed-up of a loop of which some time is saved."""
    return full_ms / max(full_ms - saved_ms, 1e-9)


def distance(output: torch.Tensor, reference: torch.Tensor) -> float:
    """RMS of the difference over the RMS of the reference."""
    return float((output - reference).norm() / reference.norm().clamp_min(1e-12))


def _device_name(model: nn.Module) -> str:
    device = next(model.parameters()).device
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def values_of(outputs: Any) -> torch.Tensor:
    """A pipeline's outputs, in whatever form they are, as float64 on the CPU."""
    if isinstance(outputs, torch.Tensor):
        return outputs.detach().double().cpu()
    import numpy as np

    if isinstance(outputs, list | tuple):
        return torch.stack([values_of(item) for item in outputs])
    return torch.from_numpy(np.asarray(outputs).copy()).double()

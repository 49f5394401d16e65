"""Training a router along the trajectories that it makes itself, without data.

Each trajectory is a call of the stock pipeline from noise. In every step the denoiser predicts twice from the same
latents: as the teacher, with everything computed, and as the student, whose units mix in what was kept of the student's
own steps before. The pipeline applies its guidance to both (``pairs.py``); where it hands the prediction to its
scheduler, the squared distance of the two is the error of the step, the gradient of which moves one row of the table,
and the scheduler steps with the student's. So the next step sees what the cache has done to this one: step-wise
denoising training (SDT). How much the error of a step counts is estimated now and then from finished pictures: the
image error proxy (IEPO).

Source: HarmoniCa (Huang et al. 2024, arXiv 2410.01723). Differs, beside what ``HarmoniCaConfig`` and
``router.py`` tell, from its released code: the backbone is frozen and the teacher runs without gradients, noise and
items never repeat, nothing is kept from one trajectory to the next or from an estimate of lambda, processes share
one lambda, and the error is of what the scheduler steps with, any scheduler of diffusers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from diffuse_compress.caching.config import MAX_TRAJECTORIES, HarmoniCaConfig
from diffuse_compress.caching.rehearsal import (
    Rehearsal,
    arguments_of_items,
    distance,
    loop_speedup,
)
from diffuse_compress.caching.schedule import Schedule
from diffuse_compress.caching.trainer import RouterTrainer, schedulers_of
from diffuse_compress.calibration.work_folder import WorkFolder, digest_of_items, digest_of_weights
from diffuse_compress.errors import ConfigError, ModelStateError
from diffuse_compress.progress import Callback
from diffuse_compress.runtime.processes import Processes
from diffuse_compress.versions import installed_versions

__all__ = ["RouterTraining", "train_cache"]


@dataclass(frozen=True)
class RouterTraining:
    """What a training found.

    Attributes:
        schedules: by component.
        predicted_speedup: of the denoisers' part of the loop, from the profile.
        measured_speedup: of the same, wall time of runs without a cache over runs with the schedules, as in
            ``CacheCalibration``.
        error: relative RMS distance of the first item's output from that without a cache.
        soft_error: the same of the router while it still mixes; the two differ by what the threshold does.
        weights: float64 [T], lambda of each step at the end; 0 of steps that are not trained.
        trace: float64 [trajectories, 3]: mean relative squared error of a step, share of scores below the threshold,
            price of a unit.
    """

    schedules: Mapping[str, Schedule]
    predicted_speedup: float
    measured_speedup: float
    error: float
    soft_error: float
    weights: torch.Tensor = field(repr=False)
    trace: torch.Tensor = field(repr=False)

    def summary(self) -> str:
        """Speed-up as predicted and as measured, errors, and the schedules."""
        lines = [
            f"feature cache, trained on {len(self.trace)} trajectories: speed-up of the denoising loop "
            f"{self.predicted_speedup:.2f}x predicted, {self.measured_speedup:.2f}x measured; output changed by "
            f"{self.error:.4f} of its RMS ({self.soft_error:.4f} before scores became decisions)"
        ]
        return "\n".join([*lines, *(f"{name}\n{schedule}" for name, schedule in self.schedules.items())])

    __str__ = summary


def train_cache(
    pipe: Any,
    items: Iterable[Any],
    config: HarmoniCaConfig,
    *,
    initial: Mapping[str, Schedule] | None = None,
    work_dir: str | Path | None = None,
    state: Any = None,
    components: Sequence[str] = ("denoisers",),
    callback: Callback | None = None,
    **call_arguments: Any,
) -> RouterTraining:
    """Train cache schedules for the denoisers of ``pipe``, which stays as it is.

    Args:
        pipe: a diffusers pipeline, compressed or not, on the device and in the dtype it will run in.
        items: prompts, class labels or dicts of arguments of ``pipe(...)``; all are used, in random order.
        config: of the training.
        initial: schedules by component to begin with (``calibrate_cache(...).schedules``); scores are random without.
        work_dir: folder for the state after each trajectory; the same call goes on from it, to the same bits.
        state: accelerate's ``PartialState`` of a run on several processes, each of which calls this with its own
            ``pipe``: they draw trajectories of their own, and learn from the mean of their gradients.
        components: names or groups of the denoisers that get a schedule.
        callback: ``callback(stage, done, total, metrics)``.
        call_arguments: of every call beside those in ``config``: height, ...

    Raises:
        ConfigError: no items, too few steps, a speed-up that these units cannot give, a model that has a cache already,
            or a ``work_dir`` that holds another training.
        ModelStateError: the place in the loop is not known, or what the scheduler is given cannot be traced to the
            denoiser.
    """
    call_arguments = {**config.call_arguments, **call_arguments}
    given, batches = _asked(pipe, items, config, call_arguments)
    rehearsal = _rehearsal(pipe, config, components)
    rehearsal.require_steps(call_arguments)
    processes, masks = Processes(state), _masks(rehearsal, initial or {})
    folder = None
    if work_dir is not None:
        folder = _claimed(WorkFolder(work_dir), _fingerprint(rehearsal, given, config, masks), processes)
    rehearsal.record(given[:MAX_TRAJECTORIES], callback)
    training = RouterTrainer(rehearsal, batches, config, processes, folder, masks)
    with training.running():
        training.train(callback)
        training.set_forecasts()
        soft = training.draw(given[0], config.seed, training.rows, learning=False)
    schedules = training.schedules()
    with rehearsal.timed() as clock:
        error, seconds = rehearsal.checked(schedules, given[0], clock)
        measured = rehearsal.measured_speedup(schedules, given[0], clock, seconds=seconds)
    return RouterTraining(
        schedules,
        loop_speedup(*rehearsal.loop_ms(schedules)),
        measured,
        error,
        distance(soft, rehearsal.references[0]),
        training.weights.clone(),
        torch.tensor(training.trace, dtype=torch.float64).reshape(-1, 3),
    )


def _rehearsal(pipe: Any, config: HarmoniCaConfig, components: Sequence[str]) -> Rehearsal:
    return Rehearsal(
        pipe, config.granularity, config.seed, cache_point=config.cache_point, force=config.force, components=components
    )


def _asked(
    pipe: Any, items: Iterable[Any], config: HarmoniCaConfig, call_arguments: Mapping[str, Any]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Arguments of a call for each item, and for each batch of them."""
    if torch.is_inference_mode_enabled():
        raise ModelStateError("router training: needs gradients, and torch.inference_mode() is on. Call it outside.")
    items = items if isinstance(items, str | Mapping) else list(items)
    given = arguments_of_items(pipe, items, call_arguments)
    if any("generator" in arguments for arguments in given):
        raise ConfigError("router training: noise is drawn from config.seed, got a generator. Leave it out.")
    return given, _batches(pipe, items, call_arguments, config.batch_size)


def _batches(pipe: Any, items: Any, call_arguments: Mapping[str, Any], size: int) -> list[dict[str, Any]]:
    """Arguments of a call for each ``size`` items; the last batch is filled up with the first items."""
    if size == 1:
        return arguments_of_items(pipe, items, call_arguments)
    if not all(isinstance(item, str | int) for item in items):
        raise ConfigError(
            f"router training: batch_size={size} puts prompts or class labels together, and cannot do that with "
            f"{type(items[0]).__name__}. Give batches as items, with batch_size=1."
        )
    padded = [*items, *items * (size // len(items) + 1)]
    starts = range(0, len(items), size)
    return arguments_of_items(pipe, [padded[start : start + size] for start in starts], call_arguments)


def _masks(rehearsal: Rehearsal, initial: Mapping[str, Schedule]) -> dict[str, torch.Tensor]:
    """Masks of the schedules to begin with; ConfigError if they are of other models or units."""
    for name, schedule in initial.items():
        if name not in rehearsal.models:
            known = ", ".join(rehearsal.models)
            raise ConfigError(f"router training: initial holds a schedule for {name!r}, and there are {known}.")
        schedule.check(type(rehearsal.models[name]).__name__, rehearsal.units[name])
    return {name: schedule.mask for name, schedule in initial.items()}


def _fingerprint(
    rehearsal: Rehearsal,
    given: list[dict[str, Any]],
    config: HarmoniCaConfig,
    initial: Mapping[str, torch.Tensor],
) -> dict[str, Any]:
    schedulers = {
        name: f"{type(part).__name__} {sorted(dict(part.config).items(), key=str)}"
        for name, part in schedulers_of(rehearsal.pipe).items()
    }
    return {
        "weights": {name: digest_of_weights(model) for name, model in rehearsal.models.items()},
        "training": config.to_dict(),
        "items": digest_of_items(given),
        "initial": digest_of_items([dict(initial)]),
        "schedulers": schedulers,
        "versions": installed_versions(),
    }


def _claimed(work: WorkFolder, fingerprint: dict[str, Any], processes: Processes) -> Path:
    """The folder of this training, which the first process writes to."""
    fingerprint = {**fingerprint, "processes": processes.count}
    folder = work.require_same("router", fingerprint, holds="files")  # raises in every process alike
    return work.claim("router", fingerprint, holds="files") if processes.index == 0 else folder

"""Recording what a model is given while it does its work: real trajectories of a pipeline, texts, forward arguments.

Of a diffusion pipeline's calls only some are kept, spread over the steps of the sampling loop: activations change so
much from noise to picture that quantizers calibrated on one end fail at the other (Q-Diffusion, Li et al. 2023, arXiv
2302.04304, section 3.2). Which steps is decided by a low-discrepancy sequence over all items together, so any prefix of
the samples is spread as well, and few items give many steps just as many items few.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from diffuse_compress.calibration.items import MAX_LENGTH, ModelItems, is_integer, pipeline_arguments
from diffuse_compress.calibration.samples import Sample, Samples
from diffuse_compress.calls import Call
from diffuse_compress.components import (
    GROUPS,
    compute_dtype_of,
    is_pipeline,
    model_components,
    resolve_names,
    unwrap,
)
from diffuse_compress.errors import ConfigError
from diffuse_compress.failures import failures_explained
from diffuse_compress.pipeline_call import CannotCallError, bundled_items, from_noise, seeded, untouched
from diffuse_compress.progress import Callback
from diffuse_compress.progress import track as progress
from diffuse_compress.runtime.sampling import SamplingSettings
from diffuse_compress.runtime.stats import CallStats
from diffuse_compress.runtime.steps import Consumer, current, track, tracker_of, untrack
from diffuse_compress.versions import installed_versions

__all__ = ["Calibration", "items_of"]

DEFAULT_SAMPLES = {"pipeline": 64, "language": 128, "model": 128}
# Fractional part of the golden ratio: k * this, modulo 1, fills [0, 1) evenly for every number of points.
_GOLDEN = 0.6180339887498949
_CONSUMER = "calibration"
_BUNDLED = 64
_MEMORY = (
    "Recording needs what a call of the pipeline does: give a smaller height=, width= or num_frames=, or call "
    "pipe.enable_model_cpu_offload() before."
)


_NO_ITEMS = (
    "calibration: needs at least one item, got none. Of a generator nothing is left once it was read: give a list."
)


def items_of(pipe: Any, calibration: Any, count: int | None) -> list[Any]:
    """What a pipeline is asked for by a method that runs it itself.

    Args:
        pipe: a diffusers pipeline.
        calibration: items as users give them; None and a `Calibration`, which holds inputs of models, mean this
            package's own.
        count: take the first so many; None for all.

    Raises:
        ConfigError: nothing was given, and the pipeline needs what this package has none of.
    """
    if calibration is not None and not isinstance(calibration, Calibration):
        return list(itertools.islice(calibration, count))
    try:
        return bundled_items(pipe, count or _BUNDLED)
    except CannotCallError as error:
        raise ConfigError(
            f"{type(pipe).__name__}: it must be run, and needs things to ask it for: {error}. Pass calibration=, a "
            "list of dicts of its arguments."
        ) from error


class _EnoughError(Exception):
    """Everything wanted of this item was seen: the rest of its trajectory is not run."""


class Calibration(Samples):
    """Recorded inputs of the models to be calibrated: ``Calibration.record(pipe, prompts)``, ``save``, ``load``."""

    @staticmethod
    def record(
        target: Any,
        items: Iterable[Any],
        *,
        num_samples: int | None = None,
        seed: int = 0,
        components: str | Sequence[str] | None = None,
        tokenizer: Any = None,
        max_length: int = MAX_LENGTH,
        callback: Callback | None = None,
        **call_arguments: Any,
    ) -> Calibration:
        """Run ``target`` on ``items`` and keep what its models are given.

        Args:
            target: a diffusers pipeline, a transformers model, or any model.
            items: an iterable (list, generator, ``datasets.Dataset``, DataLoader). For a pipeline each is a prompt, a
                class label, or a dict of arguments of ``pipe(...)``; for a transformers model a text, a list of chat
                messages (with pictures too, where it takes them), token ids, or a dict of forward arguments (what a
                processor returns); for any other model a dict of forward arguments, or tensors by position. A batch
                of texts, chats or ids is as many items; a dict of tensors may hold a batch, whose padding (0 in a
                2-d ``attention_mask``) does not count. Of a row of a dataset, "text" and "messages" are found.
            num_samples: calls kept of each component; with two calls per step (sequential guidance) both count as one,
                and two experts share them by their shares of the steps. 64 for pipelines, 128 for models.
            seed: of the steps that are kept, and of the starting noise: item i gets ``seed + i``.
            components: names or groups of a pipeline's components; the denoisers by default.
            tokenizer: for texts, or a processor; by default the one beside the model's weights.
            max_length: tokens of a text that are kept; texts with pictures are kept whole.
            callback: ``callback(stage, done, total, metrics)``.
            call_arguments: of ``pipe(...)`` for every item: num_inference_steps, guidance_scale, height, ...

        Raises:
            ConfigError: no items, items of the wrong kind, or arguments that the pipeline does not take.
        """
        if num_samples is not None and not (is_integer(num_samples) and num_samples >= 1):
            raise ConfigError(f"calibration: num_samples must be a number of at least 1, got {num_samples!r}.")
        if not is_integer(seed):
            raise ConfigError(f"calibration: seed must be a whole number, got {seed!r}.")
        items = _each(items)
        if is_pipeline(target):
            return _record_pipeline(target, items, num_samples, seed, components, callback, call_arguments)
        if call_arguments:
            raise ConfigError(
                f"calibration: {', '.join(call_arguments)} are arguments of a pipeline's call, got a "
                f"{type(target).__name__}. Leave them out, or record the pipeline."
            )
        limit, reader = num_samples or DEFAULT_SAMPLES["model"], ModelItems(target, tokenizer, max_length)
        # Copies, at once: a loader may fill the same tensors again for its next item.
        calls = (call.copied() for index, item in enumerate(items) for call in reader.calls(item, index))
        chosen = list(itertools.islice(calls, limit))
        if not chosen:
            raise ConfigError(_NO_ITEMS)
        samples = [Sample(call, item=index) for index, call in enumerate(chosen)]
        settings = {
            "model": type(unwrap(target)).__name__,
            "items": len(samples),
            "versions": installed_versions(),
            "components": {"": {"dtype": _dtype_name(unwrap(target))}},
        }
        return Calibration({"": samples}, settings)


def _each(items: Any) -> Iterable[Any]:
    """``items``, checked. What torch calls a dataset need not be iterable."""
    if isinstance(items, str | Mapping):
        raise ConfigError(
            f"calibration: a list of items is needed, got one {type(items).__name__}. Put it in a list; a file is read "
            "with Calibration.load(path)."
        )
    if hasattr(items, "__iter__"):
        return items  # type: ignore[no-any-return]
    if hasattr(items, "__getitem__") and hasattr(items, "__len__"):
        return (items[index] for index in range(len(items)))
    raise ConfigError(
        f"calibration: a list of items or a Calibration is needed, got a {type(items).__name__}. A file is read with "
        "Calibration.load(path)."
    )


# --- pipelines --------------------------------------------------------------------------------------------------


def _record_pipeline(
    pipe: Any,
    items: Iterable[Any],
    num_samples: int | None,
    seed: int,
    components: str | Sequence[str] | None,
    callback: Callback | None,
    shared: dict[str, Any],
) -> Calibration:
    names = _component_names(pipe, components)
    wanted = num_samples or DEFAULT_SAMPLES["pipeline"]
    # Of more items than samples the rest would not be called, and an iterable may have no end.
    chosen = enumerate(itertools.islice(items, wanted))
    arguments = [pipeline_arguments(pipe, item, shared, index) for index, item in chosen]
    if not arguments:
        raise ConfigError(_NO_ITEMS)
    recorder = _Recorder({name: model_components(pipe)[name] for name in names}, wanted, len(arguments), seed)
    settings: dict[str, Any] = {}
    with untouched(pipe), recorder.attached():
        decode = any(GROUPS["vaes"].match(name) for name in names)
        for index, given in progress(list(enumerate(arguments)), "Recording", pipe, callback, {}):
            call = from_noise(pipe, given, seed + index, decode=decode)
            recorder.begin(index, pipe)
            what = f"item {index} cannot be run: {type(pipe).__name__} called with {', '.join(given)}"
            with failures_explained(what, _MEMORY), contextlib.suppress(_EnoughError):
                pipe(**call)
            recorder.end()
            settings = settings or _settings(pipe, given)
    settings |= {"items": len(arguments), "seed": seed, "versions": installed_versions()}
    settings["components"] = recorder.settings()
    return Calibration(recorder.samples(), settings)


def _component_names(pipe: Any, components: str | Sequence[str] | None) -> list[str]:
    wanted = ["denoisers"] if components is None else [components] if isinstance(components, str) else list(components)
    found = resolve_names(wanted, pipe)
    return list(dict.fromkeys(name for names in found.values() for name in names))


def _settings(pipe: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """How the first item was run, as far as it can be told: the pipeline's defaults where nothing was given."""
    scheduler = getattr(pipe, "scheduler", None)
    steps = given.get("num_inference_steps") or getattr(scheduler, "num_inference_steps", None)
    found = {
        "pipeline": type(pipe).__name__,
        "scheduler": type(scheduler).__name__ if scheduler is not None else None,
        "num_inference_steps": steps,
        "guidance_scale": given.get("guidance_scale", getattr(pipe, "_guidance_scale", None)),
        "height": given.get("height"),
        "width": given.get("width"),
        "num_frames": given.get("num_frames"),
    }
    return {key: value for key, value in found.items() if isinstance(value, str | int | float)}


def _dtype_name(model: nn.Module) -> str:
    return str(compute_dtype_of(model)).removeprefix("torch.")


class _Recorder:
    """Hooks on the components that keep the calls of the chosen steps."""

    def __init__(self, models: Mapping[str, nn.Module], wanted: int, items: int, seed: int) -> None:
        self.models = models
        self.kept: dict[str, list[tuple[int, Sample]]] = {name: [] for name in models}
        self._sampling = dict.fromkeys(models, SamplingSettings())
        # Point k of the sequence belongs to item k modulo items.
        start = torch.rand((), generator=seeded(seed)).item()
        self._points = [[(k, (start + k * _GOLDEN) % 1.0) for k in range(i, wanted, items)] for i in range(items)]
        self._wanted = wanted

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        handles = []
        try:
            for name, model in self.models.items():
                if _is_stepped(name):
                    track(model, Consumer(_CONSUMER, saves=False))
                handles.append(model.register_forward_pre_hook(self._hook(name), with_kwargs=True))
            yield
        finally:
            for handle in handles:
                handle.remove()
            for model in self.models.values():
                untrack(model, _CONSUMER)

    def begin(self, item: int, pipe: Any) -> None:
        """The next calls are those of ``item``."""
        self._item, self._pipe = item, pipe
        self._steps: dict[int, int] | None = None  # step -> point
        self._counted: dict[str, tuple[Any, int]] = {}
        self._calls: dict[tuple[str, int], int] = {}
        self._before = {name: self._last_stats(name) for name in self.models}

    def end(self) -> None:
        """The pipeline is done with the item, or was stopped."""
        for name in self.models:
            stats = self._last_stats(name)
            if stats is not None and stats is not self._before[name]:
                self._sampling[name] |= stats.sampling.settings()

    def settings(self) -> dict[str, dict[str, Any]]:
        """Of each component: its dtype, and how it was run where that is known."""
        found = {}
        for name, model in self.models.items():
            sampling = self._sampling[name].to_dict()
            found[name] = {"dtype": _dtype_name(model), **({"sampling": sampling} if sampling else {})}
        return found

    def _last_stats(self, name: str) -> CallStats | None:
        tracker = tracker_of(self.models[name])
        return None if tracker is None else tracker.last

    def samples(self) -> dict[str, list[Sample]]:
        """By component, in the order of the sequence."""
        ordered = {name: sorted(found, key=lambda pair: pair[0]) for name, found in self.kept.items()}
        return {name: [sample for _, sample in found] for name, found in ordered.items()}

    def _hook(self, name: str) -> Any:
        is_stepped = _is_stepped(name)

        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not is_stepped:
                number = len(self.kept[name])
                if number < self._wanted:
                    self.kept[name].append((number, Sample(Call(args, kwargs).copied(), self._item)))
                return
            context = current()
            timestep = _largest(context.timestep) if context is not None else None
            step = context.step if context is not None and context.step is not None else self._count(name, timestep)
            points = self._chosen_steps(context)
            if step in points:
                call_in_step = self._calls.get((name, step), 0)
                self._calls[name, step] = call_in_step + 1
                branch = context.branch if context is not None else None
                sample = Sample(Call(args, kwargs).copied(), self._item, timestep, step, call_in_step, branch)
                self.kept[name].append((points[step], sample))
            elif not points or step > max(points):
                raise _EnoughError

        return enter

    def _chosen_steps(self, context: Any) -> dict[int, int]:
        if self._steps is None:
            total = context.run.num_steps if context is not None and context.run is not None else None
            if total is None:
                total = len(getattr(getattr(self._pipe, "scheduler", None), "timesteps", ())) or 1
            self._steps = {}
            for point, position in self._points[self._item]:
                step = int(position * total)
                free = next((s for s in _nearest(step, total) if s not in self._steps), None)
                if free is not None:
                    self._steps[free] = point
        return self._steps

    def _count(self, name: str, timestep: float | None) -> int:
        """Steps seen so far where no scheduler tells: the timestep changes from one to the next."""
        last, count = self._counted.get(name, (None, -1))
        if timestep != last or count < 0:
            count += 1
        self._counted[name] = (timestep, count)
        return count


def _is_stepped(name: str) -> bool:
    """Whether the sampling loop calls a component in every step, with the timestep."""
    return GROUPS["denoisers"].match(name) is not None or name.startswith("controlnet")


def _nearest(step: int, total: int) -> Iterator[int]:
    """Steps in [0, total), the given one first, then its neighbours outwards."""
    return iter(sorted(range(total), key=lambda other: (abs(other - step), other)))


def _largest(timestep: torch.Tensor | None) -> float | None:
    return None if timestep is None or timestep.numel() == 0 else float(timestep.max())

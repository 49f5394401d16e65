"""Training data of what users have: prompts, pictures or clips with captions, latents on disk, texts, or nothing.

With prompts alone, the teacher's own trajectories are recorded: inputs as inference has them, no data set, as
EfficientDM (He et al. 2023, arXiv 2310.03270) trains. For clean latents a pipeline is asked for one call of its
denoiser for each caption, in which latents and timestep are replaced: rotary tables, masks and pooled texts are as it
makes them.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffuse_compress.caching.encoding import encoded_once
from diffuse_compress.calibration.items import ModelItems, pipeline_arguments
from diffuse_compress.calibration.recording import Calibration
from diffuse_compress.calibration.samples import Sample, Samples
from diffuse_compress.calls import Call
from diffuse_compress.components import compute_dtype_of, is_pipeline, model_components
from diffuse_compress.errors import ConfigError, ModelStateError
from diffuse_compress.pipeline_call import (
    CannotCallError,
    bundled_items,
    from_noise,
    named_arguments,
    seeded,
    untouched,
)
from diffuse_compress.progress import Callback, track
from diffuse_compress.training.batches import (
    NoisedLatents,
    RecordedCalls,
    TrainingData,
    notes_of,
    sample_of,
    timestep_of,
)
from diffuse_compress.training.config import LossSpace
from diffuse_compress.training.media import Media, digest_of_media, encoded, fitted, is_media, media_in, read_media
from diffuse_compress.training.noising import Density, Noising
from diffuse_compress.training.shards import INDEX, StoredItems, store_items

__all__ = [
    "denoiser_call",
    "encode_media",
    "load_data",
    "own_items",
    "record_calls",
    "save_data",
    "synthetic_latents",
    "training_data",
]

_PER_PROMPT = 8
_BUNDLED = 16
_CLIPS_IN_SHARD = 8  # all that is in memory at a time; of a clip in 480p moments and texts are some 20 MB


def training_data(
    target: Any,
    component: str,
    data: Any,
    *,
    space: LossSpace | str = LossSpace.OUTPUT,
    seed: int = 0,
    folder: str | Path | None = None,
    callback: Callback | None = None,
) -> TrainingData:
    """Whatever a user gives as data.

    Args:
        target: a pipeline, or a model.
        component: of the pipeline; "" for a model.
        data: ready :class:`TrainingData`; a Calibration; a folder (of :func:`save_data`, or of pictures and clips with
            captions); dicts ``{"video" | "image", "caption"}``; for a pipeline prompts, class labels or dicts of its
            arguments; for a model texts or dicts of forward arguments. None takes prompts of this package.
        space: of the loss.
        seed: of what is drawn.
        folder: for latents of pictures and clips, as in :func:`encode_media`.
        callback: of progress.

    Raises:
        ConfigError: data of another kind.
    """
    if isinstance(data, TrainingData):
        return data
    if isinstance(data, str | Path):
        if (Path(data) / INDEX).is_file():
            pipe = target if is_pipeline(target) else None
            return load_data(data, pipe=pipe, component=component, space=space)
        if not Path(data).is_dir():
            raise ConfigError(f"training: data={str(data)!r} is no folder. A single prompt goes in a list: [prompt].")
        data = media_in(data)
    if isinstance(data, Samples):
        return _of_samples(data.of(component, compute_dtype_of(model_components(target)[component])), target, space)
    if not is_pipeline(target):
        return _of_model(target, data)
    items = own_items(target) if data is None else list(data)
    if items and (isinstance(items[0], Media) or is_media(items[0])):
        return encode_media(
            target, items, component=component, space=space, seed=seed, folder=folder, callback=callback
        )
    return record_calls(target, items, component=component, space=space, seed=seed, callback=callback)


def own_items(pipe: Any) -> list[Any]:
    """Prompts, or what else the pipeline is asked for, of this package.

    Raises:
        ConfigError: the pipeline needs what there is none of.
    """
    try:
        return bundled_items(pipe, _BUNDLED)
    except CannotCallError as error:
        raise ConfigError(f"training: data= is needed, a list of dicts of the call's arguments: {error}.") from None


def _of_model(model: Any, data: Any) -> RecordedCalls:
    if data is None:
        raise ConfigError(
            f"training: data= is needed for a {type(model).__name__} without pipeline: texts, or dicts of its forward "
            "arguments."
        )
    reader = ModelItems(model)
    calls = [call.copied() for index, item in enumerate(data) for call in reader.calls(item, index)]
    return RecordedCalls(calls)


# --- trajectories -------------------------------------------------------------------------------------------------


def record_calls(
    pipe: Any,
    items: Iterable[Any],
    *,
    component: str = "transformer",
    num_samples: int | None = None,
    space: LossSpace | str = LossSpace.OUTPUT,
    seed: int = 0,
    callback: Callback | None = None,
    **call_arguments: Any,
) -> RecordedCalls:
    """Calls of a denoiser along the pipeline's own trajectories, of steps spread over the schedule.

    Args:
        pipe: a diffusers pipeline.
        items: prompts, class labels or dicts of arguments.
        component: the denoiser.
        num_samples: calls that are kept; 8 for each item by default.
        space: of the loss.
        seed: of the noise.
        callback: of progress.
        call_arguments: of ``pipe(...)``: num_inference_steps, height, ...

    Raises:
        ConfigError: no items, or items of another kind.
    """
    items = list(items)
    samples = Calibration.record(
        pipe,
        items,
        num_samples=num_samples or _PER_PROMPT * max(1, len(items)),
        seed=seed,
        components=[component],
        callback=callback,
        **call_arguments,
    )
    return _of_samples(samples.of(component), pipe, space)


def _of_samples(samples: Sequence[Sample], target: Any, space: LossSpace | str) -> RecordedCalls:
    calls = [sample.call for sample in samples]
    if LossSpace(space) is LossSpace.OUTPUT:
        return RecordedCalls(calls)
    scheduler = getattr(target, "scheduler", None)
    if scheduler is None:
        raise ConfigError('training: loss_space="x0" needs the scheduler of a pipeline, got a model alone.')
    noising = Noising(scheduler, mu=0.0)  # levels are given; the shift only matters to draws
    weights = []
    for call in calls:
        sample, timestep = sample_of(call), timestep_of(call)
        if sample is None or timestep is None:
            raise ConfigError('training: loss_space="x0" needs the timestep of every call as a tensor.')
        scale = _timestep_scale(timestep, noising.num_train_timesteps)
        levels = noising.at((timestep.reshape(-1)[: len(sample)] / scale).expand(len(sample)))
        weights.append(noising.weights(levels, space))
    return RecordedCalls(calls, weights)


def _timestep_scale(timestep: torch.Tensor, num_train_timesteps: int) -> float:
    """What the pipeline multiplies the scheduler's timesteps by for its denoiser: Flux and others divide by 1000."""
    return 1 / num_train_timesteps if timestep.is_floating_point() and float(timestep.max()) <= 1 else 1.0


# --- clean latents ------------------------------------------------------------------------------------------------


class _ReachedError(Exception):
    """The denoiser was called; the rest of the trajectory is not wanted."""


def denoiser_call(pipe: Any, component: str, arguments: Mapping[str, Any]) -> tuple[Call, float | None]:
    """(the first call of a denoiser with these arguments, mu that the scheduler was given).

    Args:
        pipe: may be called (``untouched``).
        component: the denoiser.
        arguments: of the pipeline.

    Raises:
        ModelStateError: the pipeline does not call it.
    """
    model, kept = model_components(pipe)[component], list[Call]()
    told: dict[str, float | None] = {"mu": None}

    def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        kept.append(Call(args, kwargs).copied())
        raise _ReachedError

    handle = model.register_forward_pre_hook(stop, with_kwargs=True, prepend=True)
    stock = getattr(pipe.scheduler, "set_timesteps", None) if hasattr(pipe, "scheduler") else None
    if stock is not None:

        @functools.wraps(stock)
        def listening(*args: Any, **kwargs: Any) -> Any:
            told["mu"] = kwargs.get("mu", told["mu"])
            return stock(*args, **kwargs)

        pipe.scheduler.set_timesteps = listening
    try:
        with contextlib.suppress(_ReachedError):
            pipe(**from_noise(pipe, arguments, 0))
    finally:
        handle.remove()
        if stock is not None:
            vars(pipe.scheduler).pop("set_timesteps", None)
    if not kept:
        raise ModelStateError(f"training: {type(pipe).__name__} never calls its {component} with these arguments.")
    return kept[0], told["mu"]


def _one_pass(pipe: Any, component: str, caption: Any, size: Mapping[str, int], shared: Mapping[str, Any]) -> Any:
    """Arguments of a call that predicts once, without guidance; one that is told to the model stays."""
    named = named_arguments(pipe)
    own: dict[str, Any] = {name: value for name, value in size.items() if name in named}
    embeds = getattr(model_components(pipe)[component].config, "guidance_embeds", False)
    if "guidance_scale" in named and not embeds:
        own["guidance_scale"] = 1.0
    if "num_inference_steps" in named:
        own["num_inference_steps"] = 2
    return pipeline_arguments(pipe, caption, {**own, **shared})


def encode_media(
    pipe: Any,
    items: Iterable[Any],
    *,
    component: str = "transformer",
    space: LossSpace | str = LossSpace.OUTPUT,
    density: Density | str = Density.UNIFORM,
    caption_dropout: float = 0.0,
    height: int | None = None,
    width: int | None = None,
    num_frames: int | None = None,
    seed: int = 0,
    folder: str | Path | None = None,
    callback: Callback | None = None,
    **call_arguments: Any,
) -> NoisedLatents:
    """Pictures or clips with captions, encoded once.

    Args:
        pipe: a diffusers pipeline with a VAE.
        items: dicts ``{"video" | "image", "caption"}`` of files, PIL images or tensors; or what :func:`media_in` finds.
        component: the denoiser.
        space: of the loss.
        density: of t before the scheduler's shift.
        caption_dropout: share of the items whose caption is left out, for guidance at inference.
        height: of all; by default what each item has.
        width: likewise.
        num_frames: likewise.
        seed: of the captions that are left out.
        folder: latents go there as they are made, and are read one by one; another call with the same items, arguments
            and models reads what is there.
        callback: of progress.
        call_arguments: of the pipeline: max_sequence_length, ...

    Raises:
        ConfigError: pixels of another kind, or a scheduler that cannot noise.
        ModelStateError: latents that do not fit what the denoiser is given.
    """
    media = [item if isinstance(item, Media) else read_media(item) for item in items]
    left_out = torch.rand(len(media), generator=seeded(seed)) < caption_dropout
    mus = set[float | None]()

    def one(index: int) -> dict[str, Any]:
        moments, size = encoded(pipe, media[index].content, height, width, num_frames)
        arguments = _one_pass(pipe, component, "" if left_out[index] else media[index].caption, size, call_arguments)
        call, mu = denoiser_call(pipe, component, arguments)
        mus.add(mu)
        return {**_item(pipe, call, moments), "mu": mu}

    def made() -> Iterator[dict[str, Any]]:
        return map(one, track(list(range(len(media))), "Encoding", pipe, callback, {}))

    with untouched(pipe):
        if folder is None:
            found: Sequence[Mapping[str, Any]] = list(made())
        else:
            asked = repr([height, width, num_frames, left_out.tolist(), call_arguments])
            settings = {"kind": "latents", "component": component, "source": digest_of_media(media, asked)}
            found = _on_disk(folder, settings, one, made)
    return NoisedLatents(found, _noising(pipe, component, mus, density), space, notes=getattr(found, "notes", None))


def _on_disk(
    folder: str | Path,
    settings: Mapping[str, Any],
    one: Callable[[int], Mapping[str, Any]],
    made: Callable[[], Iterable[Mapping[str, Any]]],
) -> StoredItems:
    """Items of a folder: those that are there, if they are of these settings and the first, made anew, is the first
    there (by these very models, then); else they are made."""
    if (Path(folder) / INDEX).is_file():
        found = StoredItems(folder)
        if found.settings == settings and found.notes is not None and found.notes[0] == notes_of(one(0)):
            return found
    return store_items(folder, made(), settings=settings, notes=notes_of, per_shard=_CLIPS_IN_SHARD)


def synthetic_latents(
    pipe: Any,
    count: int,
    *,
    component: str = "transformer",
    space: LossSpace | str = LossSpace.OUTPUT,
    density: Density | str = Density.UNIFORM,
    seed: int = 0,
    **call_arguments: Any,
) -> NoisedLatents:
    """Latents of independent normal numbers under prompts of this package: for trying a training out, not for models
    that are to be used."""
    items, mus = [], set[float | None]()
    with untouched(pipe), torch.random.fork_rng(devices=[]):
        asked = list(itertools.islice(itertools.cycle(bundled_items(pipe, min(count, _BUNDLED))), count))
        arguments = [_one_pass(pipe, component, item, {}, call_arguments) for item in asked]
        models = {component: model_components(pipe)[component]}
        with encoded_once(pipe, models, arguments):
            for index, given in enumerate(arguments):
                call, mu = denoiser_call(pipe, component, given)
                mus.add(mu)
                sample = sample_of(call)
                assert sample is not None
                latents = torch.randn(sample.shape, generator=seeded(seed + index))
                items.append({**_described(call), "latents": latents, "mu": mu})
    return NoisedLatents(items, _noising(pipe, component, mus, density), space)


def _item(pipe: Any, call: Call, moments: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    sample = sample_of(call)
    if sample is None:
        raise ModelStateError(f"training: no latents among what {type(pipe).__name__} gives to its denoiser.")
    return {**_described(call), **{name: fitted(pipe, moment, sample) for name, moment in moments.items()}}


def _described(call: Call) -> dict[str, Any]:
    timestep = timestep_of(call)
    scale = 1.0 if timestep is None else _timestep_scale(timestep, 1000)
    return {"call": {"args": tuple(call.args), "kwargs": dict(call.kwargs)}, "timestep_scale": scale}


def _noising(pipe: Any, component: str, mus: set[float | None], density: Density | str) -> Noising:
    known = sorted(mu for mu in mus if mu is not None)
    low, high = _shares(pipe, component)
    return Noising(pipe.scheduler, mu=known[len(known) // 2] if known else None, density=density, low=low, high=high)


def _shares(pipe: Any, component: str) -> tuple[float, float]:
    """Of the timesteps, those at which this denoiser works: Wan 2.2 has one for each side of a boundary."""
    boundary = getattr(pipe, "config", {}).get("boundary_ratio")
    if boundary is None or getattr(pipe, "transformer_2", None) is None:
        return 0.0, 1.0
    return (0.0, float(boundary)) if component.endswith("_2") else (float(boundary), 1.0)


# --- disk ---------------------------------------------------------------------------------------------------------


def save_data(data: TrainingData, folder: str | Path) -> None:
    """Write latents and calls as safetensors shards with an index; :func:`load_data` reads them item by item.

    Raises:
        ConfigError: data of a class of its own.
    """
    if isinstance(data, NoisedLatents):
        store_items(folder, data.items, settings={"kind": "latents"}, notes=notes_of)
        return
    if not isinstance(data, RecordedCalls):
        raise ConfigError(f"training: {type(data).__name__} cannot be stored; latents and recorded calls can.")
    store_items(folder, map(data.item, range(len(data))), settings={"kind": "calls"}, notes=notes_of)


def load_data(
    folder: str | Path,
    noising: Noising | None = None,
    *,
    pipe: Any = None,
    component: str = "transformer",
    space: LossSpace | str = LossSpace.OUTPUT,
    density: Density | str = Density.UNIFORM,
) -> TrainingData:
    """Data of :func:`save_data` or of :func:`encode_media`'s folder.

    Args:
        folder: with the index.
        noising: for latents; or
        pipe: whose scheduler is taken.
        component: the denoiser.
        space: of the loss.
        density: of t before the scheduler's shift.

    Raises:
        ConfigError: latents, and neither ``noising`` nor ``pipe``.
    """
    items = StoredItems(folder)
    first = items[0]
    if "weight" in first:
        known = [items.part(name) if name in first else None for name in ("weight", "target", "truth")]
        return RecordedCalls(_Calls(items.part("call")), *known, notes=items.notes)
    if noising is None:
        if pipe is None:
            raise ConfigError(f"{folder}: latents are noised by a scheduler: pass noising= or pipe=.")
        noising = _noising(pipe, component, {first.get("mu")}, density)
    return NoisedLatents(items, noising, space, notes=items.notes)


class _Calls(Sequence[Call]):
    def __init__(self, trees: Sequence[Mapping[str, Any]]) -> None:
        self._trees = trees

    def __len__(self) -> int:
        return len(self._trees)

    def __getitem__(self, index: Any) -> Any:
        found = self._trees[index]
        trees = found if isinstance(index, slice) else [found]
        calls = [Call(tuple(tree["args"]), tree["kwargs"]) for tree in trees]
        return calls if isinstance(index, slice) else calls[0]

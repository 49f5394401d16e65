"""What is trained on, as calls of the model: recorded ones, and latents that are noised anew at every draw.

Whatever the data were (videos with captions, prompts, texts), an item is a call of the denoiser, so the loop and the
loss know no model. A draw is a function of the item and of a seed; nothing else is random.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from diffuse_compress.calibration.trees import hash_tensor, hash_tree
from diffuse_compress.calls import Call, map_tensors
from diffuse_compress.errors import ConfigError
from diffuse_compress.families.base import SAMPLE_NAMES, TIMESTEP_NAMES
from diffuse_compress.training.config import LossSpace
from diffuse_compress.training.noising import Noising

__all__ = ["Batch", "NoisedLatents", "RecordedCalls", "TrainingData", "collated", "notes_of", "sample_of"]
__all__ += ["timestep_of"]


@dataclass(frozen=True)
class Batch:
    """Calls of the model as one.

    Attributes:
        call: its arguments.
        weight: float32 [rows], what a row's squared error counts.
        target: the teacher's output, if it was kept.
        truth: what a perfect model would answer, if the data know it: of noised latents the noise or velocity.
    """

    call: Call
    weight: torch.Tensor
    target: torch.Tensor | None = None
    truth: torch.Tensor | None = None

    def to(self, device: torch.device | str) -> Batch:
        """The same on ``device``."""
        target, truth = (None if value is None else value.to(device) for value in (self.target, self.truth))
        return Batch(self.call.to(device), self.weight.to(device), target, truth)


class TrainingData(ABC):
    """Items that batches are drawn from."""

    @abstractmethod
    def __len__(self) -> int:
        """Number of items."""

    @abstractmethod
    def draw(self, index: int, generator: torch.Generator) -> Batch:
        """A batch of one item, on the CPU."""

    @abstractmethod
    def call(self, index: int) -> Call:
        """Arguments of an item, whatever is drawn for it."""

    def target(self, index: int) -> torch.Tensor | None:
        """The teacher's output for an item whose inputs never change; None if it is not known."""
        return None

    @property
    def is_fixed(self) -> bool:
        """Whether every draw of an item gives the same inputs."""
        return False

    def describe(self) -> dict[str, Any]:
        """What decides the draws, JSON-able."""
        return {"items": len(self), "kind": type(self).__name__}

    def item(self, index: int) -> Mapping[str, Any]:
        """All that an item is, a tree ``{"call": {"args", "kwargs"}, ...}`` of tensors and JSON values."""
        call = self.call(index)
        return {"call": {"args": tuple(call.args), "kwargs": dict(call.kwargs)}}

    def notes(self, index: int) -> Mapping[str, str]:
        """:func:`notes_of` an item; from a disk without reading it."""
        return notes_of(self.item(index))

    def signature(self, index: int) -> str:
        """Items of one signature can be one batch."""
        return self.notes(index)["signature"]

    def fingerprint(self) -> str:
        """Hash of every item, for a resumed run to be compared with."""
        digest = hashlib.sha256()
        for index in range(len(self)):
            digest.update(self.notes(index)["digest"].encode())
        return digest.hexdigest()[:16]


class RecordedCalls(TrainingData):
    """Calls whose inputs are what they are: a pipeline's own trajectories, texts for a language model.

    Args:
        calls: on the CPU; may be read from a disk one by one.
        weights: by item, of its rows; 1 without.
        targets: the teacher's outputs by item, if they are known.
        truths: what a perfect model would answer, by item; ``method="lsq"`` learns that.
        notes: by item, where they are stored beside it.
    """

    def __init__(
        self,
        calls: Sequence[Call],
        weights: Sequence[torch.Tensor] | None = None,
        targets: Sequence[torch.Tensor] | None = None,
        truths: Sequence[torch.Tensor] | None = None,
        *,
        notes: Sequence[Mapping[str, str]] | None = None,
    ) -> None:
        self._calls, self._weights, self._targets, self._truths, self._notes = calls, weights, targets, truths, notes
        if not len(calls):
            raise ConfigError("training: at least one item is needed, got none.")
        for name, given in (("weights", weights), ("targets", targets), ("truths", truths)):
            if given is not None and len(given) != len(calls):
                raise ConfigError(f"training: {name} must be {len(calls)}, one for each item, got {len(given)}.")

    def __len__(self) -> int:
        return len(self._calls)

    @property
    def is_fixed(self) -> bool:
        """Every draw of an item gives the same inputs."""
        return True

    def call(self, index: int) -> Call:
        """The recorded one."""
        return self._calls[index]

    def target(self, index: int) -> torch.Tensor | None:
        """The teacher's output, if it was kept."""
        return None if self._targets is None else self._targets[index]

    def draw(self, index: int, generator: torch.Generator) -> Batch:
        """The recorded call; nothing is random."""
        call = self._calls[index]
        weight = torch.ones(rows_of(call)) if self._weights is None else self._weights[index].float()
        return Batch(call, weight, self.target(index), None if self._truths is None else self._truths[index])

    def item(self, index: int) -> Mapping[str, Any]:
        """The call, the weights of its rows, and what is known of its outputs."""
        batch = self.draw(index, torch.Generator())
        known = {name: value for name in ("target", "truth") if (value := getattr(batch, name)) is not None}
        return {**super().item(index), "weight": batch.weight, **known}

    def notes(self, index: int) -> Mapping[str, str]:
        """Of an item."""
        return super().notes(index) if self._notes is None else self._notes[index]

    def with_targets(self, targets: Sequence[torch.Tensor]) -> RecordedCalls:
        """The same with the teacher's outputs."""
        return RecordedCalls(self._calls, self._weights, targets, self._truths)


class NoisedLatents(TrainingData):
    """Clean latents under captions: a draw takes a level of the scheduler's, and noise, for each.

    Args:
        items: trees ``{"call": {"args", "kwargs"}, "latents" or "mean" and "std", "timestep_scale", "mu"}``, on the
            CPU; may be read from a disk one by one. ``call`` is one of the denoiser for the caption, whose sample and
            timestep are replaced. Of ``mean`` and ``std`` latents are drawn anew each time. ``mu`` is the shift of
            levels for the item's own size, where the scheduler has one.
        noising: of the pipeline's scheduler.
        space: of the loss, which decides the weights.
        notes: by item, where they are stored beside it.
    """

    def __init__(
        self,
        items: Sequence[Mapping[str, Any]],
        noising: Noising,
        space: LossSpace | str = LossSpace.OUTPUT,
        *,
        notes: Sequence[Mapping[str, str]] | None = None,
    ) -> None:
        if not len(items):
            raise ConfigError("training: at least one item is needed, got none.")
        self.items, self.noising, self.space, self._notes = items, noising, LossSpace(space), notes

    def __len__(self) -> int:
        return len(self.items)

    def call(self, index: int) -> Call:
        """That of the caption."""
        made = self.items[index]["call"]
        return Call(tuple(made["args"]), made["kwargs"])

    def item(self, index: int) -> Mapping[str, Any]:
        """Latents and the call of the caption."""
        return self.items[index]

    def notes(self, index: int) -> Mapping[str, str]:
        """Of an item."""
        return super().notes(index) if self._notes is None else self._notes[index]

    def describe(self) -> dict[str, Any]:
        """Items, levels and the space of the loss."""
        return {**super().describe(), **self.noising.to_dict(), "space": self.space.value}

    def draw(self, index: int, generator: torch.Generator) -> Batch:
        """Noisy latents of an item at a level of its own."""
        item, call = self.items[index], self.call(index)
        clean = item.get("latents")
        if clean is None:
            mean = item["mean"]
            clean = mean + item["std"] * torch.randn(mean.shape, generator=generator)
        levels = self.noising.draw(len(clean), generator, item.get("mu"))
        noise = torch.randn(clean.shape, generator=generator)
        noisy = levels.noisy(clean, noise)
        made = _with_sample(call, noisy, levels.timesteps * float(item.get("timestep_scale", 1.0)))
        return Batch(made, self.noising.weights(levels, self.space), None, self.noising.truth(clean, noise, levels))


def notes_of(item: Mapping[str, Any]) -> dict[str, str]:
    """{"digest": hash of all that an item holds, "signature": hash of the shapes of its call}."""
    digest = hashlib.sha256()
    hash_tree(digest, item, "")
    call = Call(tuple(item["call"]["args"]), item["call"]["kwargs"])
    return {"digest": digest.hexdigest()[:32], "signature": _signature(call)}


def _signature(call: Call) -> str:
    rows, digest = rows_of(call), hashlib.sha256()
    found = map_tensors(lambda tensor: _shape(tensor, rows, digest), [call.args, dict(call.kwargs)])
    return hashlib.sha256(f"{json.dumps(found, default=str)} {digest.hexdigest()}".encode()).hexdigest()[:16]


def collated(batches: Sequence[Batch]) -> Batch:
    """Batches of one signature as one; a tensor without rows is that of the first."""
    if len(batches) == 1:
        return batches[0]
    rows = [rows_of(batch.call) for batch in batches]
    calls = [batch.call for batch in batches]
    args = tuple(_joined([call.args[place] for call in calls], rows) for place in range(len(calls[0].args)))
    kwargs = {name: _joined([call.kwargs[name] for call in calls], rows) for name in calls[0].kwargs}
    for name in TIMESTEP_NAMES:  # one for all is not one for each
        values = [call.kwargs.get(name) for call in calls]
        if all(isinstance(value, torch.Tensor) and value.ndim == 0 for value in values):
            kwargs[name] = torch.cat([v.expand(r) for v, r in zip(values, rows, strict=True) if v is not None])
    known = [[getattr(batch, name) for batch in batches] for name in ("target", "truth")]
    target, truth = (None if any(value is None for value in values) else torch.cat(values) for values in known)
    return Batch(Call(args, kwargs), torch.cat([batch.weight for batch in batches]), target, truth)


def sample_of(call: Call) -> torch.Tensor | None:
    """The latents, or token ids, of a call; of others its first tensor."""
    if call.args and isinstance(call.args[0], torch.Tensor):
        return call.args[0]
    named = next((call.kwargs[name] for name in SAMPLE_NAMES if isinstance(call.kwargs.get(name), torch.Tensor)), None)
    return named if named is not None else next((t for t in call.tensors() if t.ndim), None)


def timestep_of(call: Call) -> torch.Tensor | None:
    """The timestep of a call, by its name or as the second argument."""
    named = next((call.kwargs[n] for n in TIMESTEP_NAMES if isinstance(call.kwargs.get(n), torch.Tensor)), None)
    second = call.args[1] if len(call.args) > 1 and isinstance(call.args[1], torch.Tensor) else None
    return named if named is not None else second


def rows_of(call: Call) -> int:
    """Samples in a call."""
    sample = sample_of(call)
    return 1 if sample is None or sample.ndim == 0 else sample.shape[0]


def _with_sample(call: Call, sample: torch.Tensor, timesteps: torch.Tensor) -> Call:
    """The call with other latents and timesteps [rows], in the dtypes and on the axes of those it has."""
    before, when = sample_of(call), timestep_of(call)
    if before is None or before.shape != sample.shape:
        shape = None if before is None else tuple(before.shape)
        raise ConfigError(f"training: latents must have the shape {shape} that the model gets, got {sample.shape}.")
    if when is None:
        raise ConfigError("training: the model gets no timestep as a tensor, so no level of noise can be told to it.")
    if when.ndim > 1:  # one for each token or frame
        timesteps = timesteps.reshape(-1, *[1] * (when.ndim - 1)).expand(-1, *when.shape[1:])
    put = {id(before): sample.to(before.dtype), id(when): timesteps.to(torch.promote_types(when.dtype, torch.float32))}
    if not when.is_floating_point():
        put[id(when)] = timesteps.round().to(when.dtype)

    def replaced(tensor: torch.Tensor) -> torch.Tensor:
        return put.get(id(tensor), tensor)

    return replace(call, args=map_tensors(replaced, call.args), kwargs=map_tensors(replaced, dict(call.kwargs)))


def _joined(values: Sequence[Any], rows: Sequence[int]) -> Any:
    first = values[0]
    if isinstance(first, torch.Tensor):
        together = first.ndim > 0 and all(value.shape[0] == count for value, count in zip(values, rows, strict=True))
        return torch.cat(list(values)) if together else first
    if type(first) is tuple or (type(first) is list and any(isinstance(item, torch.Tensor) for item in first)):
        return type(first)(_joined([value[place] for value in values], rows) for place in range(len(first)))
    if type(first) is list and all(len(value) == count for value, count in zip(values, rows, strict=True)):
        return [item for value in values for item in value]  # QwenImage's img_shapes
    if type(first) is dict:
        return {name: _joined([value[name] for value in values], rows) for name in first}
    return first


def _shape(tensor: torch.Tensor, rows: int, digest: Any) -> str:
    """Of a tensor; one that has no rows is told apart by what it holds."""
    if tensor.ndim and tensor.shape[0] != rows:
        hash_tensor(digest, "", tensor)
    return f"{tensor.dtype} {list(tensor.shape)}"

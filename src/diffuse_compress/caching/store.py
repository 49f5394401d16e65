"""What is kept of a step: atoms, how they are summed up while a step runs, and where they lie until they are added."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from diffuse_compress.families.base import Streams

__all__ = ["Kept", "Placement", "Signature", "Sum", "plus", "signature"]

Signature = dict[str, tuple[torch.Size, torch.dtype, torch.device]]
_FP16_LIMIT = 65504


def signature(streams: Streams) -> Signature:
    """Shape, dtype and device of each stream."""
    return {name: (value.shape, value.dtype, value.device) for name, value in streams.items()}


def plus(stream: torch.Tensor, delta: torch.Tensor, weight: float = 1.0) -> torch.Tensor:
    """stream + weight * delta in the stream's dtype; within float16's range, as stock blocks keep theirs."""
    delta = delta if delta.dtype == stream.dtype else delta.to(stream.dtype)
    total = stream + delta if weight == 1.0 else torch.add(stream, delta, alpha=weight)
    return total.clip(-_FP16_LIMIT, _FP16_LIMIT) if total.dtype == torch.float16 else total


@dataclass(frozen=True)
class Placement:
    """How atoms are kept: None leaves dtype or device as they are."""

    dtype: torch.dtype | None = None
    device: torch.device | None = None


class Kept:
    """An atom that is kept.

    Attributes:
        taken: of the streams where it was taken; it can be added to streams like these only.
        nbytes: of its tensors.
    """

    def __init__(self, deltas: Streams, taken: Signature, placement: Placement) -> None:
        self.taken = taken
        self._home = {name: value.device for name, value in deltas.items()}
        self._tensors = {name: _placed(value, placement) for name, value in deltas.items()}
        self._arriving: tuple[Streams, Any] | None = None
        self.nbytes = sum(value.numel() * value.element_size() for value in self._tensors.values())

    def fits(self, now: Signature) -> bool:
        """Are streams like these what it was taken from?"""
        return all(now[name] == value for name, value in self.taken.items() if name in now)

    def prefetch(self) -> None:
        """Begin to bring it back from the CPU, beside what the device is computing."""
        if self._arriving is not None or not any(device.type == "cuda" for device in self._home.values()):
            return
        device = next(device for device in self._home.values() if device.type == "cuda")
        side = _side_stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            tensors = {n: value.to(self._home[n], non_blocking=True) for n, value in self._tensors.items()}
        self._arriving = tensors, side

    def deltas(self) -> Streams:
        """Its tensors, on the device and in the dtype of the streams that they were taken from."""
        if self._arriving is not None:
            tensors, side = self._arriving
            current = torch.cuda.current_stream(next(iter(tensors.values())).device)
            current.wait_stream(side)
            for value in tensors.values():
                value.record_stream(current)
            self._arriving = None
        else:
            tensors = {name: value.to(self._home[name], non_blocking=True) for name, value in self._tensors.items()}
        return {n: value.to(self.taken[n][1]) if n in self.taken else value for n, value in tensors.items()}


@cache
def _side_stream(device: torch.device) -> Any:
    return torch.cuda.Stream(device)


def _placed(value: torch.Tensor, placement: Placement) -> torch.Tensor:
    value = value if placement.dtype is None else value.to(placement.dtype)
    if placement.device is None or placement.device == value.device:
        return value
    if placement.device.type == "cpu" and value.device.type == "cuda":
        pinned = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
        return pinned.copy_(value, non_blocking=True)
    return value.to(placement.device)


class Sum:
    """An atom while its units run: the sum of what they add.

    Of neighbouring whole blocks nothing is summed up: what they add is what the last returns less what the first was
    given. Whatever was added to the streams between two blocks (a ControlNet's residuals) is told by a tensor that the
    block before did not return, and is no part of the sum: the model's own code adds it in every step.

    Attributes:
        atom: index of it.
        taken: of the streams that it begins with.
        broken: something cannot be told of it, so it is not kept.
    """

    def __init__(self, atom: int, streams: Streams) -> None:
        self.atom = atom
        self.broken = False
        self.taken = signature(streams)
        self._total: Streams = {}
        self._start: Streams = {}
        self._last: dict[str, tuple[torch.Tensor, int | None]] = {}

    def block(self, entered: Streams, returned: Streams) -> None:
        """A whole block has run."""
        for name, value in returned.items():
            if name not in entered:
                continue
            last = self._last.get(name)
            if last is None or last[0] is not entered[name] or last[1] != _version(last[0]):
                self._settle(name)
                self._start[name] = entered[name]
            self._last[name] = value, _version(value)

    def add(self, deltas: Streams) -> None:
        """A unit inside of a block has run."""
        for name in self._start.keys() | deltas.keys():
            self._settle(name)
        for name, delta in deltas.items():
            self._total[name] = self._total[name] + delta if name in self._total else delta

    def result(self) -> Streams | None:
        """What is to be kept, if anything."""
        for name in list(self._start):
            self._settle(name)
        if self.broken or not self._total:
            return None
        # A float32 sum of a bfloat16 stream (Wan's residuals) is rounded where it is added anyway.
        return {n: v.to(self.taken[n][1]) if n in self.taken else v for n, v in self._total.items()}

    def _settle(self, name: str) -> None:
        start, last = self._start.pop(name, None), self._last.pop(name, None)
        if start is None or last is None:
            return
        value, version = last
        if _version(value) != version:
            self.broken = True  # changed in place since the block returned it
        elif value is not start:
            delta = value - start
            self._total[name] = self._total[name] + delta if name in self._total else delta


def _version(value: torch.Tensor) -> int | None:
    return None if value.is_inference() else value._version

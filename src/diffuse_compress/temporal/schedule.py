"""The timesteps of a schedule in the form in which a pipeline hands them to its model.

Flux's pipeline gives t / 1000 in bfloat16, others t itself, 1 - t / 1000 or whole numbers; the embedding is that of the
value given, rounding included. One call shows the form: of those known, the first that gives its very value at the row
of the call. Later calls are looked up by their own value, so that a wrong guess is a miss and no wrong embedding.
"""

from __future__ import annotations

import numbers
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from diffuse_compress.runtime.run import SEVERAL_ROWS, TIMESTEP_FORMS, Run
from diffuse_compress.runtime.stats import Reason
from diffuse_compress.temporal.reasons import UNKNOWN_FORM

__all__ = ["Timesteps", "host_value", "timesteps_of"]


@dataclass(frozen=True)
class Timesteps:
    """A schedule as the model is given it, equal timesteps once.

    Attributes:
        values: in the order of their first row, as float64 would hold them.
        rows: of every row of the schedule, the place of its timestep in ``values``.
        given: a timestep as the model got it, a number or a tensor of any shape, in which they come.
    """

    values: tuple[float, ...]
    rows: tuple[int, ...]
    given: Any

    @property
    def form(self) -> str:
        """What the timesteps are given as."""
        return str(self.given.dtype).removeprefix("torch.") if isinstance(self.given, torch.Tensor) else "number"

    def at(self, place: int, batch: int | None = None) -> Any:
        """The timestep ``values[place]`` as the model would be given it; for ``batch`` samples if it had one each."""
        value = self.values[place]
        if not isinstance(self.given, torch.Tensor):
            return type(self.given)(value)
        shape = self.given.shape if batch is None or self.given.ndim == 0 else (batch, *self.given.shape[1:])
        return torch.full(shape, value, dtype=self.given.dtype, device=self.given.device)


def host_value(timestep: Any) -> float | Reason | None:
    """The one value of a timestep on the host; None if it is on a device, where reading would make the host wait."""
    if isinstance(timestep, numbers.Real):
        return float(timestep)
    if not isinstance(timestep, torch.Tensor) or timestep.device.type != "cpu" or timestep.numel() == 0:
        return None
    return _uniform(timestep)


def timesteps_of(run: Run, row: int, given: Any) -> Timesteps | Reason:
    """Timesteps of a run, of which ``given`` is that of ``row``. Reads ``given``, from a device too.

    Args:
        run: with a schedule.
        row: of the call.
        given: a number, or a tensor with one value.

    Returns:
        A reason if the samples differ, or no known form gives that value.
    """
    value = float(given) if isinstance(given, numbers.Real) else _uniform(given)
    if isinstance(value, Reason):
        return value
    for values in _candidates(run, given):
        if values[row] == value:
            unique = list(dict.fromkeys(values))
            place = {number: index for index, number in enumerate(unique)}
            return Timesteps(tuple(unique), tuple(place[number] for number in values), given)
    return UNKNOWN_FORM


def _uniform(timestep: torch.Tensor) -> float | Reason:
    values = timestep.detach().reshape(-1)
    return SEVERAL_ROWS if bool((values != values[0]).any()) else float(values[0])


def _candidates(run: Run, given: Any) -> Iterator[list[float]]:
    """All rows' values in every known form: as they are cast first (most pipelines), or last, on either device."""
    schedule, count = run.timesteps, run.num_train_timesteps
    if schedule is None:
        return
    if not isinstance(given, torch.Tensor):
        exact = schedule.double()
        yield from (form(exact, count).tolist() for form in TIMESTEP_FORMS)
        return
    if not given.is_floating_point():
        yield schedule.to(given.dtype).double().tolist()
        return
    # Dividing by a number, devices may multiply by its inverse.
    for device in dict.fromkeys((given.device, schedule.device)):
        there = schedule.to(device)
        for form in TIMESTEP_FORMS:
            yield form(there.to(given.dtype), count).double().tolist()
            yield form(there, count).to(given.dtype).double().tolist()

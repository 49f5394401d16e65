"""Which rows of the tables a call means: an index on the device that the layers' lookups read."""

from __future__ import annotations

from typing import Any

import torch

from diffuse_compress.runtime import steps
from diffuse_compress.runtime.stats import Reason
from diffuse_compress.temporal.schedule import UNKNOWN_FORM, Timesteps, host_value

__all__ = ["Index"]


class Index:
    """Index tensors of one model, at the same addresses for every call of one batch size.

    Attributes:
        rows: int64 [batch], rows of tables of the timestep alone.
        samples: int64 [batch], rows of tables that have one for every timestep and sample.
    """

    def __init__(self) -> None:
        self.rows: torch.Tensor | None = None
        self.samples: torch.Tensor | None = None
        self._buffers: dict[tuple[int, torch.device], tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}
        self._values: tuple[Timesteps, torch.Tensor] | None = None
        self._doubt: torch.Tensor | None = None  # on the device, of all calls since it last told
        self._answer: torch.Tensor | None = None  # on its way to the host
        self._event: Any = None

    def place(self, timesteps: Timesteps, context: steps.StepContext, given: Any) -> int | torch.Tensor | Reason:
        """Where a call's timestep stands in ``timesteps.values``: a number if the host can tell, else for each sample.

        A timestep that the host cannot read is proven if it is an element of the schedule itself; any other is looked
        for on the device, sample by sample, and :meth:`doubted` tells later if it was not there.
        """
        value = host_value(given)
        if isinstance(value, Reason):
            return value
        if value is not None:
            try:
                return timesteps.values.index(value)
            except ValueError:
                return UNKNOWN_FORM
        run, row = context.run, context.row
        if run is not None and row is not None and isinstance(run.row_of(given), int):
            return timesteps.rows[row]
        return self._search(timesteps, given)

    def write(self, place: int | torch.Tensor, batch: int, first: int, device: torch.device) -> None:
        """Let the tensors point there; ``first`` is the row at which the tables with samples begin."""
        key = (batch, device)
        if key not in self._buffers:
            with torch.inference_mode(False):
                self._buffers[key] = (
                    torch.zeros(batch, dtype=torch.int64, device=device),
                    torch.zeros(batch, dtype=torch.int64, device=device),
                    torch.arange(batch, device=device),
                )
        self.rows, self.samples, numbers = self._buffers[key]
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return  # a graph of the whole model reads what stands there when it is replayed
        if isinstance(place, int):
            self.rows.fill_(place)
        else:
            if first:
                self._note((place < first).any())
            self.rows.copy_(place.clamp(min=first).expand(batch))
        torch.add(numbers, self.rows - first, alpha=batch, out=self.samples)

    def doubted(self) -> bool:
        """Was a timestep of an earlier call not the schedule's, as far as the device has told by now?"""
        if self._answer is None or (self._event is not None and not self._event.query()):
            return False
        found, self._answer, self._event = bool(self._answer), None, None
        if found:
            self._doubt = None
        return found

    def _search(self, timesteps: Timesteps, given: torch.Tensor) -> torch.Tensor:
        if self._values is None or self._values[0] is not timesteps or self._values[1].device != given.device:
            values = torch.tensor(timesteps.values, dtype=torch.float64).to(given.device)
            self._values = (timesteps, values)
        distance = (self._values[1] - given.detach().reshape(-1, 1).double()).abs()
        nearest, place = distance.min(dim=1)
        self._note((nearest != 0).any())
        return place

    def _note(self, doubt: torch.Tensor) -> None:
        """Ask the device for an answer that the host will not wait for."""
        with torch.inference_mode(False):
            self._doubt = doubt.clone() if self._doubt is None else self._doubt | doubt
            if self._answer is not None:
                return  # an earlier question is still open; the next one covers this call too
            if self._doubt.device.type == "cpu":
                self._answer = self._doubt
                return
            host = torch.empty((), dtype=torch.bool, pin_memory=True)
            self._answer = host.copy_(self._doubt, non_blocking=True)
            self._event = torch.Event(self._doubt.device)
            self._event.record()

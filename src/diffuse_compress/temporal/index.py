"""Which rows of the tables a call means, as an index on the device."""

from __future__ import annotations

from typing import Any

import torch

from diffuse_compress.runtime import steps
from diffuse_compress.runtime.stats import Reason
from diffuse_compress.temporal.reasons import UNKNOWN_FORM
from diffuse_compress.temporal.schedule import Timesteps, host_value

__all__ = ["Index"]


class Index:
    """Index tensors of one call of a model.

    Attributes:
        rows: int64 [batch], rows of tables of the timestep alone.
        samples: int64 [batch], rows of tables that have one for every timestep and sample.
    """

    def __init__(self) -> None:
        self.rows = self.samples = torch.zeros(0, dtype=torch.int64)
        self._numbers: torch.Tensor | None = None
        self._values: tuple[Timesteps, torch.Tensor] | None = None
        self._doubt: torch.Tensor | None = None  # on the device, of all calls since it last told
        self._answer: torch.Tensor | None = None  # on its way to the host
        self._event: Any = None

    def place(self, timesteps: Timesteps, context: steps.StepContext, given: Any) -> int | torch.Tensor | Reason:
        """Where a call's timestep stands in ``timesteps.values``: a number if the host can tell, else for each sample.

        A timestep that the host cannot read is proven if it is an element of the schedule itself, or if the loop told
        its row; any other is looked for on the device, sample by sample, and :meth:`doubted` tells later if it was not
        there.
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
        if run is not None and row is not None and (context.told or isinstance(run.row_of(given), int)):
            return timesteps.rows[row]
        return self._search(timesteps, given)

    def write(self, place: int | torch.Tensor, batch: int, first: int, device: torch.device) -> None:
        """Let the tensors point there; ``first`` is the row at which the tables with samples begin."""
        if self._numbers is None or self._numbers.device != device or self._numbers.shape[0] != batch:
            with torch.inference_mode(False):
                self._numbers = torch.arange(batch, device=device)
        if isinstance(place, int):
            self.rows = torch.full_like(self._numbers, place)
        else:
            if first:
                self._note((place < first).any())
            self.rows = place.clamp(min=first).expand(batch)
        self.samples = torch.add(self._numbers, self.rows - first, alpha=batch)

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

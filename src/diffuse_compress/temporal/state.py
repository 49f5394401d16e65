"""What a table holds: rows of schedules for good, of a request's conditions for a run."""

from __future__ import annotations

import functools
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch

from diffuse_compress.runtime.stats import Reason
from diffuse_compress.temporal.request import Conditions
from diffuse_compress.temporal.schedule import Timesteps
from diffuse_compress.temporal.storage import StoredRows

__all__ = ["Pass", "Request", "Schedule"]


@dataclass
class Schedule:
    """Rows of the layers of the timestep alone.

    Attributes:
        values: timesteps of the rows, as the model is given them.
        form: dtype in which it is given them ("int64", "bfloat16"), or "number".
        precision: what the layers computed in: their dtype, and autocast's.
        rows: of the layers.
        batch: of the call that they were made for.
        scheduler: class of the scheduler that they were made for.
        signature: samples of the weights that they were made from (``Watch.signature``).
    """

    values: tuple[float, ...]
    form: str
    precision: str
    rows: list[StoredRows]
    batch: int
    scheduler: str
    signature: torch.Tensor | None

    def is_of(self, signature: torch.Tensor) -> bool:
        """Were they made from these weights?"""
        return self.signature is not None and torch.equal(self.signature, signature)

    def serves(self, timesteps: Timesteps, precision: str, layers: frozenset[str]) -> bool:
        """Are these timesteps' rows of these layers here?"""
        same = self.values == timesteps.values and (self.form, self.precision) == (timesteps.form, precision)
        return same and set().union(*(part.columns for part in self.rows)) >= layers

    @functools.cached_property
    def partly(self) -> dict[str, list[bool]]:
        """Of layers that have no row at some timesteps: is there one?"""
        parts = [(part, (part.place >= 0).tolist()) for part in self.rows if part.place is not None]
        return {name: there for part, there in parts for name in part.columns}

    @property
    def nbytes(self) -> int:
        """Of all rows."""
        return sum(part.nbytes for part in self.rows)


@dataclass(eq=False)
class Request:
    """What was computed for one set of conditions in one run, from row ``first`` on."""

    conditions: Conditions
    batch: int
    first: int
    rows: list[StoredRows] = field(default_factory=list)
    values: dict[str, torch.Tensor] = field(default_factory=dict)
    _versions: dict[str, int] = field(default_factory=dict)

    def set_values(self, values: dict[str, torch.Tensor]) -> None:
        """Outputs of the layers of the conditions alone, which are given out themselves."""
        self.values = values
        self._versions = {name: value._version for name, value in values.items()}

    def untouched(self) -> bool:
        """Has nobody written into what was given out?"""
        return all(value._version == self._versions[name] for name, value in self.values.items())

    @property
    def nbytes(self) -> int:
        """Of tables and outputs."""
        return sum(part.nbytes for part in self.rows) + sum(v.nbytes for v in self.values.values())


@dataclass
class Pass:
    """One run, as this model is called in it; lives as long as the run."""

    timesteps: Timesteps
    schedule_tensor: torch.Tensor | None
    form: Any
    generation: int
    schedule: Schedule | None = None
    requests: list[Request] = field(default_factory=list)
    builds: Counter[Any] = field(default_factory=Counter)
    keys: set[str | int] = field(default_factory=set)
    problem: Reason | None = None

"""One pass over a schedule, and the row of it at which a model is called.

What is known of a call's row, strongest first: the timestep may be a view of ``scheduler.timesteps``, whose storage
offset says which element it is; an element of a copy of the schedule says the same; a number, or a tensor on the CPU,
can be compared with the schedule's values; the scheduler has a ``step_index``; the last ``step()`` was told its
timestep; and iterations can be counted. Tensors on a device are never read. A start that nothing tells stays unknown
until the scheduler's first step, and a clue that contradicts the others makes the place unknown.
"""

from __future__ import annotations

import itertools
import weakref
from typing import Any

import torch

from diffuse_compress.runtime.stats import Reason

__all__ = [
    "COPIED",
    "JUMPED",
    "PAST_THE_END",
    "SEVERAL_ROWS",
    "START_UNKNOWN",
    "Run",
]

PAST_THE_END = Reason(
    "the loop went on after the schedule's last step",
    "call scheduler.set_timesteps(...) again before a second pass",
)
JUMPED = Reason(
    "the loop is not where its scheduler's steps say: it was restarted, or steps without scheduler.step(...)",
    "call scheduler.set_timesteps(...) before every pass, and scheduler.step(...) once in each iteration",
)
SEVERAL_ROWS = Reason(
    "the samples of one batch are at different timesteps",
    "nothing, where the method wants it so (diffusion forcing, ParaDiGMS); else denoise the samples in step",
)
START_UNKNOWN = Reason(
    "nothing tells where in the schedule the loop starts, before the scheduler's first step",
    "call scheduler.set_begin_index(0), or pass the model the elements of scheduler.timesteps themselves",
)
COPIED = Reason(
    "the scheduler is a copy of the one that got the schedule, and the timestep does not tell which of its copies",
    "call set_timesteps(...) on the copy",
)

# A model that is called more often in a step, with nothing to prove the step, is in a loop that takes none.
_CALLS_IN_A_STEP = 8
# Forms in which pipelines hand a timestep t of a schedule over num_train_timesteps = n to their models.
_FORMS = (lambda t, n: t, lambda t, n: t / n, lambda t, n: 1 - t / n, lambda t, n: n - t)

_run_numbers = itertools.count(1)


class Run:
    """One pass over a schedule, from ``set_timesteps`` to the last step.

    Attributes:
        number: unique in this process.
        scheduler: weak reference to the scheduler.
        timesteps: the scheduler's own tensor of timesteps, [rows], or None if it has none.
        step: iterations so far, from 0.
        taken: steps of the scheduler so far.
        first_row: row of the first iteration, above 0 in img2img; None while it is unknown.
        copied: the scheduler is a copy of the one that got the schedule.
        apart: another scheduler of the same schedule was seen at another step.
        storage: values of consumers that live as long as the run, by any key; an interrupted run takes them along.
    """

    def __init__(self, scheduler: Any) -> None:
        self.number = next(_run_numbers)
        self.scheduler = weakref.ref(scheduler)
        self.timesteps = _timesteps(scheduler)
        self.step = 0
        self.taken = 0
        self.first_row: int | None = None
        self.copied = False
        self.apart = False
        self.storage: dict[Any, Any] = {}
        train = getattr(getattr(scheduler, "config", None), "num_train_timesteps", None)
        self._train = train if isinstance(train, int) and train > 0 else 1000
        self._forms: frozenset[int] = frozenset()
        self._stepped_row: int | None = None
        self._next_row: int | None = None
        self._pending = False
        self._called = False
        self._calls: dict[int, tuple[int, int]] = {}
        self._rows: dict[torch.device, torch.Tensor] = {}
        self._values: list[float] | None = None

    @property
    def num_rows(self) -> int | None:
        """Length of the schedule."""
        return None if self.timesteps is None else self.timesteps.numel()

    @property
    def num_steps(self) -> int | None:
        """Iterations that this run will have, fewer than rows in img2img; None while its start is unknown."""
        if self.num_rows is None or self.first_row is None:
            return None
        return self.num_rows - self.first_row

    @property
    def over(self) -> bool:
        """The scheduler has taken every step of the schedule."""
        return self.num_steps is not None and self.taken >= self.num_steps

    @property
    def values(self) -> list[float]:
        """The schedule's timesteps; of a schedule on a device, the first call waits for it."""
        if self._values is None:
            self._values = [] if self.timesteps is None else self.timesteps.double().tolist()
        return self._values

    def follow(self, scheduler: Any) -> None:
        """Go on with a copy of the scheduler."""
        self.scheduler, self.timesteps, self.copied = weakref.ref(scheduler), _timesteps(scheduler), True

    def take_step(self, timestep: Any) -> None:
        """The scheduler has stepped from ``timestep``."""
        row = self.row_of(timestep)
        self._stepped_row = row if isinstance(row, int) else None
        if self.first_row is None and self._stepped_row is not None:
            self.first_row = max(0, self._stepped_row - self.taken)
        self._pending = True
        self.taken += 1
        if self.over:
            self.storage.clear()

    def advance(self) -> None:
        """At a model's call: the step goes on if the scheduler stepped since the last one."""
        if self._pending:
            self._pending = False
            # Before the first call another model, that nobody tracks, may have taken part in several steps.
            self.step = self.step + 1 if self._called else self.taken
            self._next_row = None if self._stepped_row is None else self._stepped_row + 1
        self._called = True

    def row_of(self, timestep: Any) -> int | Reason | None:
        """Row of a timestep that is a view of the schedule (an element, expanded or not), without reading it.

        ``SEVERAL_ROWS`` for a view of several elements; None for anything else.
        """
        schedule = self.timesteps
        if schedule is None or not isinstance(timestep, torch.Tensor) or not _same_storage(schedule, timestep):
            return None
        if any(size != 1 and stride != 0 for size, stride in zip(timestep.shape, timestep.stride(), strict=True)):
            return SEVERAL_ROWS
        row, rest = divmod(int(timestep.storage_offset() - schedule.storage_offset()), max(1, schedule.stride(0)))
        return row if rest == 0 and 0 <= row < schedule.numel() else None

    def recognises(self, timestep: Any) -> bool:
        """The timestep proves that this call belongs here, as far as this run alone can tell."""
        row, _ = self._clue(timestep, self._expected())
        return isinstance(row, int) and (self.first_row is None or row == self.first_row + self.step)

    def place(self, timestep: Any, caller: object) -> tuple[int | None, int, Reason | None]:
        """(row of the schedule, calls of this caller in the step before this one, why the row is unknown)."""
        call = self._count(caller)
        if self.num_rows is not None and self.first_row is not None and self.first_row + self.step >= self.num_rows:
            return None, call, PAST_THE_END
        expected = self._expected()
        told, forms = self._clue(timestep, expected)
        if isinstance(told, Reason):
            return None, call, told
        if told is None and call >= _CALLS_IN_A_STEP:
            return None, call, JUMPED
        if told is None and self.copied:
            return None, call, COPIED
        row = expected if told is None else told
        if row is None:
            return None, call, START_UNKNOWN
        if self.num_rows is not None and row >= self.num_rows:
            return None, call, PAST_THE_END
        if self.first_row is None and row >= self.step:
            self.first_row = row - self.step
        if self.first_row is None or row != self.first_row + self.step:
            return None, call, JUMPED
        self._forms = forms
        return row, call, None

    def index(self, row: int | None, device: torch.device) -> torch.Tensor | None:
        """The row as an int64 scalar on ``device``."""
        if row is None or self.num_rows is None:
            return None
        if device not in self._rows:
            self._rows[device] = torch.arange(self.num_rows, device=device)
        return self._rows[device][row]

    def _count(self, caller: object) -> int:
        step, calls = self._calls.get(id(caller), (-1, -1))
        calls = calls + 1 if step == self.step else 0
        self._calls[id(caller)] = self.step, calls
        return calls

    def _expected(self) -> int | None:
        """Row according to the scheduler and to counting."""
        scheduler = self.scheduler()
        index = _integer(scheduler, "step_index")
        if index is None:
            index = self._next_row
        if index is None and self.first_row is not None:
            index = self.first_row + self.step
        if index is None:
            begin = _integer(scheduler, "begin_index")
            index = None if begin is None else begin + self.step
        return index

    def _clue(self, timestep: Any, expected: int | None) -> tuple[int | Reason | None, frozenset[int]]:
        """(what the timestep itself tells: the row, a contradiction or nothing; forms it may be given in)."""
        row = self.row_of(timestep)
        if row is None and isinstance(timestep, torch.Tensor):
            row = _element_of_a_copy(self.timesteps, timestep)
        if row is not None:
            return row, self._forms
        value = _readable(timestep)
        if value is None or isinstance(value, Reason) or not self.values:
            return value if isinstance(value, Reason) else None, self._forms
        forms = self._forms or frozenset(range(len(_FORMS)))
        matches = {form: rows for form in forms if (rows := self._matching(form, value, timestep))}
        if expected is None:
            return _start(matches) if self.step == 0 else (None, self._forms)
        fitting = frozenset(form for form, rows in matches.items() if expected in rows)
        if fitting:
            return expected, fitting
        # It was given in one of these forms until now; a form that is none of them may be right all the same.
        return (JUMPED if self._forms else None), self._forms

    def _matching(self, form: int, value: float, timestep: Any) -> list[int]:
        """Rows whose timestep, in this form, is ``value`` up to rounding."""
        tensor = isinstance(timestep, torch.Tensor)
        relative = 4 * torch.finfo(timestep.dtype).eps if tensor and timestep.is_floating_point() else 1e-6
        # A schedule of fractions may reach the model as whole numbers.
        absolute = 1.0 if tensor and not timestep.is_floating_point() and form == 0 else 1e-6
        return [
            row
            for row, t in enumerate(self.values)
            if abs((given := _FORMS[form](t, self._train)) - value) < max(absolute, relative * abs(given))
        ]


def _start(matches: dict[int, list[int]]) -> tuple[int | None, frozenset[int]]:
    """Row of the first call, by the rows that match in each form: the schedule's first, or the only one there is."""
    first = frozenset(form for form, rows in matches.items() if 0 in rows)
    if first:
        return 0, first
    rows = [row for found in matches.values() for row in found]
    return (rows[0], frozenset(matches)) if len(rows) == 1 else (None, frozenset())


def _timesteps(scheduler: Any) -> torch.Tensor | None:
    timesteps = getattr(scheduler, "timesteps", None)
    return timesteps if isinstance(timesteps, torch.Tensor) and timesteps.ndim == 1 else None


def _integer(scheduler: Any, name: str) -> int | None:
    value = getattr(scheduler, name, None)
    return value if type(value) is int else None


def _storage(tensor: torch.Tensor) -> torch.UntypedStorage | None:
    if tensor.device.type == "meta":
        return None
    try:
        storage = tensor.untyped_storage()
        return storage if storage.data_ptr() else None
    except (RuntimeError, NotImplementedError):  # fake and wrapped tensors have no storage
        return None


def _same_storage(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.device != b.device or a.dtype != b.dtype:
        return False
    one, other = _storage(a), _storage(b)
    return one is not None and other is not None and one.data_ptr() == other.data_ptr()


def _element_of_a_copy(schedule: torch.Tensor | None, timestep: torch.Tensor) -> int | Reason | None:
    """Position of a timestep that is an element of another tensor as long as the schedule; None if it is none."""
    if schedule is None or schedule.numel() < 2 or schedule.dtype != timestep.dtype:
        return None
    storage = _storage(timestep)
    if storage is None or storage.nbytes() != schedule.numel() * schedule.element_size():
        return None
    if any(size != 1 and stride != 0 for size, stride in zip(timestep.shape, timestep.stride(), strict=True)):
        return None  # as many samples as the schedule has rows, perhaps
    return int(timestep.storage_offset())


def _readable(timestep: Any) -> float | Reason | None:
    """Value of a timestep that can be read without waiting for a device; of per-token timesteps, the largest."""
    if isinstance(timestep, int | float) and not isinstance(timestep, bool):
        return float(timestep)
    if type(timestep) is not torch.Tensor or timestep.device.type != "cpu" or timestep.numel() == 0:
        return None
    if _storage(timestep) is None:
        return None
    values = timestep.detach()
    if values.ndim > 1 and values.shape[-1] > 1:
        values = values.amax(-1)  # tokens that are given, like an image-to-video model's first frame, are at 0
    values = values.reshape(-1)
    if bool((values != values[0]).any()):
        return SEVERAL_ROWS
    return float(values[0])

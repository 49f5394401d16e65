"""One pass over a schedule, and the row of it at which a model is called.

What is known of a call's row, strongest first: the timestep may be a view of ``scheduler.timesteps``, whose storage
offset says which element it is; the scheduler has a ``step_index``; the last ``step()`` was told its timestep;
iterations can be counted. A number, or a tensor on the CPU, must also be the schedule's value at that row, in one of
the forms that pipelines use, and it may tell where the loop starts. Tensors on a device are read before the scheduler's
first step only, and only if nothing else tells where the loop starts. A start that nothing tells stays unknown until
the scheduler's first step, and a call that contradicts the run makes the rest of it unknown: a loop that was restarted
goes over other latents.
"""

from __future__ import annotations

import itertools
import numbers
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
    "TIMESTEP_FORMS",
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
    "pass the model the elements of scheduler.timesteps themselves, or call scheduler.set_begin_index(0) before it",
)
COPIED = Reason(
    "the scheduler is a copy of the one that got the schedule, and the timestep does not tell which of its copies",
    "call set_timesteps(...) on the copy",
)

# Calls in a step that need no proof even if there was just one in the steps before: guidance may set in later.
_CALLS_IN_A_STEP = 2
# Forms in which pipelines hand a timestep t of a schedule over num_train_timesteps = n to their models.
TIMESTEP_FORMS = (lambda t, n: t, lambda t, n: t / n, lambda t, n: 1 - t / n, lambda t, n: n - t)
_REVERSED = (2, 3)

_run_numbers = itertools.count(1)


class Run:
    """One pass over a schedule, from ``set_timesteps`` to the last step.

    Attributes:
        number: unique in this process.
        scheduler: weak reference to the scheduler.
        timesteps: the scheduler's own tensor of timesteps, [rows], or None if it has none.
        step: iterations so far, from 0.
        taken: steps of the scheduler so far.
        first_row: row of the first iteration, above 0 in img2img; None while it is unknown. Until the first step it may
            be corrected.
        num_train_timesteps: n of the timesteps t in 0..n that the schedule is over.
        copied: the scheduler is a copy of the one that got the schedule.
        apart: another scheduler of the same schedule was seen at another step.
        num_latents: rows of what the scheduler steps; None before its first step.
    """

    def __init__(self, scheduler: Any) -> None:
        self.number = next(_run_numbers)
        self._storages: weakref.WeakKeyDictionary[Any, dict[Any, Any]] = weakref.WeakKeyDictionary()
        self._bind(scheduler)
        self.timesteps = _timesteps(scheduler)
        self.step = 0
        self.taken = 0
        self.first_row: int | None = None
        self.copied = False
        self.apart = False
        self.num_latents: int | None = None
        train = getattr(getattr(scheduler, "config", None), "num_train_timesteps", None)
        self.num_train_timesteps = train if isinstance(train, int) and train > 0 else 1000
        self._forms: frozenset[int] = frozenset()
        self._last_row: int | None = None
        self._stepped_row: int | None = None
        self._next_row: int | None = None
        self._pending = False
        self._called = False
        self._broken = False
        self._unplaced = False
        self._calls = _Calls()
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
        # Panorama pipelines step several times in each row.
        early = self._last_row is not None and self._last_row + 1 != self.num_rows
        return self.num_steps is not None and self.taken >= self.num_steps and not early

    @property
    def values(self) -> list[float]:
        """The schedule's timesteps; of a schedule on a device, the first use waits for it."""
        if self._values is None:
            self._values = [] if self.timesteps is None else self.timesteps.double().tolist()
        return self._values

    def storage(self, owner: Any) -> dict[Any, Any]:
        """Values of an owner that live as long as it, the scheduler and the run do."""
        return self._storages.setdefault(owner, {})

    def end(self) -> None:
        """Free what was stored."""
        self._storages.clear()

    def follow(self, scheduler: Any) -> None:
        """Go on with a copy of the scheduler."""
        self._bind(scheduler)
        self.timesteps, self.copied = _timesteps(scheduler), True

    def refresh(self) -> None:
        """Notice that the scheduler's timesteps were replaced by others after ``set_timesteps``."""
        current = _timesteps(self.scheduler())
        if current is None or current is self.timesteps:
            return
        if self.taken == 0:
            self.first_row, self._last_row, self._forms = None, None, frozenset()
        elif current.numel() != self.num_rows:
            self._broken = True
        self.timesteps, self._values = current, None
        self._rows.clear()

    @property
    def num_inference_steps(self) -> int | None:
        """Steps that the scheduler was asked for; of one that does not say, its rows."""
        steps = _integer(self.scheduler(), "num_inference_steps")
        return self.num_rows if steps is None else steps

    def take_step(self, timestep: Any, sample: Any = None) -> None:
        """The scheduler has stepped ``sample`` from ``timestep``."""
        self.refresh()
        if isinstance(sample, torch.Tensor) and sample.ndim > 0:
            self.num_latents = sample.shape[0]
        row = self.row_of(timestep)
        if row is None and isinstance(value := _readable(timestep), float):
            counted = None if self.first_row is None else self.first_row + self.step
            known = counted is not None and counted < len(self.values)
            fits = known and self._distance(0, counted or 0, value, timestep) is not None
            row = counted if fits else self._nearest(0, value, timestep)
        self._stepped_row = row if isinstance(row, int) else None
        if self._stepped_row is not None and (self.first_row is None or self.taken == 0):
            self.first_row = max(0, self._stepped_row - self.taken)
        self._pending = True
        self.taken += 1
        if self.over:
            self.end()

    def advance(self) -> None:
        """At a model's call: the step goes on if the scheduler stepped since the last one."""
        self.refresh()
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
        if self.row_of(timestep) is not None:
            return True
        row, _ = self._told(timestep, self._expected())
        return isinstance(row, int) and (self.first_row is None or row == self.first_row + self.step)

    def place(self, timestep: Any, caller: object, branch: str | None = None) -> tuple[int | None, int, Reason | None]:
        """(row of the schedule, calls of this caller in the step before this one, why the row is unknown).

        ``branch``: name of the cache context in which the caller runs; each opens once in a step.
        """
        row, problem = self._row(timestep)
        call, often = self._calls.count(caller, branch, self.step)
        if row is None and problem is None:  # neither proven nor refused
            row = self._expected()
            if row is None or (self.taken == 0 and call > 0):
                row, problem = None, START_UNKNOWN
            elif often:
                row, problem, self._broken = None, JUMPED, True
        if row is not None:
            problem = self._follow_up(row)
        self._unplaced = self._unplaced or problem is START_UNKNOWN
        return (row if problem is None else None), call, problem

    def index(self, row: int | None, device: torch.device) -> torch.Tensor | None:
        """The row as an int64 scalar on ``device``."""
        if row is None or self.num_rows is None:
            return None
        if device not in self._rows:
            self._rows[device] = torch.arange(self.num_rows, device=device)
        return self._rows[device][row]

    def _bind(self, scheduler: Any) -> None:
        # With the scheduler goes what was stored: nobody can go on with an interrupted loop.
        storages = self._storages
        self.scheduler = weakref.ref(scheduler, lambda _: storages.clear())

    def _row(self, timestep: Any) -> tuple[int | None, Reason | None]:
        """A row that the timestep proves, or why there is none; (None, None) leaves it to counting."""
        viewed = self.row_of(timestep)
        if isinstance(viewed, Reason):
            return None, viewed
        if viewed is not None:
            return self._reach(viewed)
        if self.num_rows is not None and self.first_row is not None and self.first_row + self.step >= self.num_rows:
            return None, PAST_THE_END
        expected = self._expected()
        if expected is None and self.taken == 0:
            timestep = _fetched(timestep)
        told, forms = self._told(timestep, expected)
        if isinstance(told, Reason):
            self._broken = self._broken or told is JUMPED
            return None, told
        if told is None:
            return None, COPIED if self.copied else None
        self._forms = forms
        return self._reach(told) if self.taken == 0 else (told, None)

    def _reach(self, row: int) -> tuple[int | None, Reason | None]:
        """A row is proven: it counts, in whatever number of scheduler steps the last one was taken."""
        if self._broken:
            return row, None
        if self.first_row is not None and self._last_row is not None and row - self._last_row in (0, 1):
            self.step = row - self.first_row
        elif self.taken == 0:
            if row and self._unplaced:
                return None, START_UNKNOWN  # was the call before it a trial, or the loop's start?
            # Whatever was called before, this is where the loop starts.
            self.first_row, self.step = row, 0
        return row, None

    def _follow_up(self, row: int) -> Reason | None:
        """Whether a row continues the run."""
        if self.num_rows is not None and row >= self.num_rows:
            return PAST_THE_END
        if self.first_row is None and row >= self.step:
            self.first_row = row - self.step
        if self.first_row is None or row != self.first_row + self.step:
            past = self.first_row is not None and self.num_steps is not None and self.step >= self.num_steps
            self._broken = True
            return PAST_THE_END if past else JUMPED
        if self._broken:
            return JUMPED
        self._last_row = row
        return None

    def _expected(self) -> int | None:
        """Row according to the scheduler and to counting."""
        scheduler = self.scheduler()
        index = _integer(scheduler, "step_index")
        if index is None:
            index = self._next_row
        if index is None and self.first_row is not None and self.taken > 0:
            index = self.first_row + self.step
        if index is None:
            begin = _integer(scheduler, "begin_index")
            index = None if begin is None else begin + self.step
        return index

    def _told(self, timestep: Any, expected: int | None) -> tuple[int | Reason | None, frozenset[int]]:
        """(what the timestep's value tells: the row, a contradiction or nothing; forms it may be given in)."""
        value = _readable(timestep)
        if value is None or isinstance(value, Reason) or not self.values:
            return value if isinstance(value, Reason) else None, self._forms
        forms = self._forms if self._forms and self.taken else frozenset(range(len(TIMESTEP_FORMS)))
        if expected is None:
            nearest = {form: row for form in forms if (row := self._nearest(form, value, timestep)) is not None}
            # Reversed forms say so little elsewhere that only the schedule's first row is believed.
            nearest = {form: row for form, row in nearest.items() if row == 0 or form not in _REVERSED}
            if len(set(nearest.values())) != 1:
                return None, frozenset()
            row = next(iter(nearest.values()))
            return row, frozenset(f for f in forms if self._distance(f, row, value, timestep) is not None)
        if expected >= len(self.values):
            return None, self._forms
        fitting = frozenset(form for form in forms if self._distance(form, expected, value, timestep) is not None)
        if fitting:
            return expected, fitting
        # It was given in one of these forms until now; a form that is none of them may be right all the same.
        return (JUMPED if self._forms and self.taken else None), self._forms

    def _nearest(self, form: int, value: float, timestep: Any) -> int | None:
        """The one row whose timestep, in this form, is nearest to ``value`` and equal up to rounding."""
        found = [
            (d, row) for row in range(len(self.values)) if (d := self._distance(form, row, value, timestep)) is not None
        ]
        found.sort()
        unique = len(found) == 1 or (len(found) > 1 and found[0][0] < found[1][0])
        return found[0][1] if unique else None

    def _distance(self, form: int, row: int, value: float, timestep: Any) -> float | None:
        """Difference of ``value`` from a row's timestep in this form, if rounding may be all there is between them."""
        given = TIMESTEP_FORMS[form](self.values[row], self.num_train_timesteps)
        tensor = isinstance(timestep, torch.Tensor)
        relative = torch.finfo(timestep.dtype).eps if tensor and timestep.is_floating_point() else 1e-6
        # A schedule of fractions may reach the model as whole numbers.
        absolute = 1.0 if tensor and not timestep.is_floating_point() and form == 0 else 1e-6
        distance = abs(given - value)
        return distance if distance < max(absolute, relative * abs(given), 1e-6 * abs(given)) else None


class _Calls:
    """How often a step calls each caller, and opens each of its branches."""

    def __init__(self) -> None:
        self.step = -1
        self.calls: dict[int, int] = {}
        self.branches: set[tuple[int, str]] = set()
        self.most: dict[int, int] = {}

    def count(self, caller: object, branch: str | None, step: int) -> tuple[int, bool]:
        """(calls in this step before this one, more of them than one step can have)."""
        if step != self.step:
            self.step, self.calls, self.branches = step, {}, set()
        key = id(caller)
        call = self.calls.get(key, 0)
        self.calls[key] = call + 1
        often = call >= max(_CALLS_IN_A_STEP, self.most.get(key, 0))
        if branch is not None:
            often = (key, branch) in self.branches
            self.branches.add((key, branch))
        if not often:
            self.most[key] = max(self.most.get(key, 0), call + 1)
        return call, often


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


def _fetched(timestep: Any) -> Any:
    """The timestep where it can be read. This waits for its device, which a stream that is being captured cannot."""
    if type(timestep) is not torch.Tensor or timestep.device.type in ("cpu", "meta") or _storage(timestep) is None:
        return timestep
    if timestep.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return timestep
    return timestep.detach().cpu()


def _readable(timestep: Any) -> float | Reason | None:
    """Value of a timestep that can be read without waiting for a device; of per-token timesteps, the largest."""
    if isinstance(timestep, numbers.Real):  # numpy's too
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

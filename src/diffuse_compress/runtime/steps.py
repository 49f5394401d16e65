"""The step protocol: which step of which run, which call within it, which timestep.

Temporal tables, feature caches and timestep-grouped quantizers all ask the same question, and this module is the only
one that answers it. A model that wants to know is tracked (:func:`track`): a forward pre-hook on it makes a
:class:`StepContext` for every call, which anything inside of the model reads with :func:`current`.

How a call finds its place. Schedulers tell of ``set_timesteps`` and ``step`` (``events.py``), thread by thread and
pipeline call by pipeline call. A :class:`Run` starts with ``set_timesteps``; its step advances at the first call of a
tracked model after a ``step()``, so several schedulers stepped in one iteration, or a ``step`` that calls another,
count once. The row of the schedule comes, in this order, from the timestep itself (a view of ``scheduler.timesteps``
says by its storage offset which element it is), from the scheduler's ``step_index``, and from counting. Nothing is
read back from the device.

Whenever the place is unknown the context has a ``problem``, and whoever reads it computes and counts the reason.
"""

from __future__ import annotations

import inspect
import itertools
import threading
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from diffuse_compress.components import unwrap
from diffuse_compress.errors import MissingDependencyError
from diffuse_compress.runtime import events
from diffuse_compress.runtime.stats import (
    CallStats,
    CompressionStats,
    PlanMissedError,
    Reason,
    missed_message,
    warn_missed,
)

__all__ = [
    "GRADIENT",
    "JUMPED",
    "NOT_SEEN",
    "NO_SCHEDULE",
    "PAST_THE_END",
    "SCHEDULERS_IN_TURN",
    "Consumer",
    "Run",
    "StepContext",
    "StepTracker",
    "current",
    "stats_of",
    "track",
    "tracker_of",
    "untrack",
]

NO_SCHEDULE = Reason(
    "no scheduler of diffusers was given a schedule in this thread",
    "call scheduler.set_timesteps(...) before the loop, in the thread that runs it, and scheduler.step(...) in it",
)
PAST_THE_END = Reason(
    "the loop went on after the schedule's last step",
    "call scheduler.set_timesteps(...) again before a second pass",
)
SCHEDULERS_IN_TURN = Reason(
    "several schedulers are stepped in turn on one model, and the timestep does not tell which",
    "run the loops one after the other, or in threads of their own",
)
JUMPED = Reason(
    "the loop is not where its scheduler's steps say: it was restarted, or steps without scheduler.step(...)",
    "call scheduler.set_timesteps(...) before every pass, and scheduler.step(...) once in each iteration",
)
GRADIENT = Reason("gradients are enabled", "run inference under torch.no_grad() or torch.inference_mode()")
NOT_SEEN = Reason(
    "the model was not seen running: it is compiled as a whole, or the pipeline did not call it",
    "if it is compiled, compile its blocks instead (compile_repeated_blocks)",
)

_NAMES_OF_TIMESTEP = ("timestep", "timesteps", "t", "sigma")
# A run is over when another one has taken this many steps while it sat still: its loop was interrupted.
_STEPS_OF_SILENCE = 2

_run_numbers = itertools.count(1)


def _no_plan(run: Run) -> int | None:
    """The default plan; a module's function, so that a tracked model can be pickled."""
    return None


@dataclass(frozen=True)
class Consumer:
    """A method that follows the steps of one model.

    Attributes:
        name: as shown in statistics ("feature cache").
        plan: units of work it means to save in a run, given the run; None if it has no plan.
        strict: raise instead of warning when a call achieves less than 90 % of the plan.
    """

    name: str
    plan: Callable[[Run], int | None] = _no_plan
    strict: bool = False


class Run:
    """One pass over a schedule, from ``set_timesteps`` to the last step.

    Attributes:
        number: unique in this process.
        timesteps: the scheduler's own tensor of timesteps, [rows] (or None if it has none).
        step: iterations so far, from 0.
        taken: steps of the scheduler so far.
        first_row: row of the first iteration, above 0 in img2img; None before the first call.
        storage: values of consumers that live as long as the run, by any key; an interrupted run takes them along.
    """

    def __init__(self, scheduler: Any) -> None:
        self.number = next(_run_numbers)
        self.scheduler = weakref.ref(scheduler)
        self.timesteps = _timesteps(scheduler)
        self.step = 0
        self.first_row: int | None = None
        self.storage: dict[Any, Any] = {}
        self._first_row_is_guess = False
        self._called = False
        self.taken = 0
        self.pending = False
        self.silence = 0
        self._calls: dict[int, tuple[int, int]] = {}
        self._rows: dict[torch.device, torch.Tensor] = {}
        self._schedules: dict[torch.device, torch.Tensor] = {}

    @property
    def num_rows(self) -> int | None:
        """Length of the schedule."""
        return None if self.timesteps is None else self.timesteps.numel()

    @property
    def num_steps(self) -> int | None:
        """Iterations that this run will have: img2img starts within the schedule."""
        return None if self.num_rows is None else self.num_rows - (self.first_row or 0)

    @property
    def over(self) -> bool:
        """The scheduler has taken every step of the schedule."""
        return self.num_steps is not None and self.taken >= self.num_steps

    def follow(self, scheduler: Any) -> None:
        """Go on with a copy of the scheduler."""
        self.scheduler, self.timesteps = weakref.ref(scheduler), _timesteps(scheduler)

    def take_step(self) -> None:
        """The scheduler has stepped."""
        self.pending, self.silence = True, 0
        self.taken += 1
        if self.over:
            self.storage.clear()

    def advance(self) -> None:
        """At a model's call: the step goes on if the scheduler stepped since the last one."""
        if self.pending:
            self.pending = False
            # Before the first call another model, that nobody tracks, may have taken part in several steps.
            self.step = self.step + 1 if self._called else self.taken
        self._called = True

    def row_of(self, timestep: Any) -> int | None:
        """Row of a timestep that is a view of the schedule (an element, expanded or not), without reading it."""
        schedule = self.timesteps
        if schedule is None or not isinstance(timestep, torch.Tensor) or not _same_storage(schedule, timestep):
            return None
        if any(size != 1 and stride != 0 for size, stride in zip(timestep.shape, timestep.stride(), strict=True)):
            return None  # several rows at once
        row, rest = divmod(int(timestep.storage_offset() - schedule.storage_offset()), max(1, schedule.stride(0)))
        return row if rest == 0 and 0 <= row < schedule.numel() else None

    def place(self, timestep: Any) -> int | None:
        """Row of the schedule at this call; None past its end."""
        scheduler = self.scheduler()
        row = self.row_of(timestep)
        if row is None:
            row = _integer(scheduler, "step_index")
        if row is not None:
            if self.first_row is None or self._first_row_is_guess:
                self.first_row, self._first_row_is_guess = max(0, row - self.step), False
        else:
            if self.first_row is None:
                begin = _integer(scheduler, "begin_index")
                self.first_row, self._first_row_is_guess = begin or 0, begin is None
            row = self.first_row + self.step
        return row if self.num_rows is None or row < self.num_rows else None

    def count_call(self, tracker: StepTracker) -> int:
        """Calls of a model in this step before this one."""
        step, calls = self._calls.get(id(tracker), (-1, -1))
        calls = calls + 1 if step == self.step else 0
        self._calls[id(tracker)] = self.step, calls
        return calls

    def index(self, row: int | None, timestep: torch.Tensor | None, device: torch.device) -> torch.Tensor | None:
        """The row as an int64 scalar on ``device``; of an unknown row, the nearest to the timestep, found there."""
        if self.timesteps is None:
            return None
        if row is not None:
            if device not in self._rows:
                self._rows[device] = torch.arange(self.timesteps.numel(), device=device)
            return self._rows[device][row]
        if timestep is None:
            return None
        if device not in self._schedules:
            self._schedules[device] = self.timesteps.to(device, torch.float32)
        first = timestep.detach().reshape(-1)[0].to(device, torch.float32)
        return (self._schedules[device] - first).abs().argmin()


def _timesteps(scheduler: Any) -> torch.Tensor | None:
    timesteps = getattr(scheduler, "timesteps", None)
    return timesteps if isinstance(timesteps, torch.Tensor) and timesteps.ndim == 1 else None


def _integer(scheduler: Any, name: str) -> int | None:
    value = getattr(scheduler, name, None)
    return value if type(value) is int else None


def _same_storage(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.device != b.device or a.dtype != b.dtype or a.device.type == "meta":
        return False
    try:
        return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr() != 0
    except (RuntimeError, NotImplementedError):  # fake and wrapped tensors have no storage
        return False


@dataclass(frozen=True)
class StepContext:
    """The place of one forward call of a tracked model.

    Attributes:
        tracker: of the model.
        run: None if unknown.
        step: iterations of the run before this one, or None.
        row: position in ``scheduler.timesteps``, or None; differs from step in img2img.
        call: calls of this model in this step before this one (0 and 1 with sequential guidance).
        branch: name of the pipeline's cache context ("cond", "uncond"), if it opened one.
        timestep: as the model got it: scalar, [batch], or [batch, tokens] (per-token timesteps), or None.
        index: ``row`` as an int64 scalar tensor on the timestep's device, or None.
        problem: why the place is unknown, or None.
    """

    tracker: StepTracker
    run: Run | None
    step: int | None
    row: int | None
    call: int
    branch: str | None
    timestep: torch.Tensor | None
    index: torch.Tensor | None
    problem: Reason | None
    stats: CallStats

    @property
    def key(self) -> str | int:
        """What tells the calls of one step apart: the branch's name where there is one, else the call's number."""
        return self.call if self.branch is None else self.branch

    @property
    def per_token(self) -> bool:
        """Every token has a timestep of its own (Wan 2.2 TI2V): ``index`` is that of the first one at best."""
        return self.timestep is not None and self.timestep.ndim >= 2 and self.timestep.shape[-1] > 1

    @property
    def blocker(self) -> Reason | None:
        """Why nothing from another step may be used in this call, or None."""
        return GRADIENT if torch.is_grad_enabled() else self.problem

    def hit(self, consumer: str, units: int = 1) -> None:
        """Count work that was saved."""
        self.stats.method(consumer).hits += units

    def miss(self, consumer: str, reason: Reason, units: int = 1) -> None:
        """Count work that was computed although the plan had it saved."""
        self.stats.method(consumer).misses[reason] += units


class _Scope:
    """Runs of one pipeline call, or of a thread's hand-written loops."""

    def __init__(self, owner: Any = None, depth: int = 0) -> None:
        self.owner = None if owner is None else weakref.ref(owner)
        self.depth = depth
        self.runs: list[Run] = []
        self.trackers: dict[int, StepTracker] = {}
        self.stats: dict[int, CallStats] = {}

    def owned_by(self, obj: Any) -> bool:
        return self.owner is not None and self.owner() is obj

    def begin(self, scheduler: Any) -> None:
        """A new run for this scheduler; its earlier one, and those that are over, end."""
        self.runs = [run for run in self.runs if run.scheduler() not in (None, scheduler) and not run.over]
        self.runs.append(Run(scheduler))
        if self.owner is None:
            self.stats.clear()

    def step(self, scheduler: Any) -> None:
        run = next((run for run in self.runs if run.scheduler() is scheduler), None) or self._adopt(scheduler)
        if run is None:
            # Somebody else's loop: whatever runs are known here, this is none of them.
            self.runs.clear()
            return
        run.take_step()
        for other in self.runs:
            if not other.pending:
                other.silence += 1
        self.runs = [other for other in self.runs if other.silence <= _STEPS_OF_SILENCE]

    def _adopt(self, scheduler: Any) -> Run | None:
        """The run of a scheduler that was copied from the one which got the schedule, if there is just one."""
        alike = (type(scheduler), type(None))
        idle = [run for run in self.runs if run.taken == 0 and type(run.scheduler()) in alike]
        timesteps = _timesteps(scheduler)
        if len(idle) != 1 or timesteps is None or idle[0].num_rows != timesteps.numel():
            return None
        idle[0].follow(scheduler)
        return idle[0]

    def locate(self, timestep: Any) -> tuple[Run | None, Reason | None]:
        """The run that a model's call belongs to, or why that is unknown."""
        if not self.runs:
            return None, NO_SCHEDULE
        if len(self.runs) > 1:
            self.runs = [run for run in self.runs if run.scheduler() is not None] or self.runs[-1:]
        for run in self.runs:
            run.advance()
        if len(self.runs) > 1:
            matching = [run for run in self.runs if run.row_of(timestep) is not None]
            if len(matching) == 1:
                return matching[0], None
            if len({run.step for run in self.runs}) > 1:
                return None, SCHEDULERS_IN_TURN
        return self.runs[0], None

    def stats_for(self, tracker: StepTracker, run: Run | None) -> CallStats:
        """Statistics of a model in this call; a new run adds its plan."""
        self.trackers[id(tracker)] = tracker
        stats = self.stats.setdefault(id(tracker), CallStats())
        if run is not None and run.number not in stats.runs:
            stats.runs.add(run.number)
            stats.planned_steps = (stats.planned_steps or 0) + run.num_steps if run.num_steps is not None else None
            for name, consumer in tracker.consumers.items():
                stats.method(name).add_plan(consumer.plan(run))
        return stats


class _Thread(threading.local):
    def __init__(self) -> None:
        self.scopes = [_Scope()]
        self.active: list[StepContext] = []
        self.branches: dict[int, str] = {}


_thread = _Thread()
_last_call: weakref.WeakKeyDictionary[Any, dict[int, CallStats]] = weakref.WeakKeyDictionary()


class _Listener:
    """Keeps each thread's scopes."""

    def on_set_timesteps(self, scheduler: Any) -> None:
        _thread.scopes[-1].begin(scheduler)

    def on_step(self, scheduler: Any) -> None:
        _thread.scopes[-1].step(scheduler)

    def on_enter(self, pipeline: Any) -> None:
        # super().__call__ is the same call.
        scope = _thread.scopes[-1]
        _thread.scopes.append(scope if scope.owned_by(pipeline) else _Scope(pipeline, len(_thread.active)))

    def on_exit(self, pipeline: Any, error: BaseException | None) -> None:
        scope = _thread.scopes.pop()
        if scope in _thread.scopes:
            return
        # An exception between a model's hooks may have left contexts behind.
        del _thread.active[scope.depth :]
        for run in scope.runs:
            run.storage.clear()
        if any(run.taken for run in scope.runs):
            for model in getattr(pipeline, "components", {}).values():
                tracker = tracker_of(model) if isinstance(model, nn.Module) else None
                if tracker is not None and id(tracker) not in scope.stats:
                    scope.stats[id(tracker)] = tracker.last = CallStats(unknown=Counter([NOT_SEEN]))
        _last_call[pipeline] = scope.stats
        if error is None:
            for tracker in scope.trackers.values():
                tracker.check(scope.stats[id(tracker)])

    def on_branch(self, model: Any, name: str | None) -> str | None:
        before = _thread.branches.pop(id(model), None)
        if name is not None:
            _thread.branches[id(model)] = name
        return before


_LISTENER = _Listener()


class StepTracker:
    """Follows the calls of one model; made by :func:`track`.

    A deep copy of the model gets a tracker of its own with the same consumers.
    """

    def __init__(self, consumers: dict[str, Consumer] | None = None) -> None:
        self.consumers: dict[str, Consumer] = dict(consumers or {})
        self.last: CallStats | None = None
        self._warned: set[str] = set()
        self._position: tuple[str, int] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> StepTracker:
        return StepTracker(self.consumers)

    def __getstate__(self) -> dict[str, Any]:
        return {"consumers": self.consumers, "last": None, "_warned": set(), "_position": None}

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook: find the place of this call and make it the current one."""
        if torch.compiler.is_compiling():
            return
        timestep = self._timestep(module, args, kwargs)
        scope = _thread.scopes[-1]
        run, problem = scope.locate(timestep)
        row = None if run is None else run.place(timestep)
        if run is not None and row is None:
            problem = PAST_THE_END
        elif run is not None and problem is None and row != (run.first_row or 0) + run.step:
            problem = JUMPED
        known = run if problem is None else None
        call = 0 if known is None else known.count_call(self)
        stats = self.last = scope.stats_for(self, run)
        stats.calls += 1
        if problem is not None:
            stats.unknown[problem] += 1
        elif call == 0:
            stats.steps += 1
        tensor = timestep if isinstance(timestep, torch.Tensor) else None
        _thread.active.append(
            StepContext(
                tracker=self,
                run=known,
                step=None if known is None else known.step,
                row=row,
                call=call,
                branch=_thread.branches.get(id(module)),
                timestep=tensor,
                index=None if run is None else run.index(row, tensor, _device_of(tensor, args, kwargs)),
                problem=problem,
                stats=stats,
            )
        )

    def after(self, module: nn.Module, args: Any, output: Any) -> None:
        """Forward hook, called after an exception too."""
        if not torch.compiler.is_compiling() and _thread.active and _thread.active[-1].tracker is self:
            _thread.active.pop()

    def check(self, stats: CallStats) -> None:
        """At the end of a pipeline's call: warn, once for each method, where its plan was missed.

        Raises:
            PlanMissedError: of a strict consumer.
        """
        for name, consumer in self.consumers.items():
            method = stats.method(name)
            if not method.missed:
                continue
            if consumer.strict:
                raise PlanMissedError(missed_message("", name, method))
            if name not in self._warned:
                self._warned.add(name)
                warn_missed("", name, method)

    def _timestep(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._position is None:
            # The first parameter is the module itself, whatever it is called.
            names = list(inspect.signature(type(module).forward).parameters)[1:]
            name = next((name for name in _NAMES_OF_TIMESTEP if name in names), "")
            self._position = name, names.index(name) if name else -1
        name, position = self._position
        if name in kwargs:
            return kwargs[name]
        return args[position] if 0 <= position < len(args) else None


def track(model: nn.Module, consumer: Consumer | None = None) -> StepTracker:
    """The tracker of ``model``, made if needed, with ``consumer`` added.

    Raises:
        MissingDependencyError: diffusers is not installed, so no scheduler could tell of its steps.
    """
    tracker = tracker_of(model)
    if tracker is None:
        if not events.install(_LISTENER):
            raise MissingDependencyError("Following the steps of a scheduler needs diffusers: pip install diffusers")
        tracker = StepTracker()
        model.register_forward_pre_hook(tracker.before, with_kwargs=True)
        model.register_forward_hook(tracker.after, always_call=True)
    if consumer is not None:
        tracker.consumers[consumer.name] = consumer
    return tracker


def tracker_of(model: nn.Module) -> StepTracker | None:
    """The tracker whose hooks ``model`` carries, or None."""
    for hook in unwrap(model)._forward_pre_hooks.values():
        owner = getattr(hook, "__self__", None)
        if isinstance(owner, StepTracker):
            return owner
    return None


def untrack(model: nn.Module, consumer: str | None = None) -> None:
    """Remove a consumer, and the hooks with the last one; without a name, all of them."""
    tracker = tracker_of(model)
    if tracker is None:
        return
    if consumer is not None:
        tracker.consumers.pop(consumer, None)
        if tracker.consumers:
            return
    for hooks in (model._forward_pre_hooks, model._forward_hooks):
        for key in [key for key, hook in hooks.items() if getattr(hook, "__self__", None) is tracker]:
            del hooks[key]
            model._forward_pre_hooks_with_kwargs.pop(key, None)
            model._forward_hooks_always_called.pop(key, None)


def current() -> StepContext | None:
    """Context of the innermost tracked model that is running in this thread."""
    return _thread.active[-1] if _thread.active else None


def stats_of(models: dict[str, nn.Module], pipeline: Any = None) -> CompressionStats:
    """Statistics of the last call of ``pipeline``; of a model that is used without one, of its last run."""
    last = {} if pipeline is None else _last_call.get(pipeline, {})
    found = {}
    for name, model in models.items():
        tracker = tracker_of(model)
        if tracker is not None:
            found[name] = last.get(id(tracker)) or tracker.last or CallStats()
    return CompressionStats(found)


def _device_of(timestep: torch.Tensor | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.device:
    """Where the model computes: that of its sample, since schedules often stay on the CPU."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, torch.Tensor) and value.ndim > 1:
            return value.device
    return torch.device("cpu") if timestep is None else timestep.device

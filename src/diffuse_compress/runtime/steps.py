"""The step protocol: which step of which run, which call within it, which timestep.

Temporal tables, feature caches and timestep-grouped quantizers all ask the same question, and this module is the only
one that answers it. A model that wants to know is tracked (:func:`track`): a forward pre-hook on it makes a
:class:`StepContext` for every call, which anything inside of the model reads with :func:`current`.

How a call finds its place. Schedulers tell of ``set_timesteps`` and ``step`` (``events.py``), thread by thread and
pipeline call by pipeline call. A :class:`Run` (``run.py``) starts with ``set_timesteps``; its step advances at the
first call of a tracked model after a ``step()``, so several schedulers stepped in one iteration, or a ``step`` that
calls another, count once. Which row of the schedule that is, ``run.py`` finds out; nothing is read back from the
device. A pipeline that knows its loop tells the row instead (:func:`follow`).

Whenever the place is unknown the context has a ``problem``, and whoever reads it computes and counts the reason.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from diffuse_compress.components import unwrap
from diffuse_compress.errors import MissingDependencyError
from diffuse_compress.runtime import events
from diffuse_compress.runtime.run import START_UNKNOWN, Run
from diffuse_compress.runtime.sampling import SamplingSettings
from diffuse_compress.runtime.stats import (
    CallStats,
    CompressionStats,
    PlanMissedError,
    Reason,
    is_unchecked,
    missed_message,
    warn,
)
from diffuse_compress.runtime.timestep import TimestepArgument

__all__ = [
    "GRADIENT",
    "NOT_SEEN",
    "NO_SCHEDULE",
    "SCHEDULERS_IN_TURN",
    "Consumer",
    "StepContext",
    "StepTracker",
    "ahead",
    "current",
    "follow",
    "hook_owner",
    "outside_loops",
    "remove_hooks",
    "stats_of",
    "track",
    "tracker_of",
    "untrack",
]

NO_SCHEDULE = Reason(
    "no scheduler of diffusers was given a schedule in this thread",
    "call scheduler.set_timesteps(...) before the loop, in the thread that runs it, and scheduler.step(...) in it",
)
SCHEDULERS_IN_TURN = Reason(
    "several schedulers have a schedule and steps to take, and the timestep does not tell whose call this is",
    "run one loop after the other or in threads of their own, and delete schedulers whose loop was given up",
)
GRADIENT = Reason("gradients are enabled", "run inference under torch.no_grad() or torch.inference_mode()")
NOT_SEEN = Reason(
    "the model was not seen running: it is compiled as a whole, or the pipeline did not call it",
    "if it is compiled, compile its blocks instead (compile_repeated_blocks)",
)

_OwnerT = TypeVar("_OwnerT")

# So many calls without any schedule are no trial of a single forward pass: the user's loop is not one we can follow.
_CALLS_WITHOUT_SCHEDULE = 3


def _no_plan(run: Run) -> Sequence[int] | None:
    """The default plan; a module's function, so that a tracked model can be pickled."""
    return None


@dataclass(frozen=True)
class Consumer:
    """A method that follows the steps of one model.

    Attributes:
        name: as shown in statistics ("feature cache").
        plan: units of work it means to save in each step of a run, given the run; None if it has no plan.
        strict: raise instead of warning when a call achieves less than 90 % of the plan.
        saves: work is to be saved; False of one that only looks on, and can miss nothing.
        calibrated: of what is static in it: the settings that this holds for. A run that is far from them is told of,
            once.
    """

    name: str
    plan: Callable[[Run], Sequence[int] | None] = _no_plan
    strict: bool = False
    saves: bool = True
    calibrated: SamplingSettings | None = None


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
        timestep: as the model got it: scalar, [batch], or [batch, tokens] (per-token timesteps); None if it got
            a Python number or nothing.
        index: ``row`` as an int64 scalar tensor on the device of the model's sample, or None.
        problem: why the row is unknown, or None. Run and step may be known all the same (a loop whose start nothing
            tells): what this call computes can be kept for the next steps then.
        told: the loop itself told the row (:func:`follow`), and gives every sample the row's timestep.
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
    told: bool = False

    @property
    def key(self) -> str | int:
        """What tells the calls of one step apart: the branch's name where there is one, else the call's number."""
        return self.call if self.branch is None else self.branch

    @property
    def per_token(self) -> bool:
        """Every token, or frame, has a timestep of its own: ``index`` is that of the noisiest ones. Some may be given
        (Wan 2.2's and LTX's image-to-video), or all at different noise levels (diffusion forcing)."""
        return self.timestep is not None and self.timestep.ndim >= 2 and self.timestep.shape[-1] > 1

    @property
    def storage(self) -> dict[Any, Any]:
        """What this model keeps for later steps of the run, by any key; freed with the run. Empty without a run."""
        return {} if self.run is None else self.run.storage(self.tracker)

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
        # A scheduler that got no schedule here has stepped: calls must prove whose they are.
        self.stranger = False
        # The element of a schedule that the loop is at, if it tells.
        self.element: Callable[[], Any] | None = None
        self.stats: weakref.WeakKeyDictionary[StepTracker, CallStats] = weakref.WeakKeyDictionary()

    def owned_by(self, obj: Any) -> bool:
        return self.owner is not None and self.owner() is obj

    def begin(self, scheduler: Any) -> None:
        """A new run for this scheduler; its earlier one, and those that are over, end."""
        if self.owner is None:
            for run in self.runs:
                if run.scheduler() in (None, scheduler) and run.taken and not run.over:
                    self.close(run, {}, strict=False)
            self.stats.clear()
        self.runs = [run for run in self.runs if run.scheduler() not in (None, scheduler) and not run.over]
        self.runs.append(Run(scheduler))
        self.stranger = False
        if len(self.runs) > 1:
            for run in self.runs:
                run.values  # noqa: B018  read here, outside of the loop: they may be on a device

    def run_of(self, element: Any) -> tuple[Run, int] | None:
        """The run whose schedule this is an element of, and its row."""
        for run in self.runs:
            run.refresh()
            row = run.row_of(element)
            if isinstance(row, int):
                return run, row
        return None

    def told(self) -> torch.Tensor | None:
        """The element of its schedule that the loop says it is at."""
        element = None if self.element is None else self.element()
        return None if self.run_of(element) is None else element

    def step(self, scheduler: Any, timestep: Any, sample: Any) -> None:
        run = next((run for run in self.runs if run.scheduler() is scheduler), None) or self._adopt(scheduler)
        if run is None:
            self.stranger = True
            return
        run.take_step(timestep, sample)
        if self.owner is None and run.over:
            self.close(run, {})

    def _adopt(self, scheduler: Any) -> Run | None:
        """The run of a scheduler that was copied from the one which got the schedule, if there is just one."""
        alike = (type(scheduler), type(None))
        idle = [run for run in self.runs if run.taken == 0 and type(run.scheduler()) in alike]
        timesteps = getattr(scheduler, "timesteps", None)
        if len(idle) != 1 or timesteps is None or idle[0].num_rows != len(timesteps):
            return None
        idle[0].follow(scheduler)
        return idle[0]

    def locate(self, timestep: Any) -> tuple[Run | None, Reason | None]:
        """The run that a model's call belongs to, or why that is unknown."""
        self.runs = [run for run in self.runs if run.scheduler() is not None] or self.runs[-1:]
        for run in self.runs:
            run.advance()
        viewed = [run for run in self.runs if run.row_of(timestep) is not None]
        live = viewed or [run for run in self.runs if not run.over] or self.runs[-1:]
        if self.owner is not None and any(run.taken for run in live):
            # A pipeline may set a schedule that others only copy or look at (diffusion forcing).
            live = [run for run in live if run.taken]
        if not live:
            return None, NO_SCHEDULE
        if len({(run.step, tuple(run.values)) for run in live} if len(live) > 1 else ()) > 1:
            for run in live:
                run.apart = True
        # Stepped together in each iteration, like LTX2's, they are as good as one.
        if self.stranger or (len(live) > 1 and any(run.apart for run in live)):
            live = [run for run in live if run.recognises(timestep)]
        return (live[0], None) if live and not any(run.apart for run in live[1:]) else (None, SCHEDULERS_IN_TURN)

    def close(self, run: Run | None, names: dict[StepTracker, str], strict: bool = True) -> None:
        """A run is over, or (None) all of them: what was planned and not achieved is said now."""
        seen: dict[int, set[int]] = {}
        for stats in self.stats.values():
            for number, share in stats.shares.items():
                seen.setdefault(number, set()).update(share.seen)
        for tracker, stats in list(self.stats.items()):
            if run is None or run.number in stats.shares:
                stats.close(seen)
                tracker.check(stats, names.get(tracker, tracker.model), strict)


class _Thread(threading.local):
    def __init__(self) -> None:
        self.scopes = [_Scope()]
        self.active: list[StepContext] = []
        self.branches: dict[int, str] = {}
        self.outside = False


_thread = _Thread()
# Of each pipeline, the statistics of its last call.
_last_call: weakref.WeakKeyDictionary[Any, Mapping[StepTracker, CallStats]] = weakref.WeakKeyDictionary()


class _Listener:
    """Keeps each thread's scopes."""

    def on_set_timesteps(self, scheduler: Any) -> None:
        _thread.scopes[-1].begin(scheduler)

    def on_step(self, scheduler: Any, timestep: Any, sample: Any) -> None:
        _thread.scopes[-1].step(scheduler, timestep, sample)

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
            run.end()
        names = {}
        for name, model in vars(pipeline).items():
            tracker = tracker_of(model) if isinstance(model, nn.Module) else None
            if tracker is None:
                continue
            names[tracker] = name
            if tracker not in scope.stats and any(run.taken for run in scope.runs):
                tracker.record(scope, CallStats(unknown=Counter([NOT_SEEN]), lost=1))
        _last_call[pipeline] = scope.stats
        outer = _thread.scopes[-1]
        if outer.owner is not None:
            # Of a pipeline that calls others, theirs are part of its statistics.
            for tracker, stats in scope.stats.items():
                outer.stats.setdefault(tracker, stats)
        if error is None:
            scope.close(None, names)

    def on_branch(self, model: Any, name: str | None) -> str | None:
        before = _thread.branches.pop(id(model), None)
        if name is not None:
            _thread.branches[id(model)] = name
        return before


_LISTENER = _Listener()


class StepTracker:
    """Follows the calls of one model; made by :func:`track`.

    A deep copy of the model gets a tracker of its own with the same consumers.

    Attributes:
        model: name of the model's class.
        consumers: by name.
        last: statistics of the last pipeline call or hand-written loop, ``last_owner`` the pipeline (a weak reference)
            or None.
    """

    def __init__(self, model: str, consumers: dict[str, Consumer] | None = None) -> None:
        self.model = model
        self.consumers: dict[str, Consumer] = dict(consumers or {})
        self.last: CallStats | None = None
        self.last_owner: weakref.ref[Any] | None = None
        self._warned: set[str] = set()
        self._warned_of_settings: set[str] = set()
        self._argument: TimestepArgument | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> StepTracker:
        return StepTracker(self.model, self.consumers)

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickled, (self.model, self.consumers, RemovableHandle.next_id)

    def record(self, scope: _Scope, stats: CallStats) -> None:
        """Statistics of this model in a pipeline's call, or in a hand-written loop."""
        scope.stats[self] = self.last = stats
        self.last_owner = scope.owner

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook: find the place of this call and make it the current one."""
        if torch.compiler.is_compiling() or _thread.outside:
            return
        timestep = self._timestep(module, args, kwargs)
        scope = _thread.scopes[-1]
        branch = _thread.branches.get(id(module))
        told = scope.told()
        telling = timestep if told is None else told
        run, problem = scope.locate(telling)
        row, call = None, 0
        if run is not None:
            row, call, problem = run.place(telling, self, branch)
        known = run if problem is None or problem is START_UNKNOWN else None
        self.record(scope, scope.stats.get(self) or CallStats())
        self._count(scope, run, known, problem)
        if known is not None:
            scope.stats[self].sampling.see(known, call, args, kwargs)
        # An interrupt skips the hook after a call, and in a hand-written loop nobody else takes its context away.
        _thread.active[:] = [context for context in _thread.active if context.tracker is not self]
        _thread.active.append(
            StepContext(
                tracker=self,
                run=known,
                step=None if known is None else known.step,
                row=row,
                call=0 if known is None else call,
                branch=branch,
                timestep=timestep if isinstance(timestep, torch.Tensor) else None,
                index=None if known is None else known.index(row, _device_of(timestep, args, kwargs)),
                problem=problem,
                stats=scope.stats[self],
                told=told is not None,
            )
        )

    def _count(self, scope: _Scope, run: Run | None, known: Run | None, problem: Reason | None) -> None:
        stats = scope.stats[self]
        stats.calls += 1
        if problem is not None:
            stats.unknown[problem] += 1
        if known is None:
            stats.lost += 1
        else:
            stats.see(known.number, known.step, problem is None)
        num_steps = None if run is None else run.num_steps
        if run is not None and num_steps is not None:
            planned = run
            stats.plan(run.number, num_steps, lambda: {name: c.plan(planned) for name, c in self.consumers.items()})
        if scope.owner is None and stats.unknown[NO_SCHEDULE] == _CALLS_WITHOUT_SCHEDULE:
            self.check(stats, self.model)

    def after(self, module: nn.Module, args: Any, output: Any) -> None:
        """Forward hook, called after an exception too."""
        if not torch.compiler.is_compiling() and _thread.active and _thread.active[-1].tracker is self:
            _thread.active.pop()

    def check(self, stats: CallStats, where: str, strict: bool = True) -> None:
        """At the end of a pipeline's call or of a loop: warn, once for each method, where its plan was missed, and once
        where the settings were far from those of its calibration.

        Raises:
            PlanMissedError: of a strict consumer.
        """
        if is_unchecked():
            return
        for name, consumer in self.consumers.items():
            self._check_settings(consumer, stats, where)
            if not consumer.saves or not stats.missed(name):
                continue
            if consumer.strict and strict:
                raise PlanMissedError(missed_message(where, name, stats))
            if name not in self._warned:
                self._warned.add(name)
                warn(missed_message(where, name, stats))

    def _check_settings(self, consumer: Consumer, stats: CallStats, where: str) -> None:
        if consumer.calibrated is None or consumer.name in self._warned_of_settings:
            return
        far = consumer.calibrated.far(stats.sampling.settings())
        if far:
            self._warned_of_settings.add(consumer.name)
            known, seen = (", ".join(pair[side] for pair in far) for side in (0, 1))
            warn(
                f"{where}: {consumer.name} come from a calibration with {known}, and this call ran with {seen}. They "
                "may not fit it, and quality suffers then. Record a calibration as the model is used, and compress "
                "the dense model with that."
            )

    def _timestep(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._argument is None:
            self._argument = TimestepArgument.of(module)
        return self._argument.read(args, kwargs)


def _unpickled(model: str, consumers: dict[str, Consumer], next_hook: int) -> StepTracker:
    """A tracker of a loaded model. In this process nobody may listen to schedulers yet, and torch counts hooks from 0
    again: without a word, the next one that is registered would take the place of ours."""
    events.install(_LISTENER)
    RemovableHandle.next_id = max(RemovableHandle.next_id, next_hook)
    return StepTracker(model, consumers)


def track(model: nn.Module, consumer: Consumer | None = None) -> StepTracker:
    """The tracker of ``model``, made if needed, with ``consumer`` added.

    Raises:
        MissingDependencyError: diffusers is not installed, so no scheduler could tell of its steps.
    """
    tracker = tracker_of(model)
    if tracker is None:
        if not events.install(_LISTENER):
            raise MissingDependencyError("Following the steps of a scheduler needs diffusers: pip install diffusers")
        tracker = StepTracker(type(unwrap(model)).__name__)
        model.register_forward_pre_hook(tracker.before, with_kwargs=True)
        model.register_forward_hook(tracker.after, always_call=True)
    if consumer is not None:
        if tracker.consumers.get(consumer.name) != consumer:
            tracker._warned_of_settings.discard(consumer.name)
        tracker.consumers[consumer.name] = consumer
    return tracker


def tracker_of(model: nn.Module) -> StepTracker | None:
    """The tracker whose hooks ``model`` carries, or None."""
    return hook_owner(model, StepTracker)


def untrack(model: nn.Module, consumer: str | None = None) -> None:
    """Remove a consumer, and the hooks with the last one; without a name, all of them."""
    tracker = tracker_of(model)
    if tracker is None:
        return
    if consumer is not None and (tracker.consumers.pop(consumer, None) is None or tracker.consumers):
        return
    remove_hooks(model, tracker)
    # Of an interrupted call: with its hooks nobody else takes it away.
    _thread.active[:] = [context for context in _thread.active if context.tracker is not tracker]


def hook_owner(model: nn.Module, kind: type[_OwnerT]) -> _OwnerT | None:
    """The object of class ``kind`` of which a forward pre-hook of ``model`` is a method, or None."""
    owners = (getattr(hook, "__self__", None) for hook in unwrap(model)._forward_pre_hooks.values())
    return next((owner for owner in owners if isinstance(owner, kind)), None)


def remove_hooks(model: nn.Module, owner: object) -> None:
    """Take the forward hooks off that are methods of ``owner``; handles do not survive a copy of the model."""
    for hooks in (model._forward_pre_hooks, model._forward_hooks):
        for key in [key for key, hook in hooks.items() if getattr(hook, "__self__", None) is owner]:
            del hooks[key]
            model._forward_pre_hooks_with_kwargs.pop(key, None)
            model._forward_hooks_always_called.pop(key, None)


@contextlib.contextmanager
def outside_loops() -> Iterator[None]:
    """Inside, this thread's calls of tracked models are no part of a loop: nothing is planned, counted or warned of."""
    before, _thread.outside = _thread.outside, True
    try:
        yield
    finally:
        _thread.outside = before


def follow(pipeline: Any, element: Callable[[], Any]) -> None:
    """In the call of ``pipeline`` that runs in this thread, its loop tells where it is; nothing is inferred then.

    Args:
        pipeline: whose call it is; where nothing is tracked, or the call is another's, nothing happens.
        element: gives the element of ``scheduler.timesteps`` that the loop is at, the very view of the schedule. While
            it gives anything else, places are found as they are without it.
    """
    scope = _thread.scopes[-1]
    if scope.owned_by(pipeline):
        scope.element = element


def ahead(model: nn.Module, element: torch.Tensor, branch: str | None = None) -> StepContext | None:
    """The context that a loop's first call of ``model`` will have, before the loop.

    Nothing is counted, and no run has begun.

    Args:
        model: a denoiser of the pipeline that is being called in this thread.
        element: of the schedule, at which the model will be called.
        branch: name of the cache context in which it will be.

    Returns:
        None if the model is not tracked, or the schedule is not one of this pipeline's call.
    """
    tracker, scope = tracker_of(model), _thread.scopes[-1]
    found = None if tracker is None or scope.owner is None else scope.run_of(element)
    if found is None or tracker is None:
        return None
    run, row = found
    return StepContext(tracker, run, 0, row, 0, branch, element, None, None, CallStats(), told=True)


def current() -> StepContext | None:
    """Context of the innermost tracked model that is running in this thread."""
    return _thread.active[-1] if _thread.active else None


def stats_of(models: dict[str, nn.Module], pipeline: Any = None) -> CompressionStats:
    """Statistics of the last call of ``pipeline``, or of a later hand-written loop over its models."""
    called = {} if pipeline is None else _last_call.get(pipeline, {})
    found = {}
    for name, model in models.items():
        tracker = tracker_of(model)
        if tracker is None:
            continue
        mine = pipeline is None or tracker.last_owner is None or tracker.last_owner() is pipeline
        found[name] = (tracker.last if mine else called.get(tracker)) or CallStats()
    return CompressionStats(found)


def _device_of(timestep: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.device:
    """Where the model computes: that of its sample, since schedules often stay on the CPU."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, torch.Tensor) and value.ndim > 1:
            return value.device
    return timestep.device if isinstance(timestep, torch.Tensor) else torch.device("cpu")

"""The tables of one model, and the root hook that finds the rows of each call.

Before a call, the hook makes sure that the rows of its schedule and its conditions are there, writes which of them are
meant into an index on the device, and lets the layers look up; after it, every layer is itself again. Whatever is not
known or has changed (``_Refused`` tells what) leaves the layers alone, and is counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from diffuse_compress.components import unwrap
from diffuse_compress.errors import ModelStateError
from diffuse_compress.families.base import Dependence, Family
from diffuse_compress.logging import get_logger
from diffuse_compress.runtime import steps
from diffuse_compress.runtime.run import Run
from diffuse_compress.runtime.stats import Reason
from diffuse_compress.temporal.build import Call, Rows, build
from diffuse_compress.temporal.config import TableConfig, WeightPlace
from diffuse_compress.temporal.index import Index
from diffuse_compress.temporal.layout import layout_of
from diffuse_compress.temporal.lookup import CONSUMER, LayerLookup, Mode
from diffuse_compress.temporal.model_call import arguments_of, bring_weights
from diffuse_compress.temporal.parking import Folder, Parking
from diffuse_compress.temporal.reasons import (
    ADAPTED,
    CAPTURED,
    CHANGING,
    DOUBTED,
    FAILED,
    NO_BATCH,
    NOT_TRACKED,
    OTHER_PROCESSOR,
    PER_TOKEN,
    TRAINING,
    TWO_THREADS,
    UNKNOWN_FORM,
)
from diffuse_compress.temporal.request import Conditions
from diffuse_compress.temporal.schedule import Timesteps, timesteps_of
from diffuse_compress.temporal.state import Pass, Request, Schedule
from diffuse_compress.temporal.step_scales import step_scales_of
from diffuse_compress.temporal.storage import store
from diffuse_compress.temporal.turns import Turns
from diffuse_compress.temporal.watch import Watch

__all__ = ["TemporalTable", "attach_table", "detach_table", "table_of"]

_LOGGER = get_logger(__name__)

_T, _TC, _C = Dependence.TIMESTEP, Dependence.TIMESTEP_AND_CONDITION, Dependence.CONDITION
# A prompt that is exchanged once or twice in a run is worth new tables; one that changes in every step is not.
_REBUILDS = 3


class _Refused(Exception):
    """This call is computed, for this reason."""

    def __init__(self, reason: Reason) -> None:
        self.reason = reason


class TemporalTable:
    """Tables of one model; made by :func:`attach_table`.

    Attributes:
        model: whose.
        config: as attached.
        layout: which layers have tables, and why others have none.
        schedules: rows by schedule, the one used last at the end.
        left: why layers that do not see the sample run live.
        prepared: numbers of steps whose schedules are stored with the model; None for the pipeline's own.
    """

    def __init__(self, model: nn.Module, config: TableConfig, family: Family | None) -> None:
        self.model = model
        self.config = config
        self.layout = layout_of(model, config, family)
        self.left: dict[str, str] = {}
        self.prepared: tuple[int, ...] | None = None
        self.schedules: list[Schedule] = []
        self.lookups = {
            name: LayerLookup(model.get_submodule(name), name, kind) for name, kind in self.layout.layers.items()
        }
        self._index = Index()
        self._watch = Watch(model, self.lookups, self.layout)
        self._calls_per_step = 1
        self._probed = family is not None
        self._generation = 0
        self._signature: torch.Tensor | None = None
        self._request_bytes = 0
        self._kinds: dict[Dependence, frozenset[str]] = {}
        self._leave(self.layout.left)
        self._names, self._timestep = arguments_of(model)
        self._turns = Turns()

    # --- attaching ------------------------------------------------------------------------------------------------

    def install(self) -> None:
        """Give the layers their lookups and the model its hooks."""
        folder = Folder(self.config.work_dir) if self.config.weights is WeightPlace.DISK else None
        steps.track(self.model, steps.Consumer(CONSUMER, self.plan, strict=self.config.strict))
        try:
            for lookup in self.lookups.values():
                lookup.install()
                if self.config.weights is not WeightPlace.DEVICE:
                    lookup.parking = Parking(lookup.layer, self.config.weights, folder)
            self._signature = self._watch.signature()
            self.model.register_forward_pre_hook(self.before, with_kwargs=True)
            self.model.register_forward_hook(self.after, always_call=True)
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        """Leave the model as it was found; weights that were rounded stay rounded."""
        for lookup in self.lookups.values():
            lookup.remove()
        steps.remove_hooks(self.model, self)
        steps.untrack(self.model, CONSUMER)

    def __getstate__(self) -> dict[str, Any]:
        # What belongs to a device's stream is made again.
        return {**self.__dict__, "_index": Index()}

    # --- what is planned and what it takes ------------------------------------------------------------------------

    def plan(self, run: Run) -> list[int] | None:
        """Layers to look up in every step of a run; of a class that was probed, that shows when they are recorded."""
        if self._probed and not self.schedules:
            return None
        served = self.num_served - len(self.partly)
        return None if run.num_steps is None else [served * self._calls_per_step] * run.num_steps

    @property
    def partly(self) -> set[str]:
        """Layers that have rows for some timesteps of a schedule only; they are no part of the plan."""
        return {name for schedule in self.schedules for name in schedule.partly}

    def nbytes(self) -> dict[str, int]:
        """Bytes of the tables by schedule (all), of the last request's tables, and of the layers' weights.

        ``weights`` are those on the layers' own device, ``parked`` what waits elsewhere in memory, or as integers.
        """
        parameters = [p for lookup in self.lookups.values() for p in lookup.layer.parameters(recurse=False)]
        parked = [lookup.parking.nbytes for lookup in self.lookups.values() if lookup.parking is not None]
        return {
            "schedules": sum(schedule.nbytes for schedule in self.schedules),
            "request": self._request_bytes,
            "weights": sum(parameter.nbytes for parameter in parameters),
            "parked": sum(parked),
        }

    def clear(self) -> None:
        """Drop every table; the next call builds anew."""
        self.schedules.clear()
        self._generation += 1
        self._request_bytes = 0
        self._leave(self.layout.left)

    def _leave(self, left: Mapping[str, str]) -> None:
        """These layers have no tables, and what is not among them has."""
        self.left = dict(left)
        for kind in (_T, _TC, _C):
            names = (name for name, lookup in self.lookups.items() if lookup.dependence is kind)
            self._kinds[kind] = frozenset(name for name in names if name not in self.left)

    @property
    def num_served(self) -> int:
        """Layers that have tables."""
        return sum(len(names) for names in self._kinds.values())

    # --- a call ---------------------------------------------------------------------------------------------------

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook: find the rows, or leave the layers live."""
        if torch.compiler.is_compiling():
            return
        self._all_live()
        context = steps.current()
        if context is None or context.tracker is not steps.tracker_of(module):
            return self._refuse(None, NOT_TRACKED)
        try:
            self._enter()
            served, missed = self._serve(context, args, kwargs)
        except _Refused as refused:
            return self._refuse(context, refused.reason)
        context.hit(CONSUMER, served)
        for reason, count in missed.items():
            context.miss(CONSUMER, reason, count)
        return None

    def after(self, module: nn.Module, args: Any, output: Any) -> None:
        """Forward hook, called after an exception too."""
        if torch.compiler.is_compiling():
            return
        self._all_live()
        self._turns.leave()

    def _all_live(self) -> None:
        for lookup in self.lookups.values():
            lookup.mode, lookup.value = Mode.LIVE, None

    def _enter(self) -> None:
        """One thread at a time: rows and index are the model's. With two, both compute."""
        if not self._turns.enter():
            raise _Refused(TWO_THREADS)

    def _refuse(self, context: steps.StepContext | None, reason: Reason) -> None:
        for lookup in self.lookups.values():
            if lookup.parking is not None:
                lookup.parking.come_back()
        if context is not None:
            context.miss(CONSUMER, reason, self.num_served)

    def prepare_call(self, context: steps.StepContext, inputs: Mapping[str, Any]) -> bool:
        """Build what a call will look up, before it comes.

        Args:
            context: of the call (``steps.ahead``).
            inputs: its arguments by name: conditions are the very tensors that it will have, sample and timestep have
                its shapes and dtypes.

        Returns:
            False if that call will be computed; it counts why.
        """
        try:
            self._enter()
            self._find(context, self._call((), dict(inputs)))
        except _Refused:
            return False
        finally:
            self._turns.leave()
        return True

    def _serve(
        self, context: steps.StepContext, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[int, Counter[Reason]]:
        """Set every layer's mode for this call; returns how many look up, and why others do not."""
        call = self._call(args, kwargs)
        blocked, place, schedule, request = self._find(context, call)
        self._index.write(place, call.batch, 0 if request is None else request.first, call.device)
        return self._turn_on(schedule, request, blocked, place)

    def _find(
        self, context: steps.StepContext, call: Call
    ) -> tuple[dict[str, Reason], int | torch.Tensor, Schedule, Request | None]:
        """Layers that must run live, the place of a call's timestep, and its tables, built if need be."""
        bring_weights(self.model, call.device)
        given = call.arguments.get(self._timestep)
        self._check(context, given)
        blocked = self._blocked()
        progress = self._progress(context, given)
        place = self._index.place(progress.timesteps, context, given)
        if isinstance(place, Reason):
            raise _Refused(place)
        schedule = self._schedule(context, call, progress)
        return blocked, place, schedule, self._request(context, call, progress, place, schedule)

    def _call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        arguments = {**dict(zip(self._names, args, strict=False)), **kwargs}
        sample = next((arguments[name] for name in self._names if name in arguments), None)
        if not isinstance(sample, torch.Tensor):
            raise _Refused(NO_BATCH)
        return Call(self.model, arguments, self._timestep, sample.shape[0], sample.device)

    def _check(self, context: steps.StepContext, given: Any) -> None:
        if self.model.training:
            raise _Refused(TRAINING)
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise _Refused(CAPTURED)
        if given is None:
            raise _Refused(UNKNOWN_FORM)
        if context.per_token or (isinstance(given, torch.Tensor) and given.ndim > 1):
            raise _Refused(PER_TOKEN)
        if context.blocker is not None:
            raise _Refused(context.blocker)

    def _blocked(self) -> dict[str, Reason]:
        """Layers that must run live in this call, by reason. Changed weights make all tables void."""
        adapted, changed = self._watch.look()
        if changed:
            self._sign(changed=True)
        if any(self.layout.temporal.reader_of(name) is None for name in adapted):
            raise _Refused(ADAPTED)  # what runs before the blocks feeds all others
        return {name: ADAPTED for name in adapted} | {
            name: OTHER_PROCESSOR for name in self._watch.strange_processors()
        }

    def _sign(self, changed: bool) -> None:
        """Weights were moved or written to, or may have been: drop what was computed from others."""
        signature = self._watch.signature()
        if self._signature is None or not torch.equal(signature, self._signature):
            self._signature, changed = signature, True
            self.schedules = [schedule for schedule in self.schedules if schedule.is_of(signature)]
        self._generation += changed

    # --- tables ---------------------------------------------------------------------------------------------------

    def _progress(self, context: steps.StepContext, given: Any) -> Pass:
        """This run's state, made anew if its schedule or the form of its timesteps has changed."""
        run, row = context.run, context.row
        assert run is not None  # there is no blocker
        assert row is not None
        known: Pass | None = context.storage.get(self)
        doubted = self._index.doubted()
        if known is None or known.schedule_tensor is not run.timesteps or known.form != _form(given):
            if doubted:
                _LOGGER.warning("%s: in the last run, %s", type(self.model).__name__, DOUBTED)
            # Merging an adapter between two requests changes weights, and nothing else tells.
            self._sign(changed=False)
            timesteps = timesteps_of(run, row, given)
            if isinstance(timesteps, Reason):
                raise _Refused(timesteps)
            known = context.storage[self] = Pass(timesteps, run.timesteps, _form(given), self._generation)
        elif doubted:
            known.problem = DOUBTED
        if known.generation != self._generation:
            known.generation, known.schedule = self._generation, None
            known.requests.clear()
        if known.problem is not None:
            raise _Refused(known.problem)
        known.keys.add(context.key)
        self._calls_per_step = max(self._calls_per_step, len(known.keys))
        return known

    def _schedule(self, context: steps.StepContext, call: Call, progress: Pass) -> Schedule:
        """Rows of the timestep alone, found or built."""
        schedule = progress.schedule
        if schedule is not None and (schedule.batch == call.batch or not self.config.exact):
            return schedule
        scheduler = "" if context.run is None else type(context.run.scheduler()).__name__
        try:
            progress.schedule = self._rows_for(call, progress.timesteps, scheduler)
        except _Refused as refused:
            progress.problem = refused.reason
            raise
        return progress.schedule

    def _rows_for(
        self,
        call: Call,
        timesteps: Timesteps,
        scheduler: str,
        kept: Mapping[str, Mapping[float, bool]] | None = None,
    ) -> Schedule:
        precision = _precision(self.model, call)
        fitting = [known for known in self.schedules if known.serves(timesteps, precision, self._kinds[_T])]
        if self.config.exact:
            fitting = [known for known in fitting if known.batch == call.batch]
        if fitting:
            schedule = fitting[-1]
        else:
            given = [timesteps.at(number, call.batch) for number in range(len(timesteps.values))]
            some = {
                name: [there.get(value, True) for value in timesteps.values] for name, there in (kept or {}).items()
            }
            parts = store(self._build(call, given, frozenset({_T})).timestep, self.config.table, some)
            schedule = Schedule(
                timesteps.values, timesteps.form, precision, parts, call.batch, scheduler, self._signature
            )
        # The one used last is the last to go.
        self.add_schedules([schedule])
        for part in schedule.rows:
            part.move(call.device)
        return schedule

    def add_schedules(self, schedules: list[Schedule]) -> None:
        """Hold these, as those used last; the ones unused for longest go."""
        others = [known for known in self.schedules if all(known is not schedule for schedule in schedules)]
        self.schedules = [*others, *schedules][-self.config.max_schedules :]

    def weights_signature(self) -> torch.Tensor:
        """Samples of the weights that tables of the timestep alone are made from, float64 on the CPU."""
        return self._watch.signature()

    def prepare(
        self,
        inputs: Mapping[str, Any],
        timesteps: torch.Tensor,
        scheduler: str = "",
        kept: Mapping[str, Mapping[float, bool]] | None = None,
    ) -> Schedule:
        """Build the rows of the timestep alone for a schedule, before any run.

        Args:
            inputs: arguments of one call of the model by name, with a timestep in the dtype and shape of later calls.
            timesteps: [rows], as the model will be given them: Flux's pipeline gives ``(t.to(dtype) / 1000)``.
            scheduler: class name of the scheduler, for the record.
            kept: {layer: {timestep: is its row kept?}} of layers that are computed at the others.

        Raises:
            ModelStateError: the rows cannot be computed; the cause says why.
        """
        values = [float(value) for value in timesteps.double().tolist()]
        unique = list(dict.fromkeys(values))
        known = Timesteps(tuple(unique), tuple(unique.index(value) for value in values), inputs[self._timestep])
        self._sign(changed=False)
        try:
            return self._rows_for(self._call((), dict(inputs)), known, scheduler, kept)
        except _Refused as refused:
            raise ModelStateError(
                f"{type(self.model).__name__}: temporal tables of a schedule need {self._timestep!r} and the other "
                f"arguments of a forward pass, and {refused.reason}: {refused.__cause__!r}."
            ) from refused

    def _request(
        self, context: steps.StepContext, call: Call, progress: Pass, place: int | torch.Tensor, schedule: Schedule
    ) -> Request | None:
        """Tables of this call's conditions, found or built; None if they change too often."""
        kinds = frozenset(kind for kind in (_TC, _C) if self._kinds[kind])
        conditions = {name: call.arguments.get(name) for name in self.layout.temporal.conditions}
        for request in progress.requests:
            late = not isinstance(place, int) or place >= request.first
            if late and request.batch == call.batch and request.conditions.match(conditions) and request.untouched():
                return request
        key = (context.key, call.batch)
        progress.builds[key] += 1
        if progress.builds[key] > _REBUILDS:
            return None
        # Earlier timesteps will not come again; where the host cannot tell which one this is, all are computed.
        first = place if isinstance(place, int) and _TC in kinds else 0
        request = Request(Conditions(conditions), call.batch, first)
        if kinds:
            numbers = range(first, len(progress.timesteps.values) if _TC in kinds else first + 1)
            given = [progress.timesteps.at(number, call.batch) for number in numbers]
            known = {
                name: rows[numbers.start : numbers.stop]
                for part in schedule.rows
                if part.exact and part.place is None
                for name, rows in part.rows().items()
            }
            try:
                rows = self._build(call, given, kinds, known)
            except _Refused as refused:
                progress.problem = refused.reason
                raise
            request.rows = store(rows.both, self.config.table)
            request.set_values(rows.condition)
        progress.requests.append(request)
        self._request_bytes = sum(known.nbytes for known in progress.requests)
        return request

    def _build(
        self,
        call: Call,
        given: list[Any],
        wanted: frozenset[Dependence],
        known: Mapping[str, torch.Tensor] | None = None,
    ) -> Rows:
        # Every row by itself has the input scales of its step.
        each = step_scales_of(self.model) is not None
        exact = {_T: each or self.config.exact is not False, _TC: each or self.config.exact is True}
        try:
            rows = build(self.layout, self.lookups, call, given, wanted, exact, known)
        except Exception as error:  # whatever a model does when its parts are run: the call goes on without tables
            _LOGGER.warning("%s: temporal tables could not be built: %r", type(self.model).__name__, error)
            raise _Refused(FAILED) from error
        if rows.failed:
            self._leave(self.left | rows.failed)
        return rows

    # --- turning on -----------------------------------------------------------------------------------------------

    def _turn_on(
        self,
        schedule: Schedule,
        request: Request | None,
        blocked: Mapping[str, Reason],
        place: int | torch.Tensor,
    ) -> tuple[int, Counter[Reason]]:
        outputs: dict[str, torch.Tensor] = {}
        partly = schedule.partly
        for part in schedule.rows:
            outputs |= part.lay_out(self._index.rows)
        if request is not None:
            outputs |= request.values
            for part in request.rows:
                outputs |= part.lay_out(self._index.samples)
        served, missed = 0, Counter[Reason]()
        for name, lookup in self.lookups.items():
            value = None if name in self.left or name in blocked else outputs.get(name)
            if value is None and name not in self.left:
                missed[blocked.get(name, CHANGING)] += 1
            there = Mode.PARTLY if name in partly else Mode.LOOKUP
            lookup.mode, lookup.value = (Mode.LIVE if value is None else there), value
            if lookup.parking is not None:
                (lookup.parking.come_back if value is None else lookup.parking.leave)()
            # Where the device alone knows the row, nobody counts.
            served += value is not None and (name not in partly or (isinstance(place, int) and partly[name][place]))
        return served, missed


def attach_table(model: nn.Module, config: TableConfig | None = None, family: Family | None = None) -> TemporalTable:
    """Let ``model`` look up what does not depend on its sample.

    Nothing is computed now; the first call of every run builds what is missing. Layers, parameters and keys of the
    state dict stay.

    Args:
        model: a denoiser of diffusers, in any dtype and on any device.
        config: how tables are kept.
        family: of a class that is not known: ``generic_family(model, probe(model, inputs))``.

    Raises:
        ConfigError: the class is unknown, has nothing to look up, or a pattern matches nothing.
        ModelStateError: the model has a table, or weights that are not loaded.
        MissingDependencyError: diffusers is not installed.
    """
    model = unwrap(model)
    if table_of(model) is not None:
        raise ModelStateError(f"{type(model).__name__} has a temporal table; call detach_table(model) first.")
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ModelStateError(
            f"{type(model).__name__}: temporal tables need loaded weights, found meta tensors. Attach before "
            "enable_sequential_cpu_offload() or a device_map= that offloads."
        )
    table = TemporalTable(model, config or TableConfig(), family)
    table.install()
    return table


def detach_table(model: nn.Module) -> None:
    """Give every layer its own forward and its weights back; without a table, nothing happens."""
    table = table_of(model)
    if table is not None:
        table.remove()


def table_of(model: nn.Module) -> TemporalTable | None:
    """The table whose hooks a model carries, or None."""
    return steps.hook_owner(model, TemporalTable)


def _form(given: Any) -> Any:
    """What must stay the same from call to call for timesteps to be told by their value."""
    return (given.dtype, given.device, given.ndim) if isinstance(given, torch.Tensor) else type(given)


def _precision(model: nn.Module, call: Call) -> str:
    kind = call.device.type
    cast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    parameter = next((p for p in model.parameters() if p.is_floating_point()), None)
    return f"{None if parameter is None else parameter.dtype}, autocast {cast}, {kind}"

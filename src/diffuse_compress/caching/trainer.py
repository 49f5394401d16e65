"""The loop that trains a router: what the student and the teacher predict, and what the table learns from it.

Every trajectory is a call of the stock pipeline. A forward hook lets the denoiser predict a second time, as the
student; the pipeline handles both predictions as one (``pairs.py``) up to its scheduler, whose class is replaced by one
whose steps begin with a lesson.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffuse_compress.caching.artefact import load_schedules, save_schedules
from diffuse_compress.caching.config import MAX_TRAJECTORIES, HarmoniCaConfig, LambdaEstimator
from diffuse_compress.caching.encoding import encoded_once
from diffuse_compress.caching.forecast import unit_forecast, with_forecast
from diffuse_compress.caching.pairs import Pair, paired, pairs_in, students_of
from diffuse_compress.caching.rehearsal import Rehearsal, values_of
from diffuse_compress.caching.router import (
    RouterTable,
    SoftCache,
    cumulative,
    gains,
    leave_one_out,
    reused_within,
)
from diffuse_compress.caching.schedule import Schedule
from diffuse_compress.caching.units import sites_of
from diffuse_compress.calibration.work_folder import write_whole
from diffuse_compress.errors import CheckpointError, ConfigError, ModelStateError
from diffuse_compress.pipeline_call import from_noise, outputs_of, seeded, untouched
from diffuse_compress.progress import Callback, bar
from diffuse_compress.runtime.processes import Processes

__all__ = ["RouterTrainer", "schedulers_of"]

_STATE = "router.safetensors"
_STAGE = "Training a router"
# A price of time follows the time that is missing: in one trajectory by at most this many steps of the scores.
_PRICE_RATE = 2.0


def schedulers_of(pipe: Any) -> dict[str, Any]:
    """Components that a training can listen to, by name."""
    return {n: part for n, part in pipe.components.items() if n in vars(pipe) and hasattr(part, "set_timesteps")}


class RouterTrainer:
    """Tables of all denoisers, and the loop that trains them.

    Attributes:
        weights: float64 [T], lambda.
        price: of a unit of mean cost in one step.
        trace: see :class:`RouterTraining`.
        rows: steps that are trained.
    """

    def __init__(
        self,
        rehearsal: Rehearsal,
        batches: list[dict[str, Any]],
        config: HarmoniCaConfig,
        processes: Processes,
        folder: Path | None,
        initial: Mapping[str, torch.Tensor],
    ) -> None:
        self.rehearsal, self.pipe, self.config = rehearsal, rehearsal.pipe, config
        self._batches, self._processes, self._folder = batches, processes, folder
        self.full = self._profiled()
        generator = seeded(config.seed)
        self.tables: dict[str, RouterTable] = {}
        for name, schedule in self.full.items():
            assert schedule.cost_ms is not None
            seen = rehearsal.recorders[name].seen
            given = initial.get(name)
            if given is not None and given.shape != schedule.mask.shape:
                steps = schedule.num_steps
                raise ConfigError(
                    f"router training: initial schedule of {name} must have {steps} steps, got {len(given)}."
                )
            self.tables[name] = RouterTable(seen, schedule.cost_ms, config, generator, given)
        self.caches = {name: SoftCache(table, config.history) for name, table in self.tables.items()}
        trained = torch.stack([table.trained for table in self.tables.values()]).any(dim=0)
        self.rows: list[int] = trained.nonzero().flatten().tolist()
        self.weights = trained.double()
        self.price = config.beta or 0.0
        self.trace: list[list[float]] = []
        self._saved_ms = 0.0
        if config.target_speedup is not None:
            self._saved_ms = rehearsal.loop_ms(self.full)[0] * (1 - 1 / config.target_speedup)
        reused_within(list(self.tables.values()), self._saved_ms)  # raises what would otherwise come at the end
        costs = torch.cat([table.cost_ms for table in self.tables.values()])
        self._mean_cost = float(costs.mean().clamp_min(1e-9))
        self._learning = False
        self._predicted: dict[str, int] = {}
        self._errors: list[float] = []
        self._originals: dict[str, Any] = {}
        self._lessons: dict[type, type] = {}
        self._row: int | None = None
        self._given: dict[int, torch.Tensor] = {}
        self._columns: dict[tuple[str, int], tuple[tuple[bool, ...], torch.Tensor]] = {}
        self._restore()

    # --- the loop -------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Inside, trajectories can be drawn."""
        models = self.rehearsal.models
        with contextlib.ExitStack() as stack:
            stack.enter_context(untouched(self.pipe))
            stack.enter_context(_frozen(models.values()))
            self._originals = {name: copy.deepcopy(part) for name, part in schedulers_of(self.pipe).items()}
            stack.enter_context(encoded_once(self.pipe, models, self._batches))
            for name, model in models.items():
                stack.enter_context(self.rehearsal.observed(name, self.caches[name]))
                hook = functools.partial(self._predict_again, name)
                # Before the hook that ends what is known of the place in the loop.
                handle = model.register_forward_hook(hook, with_kwargs=True, prepend=True)
                stack.callback(handle.remove)
            yield

    def train(self, callback: Callback | None) -> None:
        """All trajectories that are left."""
        total = self.config.trajectories
        with bar(_STAGE, total, self.pipe, callback) as advance:
            for number in range(len(self.trace), total):
                if self._is_due(number):
                    self._set_weights(number)
                self.set_forecasts()
                self._errors = []
                self.draw(*self._item(number), self.rows, learning=True)
                if not self._errors:
                    raise ModelStateError(
                        f"router training: a scheduler that {type(self.pipe).__name__} has as a component and steps is "
                        "needed, and none has stepped with what the denoiser predicts. Modular pipelines keep theirs "
                        "elsewhere: train with the pipeline class of the model."
                    )
                error = sum(self._errors) / len(self._errors)
                self._set_price()
                decided = torch.cat([table.mask.flatten() for table in self.tables.values()])
                reused = 1 - float(decided.double().mean())
                self.trace.append([error, reused, self.price])
                self._save()
                advance(number + 1, {"error": error, "reused": reused, "price": self.price})

    def draw(
        self,
        arguments: Mapping[str, Any],
        seed: int,
        cached: Collection[int],
        *,
        learning: bool,
        whole: bool = False,
    ) -> torch.Tensor:
        """Output of one trajectory, with steps cached under the router (or as a ``whole``) and, if wanted, the router
        learning."""
        for name, scheduler in self._originals.items():
            vars(self.pipe)[name] = self._stepping(copy.deepcopy(scheduler))
        for cache in self.caches.values():
            cache.begin(cached)
            cache.passive, cache.whole = learning, whole
        self._learning, self._predicted, self._given = learning, {}, {}
        devices = {p.device for model in self.rehearsal.models.values() for p in model.parameters()}
        # Schedulers may draw noise without the generator of the call.
        with torch.random.fork_rng(devices=[device for device in devices if device.type == "cuda"]):
            torch.manual_seed(seed)
            return values_of(outputs_of(self.pipe(**from_noise(self.pipe, arguments, seed))))

    def _item(self, number: int) -> tuple[dict[str, Any], int]:
        """A batch, and the seed of its noise: other ones for every trajectory of every process, and in every run the
        same."""
        place = number * self._processes.count + self._processes.index
        epoch, at = divmod(place, len(self._batches))
        order = torch.randperm(len(self._batches), generator=seeded(self.config.seed + 1 + epoch))
        # Apart from the seeds of what was recorded.
        return self._batches[int(order[at])], self.config.seed + MAX_TRAJECTORIES + place

    # --- one step -------------------------------------------------------------------------------------------------

    def _predict_again(self, name: str, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        """Forward hook: what the model has predicted is the teacher's, and the student predicts now."""
        cache = self.caches[name]
        row = self._row = cache.last_row
        if not self._learning or row is None or not bool(cache.table.trained[row]):
            return None
        cache.passive = False
        try:
            with torch.enable_grad():
                student = module.forward(*args, **kwargs)
        finally:
            cache.passive = True
        self._predicted[name] = row
        return paired(student, output)

    def _stepping(self, scheduler: Any) -> Any:
        """The scheduler with a class whose steps begin with a lesson: a copy of it, too, steps itself."""
        stock = type(scheduler)
        if stock not in self._lessons:
            self._lessons[stock] = self._with_lessons(stock)
        scheduler.__class__ = self._lessons[stock]
        return scheduler

    def _with_lessons(self, stock: type) -> type:
        original: Callable[..., Any] = stock.step  # type: ignore[attr-defined]

        @functools.wraps(original)
        def step(scheduler: Any, *args: Any, **kwargs: Any) -> Any:
            if self._predicted:
                pairs = pairs_in((args, kwargs))
                if not pairs:
                    raise ModelStateError(
                        "router training: what the scheduler is given does not come from the denoiser by torch's "
                        f"functions in {type(self.pipe).__name__}, so no gradient can be told."
                    )
                self._learn(pairs[0])
                args, kwargs = students_of(args), students_of(kwargs)
            elif self._row is not None:
                given = kwargs["model_output"] if "model_output" in kwargs else args[0]
                self._given[self._row] = given.detach().clone()
            return original(scheduler, *args, **kwargs)

        return type(stock.__name__, (stock,), {"step": step, "__module__": stock.__module__})

    def _learn(self, pair: Pair) -> None:
        """A step of the optimizer, on the row of this step in each table that took part."""
        rows, self._predicted = self._predicted, {}
        with torch.enable_grad():
            wide = torch.promote_types(pair.student.dtype, torch.float32)
            # Not the mean: its gradients are too small for half precision.
            total = (pair.student.to(wide) - pair.teacher.to(wide)).square().sum()
        leaves = {n: self.caches[n].leaves[row] for n, row in rows.items() if row in self.caches[n].leaves}
        found: tuple[torch.Tensor | None, ...] = (None,) * len(leaves)
        if leaves and total.requires_grad:
            found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
        power = pair.teacher.to(wide).square().sum().clamp_min(1e-12)
        gradients = dict(zip(leaves, found, strict=True))
        parts = [gradients.get(name) for name in rows]
        parts = [
            torch.zeros_like(self.tables[name].cost_ms) if part is None else part.double().cpu() / power.double().cpu()
            for name, part in zip(rows, parts, strict=True)
        ]
        relative = (total.detach() / power).double().cpu().reshape(1)
        error, *shared = self._processes.mean(torch.cat([relative, *parts])).split([1, *map(len, parts)])
        self._errors.append(float(error))
        for (name, row), slope in zip(rows.items(), shared, strict=True):
            slope = self.weights[row] * slope
            self.tables[name].learn(row, slope + self._prices(name), -slope)
            self.caches[name].forget()

    # --- weights, forecasts and the price ---------------------------------------------------------------------------

    def _is_due(self, number: int) -> bool:
        steps = len(self.weights)
        return (
            number == 0
            or (number * steps) // self.config.refresh_every != ((number - 1) * steps) // self.config.refresh_every
        )

    def set_forecasts(self) -> None:
        """What is kept of a unit is forecast from the steps that compute it now, also where it is computed: what that
        is worth depends on what it would be replaced by."""
        if self.config.history < 2:
            return
        for name, cache in self.caches.items():
            columns = [tuple(column) for column in self.tables[name].mask.T.bool().tolist()]
            for unit, column in enumerate(columns):
                if self._columns.get((name, unit), ((), None))[0] != column:
                    trajectories = self.rehearsal.recorders[name].trajectories
                    fitted = unit_forecast(trajectories, unit, column, self.config.history)
                    self._columns[name, unit] = column, fitted
            cache.coefficients = torch.stack([self._columns[name, unit][1] for unit in range(len(columns))], dim=1)

    def _set_weights(self, number: int) -> None:
        """Lambda, estimated from the latents that the next trajectory begins with."""
        self.set_forecasts()
        item = self._item(number)

        def drawn(cached: Collection[int]) -> torch.Tensor:
            return self.draw(*item, cached, learning=False)

        def predicted(reused: Collection[int]) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
            return self.draw(*item, reused, learning=False, whole=True), self._given

        estimate: dict[LambdaEstimator, Callable[[], dict[int, float]]] = {
            LambdaEstimator.LEAVE_ONE_OUT: lambda: leave_one_out(drawn, self.rows),
            LambdaEstimator.CUMULATIVE: lambda: cumulative(drawn, self.rows),
            LambdaEstimator.GAIN: lambda: gains(predicted, self.rows),
        }
        if self.config.estimator in estimate:
            found = estimate[self.config.estimator]()
            weights = self._processes.mean(torch.tensor([found[row] for row in self.rows], dtype=torch.float64))
            mean = float(weights.mean())
            self.weights[self.rows] = weights / mean if mean > 0 else torch.ones_like(weights)

    def _forecast(self, name: str, mask: torch.Tensor) -> Schedule:
        schedule, trajectories = self.full[name].with_mask(mask), self.rehearsal.recorders[name].trajectories
        if self.config.history < 2:
            return schedule
        sites = sites_of(self.rehearsal.models[name], schedule.units)
        return with_forecast(schedule, sites, trajectories, history=self.config.history)

    def _prices(self, name: str) -> torch.Tensor:
        """[K], of the units of a model in one step."""
        if self.config.beta is not None:
            return torch.full_like(self.tables[name].cost_ms, self.price)
        return self.price * self.tables[name].cost_ms / self._mean_cost

    def _set_price(self) -> None:
        """Dual ascent: time gets dearer while the loop takes too long, and cheaper while it takes less than it may."""
        if self.config.target_speedup is None:
            return
        if self.price == 0.0:
            self.price = self._first_price()
            return
        # The time of decisions, not of scores: the latter may be short with every unit computed by half.
        decided = {name: self.full[name].with_mask(table.mask) for name, table in self.tables.items()}
        full, saved = self.rehearsal.loop_ms(decided)
        self.price *= math.exp(_PRICE_RATE * self.config.learning_rate * (self._saved_ms - saved) / full)

    def _first_price(self) -> float:
        """What the units that may be reused are worth at most, for their time, after one trajectory."""
        tables = list(self.tables.values())
        worth = torch.cat(
            [(t.worth * self._mean_cost / t.cost_ms.clamp_min(1e-9))[t.trained].flatten() for t in tables]
        )
        time = torch.cat([t.cost_ms.expand_as(t.worth)[t.trained].flatten() for t in tables])
        order = worth.argsort()
        at = int((time[order].cumsum(0) < self._saved_ms).sum().clamp_max(len(order) - 1))
        return max(float(worth[order][at]), 1e-3 * float(worth.abs().mean()), 1e-12)

    # --- results --------------------------------------------------------------------------------------------------

    def _masks(self) -> dict[str, torch.Tensor]:
        if self.config.target_speedup is None:
            return {name: table.mask for name, table in self.tables.items()}
        return dict(zip(self.tables, reused_within(list(self.tables.values()), self._saved_ms), strict=True))

    def schedules(self) -> dict[str, Schedule]:
        """Of each model, as trained so far."""
        asked = {"beta": self.config.beta, "target_speedup": self.config.target_speedup}
        told: dict[str, Any] = {name: value for name, value in asked.items() if value is not None}
        told |= {"router": len(self.trace), "estimator": self.config.estimator.value, "seed": self.config.seed}
        found = {name: self._forecast(name, mask) for name, mask in self._masks().items()}
        return {name: replace(schedule, details={**schedule.details, **told}) for name, schedule in found.items()}

    # --- files ----------------------------------------------------------------------------------------------------

    def _profiled(self) -> dict[str, Schedule]:
        """Everything computed, with the profile that this training began with."""
        names = list(self.rehearsal.models)
        path = None if self._folder is None else self._folder / "profile.safetensors"
        known = path is not None and path.exists()
        self._processes.wait()  # before the first process writes what the others look for
        if path is not None and known:
            return load_schedules(path)
        full = {name: self.rehearsal.full_schedule(name) for name in names}
        for name, schedule in full.items():
            assert schedule.cost_ms is not None
            times = torch.cat([schedule.cost_ms.double(), torch.tensor([schedule.other_ms], dtype=torch.float64)])
            times = self._processes.mean(times)
            full[name] = replace(schedule, cost_ms=times[:-1].float(), other_ms=float(times[-1]))
        if path is not None and self._processes.index == 0:
            write_whole(path, lambda part: save_schedules(part, full))
        return full

    def _save(self) -> None:
        if self._folder is None or self._processes.index != 0:
            return
        from safetensors.torch import save_file

        tensors = {f"{name}.{key}": v for name, table in self.tables.items() for key, v in table.state().items()}
        tensors |= {"weights": self.weights, "price": torch.tensor([self.price], dtype=torch.float64)}
        tensors["trace"] = torch.tensor(self.trace, dtype=torch.float64)
        write_whole(self._folder / _STATE, lambda path: save_file(tensors, path))

    def _restore(self) -> None:
        if self._folder is None:
            return
        path = self._folder / _STATE
        exists = path.exists()
        self._processes.wait()
        if not exists:
            return
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            tensors = load_file(path)
            for name, table in self.tables.items():
                table.restore({key: tensors[f"{name}.{key}"] for key in table.state()})
            self.weights.copy_(tensors["weights"])
            self.price = float(tensors["price"])
            self.trace = tensors["trace"].tolist()
        except (OSError, SafetensorError, KeyError, RuntimeError) as error:
            raise CheckpointError(
                f"work_dir: {path} is damaged ({type(error).__name__}: {error}). Delete the folder {self._folder}."
            ) from error


@contextlib.contextmanager
def _frozen(models: Iterable[nn.Module]) -> Iterator[None]:
    """Inside, no weight gets a gradient, and no block is run a second time for its own (a unit must be seen once)."""
    modules = [module for model in models for module in model.modules()]
    weights = [(p, p.requires_grad) for module in modules for p in module.parameters(recurse=False)]
    again: Sequence[Any] = [module for module in modules if getattr(module, "gradient_checkpointing", False)]
    try:
        for weight, _ in weights:
            weight.requires_grad_(False)
        for module in again:
            module.gradient_checkpointing = False
        yield
    finally:
        for weight, wanted in weights:
            weight.requires_grad_(wanted)
        for module in again:
            module.gradient_checkpointing = True

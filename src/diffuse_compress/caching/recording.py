"""What each unit adds in each step of real trajectories, as samples, and what each unit costs.

Errors of reuse are ratios of norms, and a few hundred elements tell them well enough: of every unit the same random
elements are kept in every step, so that any two steps can be compared afterwards without running the model again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from diffuse_compress.caching.observing import Observer, observed
from diffuse_compress.caching.schedule import Guidance, noise_levels
from diffuse_compress.caching.units import Unit
from diffuse_compress.calls import Call
from diffuse_compress.errors import ConfigError
from diffuse_compress.families.base import Streams
from diffuse_compress.runtime.run import Run
from diffuse_compress.runtime.steps import StepContext, current, outside_loops

__all__ = ["ATTENTION_ON_CPU", "LoopClock", "Profile", "Recorder", "Trajectory", "profile_units"]

DEFAULT_ELEMENTS = 1024
_REPEATS = 5


def _attention_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


ATTENTION_ON_CPU = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}
"""``custom_mapping`` of torch's ``FlopCounterMode``, which counts attention on GPUs only."""


@dataclass(frozen=True)
class Trajectory:
    """One call of a step along one run.

    Attributes:
        deltas: float32 [T, K, elements] on the CPU, samples of what each unit added; NaN in steps that were not seen.
        power: float32 [T, K], mean square of the streams that each unit was given.
        noise: float32 [T, K, elements], what rounded activations are to blame for in the same samples (``noise.py``),
            or None.
    """

    deltas: torch.Tensor
    power: torch.Tensor
    noise: torch.Tensor | None = None

    @cached_property
    def products(self) -> torch.Tensor:
        """Float64 [T, T, K]: inner products of what a unit added in two steps; 0 with a step that was not seen."""
        deltas = self.deltas.double().nan_to_num(0.0).transpose(0, 1)
        return torch.bmm(deltas, deltas.mT).permute(1, 2, 0).contiguous()

    @cached_property
    def seen(self) -> torch.Tensor:
        """Bool [T, K]: the unit was computed in that step."""
        return ~self.power.isnan()


_Rows = dict[tuple[Any, int], dict[int, tuple[torch.Tensor, torch.Tensor]]]
"""{(call of a step, step): {unit: (samples of what it adds, mean square of the streams)}}."""


class Recorder(Observer):
    """An observer that keeps samples; ``end_run`` after each trajectory.

    Attributes:
        trajectories: of all runs so far, each call of a step by itself.
        timesteps, levels: float32 [T] of the schedule, once a run is over.
        scheduler: class name.
        call: arguments of a forward in the middle of the first run.
        calls: forwards so far.
    """

    def __init__(self, units: Sequence[Unit], elements: int = DEFAULT_ELEMENTS) -> None:
        self.trajectories: list[Trajectory] = []
        self.timesteps = self.levels = torch.empty(0)
        self.scheduler = ""
        self.call: Call | None = None
        self.calls = 0
        self.batch = 0
        self._units, self._elements = len(units), elements
        self._indices: dict[tuple[int, torch.device], torch.Tensor] = {}
        self._rows: _Rows = {}
        self._exact: _Rows = {}
        self._is_exact = False
        self._keys: set[Any] = set()
        self._run: Run | None = None

    def unit(self, index: int, streams: Streams, compute: Callable[[], Streams]) -> Streams:
        """Computes, and keeps a few elements of the result."""
        deltas = compute()
        context = current()
        if context is not None and context.run is not None and context.row is not None and deltas:
            self._run = context.run
            taken = [self._sampled(delta) for _, delta in sorted(deltas.items())]
            given = [self._sampled(streams[name]) for name in sorted(deltas) if name in streams]
            rows = self._exact if self._is_exact else self._rows
            row = rows.setdefault((context.key, context.row), {})
            # A value is not added to streams: it counts by its own size.
            row[index] = torch.cat(taken), torch.cat(given or taken).square().mean()
        return deltas

    def watch(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Forward pre-hook of the model: keeps the arguments of one call to be profiled."""
        self.calls += 1
        context = current()
        middle = context is not None and context.run is not None and _is_middle(context)
        if self.call is None and middle:
            self.call = Call(args, kwargs)
            tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor) and value.ndim]
            self.batch = tensors[0].shape[0] if tensors else 0

    def compare(self, exact: Callable[[], Any]) -> None:
        """Of the first run: a step is over, and ``exact`` runs it once more without any noise."""
        context = current()
        if self._is_exact or self.trajectories or context is None or context.run is None or context.row is None:
            return
        self._is_exact = True
        try:
            exact()
        finally:
            self._is_exact = False

    def end_run(self) -> None:
        """A trajectory is over: its samples go to the CPU.

        Raises:
            ConfigError: no step was seen, or runs had schedules of different lengths.
        """
        if self._run is None or self._run.timesteps is None:
            raise ConfigError(
                "cache calibration: no step of the model was seen. It must be called in the loop of a diffusers "
                "scheduler, in this thread, and not be compiled as a whole (compile_repeated_blocks)."
            )
        timesteps = torch.tensor(self._run.values, dtype=torch.float32)
        if len(self.timesteps) not in (0, len(timesteps)):
            raise ConfigError(
                f"cache calibration: trajectories must have the same steps, got {len(self.timesteps)} and "
                f"{len(timesteps)}. Give all prompts the same num_inference_steps."
            )
        scheduler = self._run.scheduler()
        self.timesteps, self.levels = timesteps, noise_levels(scheduler, timesteps)
        self.scheduler = type(scheduler).__name__
        for key in dict.fromkeys(key for key, _ in self._rows):
            self.trajectories.append(self._trajectory(key))
        self._rows.clear()
        self._exact.clear()
        self._run = None

    @property
    def guidance(self) -> Guidance:
        """How many calls a step has, and whether one holds both halves (for one prompt at a time)."""
        if len(self._keys) > 1:
            return Guidance.SEQUENTIAL
        return Guidance.BATCHED if self.batch == 2 else Guidance.NONE

    @property
    def seen(self) -> torch.Tensor:
        """Bool [T]: steps in which this model runs (of two experts, each in some)."""
        return torch.stack([t.seen.any(dim=1) for t in self.trajectories]).any(dim=0)

    def _trajectory(self, key: Any) -> Trajectory:
        self._keys.add(key)
        deltas, power = self._table(self._rows, key)
        noise = deltas - self._table(self._exact, key)[0] if self._exact else None
        return Trajectory(deltas, power, noise)

    def _table(self, rows: _Rows, key: Any) -> tuple[torch.Tensor, torch.Tensor]:
        found_rows = {row: found for (other, row), found in rows.items() if other == key}
        width = max((len(taken) for found in found_rows.values() for taken, _ in found.values()), default=0)
        deltas = torch.full((len(self.timesteps), self._units, width), float("nan"))
        power = torch.full((len(self.timesteps), self._units), float("nan"))
        for row, found in found_rows.items():
            for index, (taken, given) in found.items():
                # Units of fewer streams fill up with zeros, which change no norm's ratio to itself.
                deltas[row, index] = 0.0
                deltas[row, index, : len(taken)] = taken.cpu()
                power[row, index] = given.cpu() * len(taken)
        return deltas, power

    def _sampled(self, value: torch.Tensor) -> torch.Tensor:
        place = value.numel(), value.device
        if place not in self._indices:
            generator = torch.Generator().manual_seed(value.numel())
            chosen = torch.randint(value.numel(), (min(self._elements, value.numel()),), generator=generator)
            self._indices[place] = chosen.to(value.device)
        return torch.take(value.detach(), self._indices[place]).float()


def _is_middle(context: StepContext) -> bool:
    total = context.run.num_steps if context.run is not None else None
    return context.step is not None and (total is None or context.step >= total // 2)


class LoopClock:
    """Wall time of a model's part of a loop: from its first call in a run to the end of its last.

    Attributes:
        seconds: of the run so far.
        calls: of the model.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self.calls = 0
        self._began: float | None = None

    @contextmanager
    def on(self, model: nn.Module) -> Iterator[LoopClock]:
        """Inside, runs are timed; set ``seconds`` and the rest back with :meth:`reset`."""
        handles = [
            model.register_forward_pre_hook(self._enter, prepend=True),
            model.register_forward_hook(self._leave),
        ]
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()

    def reset(self) -> None:
        """Before a run."""
        self.seconds, self.calls, self._began = 0.0, 0, None

    def stop(self) -> float:
        """Seconds from the first call to now, when the device has done what it was given."""
        if self._began is not None:
            _wait()
            self.seconds = time.perf_counter() - self._began
        return self.seconds

    def _enter(self, module: nn.Module, args: Any) -> None:
        if self._began is None:
            _wait()
            self._began = time.perf_counter()
        self.calls += 1

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        assert self._began is not None
        self.seconds = time.perf_counter() - self._began


@dataclass(frozen=True)
class Profile:
    """What one step costs.

    Attributes:
        cost_ms: float32 [K], of each unit.
        other_ms: of everything else in the model.
        flops: float64 [K].
    """

    cost_ms: torch.Tensor
    other_ms: float
    flops: torch.Tensor


class _Timer(Observer):
    """An observer that times units; on a GPU by its own clock, read at the end."""

    def __init__(self, count: int, device: torch.device) -> None:
        self.events: list[list[tuple[Any, Any]]] = [[] for _ in range(count)]
        self._device = device

    def clear(self) -> None:
        """Before a call."""
        for pairs in self.events:
            pairs.clear()

    def unit(self, index: int, streams: Streams, compute: Callable[[], Streams]) -> Streams:
        """Computes between two marks."""
        deltas: Streams = self.part(index, compute)
        return deltas

    def part(self, index: int, compute: Callable[[], Any]) -> Any:
        """Likewise."""
        before = _mark(self._device)
        output = compute()
        self.events[index].append((before, _mark(self._device)))
        return output


class _Counter(Observer):
    """An observer that counts floating point operations, of packed layers those of the dense ones."""

    def __init__(self, count: int) -> None:
        self.flops = [0] * count

    def unit(self, index: int, streams: Streams, compute: Callable[[], Streams]) -> Streams:
        """Computes under a counter."""
        deltas: Streams = self.part(index, compute)
        return deltas

    def part(self, index: int, compute: Callable[[], Any]) -> Any:
        """Likewise."""
        with FlopCounterMode(display=False, custom_mapping=ATTENTION_ON_CPU) as counter:
            output = compute()
        self.flops[index] += counter.get_total_flops()
        return output


@torch.no_grad()
@outside_loops()
def profile_units(
    model: nn.Module, units: Sequence[Unit], call: Call, *, repeats: int = _REPEATS, before_gates: bool = False
) -> Profile:
    """Time and count every unit of ``model``: its median share of a call, of the time of the fastest call.

    Args:
        model: as it will run (compiled blocks are timed compiled).
        units: of it.
        call: arguments of a typical forward.
        repeats: timed calls.
        before_gates: gates of branches are no part of their units.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    call.run(model)
    total = min(_between(*pair) for pair in [_timed(model, call, device) for _ in range(repeats)])
    timer, shares = _Timer(len(units), device), []
    with observed(model, units, timer, in_a_loop=False, before_gates=before_gates):
        for _ in range(repeats):
            timer.clear()
            whole = _between(*_timed(model, call, device))
            shares.append([sum(_between(*pair) for pair in pairs) / whole for pairs in timer.events])
    # Shares of one call are alike however busy the machine was in it.
    cost = total * torch.tensor(shares).median(dim=0).values
    counter = _Counter(len(units))
    with (
        observed(model, units, counter, in_a_loop=False, before_gates=before_gates),
        torch.compiler.set_stance("force_eager"),
    ):
        call.run(model)
    return Profile(cost, max(0.0, total - float(cost.sum())), torch.tensor(counter.flops, dtype=torch.float64))


def _timed(model: nn.Module, call: Call, device: torch.device) -> tuple[Any, Any]:
    before = _mark(device)
    call.run(model)
    return before, _mark(device)


def _mark(device: torch.device) -> Any:
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(before: Any, after: Any) -> float:
    """Milliseconds."""
    if isinstance(before, float):
        return 1000 * (after - before)
    after.synchronize()
    return float(before.elapsed_time(after))


def _wait() -> None:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()

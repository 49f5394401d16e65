"""Sampling loops of tiny denoisers, and a naive cache to compare with: one branch, one tensor, no merging."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import DDIMScheduler
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import tiny
from diffuse_compress.caching.schedule import Schedule
from diffuse_compress.caching.units import Unit, units_of
from diffuse_compress.runtime import steps
from diffuse_compress.runtime.blocks import BlockOption, disown, known_kind, own
from families.composition import extra_inputs

SAMPLES = ("hidden_states", "sample")


def inputs_of(model: nn.Module, **kwargs: Any) -> dict[str, Any]:
    return extra_inputs(model, tiny.inputs_for(model, **kwargs))


def loop(
    model: nn.Module,
    inputs: dict[str, Any],
    num_steps: int,
    *,
    scheduler: Any = None,
    start: int = 0,
    before: Callable[[int, dict[str, Any]], dict[str, Any]] = lambda step, given: given,
) -> list[torch.Tensor]:
    """Outputs of a loop in which the sample drifts by a fixed amount, so that no output depends on those before it."""
    scheduler = scheduler or DDIMScheduler()
    scheduler.set_timesteps(num_steps)
    name = next(name for name in SAMPLES if name in inputs)
    outputs = []
    with torch.no_grad():
        for step, t in enumerate(scheduler.timesteps[start:]):
            given = before(step, {**inputs, name: inputs[name] * (1 - 0.03 * step), "timestep": _like(inputs, t)})
            outputs.append(model(**given, return_dict=False)[0])
            scheduler.step(torch.zeros(1, 4), t, torch.zeros(1, 4))
    return outputs


def _like(inputs: dict[str, Any], t: torch.Tensor) -> torch.Tensor:
    before = inputs["timestep"]
    t = t.to(before.device)
    value = t / 1000 if before.is_floating_point() and float(before.max()) <= 1 else t
    return value.to(before.dtype).expand(before.shape) if before.is_floating_point() else t.expand(before.shape)


def schedule_for(model: nn.Module, mask: torch.Tensor, granularity: str = "block", **fields: Any) -> Schedule:
    units = units_of(model, granularity)
    return Schedule.full(units, len(mask), type(model).__name__, **fields).with_mask(mask, fields.get("coefficients"))


def random_mask(num_steps: int, num_units: int, reused: float = 0.5, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mask = (torch.rand(num_steps, num_units, generator=generator) > reused).to(torch.uint8)
    mask[0] = 1
    return mask


class Naive(BlockOption):
    """Every branch of one block by itself: what a schedule means, unit by unit."""

    name = "naive"

    def __init__(self, first: int, branches: list[str], schedule: Schedule, *, raw: bool = False) -> None:
        self.units = {name: first + index for index, name in enumerate(branches)}
        self.schedule, self.raw = schedule, raw
        self.history: dict[tuple[Any, int], list[dict[str, torch.Tensor]]] = {}

    def branch(self, block, branch, streams, conditioning, compute):
        context = steps.current()
        unit = self.units.get(branch.name, self.units.get(""))
        history = self.history.setdefault((context.key, unit, branch.name), [])
        if self.schedule.mask[context.row, unit] or not history:
            history.insert(0, branch.output(block, streams, conditioning) if self.raw else compute())
            deltas = history[0]
        else:
            coefficients = self.schedule.coefficients
            weights = [1.0] if coefficients is None else coefficients[context.row, unit].tolist()
            deltas = {
                name: sum(w * past[name] for w, past in zip(weights, history, strict=False)) for name in history[0]
            }
        return branch.gated(block, deltas, conditioning) if self.raw else deltas


class NaiveWhole:
    """The same of a module that no family describes and that returns ``hidden_states``, or both streams, text first."""

    def __init__(self, module: nn.Module, unit: int, schedule: Schedule) -> None:
        self.module, self.unit, self.schedule, self.kept = module, unit, schedule, {}
        self.signature = inspect.signature(type(module).forward)

    def __call__(self, *args, **kwargs):
        context = steps.current()
        given = list(self.signature.bind(self.module, *args, **kwargs).arguments.values())[1:]
        if self.schedule.mask[context.row, self.unit] or context.key not in self.kept:
            output = type(self.module).forward(self.module, *args, **kwargs)
            self.bare, values = not isinstance(output, tuple), output if isinstance(output, tuple) else (output,)
            self.kept[context.key] = [value - given[at] for value, at in zip(values, self.places(values), strict=True)]
            return output
        deltas = self.kept[context.key]
        values = tuple(given[at] + delta for delta, at in zip(deltas, self.places(deltas), strict=True))
        return values[0] if self.bare else values

    @staticmethod
    def places(values) -> list[int]:
        return [1, 0] if len(values) == 2 else [0]


@contextmanager
def naive_cache(model: nn.Module, schedule: Schedule, *, raw: bool = False) -> Iterator[None]:
    by_block: dict[str, list[tuple[int, Unit]]] = {}
    for index, unit in enumerate(schedule.units):
        by_block.setdefault(unit.block, []).append((index, unit))
    for name, members in by_block.items():
        module, first = model.get_submodule(name), members[0][0]
        if known_kind(module) is None:
            module.forward = NaiveWhole(module, first, schedule)
        else:
            own(module, Naive(first, [unit.branch for _, unit in members], schedule, raw=raw))
    steps.track(model)
    try:
        yield
    finally:
        steps.untrack(model)
        for name in by_block:
            disown(model.get_submodule(name), "naive")
            model.get_submodule(name).__dict__.pop("forward", None)


class Operations(TorchDispatchMode):
    """Names of the operations that run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))

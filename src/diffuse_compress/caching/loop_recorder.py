"""What schedulers were given along the sampling loops of a pipeline, and by which denoiser: a few elements of it."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from diffuse_compress.caching.outputs import ModelBoundary, aligned
from diffuse_compress.errors import ConfigError
from diffuse_compress.runtime.steps import current

__all__ = ["LoopRecorder", "Step"]

_ELEMENTS = 2048


@dataclass
class Step:
    """What the scheduler was given in a step, and by whom: samples of 1-D float64 on the CPU; ``row`` is its place in
    the scheduler's timesteps."""

    output: torch.Tensor
    sample: torch.Tensor
    seen: torch.Tensor | None
    component: str
    timestep: Any
    options: dict[str, Any]
    row: int = 0


class LoopRecorder:
    """Listens to the schedulers of a pipeline and to its denoisers.

    Attributes:
        trajectories: of each run so far, its steps.
        scheduler: a copy from before the first step of the first run.
        dimensions: of the samples.
    """

    def __init__(self) -> None:
        self.trajectories: list[list[Step]] = []
        self.scheduler: Any = None
        self.dimensions = 0
        self._steps: list[Step] = []
        self._last: tuple[str, torch.Tensor, int] | None = None
        self._indices: dict[int, torch.Tensor] = {}

    @contextlib.contextmanager
    def listening(self, pipe: Any, models: Mapping[str, nn.Module]) -> Iterator[None]:
        """Inside, runs are recorded. The schedulers, which are the caller's copies, stay of a class that listens."""
        handles = [
            model.register_forward_pre_hook(
                functools.partial(self._called, name, ModelBoundary(model)), with_kwargs=True
            )
            for name, model in models.items()
        ]
        for part in [part for name, part in pipe.components.items() if name in vars(pipe)]:
            if hasattr(part, "set_timesteps"):
                part.__class__ = _listening(type(part), self)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def end_run(self) -> None:
        """A trajectory is over.

        Raises:
            ConfigError: its steps are not those of one scheduler, one after the other, or not those of other runs.
        """
        steps, self._steps, self._last = self._steps, [], None
        rows = [step.row for step in steps]
        if not steps or any(row >= following for row, following in itertools.pairwise(rows)):
            raise ConfigError(
                "cache calibration: the steps of this loop cannot be followed by its scheduler. "
                'Use granularity="block".'
            )
        if self.trajectories and rows != self.rows:
            raise ConfigError(
                f"cache calibration: prompts must all run the same steps of the scheduler, got {self.rows} and {rows}. "
                'Give all of them the same strength, and end none early, or use granularity="block".'
            )
        self.trajectories.append(steps)

    @property
    def rows(self) -> list[int]:
        """Place of each step in the scheduler's timesteps, of which a run may leave out the first or the last."""
        return [step.row for step in self.trajectories[0]]

    @property
    def components(self) -> list[str]:
        """Name of the denoiser of each step."""
        return [step.component for step in self.trajectories[0]]

    def features(self) -> tuple[torch.Tensor, bool]:
        """([2T, 2T] float64, products of outputs and, after them, of the samples that the denoisers were given, mean
        over trajectories and elements; False if those samples are not known, and zero here)."""
        known = all(step.seen is not None for steps in self.trajectories for step in steps)
        total = torch.zeros(())
        for steps in self.trajectories:
            outputs = torch.stack([step.output for step in steps])
            inputs = torch.zeros_like(outputs)
            if known:
                inputs = torch.stack([step.seen for step in steps if step.seen is not None])
            rows = torch.cat([outputs, inputs])
            total = total + rows @ rows.T / (rows.shape[1] * len(self.trajectories))
        return total, known

    def _called(self, name: str, boundary: ModelBoundary, module: nn.Module, args: Any, kwargs: Any) -> None:
        value, context = boundary.streams(args, kwargs).get("input"), current()
        if context is not None and context.row is not None and value is not None:
            self._last = name, value, context.row

    def step(self, scheduler: Any, output: Any, timestep: Any, sample: Any, options: dict[str, Any]) -> None:
        """The scheduler is about to take a step."""
        if self._last is None or not isinstance(output, torch.Tensor) or not isinstance(sample, torch.Tensor):
            return
        if self.scheduler is None:
            self.scheduler, self.dimensions = _on_cpu(scheduler), sample.ndim
        moved = aligned(output, sample.shape)
        if moved is None:
            return
        # Steps that follow without a call, or with one of a model that gets no schedule, are none of its own.
        (component, given, row), self._last = self._last, None
        seen = aligned(given, torch.Size([given.shape[0], *sample.shape[1:]]))
        self._steps.append(
            Step(
                self._taken(moved),
                self._taken(sample),
                None if seen is None or seen.shape[0] < sample.shape[0] else self._taken(seen[: sample.shape[0]]),
                component,
                timestep.cpu() if isinstance(timestep, torch.Tensor) else timestep,
                {name: _plain(value) for name, value in options.items() if name not in ("generator", "return_dict")},
                row,
            )
        )

    def _taken(self, value: torch.Tensor) -> torch.Tensor:
        size = value.numel()
        if size not in self._indices:
            generator = torch.Generator().manual_seed(size)
            self._indices[size] = torch.randint(size, (min(_ELEMENTS, size),), generator=generator)
        return torch.take(value.detach(), self._indices[size].to(value.device)).double().cpu()


def _plain(value: Any) -> Any:
    """An argument of a step, where it is run over a few elements: tensors are of all of them, and left out."""
    if not isinstance(value, torch.Tensor):
        return value
    return None if value.ndim else value.cpu()


def _on_cpu(scheduler: Any) -> Any:
    """A copy that steps samples on the CPU; flow matching's sigmas may lie on a GPU."""
    found = copy.deepcopy(scheduler)
    found.__class__ = type(scheduler).__mro__[1]
    for name, value in vars(found).items():
        if isinstance(value, torch.Tensor):
            setattr(found, name, value.cpu())
    return found


def _listening(stock: type, recorder: LoopRecorder) -> type:
    original: Any = stock.step  # type: ignore[attr-defined]
    signature = inspect.signature(original)

    @functools.wraps(original)
    def step(scheduler: Any, *args: Any, **kwargs: Any) -> Any:
        # By name, since some take something else between these (CogVideoX's).
        options = dict(signature.bind(scheduler, *args, **kwargs).arguments)
        options |= options.pop("kwargs", {})
        output, timestep, sample = (options.pop(name, None) for name in ("model_output", "timestep", "sample"))
        options.pop(next(iter(signature.parameters)))
        recorder.step(scheduler, output, timestep, sample, options)
        return original(scheduler, *args, **kwargs)

    return type(stock.__name__, (stock,), {"step": step, "__module__": stock.__module__})

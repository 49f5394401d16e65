"""The rows of a schedule before any run: from a loop of the pipeline in which the denoisers compute nothing.

What the denoisers are called with decides: a scheduler may shift its timesteps by the size of the picture, and a
pipeline may scale and cast them before the call.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from diffuse_compress.errors import ModelStateError
from diffuse_compress.logging import get_logger
from diffuse_compress.pipeline_call import from_noise, untouched
from diffuse_compress.temporal.model_call import arguments_of, single_timestep
from diffuse_compress.temporal.table import TemporalTable

__all__ = ["LoopCalls", "calls_of_schedule", "loop_calls", "prepare_schedule"]

_LOGGER = get_logger(__name__)


@dataclass
class LoopCalls:
    """How a pipeline calls one of its denoisers in a loop.

    Attributes:
        inputs: arguments of the first call, by name.
        timesteps: of all calls, as they were given; None where one of them cannot be told.
    """

    inputs: dict[str, Any] = field(default_factory=dict)
    timesteps: list[float | None] = field(default_factory=list)


def loop_calls(pipe: Any, models: Mapping[str, nn.Module], arguments: Mapping[str, Any]) -> dict[str, LoopCalls]:
    """Run ``pipe`` once and tell how it calls each of ``models``, which run in their first call only.

    Args:
        pipe: a diffusers pipeline; not changed.
        models: its denoisers, by name, of which nothing follows the steps (they would miss them).
        arguments: of ``pipe(...)``.
    """
    found = {name: LoopCalls() for name in models}
    with contextlib.ExitStack() as stack:
        stack.enter_context(untouched(pipe))
        for name, model in models.items():
            stack.enter_context(_answering(model, found[name]))
        pipe(**from_noise(pipe, arguments, 0))
    return found


def calls_of_schedule(
    pipe: Any, models: Mapping[str, nn.Module], steps: int | None, arguments: Mapping[str, Any]
) -> dict[str, LoopCalls]:
    """:func:`loop_calls` for a number of steps, None for the pipeline's own; {} if the pipeline refuses."""
    try:
        return loop_calls(pipe, models, {**arguments, **({} if steps is None else {"num_inference_steps": steps})})
    except Exception as error:  # whatever it refuses: the same rows are made when it runs
        what = "its own number of" if steps is None else str(steps)
        _left_to_the_first_run(f"{type(pipe).__name__}, {what} steps", error)
        return {}


def prepare_schedule(
    table: TemporalTable,
    calls: LoopCalls,
    scheduler: str,
    kept: Mapping[str, Mapping[float, bool]] | None = None,
) -> None:
    """Build the rows of the timestep alone for these calls, or those of them that are kept (``TemporalTable.prepare``);
    what cannot be built is left to the first run."""
    known = [value for value in calls.timesteps if value is not None]
    name = type(table.model).__name__
    if not known or len(known) != len(calls.timesteps):
        return _left_to_the_first_run(
            name, f"{len(known)} of its {len(calls.timesteps)} calls have one timestep for all"
        )
    try:
        table.prepare(calls.inputs, torch.tensor(known, dtype=torch.float64), scheduler, kept)
    except ModelStateError as error:
        _left_to_the_first_run(name, error)
    return None


def _left_to_the_first_run(what: str, why: Any) -> None:
    _LOGGER.warning("%s: temporal tables are made in the first run: %s", what, why)


@contextlib.contextmanager
def _answering(model: nn.Module, calls: LoopCalls) -> Iterator[None]:
    """Inside, ``model`` answers with the output of its first call."""
    names, timestep = arguments_of(model)
    own, outputs = model.__dict__.get("forward"), list[Any]()
    stock = model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        inputs = {**dict(zip(names, args, strict=False)), **kwargs}
        given = inputs.get(timestep)
        each = isinstance(given, torch.Tensor) and given.ndim > 1  # tokens have timesteps of their own
        calls.timesteps.append(None if each else single_timestep(given))
        if not outputs:
            calls.inputs.update(inputs)
            outputs.append(stock(*args, **kwargs))
        return outputs[0]

    model.forward = forward
    try:
        yield
    finally:
        if own is None:
            del model.__dict__["forward"]
        else:
            model.forward = own

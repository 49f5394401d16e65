"""The denoiser as one unit: what it returns in a step that is left out, from what it returned before.

Nothing of the model runs in such a step. What is kept are outputs and the samples they were computed from, a few of the
smallest tensors there are. The forecast may use the sample of the step itself, too, which costs nothing and tells where
the trajectory has got to since: see ``whole_steps.py`` for how its weights are found.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from diffuse_compress.caching.call import NAME, NOT_RETURNED, Call
from diffuse_compress.caching.compiler import Segment
from diffuse_compress.caching.store import Signature, signature
from diffuse_compress.families.base import Streams
from diffuse_compress.families.boundary import Boundary
from diffuse_compress.runtime.stats import Reason

__all__ = ["ModelBoundary", "OutputCall", "aligned"]

Form = tuple[type, str | None]
"""How a model returned its output: the class, and the field of it; None for a tuple."""


def aligned(value: torch.Tensor, shape: torch.Size) -> torch.Tensor | None:
    """The part of a model's input that its output is about, in the output's shape; None if that cannot be told.

    Inpainting and image-to-video pipelines append channels, models of learned variance return some more (here 0).
    """
    if value.ndim != len(shape):
        return None
    differing = [axis for axis in range(value.ndim) if value.shape[axis] != shape[axis]]
    if not differing:
        return value
    if len(differing) > 1 or differing == [0]:
        return None
    axis = differing[0]
    missing = shape[axis] - value.shape[axis]
    if missing < 0:
        return value.narrow(axis, 0, shape[axis])
    return torch.cat([value, value.new_zeros(*shape[:axis], missing, *shape[axis + 1 :])], dim=axis)


class ModelBoundary(Boundary):
    """The sample among the arguments of a denoiser, and its output among what it returns."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.layout = ()
        self._name = next(name for name, position in self.arguments.items() if position == 0)

    def streams(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Streams:
        """{"input": the sample}, nothing if it is no tensor."""
        found = super().streams(args, kwargs)
        return {"input": found[self._name]} if self._name in found else {}

    @staticmethod
    def form(output: Any) -> Form | None:
        """How the output was returned; None if there is more than one tensor, or none."""
        if isinstance(output, torch.Tensor):
            return torch.Tensor, None
        if type(output) is tuple:
            return (tuple, None) if len(output) == 1 and isinstance(output[0], torch.Tensor) else None
        fields = output if isinstance(output, dict) else {}
        given = {name: value for name, value in fields.items() if value is not None}
        if len(given) != 1 or not isinstance(next(iter(given.values())), torch.Tensor):
            return None
        return type(output), next(iter(given))

    @staticmethod
    def value(output: Any) -> torch.Tensor | None:
        """The output itself, if there is one."""
        form = ModelBoundary.form(output)
        if form is None:
            return None
        if form[1] is not None:
            output = output[form[1]]
        value: torch.Tensor = output[0] if type(output) is tuple else output
        return value

    @staticmethod
    def formed(value: torch.Tensor, form: Form) -> Any:
        """An output in the form of another."""
        cls, field = form
        if cls is torch.Tensor:
            return value
        return (value,) if field is None else cls(**{field: value})


class OutputCall(Call):
    """A call of a denoiser that is computed or left out as a whole."""

    def at(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any], run: Callable[..., Any]) -> Any:
        """The denoiser is called: what it returns."""
        boundary = self.cache.boundaries[index]
        assert isinstance(boundary, ModelBoundary)
        streams = boundary.streams(args, kwargs)
        now = signature(streams)
        # Of which size is what is kept an output tells; until there is one, nothing is kept.
        output = run(*args, **kwargs) if self._program is None else None
        sizes = now if output is None else signature(_both(streams, boundary.value(output)))
        plan = self._planned(sizes).steps[self.row].sites[index]
        number = plan.segments[0]
        if number is not None and self._decide(number, now):
            return self._forecast(self._segment(number), streams)
        if output is None:
            output = run(*args, **kwargs)
        atom = self._keep(plan, 0, False)
        if atom is not None:
            value = boundary.value(output)
            self.context.storage[NAME, "form"] = boundary.form(output), None if value is None else value.dtype
            if number is not None:
                self._stand_ins.add(atom)
            self._hand(atom, self._kept_of(streams, value), now)
        return output

    def _kept_of(self, streams: Streams, value: torch.Tensor | None) -> Streams | None:
        """What is kept of a step, the sample only if a forecast asks for it; pipelines may write to both."""
        assert self._program is not None
        wanted = {} if self._program.schedule.input_coefficients is None else streams
        return {name: kept.clone() for name, kept in _both(wanted, value).items()} or None

    @property
    def _stand_ins(self) -> set[int]:
        """Atoms that were computed in another step than the forecast was fitted to, since theirs was not seen."""
        found: set[int] = self.context.storage.setdefault((NAME, "stand-ins", self.context.key), set())
        return found

    def _why_not(self, segment: Segment, streams: Signature) -> Reason | None:
        return super()._why_not(segment, streams) if streams else NOT_RETURNED

    def _forecast(self, segment: Segment, streams: Streams) -> Any:
        assert self._program is not None
        table = self._program.schedule.input_coefficients
        wanted = [atom for atom, _ in segment.terms]
        complete = all(atom in self._kept and atom not in self._stand_ins for atom in wanted)
        terms = self._terms(segment)
        if not complete:
            terms = [(kept, 1.0) for kept, _ in terms[:1]]
        like = terms[0][0]["output"]
        # Weights differ in sign, and what they cancel would be lost in half precision.
        total = sum((kept["output"].float() * weight for kept, weight in terms[1:]), like.float() * terms[0][1])
        if complete and table is not None:
            row = table[self.row].tolist()
            inputs = [aligned(streams["input"], like.shape), *(kept.get("input") for kept, _ in terms)]
            for value, weight in zip(inputs, row, strict=False):
                if value is not None and weight != 0.0:
                    total = total + value.float() * weight
        form, dtype = self.context.storage[NAME, "form"]
        return ModelBoundary.formed(total.to(dtype), form)


def _both(streams: Streams, output: torch.Tensor | None) -> Streams:
    """An output and the sample that it was computed from, as far as there are any."""
    if output is None:
        return {}
    sample = aligned(streams["input"], output.shape) if streams else None
    return {"output": output, **({} if sample is None else {"input": sample})}

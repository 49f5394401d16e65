"""Input scales for every step of a schedule (finite-set calibration), put into the layers before each call.

Source: Huang et al. 2023, arXiv 2311.16503 (finite-set calibration): timesteps take finitely many values, so every
activation quantizer has a scale and a zero point for each. Differs: a root hook copies one row of a table into what the
layers hold, found on the device by the call's timestep, so that kernels, compiled blocks and CUDA graphs read it where
they always do, and nothing waits for the device. Between calls, and in all that no row is known for, the layers hold
the ranges that cover all steps.
"""

from __future__ import annotations

import bisect
import itertools
import numbers
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from diffuse_compress.components import groups_on_disk, unwrap
from diffuse_compress.errors import CheckpointError, ModelStateError
from diffuse_compress.quantization.layer_base import QuantizedLayer
from diffuse_compress.runtime import steps
from diffuse_compress.runtime.stats import Reason
from diffuse_compress.temporal.config import Scope
from diffuse_compress.temporal.model_call import arguments_of, bring_weights
from diffuse_compress.temporal.reasons import OFFLOADED, TWO_THREADS, UNKNOWN_FORM
from diffuse_compress.temporal.turns import Turns

__all__ = [
    "CONSUMER",
    "StepQParams",
    "StepScales",
    "at_timestep",
    "attach_step_scales",
    "detach_step_scales",
    "static_layers",
    "step_scales_of",
]

CONSUMER = "step scales"
_SCALE, _ZERO_POINT = "input_scale", "input_zero_point"
_KEYS = ("timesteps", "scale", "zero_point")


def static_layers(model: nn.Module) -> dict[str, QuantizedLayer]:
    """Layers of a model whose inputs have a static scale, by name."""
    found = ((name, module) for name, module in unwrap(model).named_modules() if isinstance(module, QuantizedLayer))
    return {name: layer for name, layer in found if layer.input_scale is not None}


@dataclass(frozen=True)
class StepQParams:
    """Scale and zero point of layers' inputs at the timesteps of a schedule.

    Attributes:
        scope: which layers were asked for.
        timesteps: as the model is given them, ascending.
        layers: qualified names.
        asymmetric: those of them whose inputs have a zero point.
        scale: fp32 [layers, timesteps].
        zero_point: int8 [asymmetric layers, timesteps].
    """

    scope: Scope
    timesteps: tuple[float, ...]
    layers: tuple[str, ...]
    asymmetric: tuple[str, ...]
    scale: torch.Tensor
    zero_point: torch.Tensor

    @property
    def nbytes(self) -> int:
        """Of scales and zero points."""
        return self.scale.nbytes + self.zero_point.nbytes

    def describe(self) -> str:
        """In a few words."""
        return f"input scales of {len(self.layers)} layers at {len(self.timesteps)} timesteps"

    def facts(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "scope": self.scope.value,
            "layers": list(self.layers),
            "timesteps": list(self.timesteps),
            "bytes": self.nbytes,
        }

    def to_tensors(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """(tensors by name, what they are, JSON-able), for :meth:`from_tensors`."""
        timesteps = torch.tensor(self.timesteps, dtype=torch.float64)
        meta = {"scope": self.scope.value, "layers": list(self.layers), "asymmetric": list(self.asymmetric)}
        return {"timesteps": timesteps, "scale": self.scale, "zero_point": self.zero_point}, meta

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, torch.Tensor], meta: Mapping[str, Any]) -> StepQParams:
        """Read :meth:`to_tensors`. Raises CheckpointError if tensors are missing or do not fit their names."""
        layers, asymmetric = tuple(meta["layers"]), tuple(meta["asymmetric"])
        count = tensors["timesteps"].numel() if "timesteps" in tensors else 0
        shapes = {"timesteps": (count,), "scale": (len(layers), count), "zero_point": (len(asymmetric), count)}
        for key in _KEYS:
            found = tuple(tensors[key].shape) if key in tensors else None
            if found != shapes[key] or not count:
                raise CheckpointError(
                    f"step scales: the tensor {key!r} must be of {list(shapes[key])}, found {found}. The "
                    "checkpoint was changed; compress the dense model again."
                )
        timesteps = tuple(tensors["timesteps"].tolist())
        return cls(Scope(meta["scope"]), timesteps, layers, asymmetric, tensors["scale"], tensors["zero_point"])


class StepScales:
    """The step scales of one model; made by :func:`attach_step_scales`.

    Row 0 of its tables is what the layers hold between calls, row ``i`` is timestep ``i - 1``.

    Attributes:
        model: whose.
        qparams: of the layers.
    """

    def __init__(self, model: nn.Module, qparams: StepQParams) -> None:
        self.model = model
        self.qparams = qparams
        found = static_layers(model)
        self._slots = [
            *((found[name], _SCALE) for name in qparams.layers),
            *((found[name], _ZERO_POINT) for name in qparams.asymmetric),
        ]
        self._bounds = _bounds(qparams.timesteps)
        self._names, self._timestep = arguments_of(model)
        self._turns = Turns()
        self._row: int | torch.Tensor = 0
        self._stamps: list[Any] = []
        self._out_of_reach: set[int] = set()
        self._tables: list[tuple[list[int], torch.Tensor]] = []
        self._bounds_there = torch.zeros(0)

    def install(self) -> None:
        """Give the model its hooks."""
        steps.track(self.model, steps.Consumer(CONSUMER, saves=False))
        self.model.register_forward_pre_hook(self.before, with_kwargs=True)
        self.model.register_forward_hook(self.after, always_call=True)
        self.model.register_state_dict_pre_hook(self.before_state_dict)
        self.model.register_load_state_dict_pre_hook(self.before_state_dict)

    def remove(self) -> None:
        """Leave the model as it was found."""
        self.rest()
        steps.remove_hooks(self.model, self)
        for hooks in (self.model._state_dict_pre_hooks, self.model._load_state_dict_pre_hooks):
            for key in [key for key, hook in hooks.items() if _owner(hook) is self]:
                del hooks[key]
        steps.untrack(self.model, CONSUMER)

    # --- a call ---------------------------------------------------------------------------------------------------

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook: let the layers hold the row of this call's timestep."""
        if torch.compiler.is_compiling():
            return
        self.rest()  # an interrupted call has left its row
        given = {**dict(zip(self._names, args, strict=False)), **kwargs}.get(self._timestep)
        reason = self._why_not(given)
        if reason is None:
            device = next(
                (x.device for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor) and x.ndim > 1), None
            )
            if device is not None:
                bring_weights(self.model, device)
            self._hold(self.place(given))
            reason = OFFLOADED if self._out_of_reach else None
        context = steps.current()
        if context is not None and context.tracker is steps.tracker_of(module):
            if reason is None:
                context.hit(CONSUMER, len(self.qparams.layers))
            else:
                context.miss(CONSUMER, reason, len(self.qparams.layers))

    def after(self, module: nn.Module, args: Any, output: Any) -> None:
        """Forward hook, called after an exception too."""
        if not torch.compiler.is_compiling():
            self.rest()
            self._turns.leave()

    def before_state_dict(self, module: nn.Module, *args: Any) -> None:
        """State dicts hold, and are loaded over, what the layers hold between calls."""
        self.rest()

    def rest(self) -> None:
        """Let the layers hold what they hold between calls."""
        if self._is_away:
            self._hold(0)

    @contextmanager
    def at(self, timestep: Any) -> Iterator[None]:
        """Inside, the layers hold the row of a timestep, for parts of the model that run without its hooks."""
        before = self._row
        self._hold(self.place(timestep))
        try:
            yield
        finally:
            self._hold(before)

    def place(self, timestep: Any) -> int | torch.Tensor:
        """Row of a timestep: of the nearest one that is known, 0 beyond both ends and where samples (or tokens) of one
        call have several; an int64 scalar tensor if it stands on an accelerator."""
        if isinstance(timestep, torch.Tensor) and timestep.device.type != "cpu":
            if self._bounds_there.device != timestep.device:
                self._bounds_there = torch.tensor(self._bounds, dtype=torch.float32, device=timestep.device)
            return _row_there(timestep, self._bounds_there)
        values = timestep.detach().reshape(-1).tolist() if isinstance(timestep, torch.Tensor) else [timestep]
        places = {bisect.bisect_left(self._bounds, float(value)) % len(self._bounds) for value in values}
        return places.pop() if len(places) == 1 else 0

    def _why_not(self, given: Any) -> Reason | None:
        if not self._turns.enter():
            return TWO_THREADS
        if torch.is_grad_enabled():
            return steps.GRADIENT  # backward needs what forward has read
        return None if isinstance(given, torch.Tensor | numbers.Real) else UNKNOWN_FORM

    @property
    def _is_away(self) -> bool:
        return isinstance(self._row, torch.Tensor) or self._row != 0

    def _hold(self, row: int | torch.Tensor) -> None:
        with torch.inference_mode(False), torch.no_grad():
            held = self._held
            self._look(held)
            for slots, table in self._tables:
                if isinstance(row, int):
                    values = table[row]
                else:
                    values = table.index_select(0, row.to(table.device).reshape(1))[0]
                torch._foreach_copy_([held[slot] for slot in slots], values.split(1))
            self._row = row
            self._stamps = _stamps(held)

    @property
    def _held(self) -> list[torch.Tensor]:
        return [layer._parameters[name] for layer, name in self._slots]  # type: ignore[misc]

    def _look(self, held: list[torch.Tensor]) -> None:
        """Make the tables again if the layers were moved, loaded or written to since the last time, or copied."""
        if self._stamps and _stamps(held) == self._stamps:
            return
        count = len(self.qparams.layers)
        from_disk = {id(tensor) for _, tensors in groups_on_disk(self.model) for tensor in tensors}
        self._out_of_reach = {slot for slot, p in enumerate(held) if p.is_meta or id(p) in from_disk}
        if self._is_away and self._tables:
            # Moved in the middle of a call: what they hold is not what they hold between calls.
            before = {slot: table[0, i] for slots, table in self._tables for i, slot in enumerate(slots)}
            between = {slot: value for slot, value in before.items() if slot not in self._out_of_reach}
        else:
            between = {slot: p.detach()[0] for slot, p in enumerate(held) if slot not in self._out_of_reach}
        self._tables = []
        for device in dict.fromkeys(p.device for p in held if not p.is_meta):
            for first, end, known in ((0, count, self.qparams.scale), (count, len(held), self.qparams.zero_point)):
                slots = [slot for slot in range(first, end) if held[slot].device == device and slot in between]
                if slots:
                    rows = known[[slot - first for slot in slots]].t().to(device)
                    now = torch.stack([between[slot].to(device) for slot in slots])
                    self._tables.append((slots, torch.cat([now[None], rows])))


def attach_step_scales(model: nn.Module, qparams: StepQParams) -> StepScales:
    """Let the layers of ``model`` have an input scale for every step.

    Args:
        model: a denoiser of diffusers whose layers are quantized.
        qparams: of layers with static inputs.

    Raises:
        ModelStateError: the model has step scales, its weights are not loaded, or it has no such layers.
        MissingDependencyError: diffusers is not installed.
    """
    model = unwrap(model)
    if step_scales_of(model) is not None:
        raise ModelStateError(f"{type(model).__name__} has step scales; call detach_step_scales(model) first.")
    found = static_layers(model)
    for name in qparams.layers:
        layer = found.get(name)
        if layer is None or (layer.input_zero_point is not None) != (name in qparams.asymmetric):
            raise ModelStateError(
                f"{type(model).__name__}: step scales are of other layers than it has: {name} has no static input of "
                "that kind. Calibrate them for this model."
            )
        if layer.input_scale is not None and (layer.input_scale.is_meta or layer.input_scale.is_inference()):
            raise ModelStateError(
                f"{type(model).__name__}: step scales need loaded weights that can be written to, found "
                f"{name}.input_scale on {layer.input_scale.device}. Attach before offloading, outside of "
                "torch.inference_mode()."
            )
    scales = StepScales(model, qparams)
    scales.install()
    return scales


def detach_step_scales(model: nn.Module) -> None:
    """Leave the layers with what they hold between calls; without step scales, nothing happens."""
    scales = step_scales_of(model)
    if scales is not None:
        scales.remove()


@contextmanager
def at_timestep(model: nn.Module, timestep: Any) -> Iterator[None]:
    """Inside, parts of ``model`` that are run without its hooks have the input scales of a timestep, if it has any."""
    scales = step_scales_of(model)
    if scales is None:
        yield
        return
    with scales.at(timestep):
        yield


def step_scales_of(model: nn.Module) -> StepScales | None:
    """The step scales whose hooks a model carries, or None."""
    return steps.hook_owner(model, StepScales)


def _bounds(timesteps: tuple[float, ...]) -> list[float]:
    """T + 1 numbers: ``bounds[i] < t <= bounds[i + 1]`` is nearest to timestep i. Beyond an end, the row of that end
    holds as far as its neighbour is on the other side."""
    if len(timesteps) == 1:
        near = max(1e-6, 1e-6 * abs(timesteps[0]))
        return [timesteps[0] - near, timesteps[0] + near]
    between = [(low + high) / 2 for low, high in itertools.pairwise(timesteps)]
    return [2 * timesteps[0] - timesteps[1], *between, 2 * timesteps[-1] - timesteps[-2]]


def _row_there(timestep: torch.Tensor, bounds: torch.Tensor) -> torch.Tensor:
    """Row of a timestep on its device, int64 scalar: nothing is read from there."""
    low, high = (torch.bucketize(timestep.detach().reshape(-1).float(), bounds) % bounds.numel()).aminmax()
    return low * (low == high)


def _stamps(held: list[torch.Tensor]) -> list[Any]:
    return [(id(p), p.data_ptr(), p._version) for p in held]


def _owner(hook: Any) -> Any:
    return getattr(getattr(hook, "hook", hook), "__self__", None)

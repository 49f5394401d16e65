"""Finite-set calibration: the ranges of static inputs at every timestep of a schedule.

Source: Huang et al. 2023, arXiv 2311.16503. Differs: the range of a step is that of all values which it showed, chosen
as the one over all steps is (``quantization/observers.py``), and not a running mean that depends on their order; it
comes from one trajectory for each item instead of one for each item and step. Inputs of the timestep path follow from
the timesteps and conditions, and no sample is needed for them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from diffuse_compress.calibration.engine import calibrating
from diffuse_compress.calibration.samples import Sample
from diffuse_compress.errors import ModelStateError
from diffuse_compress.quantization.layer_base import QuantizedLayer
from diffuse_compress.quantization.observers import Observer, ObserverConfig
from diffuse_compress.runtime.steps import outside_loops
from diffuse_compress.temporal.config import Scope
from diffuse_compress.temporal.layout import Layout
from diffuse_compress.temporal.model_call import arguments_of, single_timestep
from diffuse_compress.temporal.prepare import LoopCalls
from diffuse_compress.temporal.step_scales import StepQParams
from diffuse_compress.temporal.tiar import observe_loop

__all__ = ["StepRanges", "see_path", "see_samples"]


class StepRanges:
    """Collects what layers are given at each timestep.

    Args:
        layers: with static inputs, by qualified name.
        observer: chooses the ranges; "mse" and "percentile" keep 64 KiB for each layer and timestep.
    """

    def __init__(self, layers: Mapping[str, QuantizedLayer], observer: ObserverConfig | None = None) -> None:
        self.layers = dict(layers)
        self._observer = observer or ObserverConfig()
        self._seen: dict[float, dict[str, Observer]] = {}

    @property
    def timesteps(self) -> tuple[float, ...]:
        """Those at which something was seen, ascending."""
        return tuple(sorted(self._seen))

    def update(self, name: str, timestep: float, x: torch.Tensor) -> None:
        """A layer's input at a timestep, as the layer is given it."""
        layer, seen = self.layers[name], self._seen.setdefault(timestep, {})
        if x.numel() and layer.scheme.activation is not None:
            if name not in seen:
                seen[name] = self._observer.make(layer.scheme.activation)
            seen[name].update(layer.prepared_input(x))

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Inside, calls of ``model`` with one timestep for all are seen by the layers, wherever they are made."""
        order, timestep = arguments_of(model)
        now: list[float | None] = [None]

        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            now[0] = single_timestep({**dict(zip(order, args, strict=False)), **kwargs}.get(timestep))

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            now[0] = None

        def see(name: str) -> Any:
            def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
                if now[0] is not None and args:
                    self.update(name, now[0], args[0])

            return hook

        with calibrating(model), torch.no_grad():
            handles = [layer.register_forward_pre_hook(see(name)) for name, layer in self.layers.items()]
            handles += [
                model.register_forward_pre_hook(enter, with_kwargs=True),
                model.register_forward_hook(leave, always_call=True),
            ]
            try:
                yield
            finally:
                for handle in handles:
                    handle.remove()

    def qparams(self, scope: Scope) -> StepQParams:
        """Scale and zero point of every layer at every timestep; where nothing was seen of it, those that it has.

        Raises:
            ModelStateError: nothing was seen at all.
        """
        timesteps = self.timesteps
        names = [name for name in self.layers if any(name in seen for seen in self._seen.values())]
        if not names:
            raise ModelStateError(
                f'finite-set calibration (scope="{scope.value}"): no layer with a static input was reached with one '
                "timestep for all samples. Give calibration items that the pipeline takes, or leave scope= out."
            )
        asymmetric = [name for name in names if self.layers[name].input_zero_point is not None]
        scale = torch.stack([_held(self.layers[name].input_scale).repeat(len(timesteps)) for name in names])
        zeros = [_held(self.layers[name].input_zero_point).repeat(len(timesteps)) for name in asymmetric]
        zero_point = torch.stack(zeros) if zeros else torch.zeros(0, len(timesteps), dtype=torch.int8)
        row, zero_row = ({name: number for number, name in enumerate(some)} for some in (names, asymmetric))
        for column, timestep in enumerate(timesteps):
            for name, observer in self._seen[timestep].items():
                found = observer.qparams()
                scale[row[name], column] = found.scale.item()
                if found.zero_point is not None:
                    zero_point[zero_row[name], column] = found.zero_point.item()
        return StepQParams(scope, timesteps, tuple(names), tuple(asymmetric), scale, zero_point)


def see_path(
    ranges: StepRanges, layout: Layout, model: nn.Module, loops: Sequence[LoopCalls], timesteps: Sequence[float]
) -> None:
    """What the layers of the timestep path are given at these timesteps.

    Args:
        ranges: of the layers.
        layout: of ``model``.
        model: whose layers are quantized.
        loops: calls of the model, one for each set of conditions.
        timesteps: as the model is given them.
    """
    for calls in loops:
        inputs = observe_loop(layout, model, calls, timesteps).inputs
        for name in ranges.layers.keys() & inputs.keys():
            for timestep, x in zip(timesteps, inputs[name].unflatten(0, (len(timesteps), -1)), strict=True):
                ranges.update(name, timestep, x)


def see_samples(ranges: StepRanges, model: nn.Module, samples: Sequence[Sample], device: torch.device) -> None:
    """What the layers are given when recorded calls are made again."""
    with ranges.watching(model), outside_loops():
        for sample in samples:
            call = sample.call.copied(device)
            model(*call.args, **call.kwargs)


def _held(parameter: torch.Tensor | None) -> torch.Tensor:
    assert parameter is not None
    return parameter.detach().cpu()

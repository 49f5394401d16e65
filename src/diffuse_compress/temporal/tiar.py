"""Temporal information aware reconstruction (TIAR): codes of the timestep path learned on the timesteps.

Source: Huang et al. 2023, arXiv 2311.16503: over the rounding of all layers of the temporal information block, head h
and projections g_i,

    minimise    sum_i sum_t | g_i(h(t)) - ghat_i(hhat(t)) |^2,

where nothing that depends on a sample is looked at, so that nothing of it can be overfitted. The block is learned as
any other is (``calibration/engine.py``), with AdaRound, and its calls are timesteps.

Deviations: a layer is learned once those that it reads are, on what these became and towards what it gives in the
unchanged block (``quantization/algorithms/adaround.py``), so that the projections make good what the head lost; the
authors learn all at once by gradients. Measured on emoji_ddim, all of it in 4 bits, the sum above: 307 rounded to
nearest, 37 after 600 steps of all at once from there, 1.1 layer by layer after 300; all at once from there on found
nothing better, at rates of 0.003 to 0.1. The timesteps are a dense grid of all that the model was trained with, not
those of one schedule: with fewer of them than a layer has inputs, codes can be right there and wrong in between. Layers
that read a condition too are learned on a few conditions, each at its share of the timesteps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from diffuse_compress.calibration.engine import Quantized, calibrate_block, quantized_layer
from diffuse_compress.calls import Call as Arguments
from diffuse_compress.errors import ModelStateError
from diffuse_compress.families.base import Dependence
from diffuse_compress.quantization.algorithms.adaround import AdaRoundConfig
from diffuse_compress.quantization.algorithms.block import BlockWork, LayerWork
from diffuse_compress.quantization.algorithms.rtn import RTNConfig
from diffuse_compress.quantization.scheme import Scheme
from diffuse_compress.temporal.block import TemporalBlock, edges_of, feature_layers, given_of
from diffuse_compress.temporal.build import Call
from diffuse_compress.temporal.features import Features, observe
from diffuse_compress.temporal.layout import Layout
from diffuse_compress.temporal.model_call import arguments_of
from diffuse_compress.temporal.prepare import LoopCalls
from diffuse_compress.temporal.schedule import Timesteps

__all__ = ["Path", "grid_of", "observe_loop", "path_of", "reconstruct"]

GRID = 1000
"""Timesteps that codes are learned on, at most."""
_EDGE_TIMESTEPS = 8
# The grid is all that layers of the timestep alone will ever see, and needs no ridge for inputs that were not seen. Of
# conditions few are. Measured on labels that emoji_dit was not learned on, shares of 0.01, 0.03, 0.1, 0.3 and 1 of the
# median: errors of 0.0112, 0.0103, 0.0100, 0.0102 and 0.0115; this is 0.1 there.
_RIDGE_OF_CONDITIONS = 1.6

Given = dict[str, torch.Tensor]


@dataclass
class Path:
    """The timestep path of a model, taken out of it before anything is quantized.

    Attributes:
        block: its layers; the model's own until they are replaced.
        kinds: what each layer depends on.
        grid: what the block is given, for each condition at its share of the timesteps.
        given: the same for ``timesteps`` of a schedule, one sample after the other within each.
        timesteps: as the model is given them.
        dense: [timesteps * samples, out] of every layer, at these.
    """

    block: TemporalBlock
    kinds: dict[str, Dependence]
    grid: list[Given]
    given: Given
    timesteps: tuple[float, ...]
    dense: dict[str, torch.Tensor]

    @property
    def features(self) -> list[str]:
        """Layers whose outputs are temporal features."""
        return feature_layers(self.block, self.kinds)


def grid_of(calls: LoopCalls, timestep: Any, num_train_timesteps: int) -> list[float]:
    """Timesteps of all noise levels, in the form in which a model is given them.

    Args:
        calls: of a loop; their timesteps tell the form: whole numbers up to ``num_train_timesteps``, fractions of it,
            or a scale of its own, of which the range that was seen is taken.
        timestep: as one call was given it.
        num_train_timesteps: of the scheduler.
    """
    seen = [value for value in calls.timesteps if value is not None]
    whole = not timestep.is_floating_point() if isinstance(timestep, torch.Tensor) else isinstance(timestep, int)
    low, high = min(seen), max(seen)
    if not whole and 0 <= low and high <= 1:
        low, high = 0.0, 1.0
    elif 0 <= low and high <= num_train_timesteps:
        low, high = 0.0, float(num_train_timesteps - whole)
    values = torch.linspace(low, high, GRID, dtype=torch.float64)
    return list(dict.fromkeys((values.round() if whole else values).tolist()))


def path_of(layout: Layout, model: nn.Module, calls: Sequence[LoopCalls], num_train_timesteps: int | None) -> Path:
    """What the layers of the timestep path are given, at all timesteps and at those of the calls' schedule.

    Args:
        layout: of ``model``, which is dense.
        model: a denoiser.
        calls: of loops of one schedule, one for each condition; of several, the last is kept to be measured on.
        num_train_timesteps: of the scheduler; None where nothing is to be learned, and the schedule's timesteps are
            enough.

    Raises:
        ModelStateError: no layer of the path can be run by itself.
    """
    found = [_call_of(model, call) for call in calls[: max(1, len(calls) - 1)]]
    first, timesteps = calls[0], _distinct(calls[0])
    grid: Sequence[float] = timesteps
    if num_train_timesteps is not None:
        grid = grid_of(first, first.inputs[found[0].timestep], num_train_timesteps)
    parts = [grid[number :: len(found)] for number in range(len(found))]
    seen = [_observe(layout, call, part) for call, part in zip(found, parts, strict=True)]
    schedule = _observe(layout, _call_of(model, calls[-1]), timesteps)
    names = [name for name in schedule.inputs if all(name in features.inputs for features in seen)]
    if not names:
        raise ModelStateError(
            f"{type(model).__name__}: no layer of the timestep path was seen to run once for each timestep, so that "
            "none can be learned by itself. Leave maintenance= out: TFMQConfig() keeps tables of them."
        )
    kinds = {name: layout.layers[name] for name in names}
    if all(kind is Dependence.TIMESTEP for kind in kinds.values()):
        # Every sample has the same.
        seen, schedule = [_first_sample(features) for features in seen], _first_sample(schedule)
    some = [_head(features, _EDGE_TIMESTEPS) for features in seen]
    block = TemporalBlock({name: model.get_submodule(name) for name in names}, edges_of(some))
    given = [given_of(block, features) for features in seen]
    dense = {name: schedule.outputs[name] for name in names}
    return Path(block, kinds, given, given_of(block, schedule), timesteps, dense)


def _call_of(model: nn.Module, calls: LoopCalls) -> Call:
    names, timestep = arguments_of(model)
    sample = next(calls.inputs[name] for name in names if name in calls.inputs)
    return Call(model, calls.inputs, timestep, sample.shape[0], sample.device)


def _distinct(calls: LoopCalls) -> tuple[float, ...]:
    return tuple(dict.fromkeys(value for value in calls.timesteps if value is not None))


def observe_loop(
    layout: Layout, model: nn.Module, calls: LoopCalls, timesteps: Sequence[float] | None = None
) -> Features:
    """What the layers of the path are given and give at these timesteps, by default those of the loop, each once."""
    return _observe(layout, _call_of(model, calls), _distinct(calls) if timesteps is None else timesteps)


def _observe(layout: Layout, call: Call, values: Sequence[float]) -> Features:
    form = Timesteps(tuple(values), (), call.arguments[call.timestep])
    return observe(layout, call, [form.at(place, call.batch) for place in range(len(values))])


def _first_sample(features: Features) -> Features:
    return _rows(features, slice(None, None, features.batch), 1)


def _head(features: Features, timesteps: int) -> Features:
    """At some timesteps from all over the schedule."""
    rows = torch.arange(next(iter(features.inputs.values())).shape[0]).view(-1, features.batch)
    return _rows(features, rows[:: max(1, len(rows) // timesteps)].flatten(), features.batch)


def _rows(features: Features, rows: slice | torch.Tensor, batch: int) -> Features:
    inputs, outputs, activations = (
        {name: x[rows] for name, x in found.items()}
        for found in (features.inputs, features.outputs, features.activations)
    )
    return Features(batch, inputs, outputs, activations)


def reconstruct(
    path: Path,
    schemes: Mapping[str, Scheme],
    iterations: int,
    replace: Callable[[str, Callable[[nn.Module], nn.Module]], nn.Module],
    *,
    generator: Callable[[str], torch.Generator],
    device: torch.device | str | None = None,
) -> None:
    """Learn the codes of these layers of the path, and put the quantized layers in the place of the dense ones. Ranges
    of static inputs follow from the timesteps, too.

    Args:
        path: whose block is then of quantized layers, too.
        schemes: {qualified name: integer format}; the other layers of the path stay.
        iterations: steps of Adam for each layer; 0 rounds to nearest.
        replace: ``replace(name, convert)`` puts ``convert(dense)`` in a layer's place in the model.
        generator: source of random numbers of a layer.
        device: where to compute; the layers go back to where they were.

    Raises:
        ModelStateError: weights or inputs are not finite.
    """
    block = path.block
    qualified = {block.relative(name): name for name in block.names if name in schemes}
    homes = {name: next(layer.parameters()).device for name, layer in zip(block.names, block.layers, strict=True)}
    there = torch.device(device) if device is not None else next(iter(homes.values()))
    learned: dict[str, Quantized] = {}

    def install(layer: LayerWork) -> nn.Module:
        name = qualified[layer.name]
        layer.dense.to(homes[name])
        learned[name] = replace(name, lambda dense: quantized_layer(layer).to(homes[name]))  # type: ignore[assignment]
        block.put(name, learned[name].to(there))
        return learned[name]

    block.to(there)
    try:
        work = BlockWork(
            name="timestep path",
            block=block,
            calls=[Arguments((given,)) for given in path.grid],
            layers={
                short: LayerWork(short, block.get_submodule(short), schemes[name])  # type: ignore[arg-type]
                for short, name in qualified.items()
            },
            generators=lambda short: generator(qualified[short]),
            install=install,
            device=there,
        )
        conditional = any(path.kinds[name] is Dependence.TIMESTEP_AND_CONDITION for name in schemes)
        ridge = _RIDGE_OF_CONDITIONS if conditional else 0.0
        calibrate_block(work, AdaRoundConfig(iterations=iterations, ridge=ridge) if iterations else RTNConfig())
    finally:
        for name, layer in zip(block.names, block.layers, strict=True):
            layer.to(homes[name])

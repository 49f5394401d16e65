"""Noise of quantized activations, and by how much a cache amplifies it.

Rounding the inputs of layers adds noise to what every unit makes, another in every step. A forecast adds up the noise
of several steps, each times its weight: extrapolated straight ahead (weights 2 and -1) it has five times the power,
which shows as flicker. Rounded weights are the same in every step, and add none.

The noise is told from one more forward of each step on the same arguments, with inputs as they are.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import nn

from diffuse_compress.caching.recording import Trajectory
from diffuse_compress.caching.schedule import Schedule
from diffuse_compress.quantization.layer_base import QuantizedLayer

__all__ = ["exact_inputs", "noise_amplification", "rounds_inputs", "with_noise"]


def _rounding(model: nn.Module) -> list[QuantizedLayer]:
    layers = (module for module in model.modules() if isinstance(module, QuantizedLayer))
    return [layer for layer in layers if layer.scheme.activation is not None]


def rounds_inputs(model: nn.Module) -> bool:
    """Do layers of ``model`` quantize their inputs?"""
    return bool(_rounding(model))


@contextlib.contextmanager
def exact_inputs(model: nn.Module) -> Iterator[None]:
    """Inside, quantized layers of ``model`` take their inputs as they are; their weights stay quantized."""
    schemes = {layer: layer.scheme for layer in _rounding(model)}
    try:
        for layer, scheme in schemes.items():
            layer.scheme = replace(scheme, activation=None)
        yield
    finally:
        for layer, scheme in schemes.items():
            layer.scheme = scheme


def noise_amplification(schedule: Schedule, trajectories: Sequence[Trajectory]) -> float | None:
    """Power of the noise in what is reused over that of the same units computed in the same steps.

    1 is a copy; None where no inputs are rounded, or nothing is reused.

    Args:
        schedule: with or without a forecast.
        trajectories: recorded with the same steps and units.
    """
    mask = schedule.mask.bool()
    history = 1 if schedule.coefficients is None else schedule.coefficients.shape[2]
    reused = computed = 0.0
    for products in (_relative(t) for t in trajectories if t.noise is not None):
        for step, unit in (~mask).nonzero().tolist():
            origins = mask[:step, unit].nonzero().flatten().flip(0)[:history]
            weights = torch.ones(1).double()
            if schedule.coefficients is not None:
                weights = schedule.coefficients[step, unit, : len(origins)].double()
            past = products[origins[:, None], origins[None], unit]
            reused += float(weights @ past[: len(weights), : len(weights)] @ weights)
            computed += float(products[step, step, unit])
    return reused / computed if computed > 0.0 else None


def with_noise(schedule: Schedule, trajectories: Sequence[Trajectory]) -> Schedule:
    """The schedule with :func:`noise_amplification` among its details, if there is noise."""
    amplification = noise_amplification(schedule, trajectories)
    if amplification is None:
        return schedule
    return replace(schedule, details={**schedule.details, "noise_amplification": round(amplification, 3)})


def _relative(trajectory: Trajectory) -> torch.Tensor:
    """[T, T, K] products of the noise of two steps over the power of the streams."""
    assert trajectory.noise is not None
    noise = trajectory.noise.double().nan_to_num(0.0).transpose(0, 1)
    scale = trajectory.power.double().nan_to_num(1.0).clamp_min(1e-12).rsqrt()
    return torch.bmm(noise, noise.mT).permute(1, 2, 0) * scale[:, None] * scale[None]

"""Learned clips of dynamic inputs: how much of a token's range its codes cover, for each group of timesteps.

A layer with clips multiplies the scale that it measures, largest magnitude over ``qmax``, by one number in (0, 1] that
depends on the timestep alone; what lies beyond is clamped. Timesteps ``low <= t < high`` are cut into ``G`` groups of
equal width, ``g = floor((t - low) * G / (high - low))``, so that neighbours share one. The layer does not look for the
timestep: it reads the groups from an object that it is handed, and that a hook of the model keeps current
(``training/clips.py``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch

from diffuse_compress.errors import ConfigError

__all__ = ["TimestepGroups", "clip_of_rows"]


@dataclass
class TimestepGroups:
    """Which group each sample of the current call belongs to.

    Attributes:
        count: G.
        low: timestep at which group 0 begins.
        high: timestep at which group G - 1 ends.
        index: int64 [B], or None where the timestep is not known.
    """

    count: int
    low: float = 0.0
    high: float = 1000.0
    index: torch.Tensor | None = None

    def __post_init__(self) -> None:
        if self.count < 1 or not self.low < self.high:
            raise ConfigError(
                "timestep groups: need a count of at least 1 and low < high, got "
                f"count={self.count}, low={self.low}, high={self.high}."
            )

    def see(self, timestep: Any) -> None:
        """Take the timestep of a call: a number, or a tensor of any device, scalar, [B], or [B, tokens], of which the
        noisiest counts; nothing is read from the device. Anything else is unknown."""
        if isinstance(timestep, Real):
            timestep = torch.tensor([float(timestep)])
        if not isinstance(timestep, torch.Tensor) or timestep.numel() == 0:
            self.index = None
            return
        values = timestep.detach().float()
        values = values.flatten(1).amax(dim=1) if values.dim() > 1 else values.reshape(-1)
        share = (values - self.low) * (self.count / (self.high - self.low))
        self.index = share.floor_().clamp_(0, self.count - 1).long()


def clip_of_rows(values: torch.Tensor, index: torch.Tensor | None, lead: Sequence[int]) -> torch.Tensor:
    """The clip of every row of an input, differentiable in ``values``.

    Args:
        values: fp32 [G].
        index: int64 [B], any device, or None.
        lead: leading dimensions of the input [..., K]: samples, or samples times frames, come first.

    Returns:
        fp32 [M, 1] with M the product of ``lead``, or [1, 1] where one clip holds for all rows: of a single group or
        sample, and the mean where the timestep is unknown, or the input is of other samples than the timesteps are.
    """
    if values.numel() == 1:
        return values.reshape(1, 1)
    if index is None:
        return values.mean().reshape(1, 1)
    picked = values[index.to(values.device)]
    samples = picked.numel()
    if samples == 1:
        return picked.reshape(1, 1)
    if not lead or lead[0] % samples:
        return picked.mean().reshape(1, 1)
    return picked.repeat_interleave(math.prod(lead) // samples).reshape(-1, 1)

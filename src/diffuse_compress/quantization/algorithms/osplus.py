"""OS+: shift channels of the inputs to the middle of their ranges, and scale down those that are still wide.

Wei et al. 2023, "Outlier Suppression+: Accurate quantization of large language models by equivalent and effective
shifting and scaling", arXiv 2304.09145, equations 2 to 7. Input ``x`` becomes ``(x - z) / s``, with ``z`` the middle of
each channel's range and ``s = max(1, (max - min) / 2t)``; columns of the weight are multiplied by s, and ``W z`` goes
into the bias. The threshold t is the one whose rounded weights and inputs change the output least.

Deviations: thresholds are spaced evenly in their logarithm, from the widest channel to the median one (the authors' end
at 1, whatever the unit of the inputs); a threshold is tried once more without the shift, and nothing at all is tried
too, so that neither is stored where it gains nothing. Where no norm or linear can take shift or scale (``folding.py``)
it stays with the layers (``act_pre_shift``, ``act_pre_scale``). Convolutions are scaled only: at their padding ``W z``
would be wrong.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from diffuse_compress.errors import ConfigError
from diffuse_compress.quantization.algorithms.awq import Candidates
from diffuse_compress.quantization.algorithms.base import (
    AlgorithmConfig,
    bytes_of_shift,
    register_block,
    takes_scale,
)
from diffuse_compress.quantization.algorithms.block import BlockWork, LayerWork, per_channel
from diffuse_compress.quantization.algorithms.folding import check_fold, set_scale
from diffuse_compress.quantization.scheme import Scheme

__all__ = ["OSPlusConfig", "RangeCollector"]


@dataclass(frozen=True)
class OSPlusConfig(AlgorithmConfig):
    """Shifts and scales of the inputs' channels, for layers whose inputs are quantized. Needs calibration data.

    It chooses shifts and scales; codes are then rounded to nearest, or chosen by what follows in a sequence.

    Args:
        num_thresholds: that are tried for the scales of each group of layers that share an input.
        shift: False leaves the channels where they are, and no layer gets a shift or the bias that comes with it.
        fold: as in :class:`SmoothQuantConfig`, of scales and shifts.
    """

    num_thresholds: int = 20
    shift: bool = True
    fold: bool | None = None
    kind: ClassVar[str] = "osplus"
    needs_calibration: ClassVar[bool] = True
    chooses_codes: ClassVar[bool] = False
    chooses_scales: ClassVar[bool] = True
    needs_quantized_inputs: ClassVar[bool] = True

    @property
    def summary(self) -> str:
        return "OS+" if self.shift else "OS+ (scales only)"

    def __post_init__(self) -> None:
        if self.num_thresholds < 1:
            raise ConfigError(f"OSPlusConfig: need num_thresholds >= 1, got {self.num_thresholds}.")
        check_fold("OSPlusConfig", self.fold)

    def idle_after(self, earlier: AlgorithmConfig) -> str | None:
        reason = super().idle_after(earlier)
        return "it has chosen the scales of the channels" if earlier.chooses_scales else reason

    def scales_input(self, layer: nn.Module, scheme: Scheme) -> bool:
        return scheme.activation is not None and takes_scale(layer)

    def shift_bytes(self, layer: nn.Module, scheme: Scheme) -> int:
        return bytes_of_shift(layer) if self.shift and scheme.activation is not None else 0


class RangeCollector:
    """Smallest and largest value of each input channel, fp32 [C]; None before there are rows."""

    def __init__(self, layer: LayerWork) -> None:
        self.layer = layer.dense
        self.low: torch.Tensor | None = None
        self.high: torch.Tensor | None = None

    def update(self, rows: torch.Tensor) -> None:
        low = per_channel(self.layer, rows.amin(dim=0).float(), torch.amin)
        high = per_channel(self.layer, rows.amax(dim=0).float(), torch.amax)
        self.low = low if self.low is None else torch.minimum(self.low, low)
        self.high = high if self.high is None else torch.maximum(self.high, high)


@register_block
def calibrate(work: BlockWork, config: OSPlusConfig) -> None:
    """Choose shift and scale of every group of layers that share an input."""
    for names in work.subsets:
        layers = [work.layers[name] for name in names]
        chosen = [layer for layer in layers if _is_open(layer)]
        if chosen:
            _search(work, chosen, config)


def _is_open(layer: LayerWork) -> bool:
    untouched = layer.quantized is None and layer.act_pre_scale is None and layer.low_rank is None
    return untouched and layer.scheme.activation is not None and takes_scale(layer.dense)


def _search(work: BlockWork, layers: list[LayerWork], config: OSPlusConfig) -> None:
    collector = RangeCollector(layers[0])
    work.collect({layers[0].name: collector})
    low, high = collector.low, collector.high
    if low is None or high is None:
        return
    shift = middle_of(low, high) if config.shift and all(isinstance(one.dense, nn.Linear) for one in layers) else None
    if shift is not None and not shift.any():
        shift = None
    candidates, ones = Candidates(work, layers), torch.ones_like(low)
    best: tuple[torch.Tensor, torch.Tensor | None] = (ones, None)
    best_error = candidates.error(ones)
    width = torch.maximum(-low, high) if shift is None else torch.maximum(high - shift, shift - low)
    for threshold in thresholds(width, config.num_thresholds):
        scale = (width / threshold).clamp(min=1.0)
        error = candidates.error(scale, shift)
        if error < best_error:
            best, best_error = (scale, shift), error
    if best[1] is not None:  # it costs time at every call, where nothing takes it
        unshifted = torch.maximum(-low, high)
        for threshold in {float(width.max() / best[0].max()), float(unshifted.max() / best[0].max())}:
            scale = (unshifted / threshold).clamp(min=1.0)
            error = candidates.error(scale)
            if error <= best_error:
                best, best_error = (scale, None), error
    scale, shift = best
    unscaled = torch.equal(scale, ones)
    if not unscaled or shift is not None:
        set_scale(work, layers, None if unscaled else 1.0 / scale, config.fold, shift)


def middle_of(low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """The middle of ranges, fp32 [C]."""
    return low + (high - low) / 2


def thresholds(width: torch.Tensor, count: int) -> list[float]:
    """``count`` numbers from the largest of ``width`` to their median, evenly spaced in their logarithm, as floats.

    Args:
        width: fp32 [C], half the range of each channel; channels that are always one number do not count.
        count: how many.
    """
    positive = width[width > 0]
    if positive.numel() == 0:
        return [1.0]
    first, last = float(positive.max()), float(positive.median())
    steps = max(1, count - 1)
    return [first * (last / first) ** (step / steps) for step in range(count)]

"""SmoothQuant: move outliers of the inputs into the weights, where a scale per channel costs nothing.

Xiao et al. 2023, "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models", arXiv
2211.10438, equation 4. Deviation: the inverse scale is folded into what precedes the layers (``folding.py``) only in
language models, unless ``fold`` says otherwise. Elsewhere, and behind adaptive norms, which have no weight to fold
into, it stays with the layers (``act_pre_scale``), where input quantization applies it: the result is the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from diffuse_compress.errors import ConfigError
from diffuse_compress.quantization.algorithms.base import AlgorithmConfig, register_block, takes_scale
from diffuse_compress.quantization.algorithms.block import BlockWork, LayerWork, per_channel
from diffuse_compress.quantization.algorithms.folding import check_fold, set_scale
from diffuse_compress.quantization.scheme import Scheme

__all__ = ["AbsMaxCollector", "SmoothQuantConfig", "smooth", "smoothing_scale"]

_SMALLEST = 1e-5


@dataclass(frozen=True)
class SmoothQuantConfig(AlgorithmConfig):
    """Per-channel scales between inputs and weights, for layers whose inputs are quantized. Needs calibration data.

    Args:
        alpha: how much of the range goes into the weights: 0 nothing, 1 all of it.
        fold: into the norm or linear before the layers, wherever that is exact: True, False, or None: in language
            models that are no part of a pipeline. Adapters trained before do not fit a model with folded scales.
    """

    alpha: float = 0.5
    fold: bool | None = None
    kind: ClassVar[str] = "smoothquant"
    needs_calibration: ClassVar[bool] = True
    chooses_codes: ClassVar[bool] = False
    chooses_scales: ClassVar[bool] = True
    needs_quantized_inputs: ClassVar[bool] = True
    rounds_input_groups: ClassVar[bool] = True

    def idle_after(self, earlier: AlgorithmConfig) -> str | None:
        return "it has chosen the scales of the channels" if earlier.chooses_scales else None

    @property
    def summary(self) -> str:
        return f"SmoothQuant (alpha {self.alpha:g})"

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ConfigError(f"SmoothQuantConfig: alpha must be in [0, 1], got {self.alpha}.")
        check_fold("SmoothQuantConfig", self.fold)

    def scales_input(self, layer: nn.Module, scheme: Scheme) -> bool:
        return scheme.activation is not None and takes_scale(layer)


class AbsMaxCollector:
    """Largest magnitude of each input channel, fp32 [C]."""

    def __init__(self, layer: LayerWork) -> None:
        self.layer = layer.dense
        self.value: torch.Tensor | None = None

    def update(self, rows: torch.Tensor) -> None:
        found = per_channel(self.layer, rows.abs().amax(dim=0).float(), torch.amax)
        self.value = found if self.value is None else torch.maximum(self.value, found)


@register_block
def calibrate(work: BlockWork, config: SmoothQuantConfig) -> None:
    """Choose the scales of every group of layers that share an input."""
    for names in work.subsets:
        layers = [work.layers[name] for name in names]
        chosen = [layer for layer in layers if layer.scheme.activation is not None and layer.act_pre_scale is None]
        chosen = [layer for layer in chosen if takes_scale(layer.dense)]
        if not chosen:
            continue
        collector = AbsMaxCollector(chosen[0])
        work.collect({chosen[0].name: collector})
        if collector.value is not None:
            smooth(work, chosen, collector.value, config.alpha, config.fold)


def smooth(work: BlockWork, layers: Sequence[LayerWork], inputs: torch.Tensor, alpha: float, fold: bool | None) -> None:
    """Give layers that share an input the scale of its channels, whose largest magnitudes are ``inputs`` fp32 [C]."""
    weights = [per_channel(layer.dense, layer.rest().abs().amax(dim=0), torch.amax) for layer in layers]
    scale = smoothing_scale(inputs, torch.stack(weights).amax(dim=0), alpha)
    set_scale(work, layers, 1.0 / scale, fold, layers[0].act_pre_shift)


def smoothing_scale(inputs: torch.Tensor, weights: torch.Tensor, alpha: float) -> torch.Tensor:
    """``max|x|^alpha / max|w|^(1 - alpha)`` per channel; for those that are always zero, the median of the others.

    So a channel that was never seen is neither lost nor the one that sets the range of all weights, whatever the unit
    of the inputs.

    Args:
        inputs: fp32 [C], largest magnitude of each input channel.
        weights: fp32 [C], of the weights' columns.
        alpha: in [0, 1].
    """
    scale = inputs.clamp(min=_SMALLEST) ** alpha / weights.clamp(min=_SMALLEST) ** (1 - alpha)
    reached = (inputs != 0) & (weights != 0)
    others = scale[reached].median() if reached.any() else 1.0
    return torch.where(reached, scale, others).clamp(min=_SMALLEST)

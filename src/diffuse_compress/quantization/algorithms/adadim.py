"""AdaDim: for each layer, groups along its inputs or along its outputs, whichever leaves less error.

Heo et al. 2023, "Rethinking Channel Dimensions to Isolate Outliers for Low-bit Weight Quantization of Large Language
Models", arXiv 2309.15531, section 3.2. A few input channels with large activations (or weights of another size) are
columns of the weight. Groups within a row (:class:`PerGroup`) spread their error over the neighbours in every row;
groups within a column (:class:`PerInputGroup`) keep it there.

Deviations: the error is that of the block's output, not the layer's own. Where output channels differ in size, groups
of rows spoil the small ones, which a sum over a layer's outputs does not see and the layer behind them does. Ranges are
those that rounding to nearest will choose. Layers that take the scale of another's input in their rows
(``folding.py``) keep their groups, for a row must have scales of its own for that.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from diffuse_compress.calls import Call
from diffuse_compress.errors import ConfigError
from diffuse_compress.quantization.algorithms.awq import output_distance
from diffuse_compress.quantization.algorithms.base import AlgorithmConfig, register_block
from diffuse_compress.quantization.algorithms.block import BlockWork, LayerWork
from diffuse_compress.quantization.algorithms.simulation import seen_as_quantized
from diffuse_compress.quantization.numerics import choose_qparams, fake_quantize
from diffuse_compress.quantization.observers import weight_qparams
from diffuse_compress.quantization.scheme import GROUP_SIZES, PerGroup, PerInputGroup, Scheme, WeightScheme

__all__ = ["AdaDimConfig", "output_error"]


@dataclass(frozen=True)
class AdaDimConfig(AlgorithmConfig):
    """Groups of columns or groups of rows, chosen for each layer by the error of its block. Needs calibration data.

    It looks at layers whose weights are in groups (:class:`PerGroup`), and leaves the others alone. Codes are then
    rounded to nearest, or chosen by what follows in a sequence. There is no kernel for groups of rows: such layers are
    dequantized, on every device, and no other library's format holds them.

    Args:
        rows: that share a scale in each column, 32, 64 or 128; None takes the layer's own ``group_size``, for the same
            number of scales.
    """

    rows: int | None = None
    kind: ClassVar[str] = "adadim"
    needs_calibration: ClassVar[bool] = True
    chooses_codes: ClassVar[bool] = False
    chooses_formats: ClassVar[bool] = True
    rounds_input_groups: ClassVar[bool] = True

    @property
    def summary(self) -> str:
        return "AdaDim" if self.rows is None else f"AdaDim (groups of {self.rows} rows)"

    def __post_init__(self) -> None:
        if self.rows is not None and self.rows not in GROUP_SIZES:
            raise ConfigError(f"AdaDimConfig: rows must be one of {GROUP_SIZES} or None, got {self.rows!r}.")

    def idle_with(self, schemes: Sequence[Scheme]) -> tuple[str, str] | None:
        grouped = any(isinstance(scheme.weight.granularity, PerGroup | PerInputGroup) for scheme in schemes)
        return None if grouped else ("weights in groups", "w4a16")

    def turned(self, scheme: WeightScheme) -> WeightScheme | None:
        """``scheme`` with groups of rows instead of columns; None if it has none of these."""
        if not isinstance(scheme.granularity, PerGroup):
            return None
        return (
            Scheme(scheme).replace(weight_granularity=PerInputGroup(self.rows or scheme.granularity.group_size)).weight
        )

    def format_bytes(self, layer: nn.Module, scheme: Scheme) -> int:
        """Bytes that groups of rows take more; how many scales there are depends on both sides of the weight."""
        turned = self.turned(scheme.weight)
        if turned is None:
            return 0
        weight = layer.weight
        assert isinstance(weight, torch.Tensor)
        shape = weight.shape[0], weight.shape[1:].numel()
        return max(0, scheme.replace(weight=turned).weight_bytes(shape) - scheme.weight_bytes(shape))


@register_block
def calibrate(work: BlockWork, config: AdaDimConfig) -> None:
    """Choose the groups of every layer of a block that has none of its own yet."""
    producers = {fold.producer for fold in work.folded.values()}
    chosen = [work.layers[name] for names in work.subsets for name in names if name not in producers]
    chosen = [layer for layer in chosen if layer.quantized is None and config.turned(layer.scheme.weight) is not None]
    if not chosen:
        return
    work.observe_inputs()
    outputs = [Call((output,)).copied(None).args[0] for output in work.run()]
    for layer in chosen:
        turned = config.turned(layer.scheme.weight)
        assert turned is not None
        if output_error(work, layer, turned, outputs) < output_error(work, layer, layer.scheme.weight, outputs):
            layer.scheme = layer.scheme.replace(weight=turned)


def output_error(work: BlockWork, layer: LayerWork, scheme: WeightScheme, outputs: Sequence[Any]) -> float:
    """Squared error of the block's output if the weight of one layer is rounded to nearest in ``scheme``.

    Args:
        work: the block.
        layer: without codes; the others stay as they are.
        scheme: to be tried.
        outputs: of the block as it is, for each call.
    """
    weight = layer.target()
    if layer.ranges is None:
        qparams = weight_qparams(weight, scheme, "mse")
    else:
        qparams = choose_qparams(layer.ranges, scheme)
    with seen_as_quantized(layer, fake_quantize(weight, scheme, qparams)):
        return sum(
            output_distance(found, output, functools.partial(work.counted, index=index))
            for index, (found, output) in enumerate(zip(work.run(), outputs, strict=True))
        )

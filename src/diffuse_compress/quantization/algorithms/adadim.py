"""AdaDim: for each layer, groups along its inputs or along its outputs, whichever leaves less error in its output.

Heo et al. 2023, "Rethinking Channel Dimensions to Isolate Outliers for Low-bit Weight Quantization of Large Language
Models", arXiv 2309.15531, section 3.2. A few input channels with large activations (or weights of another size) are
columns of the weight. Groups within a row (:class:`PerGroup`) spread their error over the neighbours in every row;
groups within a column (:class:`PerInputGroup`) keep it there.

Deviations: the error is that of the output on all calibration rows, from the second moments of the inputs, with the
ranges that rounding to nearest will choose; layers that take the scale of another's input in their rows
(``folding.py``) keep their groups, for a row must have scales of its own for that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from diffuse_compress.errors import ConfigError
from diffuse_compress.quantization.algorithms.base import AlgorithmConfig, register_block
from diffuse_compress.quantization.algorithms.block import BlockWork, LayerWork
from diffuse_compress.quantization.algorithms.gptq import collected
from diffuse_compress.quantization.numerics import choose_qparams, fake_quantize
from diffuse_compress.quantization.observers import weight_qparams
from diffuse_compress.quantization.scheme import GROUP_SIZES, PerGroup, PerInputGroup, Scheme, WeightScheme

__all__ = ["AdaDimConfig", "output_error"]


@dataclass(frozen=True)
class AdaDimConfig(AlgorithmConfig):
    """Groups of columns or groups of rows, chosen for each layer by its output error. Needs calibration data.

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
    work.observe_inputs()
    producers = {fold.producer for fold in work.folded.values()}
    for names in work.subsets:
        chosen = [name for name in names if name not in producers and config.turned(work.layers[name].scheme.weight)]
        for name, collector in collected(work, chosen, pairs=False).items():
            layer = work.layers[name]
            turned, hessian = config.turned(layer.scheme.weight), collector.hessian()
            assert turned is not None
            if output_error(layer, turned, hessian) < output_error(layer, layer.scheme.weight, hessian):
                layer.scheme = layer.scheme.replace(weight=turned)


def output_error(layer: LayerWork, scheme: WeightScheme, hessian: torch.Tensor) -> float:
    """Squared error of a layer's output if its weight is rounded to nearest in ``scheme``.

    Args:
        layer: without codes.
        scheme: to be tried.
        hessian: fp32 [K, K], second moments of what the codes are multiplied with.
    """
    weight = layer.target()
    if layer.ranges is None:
        qparams = weight_qparams(weight, scheme, "mse")
    else:
        qparams = choose_qparams(layer.ranges, scheme)
    missed = fake_quantize(weight, scheme, qparams) - weight
    return float(((missed @ hessian) * missed).sum(dtype=torch.float64))

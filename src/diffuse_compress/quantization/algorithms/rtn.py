"""RTN: round to nearest, each range chosen from the weight alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from diffuse_compress.errors import ConfigError
from diffuse_compress.quantization.algorithms.base import AlgorithmConfig, register, register_block
from diffuse_compress.quantization.algorithms.block import BlockWork
from diffuse_compress.quantization.numerics import choose_qparams, quantize_weight
from diffuse_compress.quantization.observers import weight_qparams
from diffuse_compress.quantization.packed import QuantizedWeight
from diffuse_compress.quantization.scheme import WeightScheme

__all__ = ["RTNConfig"]

_OBSERVERS = ("mse", "minmax")


@dataclass(frozen=True)
class RTNConfig(AlgorithmConfig):
    """Round to nearest, within the range an observer chooses. Data-free and deterministic.

    Args:
        observer: "mse" clips each range where that lowers the error (:class:`MSEObserver`), "minmax" never clips.
        norm: exponent of the error that "mse" minimises; 2.0 gives the highest SNR.
        num_ratios: clipping ratios that "mse" tries first; the refinement adds six. Two-level scales search
            integers instead.
        min_ratio: smallest of these ratios, in (0, 1).
    """

    observer: str = "mse"
    norm: float = 2.0
    num_ratios: int = 20
    min_ratio: float = 0.2
    kind: ClassVar[str] = "rtn"
    rounds_input_groups: ClassVar[bool] = True

    @property
    def summary(self) -> str:
        return f"round-to-nearest ({self.observer} ranges)"

    def __post_init__(self) -> None:
        if self.observer not in _OBSERVERS:
            raise ConfigError(f"RTNConfig: observer must be one of {_OBSERVERS}, got {self.observer!r}.")
        if self.norm <= 0 or self.num_ratios < 2 or not 0 < self.min_ratio < 1:
            raise ConfigError(
                "RTNConfig: need norm > 0, num_ratios >= 2 and 0 < min_ratio < 1, "
                f"got norm={self.norm}, num_ratios={self.num_ratios}, min_ratio={self.min_ratio}."
            )


@register_block
def calibrate(work: BlockWork, config: RTNConfig) -> None:
    """Round every layer of a block that has no codes yet."""
    for layer in work.layers.values():
        if layer.quantized is None:
            weight, scheme = layer.target(), layer.scheme.weight
            if layer.ranges is None:
                layer.quantized = quantize(weight, scheme, config)
            else:
                layer.quantized = quantize_weight(weight, scheme, choose_qparams(layer.ranges, scheme))
            work.install(layer)


@register
def quantize(
    weight: torch.Tensor, scheme: WeightScheme, config: RTNConfig, generator: torch.Generator | None = None
) -> QuantizedWeight:
    """Round a weight to nearest.

    Args:
        weight: [N, K] floating point, any device, not modified.
        scheme: any.
        config: which range.
        generator: not used, RTN draws nothing.

    Returns:
        The packed weight; equal inputs on one device give equal bytes.

    Raises:
        IncompatibleShapeError: K does not fit the scheme's group size.
        ModelStateError: the weight holds inf or nan.
    """
    options = {"norm": config.norm, "num_ratios": config.num_ratios, "min_ratio": config.min_ratio}
    return quantize_weight(weight, scheme, weight_qparams(weight, scheme, config.observer, **options))

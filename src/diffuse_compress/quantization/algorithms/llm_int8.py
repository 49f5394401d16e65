"""LLM.int8(): inputs are int8 but for the columns in which something large stands, found on every call.

Dettmers et al. 2022, "LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale", arXiv 2208.07339, sections
3.1 and 3.2; the product is in ``outlier_columns.py``. Deviations: columns are found for each layer's input by the
threshold alone, as in the authors' code, not by how many layers and tokens have them; where inputs are left alone
(``w8a16``) nothing is done.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import nn

from diffuse_compress.errors import ConfigError
from diffuse_compress.quantization.algorithms.base import AlgorithmConfig, register
from diffuse_compress.quantization.algorithms.rtn import RTNConfig
from diffuse_compress.quantization.algorithms.rtn import quantize as round_to_nearest
from diffuse_compress.quantization.packed import QuantizedWeight
from diffuse_compress.quantization.scheme import NumberFormat, PerChannel, PerTensor, PerToken, Scheme, WeightScheme

__all__ = ["LLMInt8Config"]


@dataclass(frozen=True)
class LLMInt8Config(AlgorithmConfig):
    """Eight-bit codes, and input columns with outliers multiplied in the layer's dtype. Data-free. For ``w8a8``.

    The columns' weights are dequantized from their codes, so that nothing is stored for them. Finding them waits for a
    GPU in every layer; under ``torch.compile`` a dense product is made instead, which takes as long as the dense layer.

    Args:
        threshold: magnitude from which on an input makes its column an outlier, in every row of the call.
        observer: "minmax" or "mse", for the ranges of the weights; the paper's is "minmax".
    """

    threshold: float = 6.0
    observer: str = "minmax"
    kind: ClassVar[str] = "llm_int8"
    needs_quantized_inputs: ClassVar[bool] = True

    @property
    def summary(self) -> str:
        return f"LLM.int8 (outliers from {self.threshold:g} on)"

    def __post_init__(self) -> None:
        threshold = self.threshold
        if not isinstance(threshold, int | float) or not math.isfinite(threshold) or threshold < 0:
            raise ConfigError(
                f"LLMInt8Config: threshold must be a finite number >= 0, got {threshold!r}. For none take RTNConfig()."
            )
        if self.observer not in ("mse", "minmax"):
            raise ConfigError(f"LLMInt8Config: observer must be 'mse' or 'minmax', got {self.observer!r}.")
        object.__setattr__(self, "threshold", float(threshold))

    def check(self, scheme: WeightScheme) -> None:
        plain = isinstance(scheme.granularity, PerChannel | PerTensor) and scheme.symmetric
        if scheme.format is not NumberFormat.INT8 or not plain:
            raise ConfigError(
                f"LLM.int8: needs symmetric int8 weights per channel, of which single columns are dequantized, got "
                f'{scheme.format.value}, {type(scheme.granularity).__name__}. Use "w8a8"; fewer bits: QUIKConfig().'
            )

    def idle_after(self, earlier: AlgorithmConfig) -> str | None:
        return "its threshold is of inputs as they come, not of smoothed or rotated ones"

    def unsupported(self, layer: nn.Module, scheme: Scheme) -> str | None:
        act = scheme.activation
        if act is None:
            return None
        if not isinstance(layer, nn.Linear):
            return "LLM.int8 takes columns out of inputs of linear layers, not of convolutions"
        if not act.dynamic or not isinstance(act.granularity, PerToken) or act.format is not NumberFormat.INT8:
            return "LLM.int8 needs dynamic int8 inputs, one scale per token"
        return None

    def format_of(self, layer: nn.Module, scheme: Scheme, arrives_rotated: bool = False, name: str = "") -> Scheme:
        """``scheme`` with the threshold, where it quantizes inputs."""
        self.check(scheme.weight)
        if scheme.activation is None:
            return scheme
        return replace(scheme, activation=replace(scheme.activation, outlier_threshold=self.threshold))


@register
def quantize(
    weight: torch.Tensor, scheme: WeightScheme, config: LLMInt8Config, generator: torch.Generator | None = None
) -> QuantizedWeight:
    """Round a weight [N, K] to nearest."""
    return round_to_nearest(weight, scheme, RTNConfig(observer=config.observer), generator)

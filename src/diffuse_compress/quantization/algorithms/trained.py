"""The name, in checkpoints and reports, of codes that quantization-aware training has chosen (``training/``)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from diffuse_compress.errors import ConfigError
from diffuse_compress.quantization.algorithms.base import AlgorithmConfig, register
from diffuse_compress.quantization.packed import QuantizedWeight
from diffuse_compress.quantization.scheme import WeightScheme

__all__ = ["TrainedConfig"]


@dataclass(frozen=True)
class TrainedConfig(AlgorithmConfig):
    """Codes, scales and clips were trained. It only says so: nothing is quantized by it.

    Args:
        method: of the training, as ``QVGenConfig.method``.
    """

    method: str = "qvgen"
    kind: ClassVar[str] = "trained"

    @property
    def summary(self) -> str:
        return f"quantization-aware training ({self.method})"


@register
def quantize(
    weight: torch.Tensor, scheme: WeightScheme, config: TrainedConfig, generator: torch.Generator | None = None
) -> QuantizedWeight:
    """Refuse: codes of a training come from its layers."""
    raise ConfigError(
        "algorithm: codes of kind 'trained' come out of quantization-aware training, not of weights alone. Train the "
        'dense model with QVGenConfig, or choose another algorithm, such as "rtn".'
    )

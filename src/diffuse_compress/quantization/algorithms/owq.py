"""OWQ: a few weak input columns, those that rounding hurts most, stay dense, and take up the error of the others.

Lee et al. 2024, "OWQ: Outlier-Aware Weight Quantization for Efficient Fine-Tuning and Inference of Large Language
Models", arXiv 2306.02272, section 3: column j's sensitivity is

    s_j = H_jj ||W_:j - Q(W_:j)||^2,    H = 2 X X^T

The columns of largest s_j are not rounded; all others are, by GPTQ, which comes to the weak columns last, so that these
make up for the errors before them. Deviations: none of what the kept columns are; where their number follows from
``extra_bits`` the codes of these columns, which stand for 0, are counted too, since they stay in the packed weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from diffuse_compress.errors import ConfigError
from diffuse_compress.quantization.algorithms.base import AlgorithmConfig, register_block
from diffuse_compress.quantization.algorithms.block import BlockWork, LayerWork
from diffuse_compress.quantization.algorithms.dense_columns import column_bytes, largest, why_no_columns
from diffuse_compress.quantization.algorithms.gptq import GPTQConfig, HessianCollector, gptq_of, quantize_block
from diffuse_compress.quantization.algorithms.quarot import QuaRotConfig
from diffuse_compress.quantization.numerics import fake_quantize
from diffuse_compress.quantization.observers import weight_qparams
from diffuse_compress.quantization.scheme import Scheme

__all__ = ["OWQConfig", "sensitivity"]


@dataclass(frozen=True)
class OWQConfig(AlgorithmConfig):
    """GPTQ with the most sensitive input columns of each linear layer dense. For weight-only formats; needs data.

    Args:
        extra_bits: that dense columns may add to each weight of a layer on average; a layer has one column at least.
        columns: of each layer, instead; 0 is GPTQ.
        damping: as :class:`GPTQConfig`.
        act_order: likewise.
        true_sequential: likewise.
        observer: likewise.
    """

    extra_bits: float = 0.1
    columns: int | None = None
    damping: float = 0.01
    act_order: bool = True
    true_sequential: bool = True
    observer: str = "mse"
    kind: ClassVar[str] = "owq"
    needs_calibration: ClassVar[bool] = True
    kept_dense: ClassVar[str] = "dense input columns"

    @property
    def summary(self) -> str:
        return f"OWQ ({f'{self.extra_bits:g} extra bits' if self.columns is None else f'{self.columns} columns'})"

    @property
    def rounding(self) -> GPTQConfig:
        """How the other columns are rounded."""
        return gptq_of(self)

    def __post_init__(self) -> None:
        counted = self.columns is None or (isinstance(self.columns, int) and self.columns >= 0)
        if not 0 < self.extra_bits <= 8 or not counted:
            raise ConfigError(
                f"OWQConfig: need 0 < extra_bits <= 8 and columns >= 0 or None, got extra_bits={self.extra_bits}, "
                f"columns={self.columns}."
            )
        _ = self.rounding  # its own checks

    def for_search(self) -> AlgorithmConfig:
        return self.rounding.for_search()

    def idle_after(self, earlier: AlgorithmConfig) -> str | None:
        if isinstance(earlier, QuaRotConfig) and not earlier.residual:
            return "rotated inputs have no columns that stand out"
        return super().idle_after(earlier)

    def unsupported(self, layer: nn.Module, scheme: Scheme) -> str | None:
        if scheme.activation is not None:
            return "OWQ is for weight-only formats; QUIKConfig() keeps columns of quantized inputs"
        return why_no_columns("OWQ", layer, scheme)

    def count(self, layer: nn.Linear) -> int:
        """Dense columns of a layer."""
        wanted = self.columns
        if wanted is None:
            bits = 8 * column_bytes(1, layer) / (layer.in_features * layer.out_features)
            wanted = max(1, int(self.extra_bits / bits))
        return min(wanted, layer.in_features - 1)

    def branch_bytes(self, layer: nn.Module, scheme: Scheme, name: str = "") -> int:
        return column_bytes(self.count(layer), layer) if isinstance(layer, nn.Linear) else 0


@register_block
def calibrate(work: BlockWork, config: OWQConfig) -> None:
    """Choose the weak columns of every layer of a block, and round the others."""

    def choose(layer: LayerWork, collector: HessianCollector) -> None:
        assert isinstance(layer.dense, nn.Linear)
        count = config.count(layer.dense)
        if count:
            layer.dense_columns = largest(sensitivity(layer, torch.diagonal(collector.sum), config.observer), count)

    quantize_block(work, config.rounding, choose=choose)


def sensitivity(layer: LayerWork, diagonal: torch.Tensor, observer: str) -> torch.Tensor:
    """fp32 [K]: what rounding each column of a layer to nearest would cost, of any scale.

    Args:
        layer: with its format.
        diagonal: fp32 [K], of the second moments of its inputs.
        observer: of the ranges.
    """
    weight, scheme = layer.target(), layer.scheme.weight
    error = fake_quantize(weight, scheme, weight_qparams(weight, scheme, observer)).sub_(weight)
    return diagonal * error.square_().sum(dim=0)

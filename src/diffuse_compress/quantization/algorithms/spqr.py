"""SpQR: very small groups with quantized scales, and the weights that spoil their group stored apart.

Dettmers et al. 2023, "SpQR: A Sparse-Quantized Representation for Near-Lossless LLM Weight Compression", arXiv
2306.03078, section 4 and algorithm 1. A weight is an outlier if its group, rounded without it in the range, would err
so much less that

    sum_j (w_j - Q(w_j))^2 / U_jj^2 - sum_{j != i} (w_j - Q_{-i}(w_j))^2 / U_jj^2  >  tau * mean_j (var(w_:j) / U_jj^2)

with U^T U the inverse of the inputs' second moments. Outliers are kept in the layer's dtype in compressed sparse rows
(``SparseOutliers``), as what they differ by from their code; the rest is rounded by GPTQ. Scales have the bilevel form
(``scheme.Bilevel``). Deviations: groups keep their neighbouring columns whatever the order of rounding, so their ranges
and outliers are those of the original weights, not of weights compensated so far; ranges are the ones of least squared
error; no more than ``max_share`` of the weights are outliers, those that help most, so that a plan knows the bytes; the
damping is GPTQ's usual one, not 1.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import nn

from diffuse_compress.errors import ConfigError
from diffuse_compress.quantization.algorithms.base import AlgorithmConfig, register_block
from diffuse_compress.quantization.algorithms.block import BlockWork
from diffuse_compress.quantization.algorithms.gptq import GPTQConfig, gptq_of, quantize_block
from diffuse_compress.quantization.numerics import qparams_from_range, row_chunks, split_groups
from diffuse_compress.quantization.packed import MAX_SPARSE_COLUMNS
from diffuse_compress.quantization.scheme import Bilevel, Scheme, WeightScheme

__all__ = ["SpQRConfig", "find_outliers", "gains"]


@dataclass(frozen=True)
class SpQRConfig(AlgorithmConfig):
    """GPTQ on small groups with quantized scales, and sparse outliers. For weights of 2 to 4 bits alone; needs data.

    The formats it takes are turned into bilevel ones: ``w4a16`` has 4.75 bits per weight in groups of 16, and 32 bits
    (16-bit models) for each outlier.

    Args:
        group_size: 8, 16 or 32.
        threshold: what an outlier gains its group, over the mean of the layer; the larger, the fewer there are.
        max_share: of a layer's weights that may be outliers; 0 for none.
        damping: as :class:`GPTQConfig`.
        act_order: likewise.
        true_sequential: likewise.
        observer: likewise.
    """

    group_size: int = 16
    threshold: float = 0.2
    max_share: float = 0.01
    damping: float = 0.01
    act_order: bool = True
    true_sequential: bool = True
    observer: str = "mse"
    kind: ClassVar[str] = "spqr"
    needs_calibration: ClassVar[bool] = True
    kept_dense: ClassVar[str] = "sparse outliers"

    @property
    def summary(self) -> str:
        return f"SpQR (groups of {self.group_size}, up to {100 * self.max_share:g} % outliers)"

    @property
    def rounding(self) -> GPTQConfig:
        """How what is no outlier is rounded."""
        return gptq_of(self)

    def __post_init__(self) -> None:
        if not self.threshold >= 0 or not 0 <= self.max_share <= 0.25:
            raise ConfigError(
                "SpQRConfig: need threshold >= 0 and 0 <= max_share <= 0.25, got "
                f"threshold={self.threshold}, max_share={self.max_share}."
            )
        Bilevel(self.group_size)
        _ = self.rounding  # its own checks

    def for_search(self) -> AlgorithmConfig:
        return replace(self, true_sequential=False)

    def check(self, scheme: WeightScheme) -> None:
        if not isinstance(scheme.granularity, Bilevel):
            raise ConfigError(
                f"SpQR: needs bilevel scales, got {scheme.format.value}, {type(scheme.granularity).__name__}. Use "
                "WeightScheme(..., Bilevel(16), symmetric=False), which it makes of weight-only formats of 2 to 4 bits "
                "by itself."
            )

    def unsupported(self, layer: nn.Module, scheme: Scheme) -> str | None:
        if scheme.activation is not None:
            return "SpQR is for weight-only formats; QUIKConfig() is for quantized inputs"
        if not scheme.weight.format.is_integer or scheme.weight.format.bits > 4:
            return f"SpQR is for weights of 2 to 4 bits, got {scheme.name}"
        if self._shape(layer)[1] > MAX_SPARSE_COLUMNS:
            return f"SpQR stores columns in 16 bits, got {self._shape(layer)[1]} of them"
        return None

    def format_of(self, layer: nn.Module, scheme: Scheme, arrives_rotated: bool = False, name: str = "") -> Scheme:
        """``scheme`` with bilevel scales."""
        if isinstance(scheme.weight.granularity, Bilevel) or self.unsupported(layer, scheme) is not None:
            return scheme
        return replace(scheme, weight=WeightScheme(scheme.weight.format, Bilevel(self.group_size), symmetric=False))

    def branch_bytes(self, layer: nn.Module, scheme: Scheme, name: str = "") -> int:
        rows, columns = self._shape(layer)
        weight = layer.weight
        assert isinstance(weight, torch.Tensor)
        most = int(self.max_share * rows * columns)
        return most * (2 + weight.element_size()) + 4 * (rows + 1) if most else 0

    @staticmethod
    def _shape(layer: nn.Module) -> tuple[int, int]:
        weight = layer.weight
        assert isinstance(weight, torch.Tensor)
        return weight.shape[0], weight.shape[1:].numel()


@register_block
def calibrate(work: BlockWork, config: SpQRConfig) -> None:
    """Find the outliers of every layer of a block, and round the rest."""

    def staying(weight: torch.Tensor, costs: torch.Tensor, scheme: WeightScheme) -> torch.Tensor:
        return find_outliers(weight, costs, scheme, config.threshold, config.max_share)

    quantize_block(work, config.rounding, staying=staying if config.max_share else None)


def find_outliers(
    weight: torch.Tensor, costs: torch.Tensor, scheme: WeightScheme, threshold: float, max_share: float
) -> torch.Tensor:
    """bool [N, K]: the weights that spoil their group.

    Args:
        weight: fp32 [N, K].
        costs: fp32 [K], of a squared error of 1 in each column.
        scheme: the format; its groups are looked at.
        threshold: tau above.
        max_share: of all weights at most.
    """
    gain = gains(weight, costs, scheme)
    scale = (weight.var(dim=0) * costs).mean()
    most = int(max_share * weight.numel())
    values, places = gain.flatten().topk(min(most, gain.numel()))
    found = torch.zeros(weight.numel(), dtype=torch.bool, device=weight.device)
    found[places] = values > threshold * scale
    return found.view_as(weight)


def gains(weight: torch.Tensor, costs: torch.Tensor, scheme: WeightScheme) -> torch.Tensor:
    """fp32 [N, K]: how much less a group would err, rounded to nearest, if this weight were stored apart."""
    return torch.cat([_gains(weight[rows], costs, scheme) for rows in row_chunks(weight)])


def _gains(weight: torch.Tensor, costs: torch.Tensor, scheme: WeightScheme) -> torch.Tensor:
    groups = split_groups(weight, scheme)  # [n, G, g]
    cost = split_groups(costs.unsqueeze(0), scheme)  # [1, G, g]
    size = groups.shape[-1]
    lowest, highest = groups.topk(2, largest=False).values, groups.topk(2).values
    whole = _group_error(groups, cost, lowest[..., 0], highest[..., 0], scheme).sum(dim=-1)
    found = torch.empty_like(groups)
    for i in range(size):
        value = groups[..., i]
        # Of equal ends either may go: the other is still there.
        low = torch.where(value == lowest[..., 0], lowest[..., 1], lowest[..., 0])
        high = torch.where(value == highest[..., 0], highest[..., 1], highest[..., 0])
        error = _group_error(groups, cost, low, high, scheme)
        found[..., i] = whole - error.sum(dim=-1) + error[..., i]
    return found.reshape(weight.shape[0], -1)[:, : weight.shape[1]]


def _group_error(
    groups: torch.Tensor, cost: torch.Tensor, low: torch.Tensor, high: torch.Tensor, scheme: WeightScheme
) -> torch.Tensor:
    """fp32 [n, G, g]: what rounding each weight costs, with the range ``low`` to ``high`` [n, G] and 0."""
    qparams = qparams_from_range(low.clamp(max=0), high.clamp(min=0), scheme)
    scale, zero_point = qparams.scale.unsqueeze(-1), qparams.zero_point
    assert zero_point is not None
    steps = groups / scale + zero_point.float().unsqueeze(-1)
    return (steps.round().clamp_(*scheme.range) - steps).mul_(scale).square_().mul_(cost)

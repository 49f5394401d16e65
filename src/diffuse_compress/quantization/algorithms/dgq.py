"""DGQ: the scales of two-level weights by the error of the layer's output, after smoothing the largest inputs alone.

Zhang et al. 2023, "Dual Grained Quantization: Efficient Fine-Grained Quantization for LLM", arXiv 2310.04836, sections
3.2 and 3.3. A weight is ``scale[n] * (group_scale[n, g] * q)`` with 4-bit codes, and the bracket fits int8: this is
:class:`TwoLevel`. The search has two phases: first every group gets the float scale, of a grid, that leaves its part of
the output with the least error; then every row gets the scale, of a grid, to whose integer multiples these are rounded
with the least error in the whole output. Before it, "percentile clipping smoothing" brings the input channels that are
larger than nearly all others down to the largest of those, and leaves the rest alone.

Deviations: codes are symmetric, as the format is (the authors' have a zero point); errors are exact sums over all
calibration rows, from the second moments of the inputs; the share of channels that is smoothed is not fixed at half a
per cent but tried, by the output of the layers' parent, and smoothing nothing is always tried too; rounding to nearest
is among the candidates of the second phase, so no row's error is larger than its.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from diffuse_compress.errors import ConfigError
from diffuse_compress.quantization.algorithms.awq import Candidates
from diffuse_compress.quantization.algorithms.base import AlgorithmConfig, register_block, takes_scale
from diffuse_compress.quantization.algorithms.block import BlockWork, LayerWork
from diffuse_compress.quantization.algorithms.folding import check_fold, set_scale
from diffuse_compress.quantization.algorithms.gptq import collected
from diffuse_compress.quantization.algorithms.smoothquant import AbsMaxCollector
from diffuse_compress.quantization.numerics import MIN_SCALE, per_group_, quantize_weight, split_groups
from diffuse_compress.quantization.observers import weight_qparams
from diffuse_compress.quantization.qparams import QParams, effective_scale
from diffuse_compress.quantization.scheme import (
    TWO_LEVEL_MAX_GROUP_SCALE,
    Scheme,
    TwoLevel,
    WeightScheme,
)

__all__ = ["DGQConfig", "clipping_scale", "group_scales", "two_level_qparams"]

# Ends of the grids: of a group's scale, relative to the one that clips nothing, and of a row's, relative to the one
# whose sixteenfold is the largest of its groups' scales.
_GROUP_RATIOS = (1.0, 0.7)
_ROW_RATIOS = (1.1, 0.7)
_CHUNK_ELEMENTS = 1 << 22


@dataclass(frozen=True)
class DGQConfig(AlgorithmConfig):
    """Two levels of scales by the error of the output, for ``w4a8``. Needs calibration data.

    Layers of other formats are rounded to nearest.

    Args:
        outlier_shares: of the input channels, tried one after the other, that are brought down to the largest of the
            others; () smooths nothing.
        group_steps: scales that are tried for each group.
        row_steps: scales that are tried for each row. Each costs a product of the weight with the second moments.
        fold: as in :class:`SmoothQuantConfig`.
    """

    outlier_shares: tuple[float, ...] = (0.005, 0.02, 0.08)
    group_steps: int = 20
    row_steps: int = 40
    fold: bool | None = None
    kind: ClassVar[str] = "dgq"
    needs_calibration: ClassVar[bool] = True
    chooses_scales: ClassVar[bool] = True

    @property
    def summary(self) -> str:
        return "DGQ" if self.outlier_shares else "DGQ (no smoothing)"

    def __post_init__(self) -> None:
        object.__setattr__(self, "outlier_shares", tuple(self.outlier_shares))
        if any(not 0 < share < 1 for share in self.outlier_shares):
            raise ConfigError(f"DGQConfig: outlier_shares must be in (0, 1), got {list(self.outlier_shares)}.")
        if self.group_steps < 1 or self.row_steps < 1:
            raise ConfigError(
                f"DGQConfig: need group_steps >= 1 and row_steps >= 1, got group_steps={self.group_steps}, "
                f"row_steps={self.row_steps}."
            )
        check_fold("DGQConfig", self.fold)

    def idle_with(self, schemes: Sequence[Scheme]) -> tuple[str, str] | None:
        return None if any(map(_is_two_level, schemes)) else ("weights with two levels of scales", "w4a8")

    def scales_input(self, layer: nn.Module, scheme: Scheme) -> bool:
        return bool(self.outlier_shares) and _is_two_level(scheme) and takes_scale(layer)


def _is_two_level(scheme: Scheme) -> bool:
    return isinstance(scheme.weight.granularity, TwoLevel)


@register_block
def calibrate(work: BlockWork, config: DGQConfig) -> None:
    """Smooth the inputs of the two-level layers of a block, then choose their scales and codes."""
    for names in work.subsets:
        layers = [work.layers[name] for name in names]
        chosen = [layer for layer in layers if config.scales_input(layer.dense, layer.scheme)]
        chosen = [layer for layer in chosen if layer.quantized is None and layer.act_pre_scale is None]
        chosen = [layer for layer in chosen if layer.low_rank is None]
        if chosen:
            _smooth(work, chosen, config)
    work.observe_inputs()
    for names in work.subsets:
        todo = [name for name in names if _is_two_level(work.layers[name].scheme)]
        for name, collector in collected(work, todo, pairs=False).items():
            layer = work.layers[name]
            weight, scheme = layer.target(), layer.scheme.weight
            qparams = two_level_qparams(weight, collector.hessian(), scheme, config.group_steps, config.row_steps)
            layer.quantized = quantize_weight(weight, scheme, qparams)
            work.install(layer)


# --- smoothing --------------------------------------------------------------------------------------------------


def _smooth(work: BlockWork, layers: Sequence[LayerWork], config: DGQConfig) -> None:
    collector = AbsMaxCollector(layers[0])
    work.collect({layers[0].name: collector})
    largest = collector.value
    if largest is None or not largest.any():
        return

    def candidates() -> Iterator[torch.Tensor]:
        yield torch.ones_like(largest)
        for share in config.outlier_shares:
            yield clipping_scale(largest, share)

    best = Candidates(work, layers).best(candidates())
    if (best != 1).any():
        set_scale(work, layers, 1.0 / best, config.fold)


def clipping_scale(largest: torch.Tensor, share: float) -> torch.Tensor:
    """fp32 [C], at least 1: brings the ``share`` of channels with the largest inputs down to the largest of the others.

    Args:
        largest: fp32 [C], largest magnitude of each input channel.
        share: in (0, 1), rounded up to whole channels.
    """
    kept = max(1, largest.numel() - math.ceil(share * largest.numel()))
    limit = largest.kthvalue(kept).values
    return torch.where(limit > 0, largest / limit, 1.0).clamp(min=1.0)


# --- scales -----------------------------------------------------------------------------------------------------


def two_level_qparams(
    weight: torch.Tensor, hessian: torch.Tensor, scheme: WeightScheme, group_steps: int, row_steps: int
) -> QParams:
    """Scales of a two-level weight that leave ``tr((What - W) H (What - W)^T)`` small, row by row.

    Args:
        weight: fp32 [N, K].
        hessian: fp32 [K, K], second moments of the inputs.
        scheme: with TwoLevel.
        group_steps: tried for each group.
        row_steps: tried for each row.

    Returns:
        scale [N, 1] and group_scale [N, G]; no row costs more than with the ranges of rounding to nearest.
    """
    nearest = weight_qparams(weight, scheme, "mse")
    wanted = group_scales(weight, hessian, scheme, group_steps)
    assert nearest.group_scale is not None
    scale, multiples = nearest.scale.clone(), nearest.group_scale.clone()
    best = _row_errors(weight, hessian, scheme, nearest)
    largest = wanted.amax(dim=1, keepdim=True)
    for ratio in torch.linspace(*_ROW_RATIOS, row_steps).tolist():
        trial = (largest * (ratio / TWO_LEVEL_MAX_GROUP_SCALE)).clamp_(min=MIN_SCALE)
        groups = (wanted / trial).round_().clamp_(1, TWO_LEVEL_MAX_GROUP_SCALE).to(torch.int8)
        error = _row_errors(weight, hessian, scheme, QParams(trial, None, groups))
        better = error < best
        best = torch.where(better, error, best)
        scale[better], multiples[better] = trial[better], groups[better]
    return QParams(scale, None, multiples)


def group_scales(weight: torch.Tensor, hessian: torch.Tensor, scheme: WeightScheme, steps: int) -> torch.Tensor:
    """fp32 [N, G]: for each group by itself, the scale that leaves its part of the output with the least error."""
    size = scheme.group_size
    assert size is not None
    count = scheme.num_groups(weight.shape[1])
    padded = nn.functional.pad(hessian, (0, -hessian.shape[1] % size, 0, -hessian.shape[1] % size))
    blocks = torch.stack([padded[g * size :, g * size :][:size, :size] for g in range(count)])  # [G, g, g]
    high, chunks = scheme.format.qmax, []
    for part in weight.split(max(1, _CHUNK_ELEMENTS // max(1, weight.shape[1]))):
        groups = split_groups(part, scheme)  # [n, G, g]
        unit = (groups.abs().amax(dim=-1) / high).clamp_(min=MIN_SCALE)
        best, best_error = unit, torch.full_like(unit, torch.inf)
        for ratio in torch.linspace(*_GROUP_RATIOS, steps).tolist():
            trial = (unit * ratio).clamp_(min=MIN_SCALE)
            codes = (groups / trial.unsqueeze(-1)).round_().clamp_(-high, high)
            missed = codes.mul_(trial.unsqueeze(-1)).sub_(groups).transpose(0, 1)  # [G, n, g]
            error = (torch.bmm(missed, blocks) * missed).sum(dim=-1).t()
            best = torch.where(error < best_error, trial, best)
            best_error = torch.minimum(error, best_error)
        chunks.append(best)
    return torch.cat(chunks)


def _row_errors(weight: torch.Tensor, hessian: torch.Tensor, scheme: WeightScheme, qparams: QParams) -> torch.Tensor:
    """fp32 [N]: squared error of each row's output."""
    step, size = effective_scale(qparams), scheme.group_size
    missed = per_group_(weight.clone(), step, size, torch.Tensor.div_).round_().clamp_(*scheme.range)
    missed = per_group_(missed, step, size, torch.Tensor.mul_).sub_(weight)
    return (missed @ hessian).mul_(missed).sum(dim=1)

"""SVDQuant: a small dense branch takes the largest singular values, and codes stand for what is left.

Li et al. 2025, "SVDQuant: Absorbing Outliers by Low-Rank Components for 4-Bit Diffusion Models", arXiv 2411.05007,
equations 4 to 7. With ``s`` the smoothing scale of the input channels::

    W diag(s) = L + R,    y = Q(x / s) Q(R)^T + (x / s) L^T

``L`` is the best approximation of rank r of ``W diag(s)``, and then, again and again, of ``W diag(s) - Q(R)``, as long
as the output error on the calibration inputs falls (the authors' code does the same). Deviations: every layer that
shares an input has a branch of its own, unless ``share`` asks for one, and no smoothing at all is among the candidates.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from diffuse_compress.errors import ConfigError
from diffuse_compress.quantization.algorithms.awq import RowCollector
from diffuse_compress.quantization.algorithms.base import AlgorithmConfig, register_block, takes_scale
from diffuse_compress.quantization.algorithms.block import BlockWork, LayerWork, per_channel
from diffuse_compress.quantization.algorithms.rtn import RTNConfig, quantize
from diffuse_compress.quantization.algorithms.smoothquant import AbsMaxCollector, smoothing_scale
from diffuse_compress.quantization.layer_base import LowRank
from diffuse_compress.quantization.numerics import dequantize, fake_quantize_activation
from diffuse_compress.quantization.rotation import rotate, rotate_back
from diffuse_compress.quantization.scheme import PerTensor, Scheme

__all__ = ["SVDQuantConfig", "truncated_svd"]

# Of less than this many times the vectors that are wanted, all are found as fast.
_FEW = 4
_OVERSAMPLING = 16
_POWER_ITERATIONS = 4


@dataclass(frozen=True)
class SVDQuantConfig(AlgorithmConfig):
    """A low-rank branch in the layer's dtype beside the codes, and smoothing of the inputs. Needs calibration data.

    It decides on branch and smoothing; codes are then rounded to nearest, or chosen by what follows in a sequence.

    Args:
        rank: of the branch; layers with a smaller side take that.
        num_alphas: smoothing strengths that are tried, evenly spaced in [0, 1], beside no smoothing; 0 smooths nothing.
            Only layers whose inputs are quantized are smoothed, and only where an algorithm before has not.
        iterations: refinements of the branch at most; they end when one does not lower the error.
        share: give layers that share an input the same ``low_rank_down``, so that they can be run as one product.
        num_rows: input rows that errors are measured on.
    """

    rank: int = 32
    num_alphas: int = 20
    iterations: int = 100
    share: bool = False
    num_rows: int = 512
    kind: ClassVar[str] = "svdquant"
    needs_calibration: ClassVar[bool] = True
    chooses_codes: ClassVar[bool] = False

    @property
    def summary(self) -> str:
        return f"SVDQuant (rank {self.rank})"

    def __post_init__(self) -> None:
        if self.rank < 1 or self.num_alphas < 0 or self.iterations < 0 or self.num_rows < 1:
            raise ConfigError(
                "SVDQuantConfig: need rank >= 1, num_alphas >= 0, iterations >= 0 and num_rows >= 1, got "
                f"rank={self.rank}, num_alphas={self.num_alphas}, iterations={self.iterations}, "
                f"num_rows={self.num_rows}."
            )

    def unsupported(self, layer: nn.Module, scheme: Scheme) -> str | None:
        if isinstance(layer, nn.Conv2d) and layer.groups != 1:
            return "SVDQuant: grouped convolutions take no low-rank branch"
        return None

    def scales_input(self, layer: nn.Module, scheme: Scheme) -> bool:
        return self.num_alphas > 0 and scheme.activation is not None and takes_scale(layer)

    def branch_bytes(self, layer: nn.Module, scheme: Scheme) -> int:
        weight = layer.weight
        assert isinstance(weight, torch.Tensor)
        rows, columns = weight.flatten(1).shape
        return min(self.rank, rows, columns) * (rows + columns) * weight.element_size()


class _InputCollector:
    """Rows to measure errors on, and the largest magnitude of each channel."""

    def __init__(self, layer: LayerWork, num_rows: int, calls: int) -> None:
        self.sample, self.largest = RowCollector(num_rows, calls), AbsMaxCollector(layer)

    def update(self, rows: torch.Tensor) -> None:
        self.sample.update(rows)
        self.largest.update(rows)


@register_block
def calibrate(work: BlockWork, config: SVDQuantConfig) -> None:
    """Give every layer of a block its smoothing scale and its branch."""
    for names in work.subsets:
        layers = [work.layers[name] for name in names]
        layers = [layer for layer in layers if layer.quantized is None and takes_scale(layer.dense)]
        collectors = {layer.name: _InputCollector(layer, config.num_rows, len(work.calls)) for layer in layers}
        work.collect(collectors)
        samples = {name: found.sample.rows() for name, found in collectors.items()}
        trials = [_Trial(layer, rows, config.rank) for layer in layers if (rows := samples[layer.name]) is not None]
        smoothed = [trial for trial in trials if trial.work.act_pre_scale is None and trial.work.scheme.activation]
        if smoothed and config.num_alphas:
            _smooth(smoothed, collectors[smoothed[0].work.name].largest.value, config.num_alphas)
        for group in _groups(trials, config.share):
            _refine(group, config.iterations)


def _groups(trials: Sequence[_Trial], share: bool) -> list[list[_Trial]]:
    """Layers that get one branch together: all of the same columns and scale, or each for itself."""
    if not share:
        return [[trial] for trial in trials]
    groups: list[list[_Trial]] = []
    for trial in trials:
        group = next((group for group in groups if trial.fits(group[0])), None)
        if group is None:
            groups.append([trial])
        else:
            group.append(trial)
    return groups


class _Trial:
    """A layer with input rows: what its output would be with some scale and branch."""

    def __init__(self, work: LayerWork, rows: torch.Tensor, rank: int) -> None:
        self.work, self.rows = work, rows
        self.exact = work.dense.weight.detach().flatten(1).float()
        self.rank = min(rank, *self.exact.shape)
        self.expected = rows @ self.exact.t()

    def fits(self, other: _Trial) -> bool:
        """Whether both multiply the same smoothed columns."""
        mine, theirs = self.work.act_pre_scale, other.work.act_pre_scale
        same = mine is theirs if mine is None or theirs is None else torch.equal(mine, theirs)
        return same and self.work.dense.weight.shape[1:] == other.work.dense.weight.shape[1:]

    def with_(self, scale: torch.Tensor | None, low_rank: LowRank | None) -> LayerWork:
        return dataclasses.replace(self.work, act_pre_scale=scale, low_rank=low_rank, weight=None, ranges=None)

    def smoothed(self, scale: torch.Tensor | None) -> torch.Tensor:
        """``W diag(s)``, fp32 [N, K]."""
        return self.exact if scale is None else self.exact / self.work.per_column(scale)

    def branch(self, factors: LowRank, scale: torch.Tensor | None) -> LowRank:
        """Factors of the smoothed weight as the layer keeps them: for the input as it comes, in the layer's dtype."""
        down, up = factors
        if scale is not None:
            down = down * self.work.per_column(scale)
        # Copies of their own, in order: layers must not share memory, and products sum alike after a reload.
        dtype, plain = self.work.dense.weight.dtype, torch.contiguous_format
        return down.to(dtype, copy=True, memory_format=plain), up.to(dtype, copy=True, memory_format=plain)

    def measure(self, layer: LayerWork) -> tuple[float, torch.Tensor]:
        """(squared output error, fp32 [N, K] rounded weight for the smoothed input)."""
        rounded = dequantize(quantize(layer.target(), layer.scheme.weight, RTNConfig()))
        output = _quantized_rows(self.rows, layer) @ rounded.t()
        if layer.low_rank is not None:
            down, up = layer.low_rank
            output += self.rows @ down.float().t() @ up.float().t()
        error = float((output - self.expected).square_().sum(dtype=torch.float64))
        rotation = layer.scheme.input_rotation
        return error, rounded if rotation is None else rotate_back(rounded, rotation)


def _smooth(trials: Sequence[_Trial], largest: torch.Tensor | None, num_alphas: int) -> None:
    """Choose the smoothing scale that all of the layers share, by their output error with the first branch."""
    assert largest is not None
    parts = [per_channel(trial.work.dense, trial.exact.abs().amax(dim=0), torch.amax) for trial in trials]
    weights = torch.stack(parts).amax(dim=0)
    candidates = [torch.ones_like(largest)]
    candidates += [1.0 / smoothing_scale(largest, weights, step / num_alphas) for step in range(num_alphas + 1)]
    best, best_error = candidates[0], float("inf")
    for scale in candidates:
        error = 0.0
        for trial in trials:
            factors = truncated_svd(trial.smoothed(scale), trial.rank)
            error += trial.measure(trial.with_(scale, trial.branch(factors, scale)))[0]
        if error < best_error:
            best, best_error = scale, error
    for trial in trials:
        trial.work.act_pre_scale = best


def _refine(group: Sequence[_Trial], iterations: int) -> None:
    """Choose the branches of layers with one ``down``, alternating between branch and codes; the best stays."""
    scale, rank = group[0].work.act_pre_scale, min(trial.rank for trial in group)
    exact = torch.cat([trial.smoothed(scale) for trial in group])
    sizes = [trial.exact.shape[0] for trial in group]
    best: list[LowRank] = []
    best_error, target = float("inf"), exact
    for _ in range(iterations + 1):
        down, up = truncated_svd(target, rank)
        parts = up.split(sizes)
        branches = [trial.branch((down, part), scale) for trial, part in zip(group, parts, strict=True)]
        found = [trial.measure(trial.with_(scale, low)) for trial, low in zip(group, branches, strict=True)]
        error = sum(part for part, _ in found)
        if not error < best_error:
            break
        best, best_error = branches, error
        target = exact - torch.cat([rounded for _, rounded in found])
    for trial, low_rank in zip(group, best, strict=True):
        trial.work.low_rank = low_rank
        # What was decided for the whole weight does not hold for what the branch leaves of it.
        trial.work.weight = trial.work.ranges = None


def _quantized_rows(rows: torch.Tensor, layer: LayerWork) -> torch.Tensor:
    """fp32 [M, K]: input rows as they meet the codes.

    A convolution's samples have one scale each; of their rows alone it cannot be told, and the largest is taken.
    """
    scale, scheme = layer.column_scale, layer.scheme.activation
    if scale is not None:
        rows = rows * scale
    if layer.scheme.input_rotation is not None:
        rows = rotate(rows, layer.scheme.input_rotation)
    if scheme is None or not scheme.dynamic:
        return rows
    if isinstance(layer.dense, nn.Conv2d):
        scheme = dataclasses.replace(scheme, granularity=PerTensor())
    return fake_quantize_activation(rows, scheme)


def truncated_svd(weight: torch.Tensor, rank: int) -> LowRank:
    """(down [rank, K], up [N, rank]) whose product is the best approximation of ``weight``; singular values are halved.

    Args:
        weight: fp32 [N, K].
        rank: at most the smaller side.

    Where few vectors of many are wanted, they are found by subspace iteration from a fixed start (Halko et al. 2011,
    arXiv 0909.4061, algorithm 4.4), so that equal weights give equal factors.
    """
    if min(weight.shape) <= _FEW * (rank + _OVERSAMPLING):
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
    else:
        generator = torch.Generator().manual_seed(0)
        start = torch.randn(weight.shape[1], rank + _OVERSAMPLING, generator=generator).to(weight)
        basis = torch.linalg.qr(weight @ start).Q
        for _ in range(_POWER_ITERATIONS):
            basis = torch.linalg.qr(weight @ torch.linalg.qr(weight.t() @ basis).Q).Q
        left, values, right = torch.linalg.svd(basis.t() @ weight, full_matrices=False)
        left = basis @ left
    root = values[:rank].sqrt()
    return right[:rank] * root.unsqueeze(1), left[:, :rank] * root

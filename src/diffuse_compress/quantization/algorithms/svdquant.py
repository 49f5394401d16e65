"""SVDQuant: a small dense branch takes the largest singular values, and codes stand for what is left.

Li et al. 2025, "SVDQuant: Absorbing Outliers by Low-Rank Components for 4-Bit Diffusion Models", arXiv 2411.05007,
equations 4 to 7. With ``s`` the smoothing scale of the input channels::

    W diag(s) = L + R,    y = Q(x / s) Q(R)^T + (x / s) L^T

``L`` is the best approximation of rank r of ``W diag(s)``, and then, again and again, of ``W diag(s) - Q(R)``, as long
as the output error on the calibration inputs falls (the authors' code does the same). Deviations: every layer that
shares an input has a branch of its own, unless ``share`` asks for one; no smoothing at all is among the candidates, of
which a few are tried first and then the neighbours of the best; each decomposition starts from the one before it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn
from torch.nn.functional import normalize

from diffuse_compress.errors import ConfigError
from diffuse_compress.quantization.algorithms.awq import RowCollector
from diffuse_compress.quantization.algorithms.base import AlgorithmConfig, register_block, takes_scale
from diffuse_compress.quantization.algorithms.block import BlockWork, LayerWork, observed_qparams, per_channel
from diffuse_compress.quantization.algorithms.gptq import shared_inputs
from diffuse_compress.quantization.algorithms.smoothquant import AbsMaxCollector, smoothing_scale
from diffuse_compress.quantization.layer_base import LowRank
from diffuse_compress.quantization.numerics import choose_qparams, fake_quantize, fake_quantize_activation
from diffuse_compress.quantization.observers import ObserverConfig, weight_qparams
from diffuse_compress.quantization.qparams import QParams
from diffuse_compress.quantization.rotation import rotate, rotate_back
from diffuse_compress.quantization.scheme import PerTensor, Scheme

__all__ = ["SVDQuantConfig", "coarse_to_fine", "truncated_svd"]

# Of less than this many times the vectors that are wanted, all are found as fast.
_FEW = 4
_OVERSAMPLING = 16
# Singular values that are this much smaller than the largest are rounding errors of float32.
_NEGLIGIBLE = 1e-6
_NO_SMOOTHING = -1


@dataclass(frozen=True)
class SVDQuantConfig(AlgorithmConfig):
    """A low-rank branch in the layer's dtype beside the codes, and smoothing of the inputs. Needs calibration data.

    It decides on branch and smoothing; codes are then rounded to nearest, or chosen by what follows in a sequence.

    Args:
        rank: of the branch; layers with a smaller side take that.
        num_alphas: smoothing strengths to choose from, evenly spaced in [0, 1], beside no smoothing; 0 smooths nothing.
            Of more than seven some are tried, then those around the best. Only layers whose inputs are quantized are
            smoothed, and only where an algorithm before has not.
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
    chooses_scales: ClassVar[bool] = True
    adds_branch: ClassVar[bool] = True

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

    def branch_bytes(self, layer: nn.Module, scheme: Scheme, name: str = "") -> int:
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
    reached = [work.layers[name] for names in work.subsets for name in names]
    owner = shared_inputs(
        work, [layer.name for layer in reached if layer.quantized is None and takes_scale(layer.dense)]
    )
    collectors = {name: _InputCollector(work.layers[name], config.num_rows, len(work.calls)) for name in owner.values()}
    # One run for all: nothing that is decided here is in the block before all of it is.
    work.collect(collectors)
    for names in work.subsets:
        trials = [
            _Trial(work.layers[name], rows, config.rank, work.observer)
            for name in names
            if name in owner and (rows := collectors[owner[name]].sample.rows()) is not None
        ]
        smoothed = [trial for trial in trials if trial.work.act_pre_scale is None and trial.work.scheme.activation]
        if smoothed and config.num_alphas:
            _smooth(smoothed, collectors[owner[smoothed[0].work.name]].largest.value, config.num_alphas)
        for group in _groups(trials, config.share):
            _refine(group, config.iterations)


def _groups(trials: Sequence[_Trial], share: bool) -> list[list[_Trial]]:
    """Layers that get one branch together: all of the same columns, scale and rotation, or each for itself."""
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
    """A layer with input rows: what its output would be with some scale, branch and codes.

    Attributes:
        dense: its weight, fp32 [N, K].
        exact: that weight for the input that its codes meet, scaled and rotated; fp32 [N, K].
        rank: of the branch.
    """

    def __init__(self, work: LayerWork, rows: torch.Tensor, rank: int, observer: ObserverConfig) -> None:
        self.work, self.rows, self._observer = work, rows, observer
        self.dense = work.dense.weight.detach().flatten(1).float()
        # Raises for values that are not finite, of which there is no decomposition.
        choose_qparams(self.dense, work.scheme.weight)
        self.rank = min(rank, *self.dense.shape)
        self._expected = rows @ self.dense.t()
        self.scale(work.act_pre_scale)

    def scale(self, act_pre_scale: torch.Tensor | None) -> None:
        """Go on with this scale of the input."""
        self._layer = dataclasses.replace(self.work, act_pre_scale=act_pre_scale)
        self._quantized_rows = _quantized_rows(self.rows, self._layer, self._observer)
        self.exact = self._layer.as_codes_see_it(self.dense)

    def fits(self, other: _Trial) -> bool:
        """Whether both multiply the same columns."""
        mine, theirs = self.work.act_pre_scale, other.work.act_pre_scale
        same = mine is theirs if mine is None or theirs is None else torch.equal(mine, theirs)
        same = same and self.work.scheme.input_rotation == other.work.scheme.input_rotation
        return same and self.work.dense.weight.shape[1:] == other.work.dense.weight.shape[1:]

    def branch(self, factors: LowRank) -> LowRank:
        """Factors of a part of ``exact`` as the layer keeps them: for the input as it comes, in the layer's dtype."""
        down, up = factors
        if self.work.scheme.input_rotation is not None:
            down = rotate_back(down, self.work.scheme.input_rotation)
        scale = self._layer.column_scale
        if scale is not None:
            down = down * scale
        # Copies of their own, in order: layers must not share memory, and products sum alike after a reload.
        dtype, plain = self.work.dense.weight.dtype, torch.contiguous_format
        return down.to(dtype, copy=True, memory_format=plain), up.to(dtype, copy=True, memory_format=plain)

    def rest(self, branch: LowRank) -> torch.Tensor:
        """fp32 [N, K]: what ``branch`` leaves of ``exact`` for the codes."""
        down, up = branch
        return torch.addmm(self.exact, up.float(), self._layer.as_codes_see_it(down.float()), alpha=-1)

    def rounded(self, rest: torch.Tensor, qparams: QParams | None = None) -> torch.Tensor:
        """fp32 [N, K]: ``rest`` as codes have it, with the ranges of its groups as they are unless given."""
        return fake_quantize(rest, self.work.scheme.weight, qparams)

    def error(self, branch: LowRank, rounded: torch.Tensor) -> torch.Tensor:
        """Squared output error, float64 []."""
        down, up = branch
        output = self._quantized_rows @ rounded.t()
        output.addmm_(self.rows @ down.float().t(), up.float().t())
        return output.sub_(self._expected).square_().sum(dtype=torch.float64)


def _smooth(trials: Sequence[_Trial], largest: torch.Tensor | None, num_alphas: int) -> None:
    """Choose the smoothing scale that all of the layers share, by their output error with the first branch.

    Strengths are ranked with a rough decomposition and with ranges that are not searched: the models of
    docs/calibration.md lose nothing by it that other samples would not change as well.
    """
    assert largest is not None
    parts = [per_channel(trial.work.dense, trial.dense.abs().amax(dim=0), torch.amax) for trial in trials]
    weights = torch.stack(parts).amax(dim=0)

    def scale(strength: int) -> torch.Tensor:
        if strength == _NO_SMOOTHING:
            return torch.ones_like(largest)
        return 1.0 / smoothing_scale(largest, weights, strength / num_alphas)

    def error(strength: int) -> torch.Tensor:
        found = []
        for trial in trials:
            trial.scale(scale(strength))
            branch = trial.branch(truncated_svd(trial.exact, trial.rank, power_iterations=1))
            found.append(trial.error(branch, trial.rounded(trial.rest(branch))))
        return torch.stack(found).sum()

    best = scale(coarse_to_fine(error, num_alphas))
    for trial in trials:
        trial.work.act_pre_scale = best
        trial.scale(trial.work.act_pre_scale)


def coarse_to_fine(error: Callable[[int], torch.Tensor], last: int) -> int:
    """The strength of least error, of ``_NO_SMOOTHING`` and 0 to ``last``: some first, then those around the best."""
    step = 1
    while 8 * step <= last:
        step *= 2
    errors: dict[int, float] = {}
    todo = [_NO_SMOOTHING, *range(0, last + 1, step)]
    while True:
        # Read together: the device is waited for once a round.
        errors.update(zip(todo, torch.stack([error(strength) for strength in todo]).tolist(), strict=True))
        if step == 1:
            return min(errors, key=errors.__getitem__)
        step //= 2
        best = min((strength for strength in errors if strength != _NO_SMOOTHING), key=errors.__getitem__)
        todo = [near for near in (best - step, best + step) if 0 <= near <= last]


def _refine(group: Sequence[_Trial], iterations: int) -> None:
    """Choose the branches of layers with one ``down``, alternating between branch and codes; the best stays."""
    rank = min(trial.rank for trial in group)
    target = exact = torch.cat([trial.exact for trial in group])
    best: list[LowRank] = []
    ranges: list[QParams] = []
    best_error, up = float("inf"), None
    for _ in range(iterations + 1):
        down, up = truncated_svd(target, rank, near=up)
        parts = up.split([trial.dense.shape[0] for trial in group])
        branches = [trial.branch((down, part)) for trial, part in zip(group, parts, strict=True)]
        rests = [trial.rest(branch) for trial, branch in zip(group, branches, strict=True)]
        # Searched once: other ranges change little but what the branch has adapted to.
        ranges = ranges or [
            weight_qparams(rest, trial.work.scheme.weight) for trial, rest in zip(group, rests, strict=True)
        ]
        rounded = [trial.rounded(rest, found) for trial, rest, found in zip(group, rests, ranges, strict=True)]
        errors = [trial.error(branch, codes) for trial, branch, codes in zip(group, branches, rounded, strict=True)]
        error = float(torch.stack(errors).sum())
        if best and not error < best_error:
            break
        best, best_error = branches, error
        target = exact - torch.cat(rounded)
    for trial, branch in zip(group, best, strict=True):
        trial.work.low_rank = branch
        # What was decided for the whole weight does not hold for what the branch leaves of it.
        trial.work.weight = trial.work.ranges = None


def _quantized_rows(rows: torch.Tensor, layer: LayerWork, observer: ObserverConfig) -> torch.Tensor:
    """fp32 [M, K]: input rows as they meet the codes.

    A convolution's samples have one scale each; of their rows alone it cannot be told, and the largest is taken. Static
    ranges are those that ``observer`` chooses for these rows.
    """
    scale, scheme = layer.column_scale, layer.scheme.activation
    if scale is not None:
        rows = rows * scale
    if layer.scheme.input_rotation is not None:
        rows = rotate(rows, layer.scheme.input_rotation)
    if scheme is None:
        return rows
    if not scheme.dynamic:
        qparams = observed_qparams([rows], scheme, observer)
        return fake_quantize_activation(rows, scheme, qparams.scale, qparams.zero_point)
    if isinstance(layer.dense, nn.Conv2d):
        scheme = dataclasses.replace(scheme, granularity=PerTensor())
    return fake_quantize_activation(rows, scheme)


def truncated_svd(
    weight: torch.Tensor, rank: int, *, power_iterations: int = 4, near: torch.Tensor | None = None
) -> LowRank:
    """(down [rank, K], up [N, rank]) whose product is the best approximation of ``weight``; singular values are halved.

    Args:
        weight: fp32 [N, K], finite.
        rank: at most the smaller side.
        power_iterations: steps of the subspace iteration.
        near: [N, rank], ``up`` of a matrix that is much like this one: a single step is then enough.

    Where few vectors of many are wanted, they are found by subspace iteration from a fixed start (Halko et al. 2011,
    arXiv 0909.4061, algorithm 4.4), so that equal weights give equal factors.
    """
    if min(weight.shape) <= _FEW * (rank + _OVERSAMPLING):
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
        root = values[:rank].sqrt()
        return right[:rank] * root.unsqueeze(1), left[:, :rank] * root
    generator = torch.Generator(weight.device).manual_seed(0)
    width = _OVERSAMPLING if near is not None else rank + _OVERSAMPLING
    start = weight @ torch.randn(weight.shape[1], width, generator=generator, device=weight.device, dtype=weight.dtype)
    if near is not None:
        start, power_iterations = normalize(torch.cat([near, start], dim=1), dim=0), 1
    left, _, _ = _orthogonalized(start)
    for _ in range(power_iterations):
        right, _, _ = _orthogonalized(weight.t() @ left)
        left, _, _ = _orthogonalized(weight @ right)
    right, values, turn = _orthogonalized(weight.t() @ left)
    root = values[:rank].sqrt()
    return right[:, :rank].t() * root.unsqueeze(1), left @ turn[:, :rank] * root


def _orthogonalized(columns: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(left [n, k], values [k] descending, turn [k, k]): the thin singular value decomposition of fp32 [n, k].

    By the eigenvectors of the Gram matrix (Stathopoulos and Wu 2002, SIAM J. Sci. Comput. 23, p. 2165): products, which
    a GPU is quicker at than at factorizations of tall matrices. In float64, of these few columns, nothing is lost by
    squaring. Directions below the rounding of ``columns`` become 0.
    """
    wide = columns.double()
    # So few numbers are a CPU's work.
    squares, turn = torch.linalg.eigh((wide.t() @ wide).cpu())
    values, turn = squares.clamp(min=0).sqrt().flip(0), turn.flip(1)
    inverse = torch.where(values > _NEGLIGIBLE * values[0], 1 / values, 0.0)
    left = wide @ (turn * inverse).to(wide.device)
    return left.to(columns), values.to(columns), turn.to(columns)

"""GPTQ: round column by column, and let the columns still to come make up for the error.

Frantar et al. 2022, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", arXiv
2210.17323, algorithm 1. Deviations: ranges of the codes are chosen by least squared error instead of minimum and
maximum, and where they are per group they are those of the weights as compensated so far (``static_groups=False``, as
the authors' code does without activation order) or of the original ones.

The asymmetric term: Li et al. 2025, "GPTAQ: Efficient Finetuning-Free Quantization for Asymmetric Calibration", arXiv
2504.02692. A layer is to give on its own, quantized inputs X what the unchanged model gives on X + D. When column q is
rounded, the columns F after it can also take over ``w_q D_q``, by ``w_q P_qF`` with

    P_qF = D_q X_F^T (X_F X_F^T)^-1,    so    P = strict_upper(D X^T U^T) U    where    U^T U = (X X^T)^-1, U upper.

Deviation: w_q is the original weight, of which the error to be taken over is a multiple, not the one compensated so
far. So all of it is added before the first column is rounded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from diffuse_compress.errors import ConfigError, ModelStateError
from diffuse_compress.quantization.algorithms.base import AlgorithmConfig, register_block
from diffuse_compress.quantization.algorithms.block import BlockWork, LayerWork
from diffuse_compress.quantization.blocks import scale_rows
from diffuse_compress.quantization.numerics import (
    FLOAT8,
    FLOAT8_MAX,
    QParams,
    choose_qparams,
    effective_scale,
    quantize_weight,
)
from diffuse_compress.quantization.observers import weight_qparams
from diffuse_compress.quantization.scheme import PerChannel, PerGroup, WeightScheme

__all__ = ["GPTQConfig", "HessianCollector", "collected", "inverse_factor", "round_columns", "shared_inputs"]

_DAMPING_ATTEMPTS = 6
# Of a convolution: what decides which rows it multiplies (``as_rows``).
_GEOMETRY = ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")


@dataclass(frozen=True)
class GPTQConfig(AlgorithmConfig):
    """Column-wise rounding with error compensation. Needs calibration data.

    Args:
        block_size: columns that are compensated at once; changes speed, and the result in the last bits only.
        damping: share of the mean of the Hessian's diagonal that is added to it; ten times more, again and again,
            where it cannot be inverted.
        act_order: round the columns with the largest inputs first. Ranges per group are those of the original weights
            then, so that a group stays a run of neighbouring columns.
        static_groups: choose every group's range from the original weights.
        true_sequential: layers that run later in a block see what the earlier ones became.
        observer: "mse" or "minmax", for the ranges.
        asymmetric: aim at the outputs of the unchanged model instead of those on the same inputs (GPTAQ). Needs the
            samples twice, and twice the time.
        asymmetric_share: how much of that difference is taken over, in (0, 1]; the authors' code takes a quarter.
    """

    block_size: int = 128
    damping: float = 0.01
    act_order: bool = True
    static_groups: bool = False
    true_sequential: bool = True
    observer: str = "mse"
    asymmetric: bool = False
    asymmetric_share: float = 0.25
    kind: ClassVar[str] = "gptq"
    needs_calibration: ClassVar[bool] = True

    @property
    def needs_reference(self) -> bool:  # type: ignore[override]
        return self.asymmetric

    @property
    def summary(self) -> str:
        return ("GPTAQ" if self.asymmetric else "GPTQ") + (" (activation order)" if self.act_order else "")

    def __post_init__(self) -> None:
        if self.block_size < 1 or not 0 < self.damping < 1:
            raise ConfigError(
                f"GPTQConfig: need block_size >= 1 and 0 < damping < 1, got block_size={self.block_size}, "
                f"damping={self.damping}."
            )
        if self.observer not in ("mse", "minmax"):
            raise ConfigError(f"GPTQConfig: observer must be 'mse' or 'minmax', got {self.observer!r}.")
        if not 0 < self.asymmetric_share <= 1:
            raise ConfigError(f"GPTQConfig: need 0 < asymmetric_share <= 1, got {self.asymmetric_share}.")

    def for_search(self) -> GPTQConfig:
        """The block is run once, not once for each group of its layers, and its inputs are the unchanged model's."""
        return replace(self, true_sequential=False, asymmetric=False)


class HessianCollector:
    """H = 2/n * sum of x x^T over the input rows, [K, K] fp32; of pairs also C = 2/n * sum of (reference - x) x^T."""

    def __init__(self, columns: int, device: torch.device) -> None:
        self.sum = torch.zeros(columns, columns, dtype=torch.float32, device=device)
        self.difference: torch.Tensor | None = None
        self.rows = 0

    def update(self, rows: torch.Tensor, references: torch.Tensor | None = None) -> None:
        x = rows.float()
        self.sum.addmm_(x.t(), x)
        if references is not None:
            if self.difference is None:
                self.difference = torch.zeros_like(self.sum)
            self.difference.addmm_((references.float() - x).t(), x)
        self.rows += x.shape[0]

    def hessian(self) -> torch.Tensor:
        return self.sum.mul(2.0 / max(1, self.rows))

    def cross(self) -> torch.Tensor | None:
        return None if self.difference is None else self.difference.mul(2.0 / max(1, self.rows))


@register_block
def calibrate(work: BlockWork, config: GPTQConfig) -> None:
    """Quantize every layer of a block; those that share an input share its Hessian, and are rounded together."""
    subsets = work.subsets if config.true_sequential else [tuple(name for names in work.subsets for name in names)]
    for names in subsets:
        sharing: dict[HessianCollector, list[LayerWork]] = {}
        for name, collector in collected(work, names, pairs=config.asymmetric).items():
            sharing.setdefault(collector, []).append(work.layers[name])
        while sharing:
            collector, layers = sharing.popitem()
            for stack in _stacks(layers):
                _quantize_stack(stack, collector, config, is_last=stack[-1] is layers[-1])
            for layer in layers:
                work.install(layer)


def _stacks(layers: Sequence[LayerWork]) -> list[list[LayerWork]]:
    """Layers whose rows may be rounded as those of one weight: nothing but the Hessian is shared between rows."""
    found: list[list[LayerWork]] = []
    for layer in layers:
        last = found[-1][0] if found else None
        by_row = isinstance(layer.scheme.weight.granularity, PerChannel | PerGroup)
        if last is not None and by_row and last.scheme.weight == layer.scheme.weight:
            if (last.ranges is None) == (layer.ranges is None):
                found[-1].append(layer)
                continue
        found.append([layer])
    return found


def _quantize_stack(
    layers: Sequence[LayerWork], collector: HessianCollector, config: GPTQConfig, *, is_last: bool
) -> None:
    """Choose the codes of layers that share a collector, which is used up by the ``is_last`` of them."""
    # Neither the codes nor the asymmetric term depend on the factor 2/n, which would cost another matrix.
    hessian = collector.sum if is_last else collector.sum.clone()
    ranges = None if layers[0].ranges is None else torch.cat([layer.ranges for layer in layers])  # type: ignore[misc]
    weight = torch.cat([layer.target() for layer in layers])
    scheme = layers[0].scheme.weight
    result, qparams = round_columns(weight, hessian, scheme, config, ranges, collector.difference)
    start = 0
    for layer in layers:
        rows = slice(start, start + layer.dense.weight.shape[0])
        part = _rows_of(qparams, rows) if layers[1:] else qparams
        layer.quantized = quantize_weight(result[rows], scheme, part)
        start = rows.stop


def _rows_of(qparams: QParams, rows: slice) -> QParams:
    zero_point = None if qparams.zero_point is None else qparams.zero_point[rows].clone()
    return QParams(qparams.scale[rows].clone(), zero_point)


def collected(work: BlockWork, names: Sequence[str], *, pairs: bool) -> dict[str, HessianCollector]:
    """{layer without codes: second moments of its inputs}; layers that see the same rows share a collector.

    Args:
        work: the block, which is run.
        names: of layers.
        pairs: collect the difference from the unchanged model's inputs as well.
    """
    todo = [name for name in names if work.layers[name].quantized is None]
    owner = shared_inputs(work, todo)
    collectors = {}
    for name in dict.fromkeys(owner.values()):
        weight = work.layers[name].dense.weight
        collectors[name] = HessianCollector(weight.flatten(1).shape[1], weight.device)
    if collectors and pairs:
        work.collect_pairs(collectors)
    elif collectors:
        work.collect(collectors, quantized_inputs=True, weighted=True)
    return {name: collectors[owner[name]] for name in todo}


def shared_inputs(work: BlockWork, names: Sequence[str]) -> dict[str, str]:
    """{layer: the layer whose collector it uses}: one for those that see the same rows."""
    first: dict[tuple[object, ...], str] = {}
    owner = {}
    group_of = {name: index for index, group in enumerate(work.subsets) for name in group}
    for name in names:
        layer = work.layers[name]
        scale = None if layer.act_pre_scale is None else layer.act_pre_scale.data_ptr()
        geometry = tuple(getattr(layer.dense, key, None) for key in _GEOMETRY)
        seen = (group_of.get(name, name), scale, layer.scheme.input_rotation, layer.scheme.activation, geometry)
        owner[name] = first.setdefault(seen, name)
    return owner


def round_columns(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    scheme: WeightScheme,
    config: GPTQConfig,
    ranges: torch.Tensor | None = None,
    cross: torch.Tensor | None = None,
) -> tuple[torch.Tensor, QParams]:
    """A weight on its grid that minimises ``tr((W - What) H (W - What)^T)`` greedily, and the grid.

    Args:
        weight: fp32 [N, K]; overwritten.
        hessian: fp32 [K, K], symmetric, positive semidefinite, of any scale; overwritten.
        scheme: the format to reach.
        config: block size, damping, order of the columns.
        ranges: fp32 [N, K] whose ranges the codes span; None chooses them as ``config`` says.
        cross: fp32 [K, K], (reference - x) x^T summed as ``hessian`` is; None aims at the outputs on the same inputs.

    Raises:
        ModelStateError: the Hessian cannot be inverted at any damping that is tried, or is not finite.
    """
    columns = weight.shape[1]
    diagonal = torch.diagonal(hessian)
    dead = diagonal == 0
    # As large as the others are, whatever their unit: the damping is a share of the mean of all.
    diagonal[dead] = 1.0 if dead.all() else diagonal[~dead].mean()
    order = torch.argsort(diagonal, descending=True, stable=True) if config.act_order else None
    if order is not None:
        hessian.copy_(hessian[order][:, order])
    upper = inverse_factor(hessian, config.damping)
    if cross is not None:
        cross = cross if order is None else cross[order][:, order]
        taken = torch.triu(cross @ upper.t(), diagonal=1) @ upper * config.asymmetric_share
        weight = weight + weight @ (taken if order is None else _reordered(taken, order))
    grid = _Grid(weight, scheme, config, ranges)
    # A column that no input reaches costs nothing: its rounding error must not be passed on.
    kept = weight[:, dead].clone()
    weight = weight if order is None else weight[:, order]
    places = range(columns) if order is None else order.tolist()
    result = torch.empty_like(weight)
    # Whole groups of columns, so that a group's range is that of weights compensated for all that went before.
    size = scheme.group_size or 1
    step = -(-config.block_size // size) * size
    for start in range(0, columns, step):
        stop = min(start + step, columns)
        # Transposed: a column's values lie side by side, and a step starts few and fast kernels.
        block, factor = weight[:, start:stop].t().contiguous(), upper[start:stop, start:stop]
        errors, rounded, pivots = torch.empty_like(block), torch.empty_like(block), torch.diagonal(factor)
        for i in range(stop - start):
            grid.enter(places[start + i], block[i:])
            grid.round(block[i], places[start + i], rounded[i])
            torch.sub(block[i], rounded[i], out=errors[i]).div_(pivots[i])
            block[i + 1 :].addr_(factor[i, i + 1 :], errors[i], alpha=-1)
        result[:, start:stop] = rounded.t()
        weight[:, stop:].addmm_(errors.t(), upper[start:stop, stop:], alpha=-1)
    if order is not None:
        result = result[:, torch.argsort(order)]
    result[:, dead] = kept
    return result, grid.qparams()


def _reordered(matrix: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """[K, K] of columns in ``order``, back in the layer's own order."""
    back = torch.argsort(order)
    return matrix[back][:, back]


def inverse_factor(hessian: torch.Tensor, damping: float) -> torch.Tensor:
    """Upper triangular U with U^T U = H^-1, damping as much as it takes; the diagonal of H is overwritten."""
    if not torch.isfinite(hessian).all():
        raise ModelStateError("GPTQ: the Hessian of the inputs is not finite. Load the model in bfloat16 or float32.")
    diagonal = torch.diagonal(hessian).clone()
    mean = diagonal.mean()
    for attempt in range(_DAMPING_ATTEMPTS):
        torch.diagonal(hessian).copy_(diagonal + mean * damping * 10**attempt)
        # Of wide layers these are a gigabyte each: none is held longer than it must be.
        inverse, problem = torch.linalg.cholesky_ex(hessian)
        if int(problem) == 0:
            inverse = torch.cholesky_inverse(inverse)
            upper: torch.Tensor
            upper, problem = torch.linalg.cholesky_ex(inverse, upper=True)
            if int(problem) == 0 and torch.isfinite(upper).all():
                return upper
    last = damping * 10 ** (_DAMPING_ATTEMPTS - 1)
    raise ModelStateError(
        f"GPTQ: the Hessian of the inputs cannot be inverted, not even with damping={last:g}. "
        "The calibration samples are too few or all alike: give more, or another algorithm."
    )


class _Grid:
    """The codes a column may take: scales found once, or group by group from the weights as they are by then."""

    def __init__(
        self, weight: torch.Tensor, scheme: WeightScheme, config: GPTQConfig, ranges: torch.Tensor | None
    ) -> None:
        self.scheme, self.config = scheme, config
        self.size, self._rows = scheme.group_size, weight.shape[0]
        self._dynamic = isinstance(scheme.granularity, PerGroup) and not (config.static_groups or config.act_order)
        if ranges is None:
            self._found = _qparams(weight, scheme, config)
        else:
            self._dynamic, self._found = False, choose_qparams(ranges, scheme)
        self._set(self._found)

    def enter(self, column: int, rest: torch.Tensor) -> None:
        """Before ``column``, the first row of ``rest`` [R, N], is rounded: at a group's start its range may be due."""
        if not self._dynamic or self.size is None or column % self.size:
            return
        group = column // self.size
        found = _qparams(rest[: self.size].t().contiguous(), self.scheme, self.config)
        self._found.scale[:, group] = found.scale[:, 0]
        if self._found.zero_point is not None and found.zero_point is not None:
            self._found.zero_point[:, group] = found.zero_point[:, 0]
        self._set(self._found)

    def round(self, values: torch.Tensor, column: int, out: torch.Tensor) -> None:
        """``values`` [N] of a column, each moved to the nearest value a code stands for, into ``out`` [N]."""
        group = 0 if self.size is None else column // self.size
        scale = self._scale[group]
        steps = values / scale
        if not self.scheme.format.is_integer:
            steps = steps.clamp_(-FLOAT8_MAX, FLOAT8_MAX).to(FLOAT8).float()
        elif self._zero is None:
            steps.round_().clamp_(*self.scheme.range)
        elif self.scheme.additive_zero_point:
            steps = torch.div(values - self._zero[group], scale).round_().clamp_(*self.scheme.range)
            torch.mul(steps, scale, out=out).add_(self._zero[group])
            return
        elif self.scheme.float_zero_point:
            steps.add_(self._zero[group]).round_().clamp_(*self.scheme.range).sub_(self._zero[group])
        else:
            steps.round_().add_(self._zero[group]).clamp_(*self.scheme.range).sub_(self._zero[group])
        torch.mul(steps, scale, out=out)

    def qparams(self) -> QParams:
        return self._found

    def _set(self, found: QParams) -> None:
        """Scales and zero points as [groups, N], or [1, 1]."""
        rows = self._rows
        self._scale = scale_rows(effective_scale(found), self.scheme, rows).t().contiguous()
        self._zero = None if found.zero_point is None else found.zero_point.float().t().contiguous()


def _qparams(weight: torch.Tensor, scheme: WeightScheme, config: GPTQConfig) -> QParams:
    found = weight_qparams(weight, scheme, config.observer)
    return QParams(
        found.scale.clone(), None if found.zero_point is None else found.zero_point.clone(), found.group_scale
    )

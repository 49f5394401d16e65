"""GPTQ: round column by column, and let the columns still to come make up for the error.

Frantar et al. 2022, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", arXiv
2210.17323, algorithm 1. Deviations: ranges of the codes are chosen by least squared error instead of minimum and
maximum, and where they are per group they are those of the weights as compensated so far (``static_groups=False``, as
the authors' code does without activation order) or of the original ones.

Two things may stay as they are, for what builds on it: whole input columns, which are then the last to come and make up
for the errors of all others (OWQ and QUIK, :class:`LayerWork.dense_columns`), and single weights (SpQR), which have no
error of their own. Ranges per group are those of the original weights then, without what stays.

The asymmetric term: Li et al. 2025, "GPTAQ: Efficient Finetuning-Free Quantization for Asymmetric Calibration", arXiv
2504.02692. A layer is to give on its own, quantized inputs X what the unchanged model gives on X + D. When column q is
rounded, the columns F after it can also take over ``w_q D_q``, by ``w_q P_qF`` with

    P_qF = D_q X_F^T (X_F X_F^T)^-1,    so    P = strict_upper(D X^T U^T) U    where    U^T U = (X X^T)^-1, U upper.

Deviation: w_q is the original weight, of which the error to be taken over is a multiple, not the one compensated so
far. So all of it is added before the first column is rounded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from diffuse_compress.errors import ConfigError, ModelStateError
from diffuse_compress.quantization.algorithms.base import AlgorithmConfig, register_block
from diffuse_compress.quantization.algorithms.block import BlockWork, LayerWork
from diffuse_compress.quantization.numerics import FLOAT8, FLOAT8_MAX, choose_qparams, dequantize, quantize_weight
from diffuse_compress.quantization.observers import weight_qparams
from diffuse_compress.quantization.packed import SparseOutliers
from diffuse_compress.quantization.qparams import QParams, effective_scale, expanded, rows_of
from diffuse_compress.quantization.scheme import PerChannel, PerGroup, WeightScheme

__all__ = [
    "Factor",
    "GPTQConfig",
    "HessianCollector",
    "collected",
    "gptq_of",
    "inverse_factor",
    "quantize_block",
    "round_columns",
    "shared_inputs",
]

_DAMPING_ATTEMPTS = 6
_PASSED_ON = ("damping", "act_order", "true_sequential", "observer")
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
    rounds_input_groups: ClassVar[bool] = True

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


def gptq_of(config: AlgorithmConfig) -> GPTQConfig:
    """The GPTQ that a config builds on, which has these of its fields; raises ConfigError as that does."""
    return GPTQConfig(**{name: getattr(config, name) for name in _PASSED_ON})


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


StayingWeights = Callable[[torch.Tensor, torch.Tensor, WeightScheme], torch.Tensor]
"""bool [N, K] of the weights that stay as they are, from the weight, fp32 [N, K], what an error in a column costs, fp32
[K] (the squared reciprocals of the factor's pivots), and the format."""


@register_block
def calibrate(work: BlockWork, config: GPTQConfig) -> None:
    """Quantize every layer of a block; those that share an input share its Hessian, and are rounded together."""
    quantize_block(work, config)


def quantize_block(
    work: BlockWork,
    config: GPTQConfig,
    *,
    before: Callable[[Sequence[LayerWork]], None] | None = None,
    choose: Callable[[LayerWork, HessianCollector], None] | None = None,
    staying: StayingWeights | None = None,
) -> None:
    """GPTQ on every layer of a block that has no codes yet.

    Args:
        work: the block.
        config: how.
        before: sees the layers of each group before their inputs are collected, and may choose ``dense_columns``.
        choose: sees each layer with its collected inputs, and may do so then; they are collected as they were.
        staying: chooses single weights that stay, where the format can have such.
    """
    subsets = work.subsets if config.true_sequential else [tuple(name for names in work.subsets for name in names)]
    for names in subsets:
        if before is not None:
            before([work.layers[name] for name in names if work.layers[name].quantized is None])
        sharing: dict[HessianCollector, list[LayerWork]] = {}
        for name, collector in collected(work, names, pairs=config.asymmetric).items():
            sharing.setdefault(collector, []).append(work.layers[name])
        while sharing:
            collector, layers = sharing.popitem()
            if choose is not None:
                for layer in layers:
                    choose(layer, collector)
            for stack in _stacks(layers):
                _quantize_stack(stack, collector, config, staying, is_last=stack[-1] is layers[-1])
            for layer in layers:
                work.install(layer)


def _stacks(layers: Sequence[LayerWork]) -> list[list[LayerWork]]:
    """Layers whose rows may be rounded as those of one weight: nothing but the Hessian is shared between rows."""
    found: list[list[LayerWork]] = []
    for layer in layers:
        last = found[-1][0] if found else None
        by_row = isinstance(layer.scheme.weight.granularity, PerChannel | PerGroup)
        if last is not None and by_row and last.scheme.weight == layer.scheme.weight:
            if (last.ranges is None) == (layer.ranges is None) and _same(last.dense_columns, layer.dense_columns):
                found[-1].append(layer)
                continue
        found.append([layer])
    return found


def _same(columns: torch.Tensor | None, others: torch.Tensor | None) -> bool:
    if columns is None or others is None:
        return columns is others
    return columns is others or torch.equal(columns, others)


def _quantize_stack(
    layers: Sequence[LayerWork],
    collector: HessianCollector,
    config: GPTQConfig,
    staying: StayingWeights | None,
    *,
    is_last: bool,
) -> None:
    """Choose the codes of layers that share a collector, which is used up by the ``is_last`` of them."""
    # Neither the codes nor the asymmetric term depend on the factor 2/n, which would cost another matrix.
    hessian = collector.sum if is_last else collector.sum.clone()
    ranges = None if layers[0].ranges is None else torch.cat([layer.ranges for layer in layers])  # type: ignore[misc]
    weight = torch.cat([layer.target() for layer in layers])
    scheme, columns = layers[0].scheme.weight, layers[0].dense_columns
    factor = Factor(hessian, config, columns)
    stay = None if staying is None else staying(weight, factor.costs(), scheme)
    result, qparams = _round_with(factor, weight, scheme, config, ranges, collector.difference, stay)
    start = 0
    for layer in layers:
        rows = slice(start, start + layer.dense.weight.shape[0])
        part, values = _rows_of(qparams, rows) if layers[1:] else qparams, result[rows]
        if columns is not None:
            scale, dense = layer.column_scale, values[:, columns]
            layer.dense_weight = dense if scale is None else dense * scale[columns]
            values = values.index_fill(1, columns, 0)
        layer.quantized = quantize_weight(values, scheme, part)
        if stay is not None:
            rest, dtype = values - dequantize(layer.quantized), layer.dense.weight.dtype
            layer.quantized.outliers = SparseOutliers.at(stay[rows], rest, dtype)
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
        columns = None if layer.dense_columns is None else layer.dense_columns.data_ptr()
        format_ = (layer.scheme.input_rotation, layer.scheme.activation)
        seen = (group_of.get(name, name), scale, columns, format_, geometry)
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
    return _round_with(Factor(hessian, config), weight, scheme, config, ranges, cross)


class Factor:
    """The order that columns are rounded in, and what each passes on to those after it.

    Args:
        hessian: fp32 [K, K], symmetric, positive semidefinite, of any scale; overwritten.
        config: damping, order of the columns.
        last: int64 [C], columns that come after all others, and are not rounded.

    Attributes:
        upper: [K, K], ``U^T U`` the inverse of the Hessian in that order.
        order: int64 [K], or None for the layer's own.
        dead: bool [K], columns that no input reaches, in the layer's own order.
        last: as given.

    Raises:
        ModelStateError: as :func:`round_columns`.
    """

    def __init__(self, hessian: torch.Tensor, config: GPTQConfig, last: torch.Tensor | None = None) -> None:
        diagonal, self.last = torch.diagonal(hessian), last
        self.dead = dead = diagonal == 0
        # As large as the others are, whatever their unit: the damping is a share of the mean of all.
        diagonal[dead] = 1.0 if dead.all() else diagonal[~dead].mean()
        self.order = torch.argsort(diagonal, descending=True, stable=True) if config.act_order else None
        if last is not None:
            order = torch.arange(len(diagonal), device=diagonal.device) if self.order is None else self.order
            at_end = torch.isin(order, last)
            self.order = torch.cat([order[~at_end], order[at_end]])
        if self.order is not None:
            hessian.copy_(hessian[self.order][:, self.order])
        self.upper = inverse_factor(hessian, config.damping)

    def costs(self) -> torch.Tensor:
        """fp32 [K]: what a squared error of 1 in a column costs that all columns after it have made up for."""
        costs = torch.diagonal(self.upper).square().reciprocal()
        costs = costs if self.order is None else costs[torch.argsort(self.order)]
        return torch.where(self.dead, 0.0, costs)


def _round_with(
    factor: Factor,
    weight: torch.Tensor,
    scheme: WeightScheme,
    config: GPTQConfig,
    ranges: torch.Tensor | None = None,
    cross: torch.Tensor | None = None,
    stay: torch.Tensor | None = None,
) -> tuple[torch.Tensor, QParams]:
    """As :func:`round_columns`; the last columns of ``factor`` and what is True in ``stay``, bool [N, K], are not on
    the grid, but make up for the errors before them."""
    columns, order, upper, dead = weight.shape[1], factor.order, factor.upper, factor.dead
    if cross is not None:
        cross = cross if order is None else cross[order][:, order]
        taken = torch.triu(cross @ upper.t(), diagonal=1) @ upper * config.asymmetric_share
        weight = weight + weight @ (taken if order is None else _reordered(taken, order))
    grid = _Grid(_without(weight, factor.last, stay), scheme, config, _without(ranges, factor.last, stay))
    if factor.last is not None:
        grid.fix()
    # A column that no input reaches costs nothing: its rounding error must not be passed on.
    unreached = weight[:, dead].clone()
    weight = weight if order is None else weight[:, order]
    if stay is not None:
        stay = (stay if order is None else stay[:, order]).t().contiguous()
    places = range(columns) if order is None else order.tolist()
    rounding = columns if factor.last is None else columns - len(factor.last)
    result = torch.empty_like(weight)
    # Whole groups of columns, so that a group's range is that of weights compensated for all that went before.
    size = scheme.group_size or 1
    step = -(-config.block_size // size) * size
    for start in range(0, rounding, step):
        stop = min(start + step, rounding)
        # Transposed: a column's values lie side by side, and a step starts few and fast kernels.
        block, part = weight[:, start:stop].t().contiguous(), upper[start:stop, start:stop]
        errors, rounded, pivots = torch.empty_like(block), torch.empty_like(block), torch.diagonal(part)
        for i in range(stop - start):
            grid.enter(places[start + i], block[i:])
            grid.round(block[i], places[start + i], rounded[i])
            if stay is not None:
                rounded[i] = torch.where(stay[start + i], block[i], rounded[i])
            torch.sub(block[i], rounded[i], out=errors[i]).div_(pivots[i])
            block[i + 1 :].addr_(part[i, i + 1 :], errors[i], alpha=-1)
        result[:, start:stop] = rounded.t()
        weight[:, stop:].addmm_(errors.t(), upper[start:stop, stop:], alpha=-1)
    result[:, rounding:] = weight[:, rounding:]
    if order is not None:
        result = result[:, torch.argsort(order)]
    result[:, dead] = unreached
    return result, grid.qparams()


def _without(weight: torch.Tensor | None, columns: torch.Tensor | None, stay: torch.Tensor | None) -> Any:
    """fp32 [N, K] with 0, which every range includes, for what stays as it is."""
    if weight is None:
        return None
    weight = weight if columns is None else weight.index_fill(1, columns, 0)
    return weight if stay is None else weight.masked_fill(stay, 0)


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

    def fix(self) -> None:
        """Keep the ranges of the original weights: columns do not come in the order of their groups."""
        self._dynamic = False

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
        group = group if self.scheme.transposed is None else column
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
        """Scales and zero points as [groups, N], or [1, 1]; of groups of rows as [K, N]."""
        found = expanded(rows_of(found, self.scheme, None, self._rows), self.scheme)
        self._scale = effective_scale(found).t().contiguous()
        self._zero = None if found.zero_point is None else found.zero_point.float().t().contiguous()


def _qparams(weight: torch.Tensor, scheme: WeightScheme, config: GPTQConfig) -> QParams:
    found = weight_qparams(weight, scheme, config.observer)
    return QParams(
        found.scale.clone(), None if found.zero_point is None else found.zero_point.clone(), found.group_scale
    )

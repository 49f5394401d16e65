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
from dataclasses import dataclass
from typing import ClassVar

import torch

from diffuse_compress.errors import ConfigError, ModelStateError
from diffuse_compress.quantization.algorithms.base import AlgorithmConfig, register_block
from diffuse_compress.quantization.algorithms.block import BlockWork
from diffuse_compress.quantization.numerics import (
    FLOAT8,
    FLOAT8_MAX,
    QParams,
    choose_qparams,
    effective_scale,
    quantize_weight,
)
from diffuse_compress.quantization.observers import MinMaxObserver, MSEObserver
from diffuse_compress.quantization.packed import QuantizedWeight
from diffuse_compress.quantization.scheme import PerGroup, WeightScheme

__all__ = ["GPTQConfig", "HessianCollector", "collected", "quantize_columns"]

_DAMPING_ATTEMPTS = 6


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
    """Quantize every layer of a block; those that share an input share its Hessian."""
    subsets = work.subsets if config.true_sequential else [tuple(name for names in work.subsets for name in names)]
    for names in subsets:
        for name, collector in collected(work, names, pairs=config.asymmetric).items():
            layer = work.layers[name]
            layer.quantized = quantize_columns(
                layer.target(), collector.hessian(), layer.scheme.weight, config, layer.ranges, collector.cross()
            )
            work.install(layer)


def collected(work: BlockWork, names: Sequence[str], *, pairs: bool) -> dict[str, HessianCollector]:
    """{layer without codes: second moments of its inputs}; layers that see the same rows share a collector.

    Args:
        work: the block, which is run.
        names: of layers.
        pairs: collect the difference from the unchanged model's inputs as well.
    """
    todo = [name for name in names if work.layers[name].quantized is None]
    owner = _shared(work, todo)
    collectors = {}
    for name in dict.fromkeys(owner.values()):
        weight = work.layers[name].dense.weight
        collectors[name] = HessianCollector(weight.flatten(1).shape[1], weight.device)
    if collectors and pairs:
        work.collect_pairs(collectors)
    elif collectors:
        work.collect(collectors, quantized_inputs=True, weighted=True)
    return {name: collectors[owner[name]] for name in todo}


def _shared(work: BlockWork, names: Sequence[str]) -> dict[str, str]:
    """{layer: the layer whose collector it uses}: one for those that see the same rows."""
    first: dict[tuple[object, ...], str] = {}
    owner = {}
    group_of = {name: index for index, group in enumerate(work.subsets) for name in group}
    for name in names:
        layer = work.layers[name]
        scale = None if layer.act_pre_scale is None else layer.act_pre_scale.data_ptr()
        kind = tuple(getattr(layer.dense, key, None) for key in ("kernel_size", "stride", "padding", "dilation"))
        seen = (group_of.get(name, name), scale, layer.scheme.input_rotation, layer.scheme.activation, kind)
        owner[name] = first.setdefault(seen, name)
    return owner


def quantize_columns(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    scheme: WeightScheme,
    config: GPTQConfig,
    ranges: torch.Tensor | None = None,
    cross: torch.Tensor | None = None,
) -> QuantizedWeight:
    """Codes for a weight that minimise ``tr((W - What) H (W - What)^T)`` greedily.

    Args:
        weight: fp32 [N, K]; overwritten.
        hessian: fp32 [K, K], symmetric, positive semidefinite; overwritten.
        scheme: the format to reach.
        config: block size, damping, order of the columns.
        ranges: fp32 [N, K] whose ranges the codes span; None chooses them as ``config`` says.
        cross: fp32 [K, K], (reference - x) x^T summed as ``hessian`` is; None aims at the outputs on the same inputs.

    Raises:
        ModelStateError: the Hessian cannot be inverted at any damping that is tried, or is not finite.
    """
    columns = weight.shape[1]
    dead = torch.diagonal(hessian) == 0
    torch.diagonal(hessian)[dead] = 1.0
    order = torch.argsort(torch.diagonal(hessian), descending=True, stable=True) if config.act_order else None
    if order is not None:
        hessian = hessian[order][:, order]
    upper = _inverse_factor(hessian, config.damping)
    if cross is not None:
        cross = cross if order is None else cross[order][:, order]
        taken = torch.triu(cross @ upper.t(), diagonal=1) @ upper * config.asymmetric_share
        weight = weight + weight @ (taken if order is None else _reordered(taken, order))
    grid = _Grid(weight, scheme, config, ranges)
    # A column that no input reaches costs nothing: its rounding error must not be passed on.
    kept = weight[:, dead].clone()
    weight = weight if order is None else weight[:, order]
    result = torch.empty_like(weight)
    # Whole groups of columns, so that a group's range is that of weights compensated for all that went before.
    size = scheme.group_size or 1
    step = -(-config.block_size // size) * size
    for start in range(0, columns, step):
        stop = min(start + step, columns)
        block, factor = weight[:, start:stop].clone(), upper[start:stop, start:stop]
        errors = torch.empty_like(block)
        for i in range(stop - start):
            column = start + i if order is None else int(order[start + i])
            grid.enter(column, block[:, i:])
            value = block[:, i]
            rounded = grid.round(value, column)
            result[:, start + i] = rounded
            error = (value - rounded) / factor[i, i]
            block[:, i + 1 :].addr_(error, factor[i, i + 1 :], alpha=-1)
            errors[:, i] = error
        weight[:, stop:].addmm_(errors, upper[start:stop, stop:], alpha=-1)
    if order is not None:
        result = result[:, torch.argsort(order)]
    result[:, dead] = kept
    return quantize_weight(result, scheme, grid.qparams())


def _reordered(matrix: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """[K, K] of columns in ``order``, back in the layer's own order."""
    back = torch.argsort(order)
    return matrix[back][:, back]


def _inverse_factor(hessian: torch.Tensor, damping: float) -> torch.Tensor:
    """Upper triangular U with U^T U = H^-1, damping as much as it takes."""
    if not torch.isfinite(hessian).all():
        raise ModelStateError("GPTQ: the Hessian of the inputs is not finite. Load the model in bfloat16 or float32.")
    mean = torch.diagonal(hessian).mean()
    for attempt in range(_DAMPING_ATTEMPTS):
        damped = hessian.clone()
        torch.diagonal(damped).add_(mean * damping * 10**attempt)
        lower, problem = torch.linalg.cholesky_ex(damped)
        if int(problem) == 0:
            upper: torch.Tensor
            upper, problem = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
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
        self.size = scheme.group_size
        self._dynamic = isinstance(scheme.granularity, PerGroup) and not (config.static_groups or config.act_order)
        if ranges is None:
            self._found = _qparams(weight, scheme, config)
        else:
            self._dynamic, self._found = False, choose_qparams(ranges, scheme)
        self._set(self._found)

    def enter(self, column: int, rest: torch.Tensor) -> None:
        """Before ``column``, the first of ``rest``, is rounded: at the start of a group its range may be due."""
        if not self._dynamic or self.size is None or column % self.size:
            return
        group = column // self.size
        found = _qparams(rest[:, : self.size], self.scheme, self.config)
        self._found.scale[:, group] = found.scale[:, 0]
        if self._found.zero_point is not None and found.zero_point is not None:
            self._found.zero_point[:, group] = found.zero_point[:, 0]
        self._set(self._found)

    def round(self, values: torch.Tensor, column: int) -> torch.Tensor:
        """``values`` [N] of a column, each moved to the nearest value a code stands for."""
        group = 0 if self.size is None else column // self.size
        scale = self._scale[:, group]
        if not self.scheme.format.is_integer:
            return (values / scale).clamp_(-FLOAT8_MAX, FLOAT8_MAX).to(FLOAT8).float() * scale
        steps = values / scale
        if self._zero is None:
            return steps.round_().clamp_(*self.scheme.range) * scale
        zero = self._zero[:, group]
        steps = (steps + zero).round_() if self.scheme.float_zero_point else steps.round_() + zero
        return (steps.clamp_(*self.scheme.range) - zero) * scale

    def qparams(self) -> QParams:
        return self._found

    def _set(self, found: QParams) -> None:
        self._scale = effective_scale(found)
        self._zero = None if found.zero_point is None else found.zero_point.float()


def _qparams(weight: torch.Tensor, scheme: WeightScheme, config: GPTQConfig) -> QParams:
    observer = MSEObserver(scheme) if config.observer == "mse" else MinMaxObserver(scheme)
    observer.update(weight)
    found = observer.qparams()
    return QParams(
        found.scale.clone(), None if found.zero_point is None else found.zero_point.clone(), found.group_scale
    )

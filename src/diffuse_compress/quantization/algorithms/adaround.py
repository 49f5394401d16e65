"""AdaRound: learn for each weight which of two codes to take, so that the layer's output stays.

Nagel et al. 2020, "Up or Down? Adaptive Rounding for Post-Training Quantization", arXiv 2004.10568, equations 21 to 25.
A code is ``lower + h(v)`` with h the rectified sigmoid of a learned v; a regulariser pushes every h to 0 or 1.

The squared error of a layer's output depends on its inputs through their second moments alone, so these are summed once
and the gradient of every step is that of all samples, not of a batch (the activation function behind the layer is left
out for it). With inputs x of the quantized model and r of the unchanged one it is, but for a constant,

    tr((What - W') H (What - W')^T)    with    W' = W + W C H^-1,    H = sum x x^T,    C = sum (r - x) x^T.

H is that of the inputs to come, not of the few that were seen, so a ridge is added to what these give. It is a share of
the median of the diagonal, which outlier channels do not move, and shrinks with the number of rows.

Deviations: the ridge; the two codes are the one that GPTQ chooses on the same H and W' and its neighbour downhill, not
those around W (``start="nearest"``: around W'); error and regulariser are relative, to the error at the start and to
the number of weights, so one setting holds for outputs and layers of every size. The rate is higher and the steps are
fewer than the authors'.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch

from diffuse_compress.errors import ConfigError
from diffuse_compress.quantization.algorithms.base import AlgorithmConfig, register_block
from diffuse_compress.quantization.algorithms.block import BlockWork, LayerWork
from diffuse_compress.quantization.algorithms.gptq import (
    GPTQConfig,
    HessianCollector,
    collected,
    inverse_factor,
    round_columns,
)
from diffuse_compress.quantization.numerics import choose_qparams, quantize_weight
from diffuse_compress.quantization.observers import weight_qparams
from diffuse_compress.quantization.packed import QuantizedWeight
from diffuse_compress.quantization.qparams import QParams, effective_scale
from diffuse_compress.quantization.scheme import Bilevel, WeightScheme

__all__ = [
    "AdaRoundConfig",
    "Aim",
    "Annealing",
    "LearnedRoundingConfig",
    "RoundingStart",
    "SoftRounding",
    "aim_of",
    "first_rounding",
    "per_column",
    "require_integers",
    "round_adaptively",
]

# Ends of the sigmoid before it is cut to [0, 1] (the authors' gamma and zeta): 0 and 1 are reached at a finite v.
_LOW, _HIGH = -0.1, 1.1
# How far from the code it has a weight stands at first, in steps: at 0 or 1 h has no gradient.
_FIRST_STEP = 0.1
# Shares of the median of the diagonal: less or more than these is never added.
_SMALLEST_RIDGE, _LARGEST_RIDGE = 0.01, 1.0
# Of its mean, where the ridge is there already.
_DAMPING = 1e-6


class RoundingStart(Protocol):
    """What of a config decides where learning starts; the fields are those of :class:`LearnedRoundingConfig`."""

    @property
    def observer(self) -> str:
        """ "mse" or "minmax"."""

    @property
    def start(self) -> str:
        """ "gptq" or "nearest"."""

    @property
    def ridge(self) -> float:
        """At least 0."""


@dataclass(frozen=True)
class LearnedRoundingConfig(AlgorithmConfig):
    """What AdaRound and BRECQ share. Both need calibration data, and take integer weights only.

    Args:
        iterations: steps of Adam.
        learning_rate: of Adam.
        regularization: how strongly h is pushed to 0 or 1, relative to the error.
        warmup: share of the steps that goes without regulariser.
        observer: "mse" or "minmax", for the ranges where nothing before chose them.
        start: "gptq": the codes that GPTQ chooses, and the best neighbour of each; "nearest": the two around a weight.
        ridge: what is added to the diagonal of the inputs' second moments for M rows of K columns is, as a share of its
            median, ``ridge * K / M``, but between 0.01 and 1. More trusts few or similar samples less.
    """

    iterations: int = 300
    learning_rate: float = 0.1
    regularization: float = 100.0
    warmup: float = 0.2
    observer: str = "mse"
    start: str = "gptq"
    ridge: float = 8.0
    needs_calibration: ClassVar[bool] = True
    needs_reference: ClassVar[bool] = True
    rounds_input_groups: ClassVar[bool] = True

    def __post_init__(self) -> None:
        name = type(self).__name__
        if self.iterations < 1 or self.learning_rate <= 0 or self.regularization < 0:
            raise ConfigError(
                f"{name}: need iterations >= 1, learning_rate > 0 and regularization >= 0, got "
                f"iterations={self.iterations}, learning_rate={self.learning_rate}, "
                f"regularization={self.regularization}."
            )
        if not 0 <= self.warmup < 1:
            raise ConfigError(f"{name}: need 0 <= warmup < 1, got {self.warmup}.")
        if self.observer not in ("mse", "minmax"):
            raise ConfigError(f"{name}: observer must be 'mse' or 'minmax', got {self.observer!r}.")
        if self.start not in ("gptq", "nearest"):
            raise ConfigError(f"{name}: start must be 'gptq' or 'nearest', got {self.start!r}.")
        if self.ridge < 0:
            raise ConfigError(f"{name}: need ridge >= 0, got {self.ridge}.")

    def check(self, scheme: WeightScheme) -> None:
        require_integers(self, scheme)

    def for_search(self) -> GPTQConfig:
        """GPTQ, whose errors are near those of learned rounding and which takes a tenth of the time."""
        return GPTQConfig(observer=self.observer).for_search()


def require_integers(config: AlgorithmConfig, scheme: WeightScheme) -> None:
    """Raise ConfigError unless ``scheme`` has integer codes, each group with a scale of its own."""
    if not scheme.format.is_integer:
        raise ConfigError(
            f"{type(config).__name__}: rounds up or down to integer codes, got {scheme.format.value} weights. Use "
            "GPTQConfig() or RTNConfig() for these."
        )
    if isinstance(scheme.granularity, Bilevel):
        raise ConfigError(
            f"{type(config).__name__}: needs one scale and zero point for each group, got bilevel scales. Use "
            "SpQRConfig() or GPTQConfig() for these."
        )


@dataclass(frozen=True)
class AdaRoundConfig(LearnedRoundingConfig):
    """Learned rounding, layer by layer: ``iterations`` for each; fields of :class:`LearnedRoundingConfig`."""

    kind: ClassVar[str] = "adaround"

    @property
    def summary(self) -> str:
        return f"AdaRound ({self.iterations} steps)"


@dataclass(frozen=True)
class Annealing:
    """The regulariser's exponent over the steps: none in the warm-up, then linear (as the authors' code and BRECQ's).

    A large exponent leaves all but the nearly decided alone, a small one decides the rest.
    """

    iterations: int
    warmup: float
    first: float = 20.0
    last: float = 2.0

    def __call__(self, step: int) -> float | None:
        start = self.warmup * self.iterations
        if step < start:
            return None
        return self.first + (self.last - self.first) * (step - start) / max(1.0, self.iterations - start)


class SoftRounding:
    """A weight between its two neighbouring codes: ``decode(clamp(floor(w in steps) + h(v)))``.

    Args:
        weight: fp32 [N, K] that the codes are to stand for.
        scheme: integer format.
        qparams: scale and zero point, which stay.

    Attributes:
        v: fp32 [N, K], to be learned; starts where h is the fraction that rounding cuts off. ``v >= 0`` rounds up.
    """

    def __init__(self, weight: torch.Tensor, scheme: WeightScheme, qparams: QParams) -> None:
        self.scheme, self.qparams = scheme, qparams
        self._scale = per_column(effective_scale(qparams), weight.shape, scheme)
        self._zero: torch.Tensor | None = None
        if qparams.zero_point is not None:
            self._zero = per_column(qparams.zero_point.float(), weight.shape, scheme)
        steps = self._in_steps(weight)
        self._floor = steps.floor()
        self.v = torch.logit(((steps - self._floor) - _LOW) / (_HIGH - _LOW))

    def _in_steps(self, weight: torch.Tensor) -> torch.Tensor:
        if self._zero is None:
            return weight / self._scale
        if self.scheme.additive_zero_point:
            return (weight - self._zero) / self._scale
        return weight / self._scale + self._zero

    def begin_at(self, codes: torch.Tensor, downhill: torch.Tensor) -> None:
        """Let each weight keep its code, or take the next one in a direction.

        Args:
            codes: fp32 [N, K] on the grid; :meth:`hard` gives it until something is learned.
            downhill: fp32 [N, K], positive where a larger weight is better; at the end of the range it is turned.
        """
        low, high = self.scheme.range
        code = self._in_steps(codes).round_().clamp_(low, high)
        up = ((downhill > 0) & (code < high)) | (code <= low)
        self._floor = code - (~up).float()
        first = torch.full_like(codes, 1 - _FIRST_STEP).masked_fill_(up, _FIRST_STEP)
        self.v = torch.logit((first - _LOW) / (_HIGH - _LOW))

    def _h(self) -> torch.Tensor:
        return (torch.sigmoid(self.v) * (_HIGH - _LOW) + _LOW).clamp_(0, 1)

    def _decode(self, codes: torch.Tensor) -> torch.Tensor:
        codes = codes.clamp_(*self.scheme.range)
        if self._zero is None:
            return codes.mul_(self._scale)
        if self.scheme.additive_zero_point:
            return codes.mul_(self._scale).add_(self._zero)
        return codes.sub_(self._zero).mul_(self._scale)

    def soft(self) -> torch.Tensor:
        """fp32 [N, K] with h as it is."""
        return self._decode(self._floor + self._h())

    def hard(self) -> torch.Tensor:
        """fp32 [N, K] with h rounded."""
        return self._decode(self._floor + (self.v >= 0))

    def quantized(self) -> QuantizedWeight:
        """The codes of :meth:`hard`."""
        return quantize_weight(self.hard(), self.scheme, self.qparams)

    def gradient(self, of_weight: torch.Tensor, strength: float, exponent: float | None) -> torch.Tensor:
        """Gradient in ``v`` of a loss plus ``strength * sum(1 - |2h - 1|^exponent)``.

        Args:
            of_weight: fp32 [N, K], that of the loss in :meth:`soft`.
            strength: factor of the regulariser.
            exponent: of the regulariser; None leaves it out.
        """
        h, s = self._h(), torch.sigmoid(self.v)
        low, high = self.scheme.range
        codes = self._floor + h
        found = of_weight * self._scale * ((codes >= low) & (codes <= high))
        if exponent is not None:
            signed = 2 * h - 1
            found -= 2 * strength * exponent * signed.sign() * signed.abs().pow_(exponent - 1)
        return found.mul_((h > 0) & (h < 1)).mul_(s * (1 - s) * (_HIGH - _LOW))


def per_column(values: torch.Tensor, shape: torch.Size, scheme: WeightScheme) -> torch.Tensor:
    """Qparams [1, 1], [N, 1], [N, G] or [K, G] for each element of a weight [N, K]."""
    if scheme.transposed is not None:
        return per_column(values, shape[::-1], scheme.transposed).t()
    size = scheme.group_size
    wide = values if size is None or values.shape[1] == 1 else values.repeat_interleave(size, dim=1)
    return wide[:, : shape[1]].expand(shape)


@dataclass(frozen=True)
class Aim:
    """What the codes of a layer should stand for, and what it costs to miss it.

    Attributes:
        weight: fp32 [N, K], W' of the module's text.
        hessian: fp32 [K, K], H; 0 where no input reaches the layer.
    """

    weight: torch.Tensor
    hessian: torch.Tensor

    def cost(self, weight: torch.Tensor) -> torch.Tensor:
        """fp32 [N]: what each row of a weight [N, K] costs."""
        return (self.downhill(weight) * (self.weight - weight)).sum(dim=1)

    def downhill(self, weight: torch.Tensor) -> torch.Tensor:
        """fp32 [N, K]: minus half the gradient of the cost."""
        return (self.weight - weight) @ self.hessian


def aim_of(layer: LayerWork, collector: HessianCollector, config: RoundingStart) -> Aim:
    """The aim of a layer whose inputs were collected, with those of the unchanged model."""
    hessian, weight = collector.hessian(), layer.target()
    diagonal = torch.diagonal(hessian)
    reached = diagonal[diagonal > 0]
    if reached.numel() == 0:
        return Aim(weight, hessian)
    share = config.ridge * hessian.shape[0] / collector.rows
    diagonal.add_(min(_LARGEST_RIDGE, max(_SMALLEST_RIDGE, share)) * reached.median())
    cross = collector.cross()
    if cross is not None and cross.any():
        upper = inverse_factor(hessian.clone(), _DAMPING)
        weight += weight @ cross @ upper.t() @ upper
    return Aim(weight, hessian)


def first_rounding(layer: LayerWork, aim: Aim, config: RoundingStart) -> SoftRounding:
    """The rounding of a layer before anything is learned; in its ``ranges`` if an algorithm before chose some."""
    scheme, weight = layer.scheme.weight, aim.weight
    if config.start == "gptq" and torch.diagonal(aim.hessian).any():
        gptq = GPTQConfig(damping=_DAMPING, observer=config.observer)
        codes, qparams = round_columns(weight.clone(), aim.hessian.clone(), scheme, gptq, layer.ranges)
        rounding = SoftRounding(weight, scheme, qparams)
        rounding.begin_at(codes, aim.downhill(codes))
        return rounding
    if layer.ranges is not None:
        return SoftRounding(weight, scheme, choose_qparams(layer.ranges, scheme))
    return SoftRounding(weight, scheme, weight_qparams(weight, scheme, config.observer))


@register_block
def calibrate(work: BlockWork, config: AdaRoundConfig) -> None:
    """Learn every layer of a block, each on what the ones before it became."""
    for names in work.subsets:
        for name, collector in collected(work, names, pairs=True).items():
            layer = work.layers[name]
            aim = aim_of(layer, collector, config)
            rounding = first_rounding(layer, aim, config)
            round_adaptively(rounding, aim, config)
            layer.quantized = rounding.quantized()
            work.install(layer)


def round_adaptively(rounding: SoftRounding, aim: Aim, config: LearnedRoundingConfig) -> None:
    """Learn ``rounding``, in place, so that it is not far from ``aim``. No row costs more in the end than before."""

    at_first, start = aim.cost(rounding.hard()), rounding.v.clone()
    error = float(at_first.sum())
    if error <= 0:
        return  # every weight is on the grid, or no input reaches the layer
    annealing = Annealing(config.iterations, config.warmup)
    optimizer = torch.optim.Adam([rounding.v], lr=config.learning_rate)
    for step in range(config.iterations):
        gradient = aim.downhill(rounding.soft())
        # Times the number of weights: gradients of a size that Adam's epsilon does not matter for.
        gradient.mul_(-2 * gradient.numel() / error)
        rounding.v.grad = rounding.gradient(gradient, config.regularization, annealing(step))
        optimizer.step()
    # Rows do not depend on each other, and nothing promises that each of them found something better.
    worse = aim.cost(rounding.hard()) > at_first
    rounding.v[worse] = start[worse]

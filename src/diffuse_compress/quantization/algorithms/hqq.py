"""HQQ: half-quadratic quantization, which moves each zero point so that a sparse norm of the error is small.

For a group of weights w with its min-max scale s, HQQ minimises over the zero point z

    phi(z) = sum |w - s (q - z)|**p,    q = clamp(round(w / s + z)),    p < 1,

because p < 1 lets few large errors (outliers) stand and makes the many others small. Half-quadratic splitting
introduces the error e as a variable of its own, held to w - s (q - z) by a quadratic penalty of weight beta, and
alternates, with beta growing by kappa:

    e <- sign(r) max(|r| - |r|**(p - 1) / beta, 0)    for r = w - s (q - z)     (prox of the p-norm, generalised)
    z <- mean(q - (w - e) / s)

Source: Badri & Shaji 2023, "Half-Quadratic Quantization of Large Machine Learning Models" (Mobius Labs). Differs:

- r and e are measured in steps of s. beta is then the same for every magnitude of weights; with raw weights of
  about 0.01 the threshold |r|**(p - 1) / beta at beta = 10 exceeds every error, so that e stays 0.
- Each group keeps the zero point of its best iteration, the min-max one included, instead of all groups stopping
  when their mean error rises: no group ends above min-max rounding in phi.
- With an integer ``zero_point`` (``float_zero_point=False``) z is rounded before an iteration is judged.
- Columns that pad the last group take no part.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from diffuse_compress.errors import ConfigError
from diffuse_compress.quantization.algorithms.base import AlgorithmConfig, register
from diffuse_compress.quantization.numerics import (
    choose_qparams,
    quantize_weight,
    row_chunks,
    split_groups,
    valid_columns,
)
from diffuse_compress.quantization.packed import QuantizedWeight
from diffuse_compress.quantization.qparams import QParams
from diffuse_compress.quantization.scheme import Bilevel, PerTensor, WeightScheme

__all__ = ["HQQConfig"]


@dataclass(frozen=True)
class HQQConfig(AlgorithmConfig):
    """Half-quadratic quantization of asymmetric integer weights. Data-free and deterministic.

    Args:
        iterations: updates of the zero point.
        lp_norm: p of the error that is minimised, in (0, 1].
        beta: first penalty weight; the error is measured in quantization steps.
        kappa: growth of beta per iteration, at least 1.
    """

    iterations: int = 20
    lp_norm: float = 0.7
    beta: float = 10.0
    kappa: float = 1.01
    kind: ClassVar[str] = "hqq"

    @property
    def summary(self) -> str:
        return f"HQQ ({self.iterations} iterations)"

    def check(self, scheme: WeightScheme) -> None:
        if scheme.symmetric:
            raise ConfigError(
                f"HQQ: needs asymmetric integer weights, got symmetric {scheme.format.value}. HQQ moves the zero "
                'point, which a symmetric scheme does not have. Use symmetric=False (the preset "w4a16" is), or '
                "RTNConfig()."
            )
        if isinstance(scheme.granularity, Bilevel):
            raise ConfigError(
                "HQQ: moves the zero point of each group by itself, got bilevel scales. Use SpQRConfig(), "
                "GPTQConfig() or RTNConfig()."
            )
        if scheme.additive_zero_point:
            raise ConfigError(
                "HQQ: needs a zero point in the domain of the codes, got additive_zero_point=True. Its equations move "
                "the codes' zero. Use float_zero_point=True, or RTNConfig()."
            )

    def __post_init__(self) -> None:
        if self.iterations < 1 or not 0 < self.lp_norm <= 1 or self.beta <= 0 or self.kappa < 1:
            raise ConfigError(
                "HQQConfig: need iterations >= 1, 0 < lp_norm <= 1, beta > 0 and kappa >= 1, got "
                f"iterations={self.iterations}, lp_norm={self.lp_norm}, beta={self.beta}, kappa={self.kappa}."
            )


@register
def quantize(
    weight: torch.Tensor, scheme: WeightScheme, config: HQQConfig, generator: torch.Generator | None = None
) -> QuantizedWeight:
    """Quantize a weight with min-max scales and half-quadratic zero points.

    Args:
        weight: [N, K] floating point, any device, not modified.
        scheme: asymmetric integers; the zero point is fp32 with ``float_zero_point``, else int8 in the code range.
        config: of the iteration.
        generator: not used, HQQ draws nothing.

    Returns:
        The packed weight; equal inputs on one device give equal bytes.

    Raises:
        ConfigError: the scheme has no zero point.
        IncompatibleShapeError: K does not fit the scheme's group size.
        ModelStateError: the weight holds inf or nan.

    Cost:
        Ten passes over the weight per iteration, in chunks of rows: 64 MiB of extra memory at most, except for
        per-tensor schemes (four fp32 copies of the weight).
    """
    config.check(scheme)
    qparams = choose_qparams(weight, scheme)
    zero_point = qparams.zero_point
    if zero_point is not None and weight.numel() and not weight.is_meta:
        zero_point = zero_point.clone()
        chunks = [slice(0, 1)] if isinstance(scheme.granularity, PerTensor) else list(row_chunks(weight))
        for rows in chunks:
            part = weight if isinstance(scheme.granularity, PerTensor) else weight[rows]
            zero_point[rows] = _optimise(part, scheme, qparams.scale[rows], zero_point[rows], config)
    return quantize_weight(weight, scheme, QParams(qparams.scale, zero_point))


def _optimise(
    weight: torch.Tensor, scheme: WeightScheme, scale: torch.Tensor, zero_point: torch.Tensor, config: HQQConfig
) -> torch.Tensor:
    """The best zero points of a weight [n, K], of the shape and dtype of ``zero_point``."""
    w = torch.div(split_groups(weight, scheme), scale.unsqueeze(-1)).float()
    valid = valid_columns(weight, scheme)
    current, best = zero_point.float(), zero_point.float()
    best_error: torch.Tensor | None = None
    beta = config.beta
    for i in range(config.iterations + 1):
        judged = current if scheme.float_zero_point else current.round().clamp_(*scheme.range)
        error = (w - _codes(w, judged, scheme)).add_(judged.unsqueeze(-1)).abs_().pow_(config.lp_norm)
        total = (error if valid is None else error.mul_(valid)).sum(dim=-1)
        if best_error is None:
            best_error = total
        else:
            better = total < best_error
            best, best_error = torch.where(better, judged, best), torch.where(better, total, best_error)
        if i < config.iterations:
            current = _step(w, current, scheme, beta, config.lp_norm, valid)
            beta *= config.kappa
    return best.to(zero_point.dtype)


def _step(
    w: torch.Tensor, zero_point: torch.Tensor, scheme: WeightScheme, beta: float, p: float, valid: torch.Tensor | None
) -> torch.Tensor:
    """One half-quadratic update of the zero points [n, G]; ``w`` [n, G, g] is in steps of the scale."""
    q = _codes(w, zero_point, scheme)
    residual = (w - q).add_(zero_point.unsqueeze(-1))
    magnitude = residual.abs()
    # At 0 the threshold is infinite (p < 1) and the error stays 0.
    shrunk = (magnitude - magnitude.pow(p - 1).div_(beta)).clamp_(min=0).mul_(residual.sign_())
    target = q.sub_(w).add_(shrunk)
    return target.mean(dim=-1) if valid is None else target.mul_(valid).sum(dim=-1) / valid.sum(dim=-1)


def _codes(w: torch.Tensor, zero_point: torch.Tensor, scheme: WeightScheme) -> torch.Tensor:
    """fp32 codes, rounded in the order in which the stored weight is."""
    z = zero_point.unsqueeze(-1)
    steps = (w + z).round_() if scheme.float_zero_point else w.round().add_(z)
    return steps.clamp_(*scheme.range)

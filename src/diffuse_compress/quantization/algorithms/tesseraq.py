"""TesseraQ: learn the rounding of a block, harden it step by step, and learn the scales beside it.

Li and Panda 2024, "TesseraQ: Ultra Low-Bit LLM Post-Training Quantization with Block Reconstruction", arXiv
2410.19103, algorithm 1. It starts from the scales and ranges that AWQ (or what else stands before it) chose.
Progressive adaptive rounding: every weight has a rectified sigmoid h(v) as in AdaRound; instead of a regulariser, after
each stage of Adam those nearest to 0 or 1 are set to it and stay, until none is soft. Meanwhile, and after the last,
every scale is multiplied by ``2 sigmoid(u)`` with a learned u, a factor of 1 at first.

The block, its samples and its aim are BRECQ's (``brecq.py``): it runs on the outputs of the quantized blocks before it
and aims at what it gives in the unchanged model, and the errors of the layers are added to the block's.

Deviations: that addition; the stages are as many as the authors' but shorter, at a higher rate; a stage hardens after
it learned, not before, so that the first choice is one of learned variables too; the share that stays soft falls
geometrically; the codes may start from GPTQ's (``start="gptq"``), as the other learned roundings here do.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from diffuse_compress.errors import ConfigError
from diffuse_compress.quantization.algorithms.adaround import (
    SoftRounding,
    aim_of,
    first_rounding,
    per_column,
    require_integers,
)
from diffuse_compress.quantization.algorithms.base import AlgorithmConfig, register_block
from diffuse_compress.quantization.algorithms.block import BlockWork
from diffuse_compress.quantization.algorithms.brecq import Learned, Reconstruction, inputs_of
from diffuse_compress.quantization.algorithms.gptq import GPTQConfig
from diffuse_compress.quantization.algorithms.simulation import seen_as_quantized
from diffuse_compress.quantization.numerics import MIN_SCALE, quantize_weight, split_groups
from diffuse_compress.quantization.packed import QuantizedWeight
from diffuse_compress.quantization.qparams import QParams
from diffuse_compress.quantization.scheme import WeightScheme

__all__ = ["ScaledRounding", "TesseraQConfig", "soft_shares"]

_FIRST_SHARE, _LAST_SHARE = 0.75, 0.005


@dataclass(frozen=True)
class TesseraQConfig(AlgorithmConfig):
    """Progressive rounding of whole blocks with learned scales. Needs calibration data, and integer weights.

    Args:
        iterations: steps of Adam in each stage; 0 keeps the codes it starts with. The authors take 250.
        stages: after each of which more variables are hardened, from a quarter of them to all.
        learning_rate: of the rounding variables.
        scale_learning_rate: of the factors of the scales; 0 leaves the scales as they were.
        batch_size: calls that are looked at in a step, drawn anew for each.
        observer: "mse" or "minmax", for the ranges where nothing before chose them.
        start: "gptq" or "nearest", as in :class:`LearnedRoundingConfig`.
        ridge: likewise.
    """

    iterations: int = 20
    stages: int = 20
    learning_rate: float = 0.05
    scale_learning_rate: float = 0.001
    batch_size: int = 4
    observer: str = "mse"
    start: str = "gptq"
    ridge: float = 8.0
    kind: ClassVar[str] = "tesseraq"
    is_random: ClassVar[bool] = True
    needs_calibration: ClassVar[bool] = True
    needs_reference: ClassVar[bool] = True
    reconstructs_blocks: ClassVar[bool] = True
    rounds_input_groups: ClassVar[bool] = True

    @property
    def summary(self) -> str:
        return f"TesseraQ ({self.stages} stages of {self.iterations} steps)"

    def __post_init__(self) -> None:
        if self.iterations < 0 or self.stages < 1 or self.batch_size < 1:
            raise ConfigError(
                "TesseraQConfig: need iterations >= 0, stages >= 1 and batch_size >= 1, got "
                f"iterations={self.iterations}, stages={self.stages}, batch_size={self.batch_size}."
            )
        if self.learning_rate <= 0 or self.scale_learning_rate < 0 or self.ridge < 0:
            raise ConfigError(
                "TesseraQConfig: need learning_rate > 0, scale_learning_rate >= 0 and ridge >= 0, got "
                f"learning_rate={self.learning_rate}, scale_learning_rate={self.scale_learning_rate}, "
                f"ridge={self.ridge}."
            )
        if self.observer not in ("mse", "minmax"):
            raise ConfigError(f"TesseraQConfig: observer must be 'mse' or 'minmax', got {self.observer!r}.")
        if self.start not in ("gptq", "nearest"):
            raise ConfigError(f"TesseraQConfig: start must be 'gptq' or 'nearest', got {self.start!r}.")

    def check(self, scheme: WeightScheme) -> None:
        require_integers(self, scheme)

    def for_search(self) -> GPTQConfig:
        """GPTQ, whose errors are near those of learned rounding and which takes a tenth of the time."""
        return GPTQConfig(observer=self.observer).for_search()


def soft_shares(stages: int) -> list[float]:
    """The share of a layer's variables that is still soft after each stage; 0 after the last."""
    ratio = (_LAST_SHARE / _FIRST_SHARE) ** (1 / max(1, stages - 2))
    return [_FIRST_SHARE * ratio**stage for stage in range(stages - 1)] + [0.0]


class ScaledRounding:
    """A soft rounding whose scales are learned too: ``2 sigmoid(u) * rounding``.

    Args:
        rounding: where it starts.

    Attributes:
        u: fp32 of the shape of the scales, 0 at first, where the factor is 1.
    """

    def __init__(self, rounding: SoftRounding) -> None:
        self.rounding = rounding
        self.u = torch.zeros_like(rounding.qparams.scale)

    @property
    def _factor(self) -> torch.Tensor:
        return 2 * torch.sigmoid(self.u)

    def _scaled(self, values: torch.Tensor) -> torch.Tensor:
        return values * per_column(self._factor, values.shape, self.rounding.scheme)

    def soft(self) -> torch.Tensor:
        """fp32 [N, K] with h as it is."""
        return self._scaled(self.rounding.soft())

    def hard(self) -> torch.Tensor:
        """fp32 [N, K] with h rounded."""
        return self._scaled(self.rounding.hard())

    def set_gradients(self, of_weight: torch.Tensor) -> None:
        """Let v and u have the gradients of a loss whose gradient in :meth:`soft` is ``of_weight``, fp32 [N, K]."""
        scheme, factor = self.rounding.scheme, self._factor
        of_factor = split_groups(of_weight * self.rounding.soft(), scheme).sum(dim=-1)
        if of_factor.shape != self.u.shape:  # two levels: one fp32 scale for all groups of a row
            of_factor = of_factor.sum(dim=1, keepdim=True)
        self.u.grad = of_factor * factor * (1 - factor / 2)
        self.rounding.v.grad = self.rounding.gradient(self._scaled(of_weight), 0.0, None)

    def harden(self, share: float) -> None:
        """Leave ``share`` of the variables soft, those that are least decided; the others are set to 0 or 1."""
        v = self.rounding.v
        hard = v.numel() - int(share * v.numel())
        decided = v.abs().flatten().topk(hard).indices
        v.view(-1)[decided] = torch.where(v.view(-1)[decided] >= 0, torch.inf, -torch.inf)

    def qparams(self) -> QParams:
        """The scales and zero points that :meth:`hard` stands on."""
        found, factor = self.rounding.qparams, self._factor
        zero_point = found.zero_point
        if zero_point is not None and self.rounding.scheme.additive_zero_point:
            zero_point = zero_point * factor
        return QParams((found.scale * factor).clamp_(min=MIN_SCALE), zero_point, found.group_scale)

    def quantized(self) -> QuantizedWeight:
        """The codes of :meth:`hard`."""
        return quantize_weight(self.hard(), self.rounding.scheme, self.qparams())


@register_block
def calibrate(work: BlockWork, config: TesseraQConfig) -> None:
    """Learn the layers of a block that have no codes yet."""
    learned: list[Learned[ScaledRounding]] = []
    with contextlib.ExitStack() as stack:
        for name, collector in inputs_of(work):
            layer = work.layers[name]
            aim = aim_of(layer, collector, config)
            rounding = first_rounding(layer, aim, config)
            codes = rounding.hard()
            stack.enter_context(seen_as_quantized(layer, codes))
            learned.append(Learned(layer, aim, ScaledRounding(rounding), float(aim.cost(codes).sum())))
        if learned and config.iterations:
            _reconstruct(work, learned, config)
    for one in learned:
        one.layer.quantized = one.rounding.quantized()
        work.install(one.layer)


def _reconstruct(work: BlockWork, learned: Sequence[Learned[ScaledRounding]], config: TesseraQConfig) -> None:
    """Learn roundings and scales so that the block's output is near the unchanged one's."""
    scaled = [one.rounding for one in learned]
    block = Reconstruction(work, learned, config.batch_size, "TesseraQ")
    if block.error_at_first <= 0:
        return
    start = [one.rounding.v.clone() for one in scaled]
    groups = [{"params": [one.rounding.v for one in scaled], "lr": config.learning_rate}]
    if config.scale_learning_rate:
        groups.append({"params": [one.u for one in scaled], "lr": config.scale_learning_rate})
    optimizer = torch.optim.Adam(groups)
    for share in (*soft_shares(config.stages), None):
        for _ in range(config.iterations):
            gradients = block.gradients([one.soft() for one in scaled])
            for one, gradient in zip(scaled, gradients, strict=True):
                one.set_gradients(gradient)
            optimizer.step()
        if share is not None:  # the last stage learns scales alone
            for one in scaled:
                one.harden(share)
    if block.error([one.hard() for one in scaled]) > block.error_at_first:
        for one, v in zip(scaled, start, strict=True):  # nothing promises that what was learned is better
            one.rounding.v, one.u = v, torch.zeros_like(one.u)

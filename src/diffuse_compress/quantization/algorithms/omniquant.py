"""OmniQuant: learn for a block how far ranges are clipped, and how scales and shifts move between inputs and weights.

Shao et al. 2023, "OmniQuant: Omnidirectionally Calibrated Quantization for Large Language Models", arXiv 2308.13137.
Learnable weight clipping (LWC, equation 2): the range of each element of the granularity is ``[sigmoid(l) min,
sigmoid(u) max]``. Learnable equivalent transformation (LET, equation 3): inputs ``(x - z) / s``, weights ``W s``,
biases ``b + W z``. AdamW trains both against what the block gives in the unchanged model; ``aug_loss`` adds what the
unchanged block gives on the inputs that the quantized blocks before it make. Gradients pass rounding straight, and
reach scales through the steps of weights and of dynamic inputs.

Deviations: s is learned as a logarithm, and z in units of its channel's range, so that one rate holds for every unit.
All layers that share an input have an s, not only those behind a norm; what precedes them takes it where that is exact
(``folding.py``), elsewhere it stays with them. The scale between q and k is left out: with a scale for each row of a
weight it changes no code, and their product is not quantized in here. Scales start at SmoothQuant's or at what came
before in the sequence (AWQ), clips at the ranges of least squares or of what came before. What was learned is kept only
if the error on all samples is lower than at the start. Scales of static inputs are not learned: their ranges are there.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from diffuse_compress.errors import ConfigError
from diffuse_compress.quantization.algorithms.adaround import per_column
from diffuse_compress.quantization.algorithms.base import (
    AlgorithmConfig,
    bytes_of_shift,
    register_block,
    takes_scale,
)
from diffuse_compress.quantization.algorithms.block import BlockWork, LayerWork, as_the_layer_sees_it
from diffuse_compress.quantization.algorithms.folding import check_fold, folds, set_scale, takes_shift
from diffuse_compress.quantization.algorithms.osplus import RangeCollector
from diffuse_compress.quantization.algorithms.reconstruction import (
    Parameters,
    block_error,
    descend,
    parameter_name,
    targets_of,
)
from diffuse_compress.quantization.algorithms.rtn import RTNConfig, quantize
from diffuse_compress.quantization.algorithms.simulation import seen_as_quantized
from diffuse_compress.quantization.algorithms.smoothquant import smooth
from diffuse_compress.quantization.numerics import (
    FLOAT8,
    FLOAT8_MAX,
    MIN_SCALE,
    choose_qparams,
    dequantize,
    fake_quantize,
    qparams_from_range,
)
from diffuse_compress.quantization.observers import weight_qparams
from diffuse_compress.quantization.qparams import QParams
from diffuse_compress.quantization.scheme import (
    TWO_LEVEL_MAX_GROUP_SCALE,
    ActivationScheme,
    NumberFormat,
    PerTensor,
    PerToken,
    Scheme,
    TwoLevel,
    WeightScheme,
)

__all__ = ["OmniQuantConfig", "clipped_range", "soft_input", "soft_weight"]

# Largest and smallest logit that a range starts at: 0.982, as the authors', and 0.05. Of 8 bits that would cut off two
# steps: 0.9975.
_FIRST, _FIRST_OF_8_BITS, _NARROWEST = 4.0, 6.0, -3.0


@dataclass(frozen=True)
class OmniQuantConfig(AlgorithmConfig):
    """Learned ranges of weights, and learned scales and shifts of inputs, block by block. Needs calibration data.

    It chooses scales and ranges; codes are then rounded to nearest, or chosen by what follows in a sequence.

    Args:
        clip: learn ranges (LWC).
        transform: learn scales (LET): True, False, or None: where inputs are quantized, or what comes before in the
            sequence has given a scale.
        shift: learn shifts with them: True, False, or None: where the bias of what precedes the layers takes them, and
            theirs what that takes.
        epochs: how often it goes over the calls; None is 20, or 40 where weights have 2 bits.
        clip_rate: of AdamW, for the ranges' logits.
        scale_rate: for logarithms of scales and for shifts; None is 0.005, or 0.001 where inputs have 4 bits.
        batch_size: calls whose gradients make a step.
        alpha: of the SmoothQuant that scales start at; None is 0.75 where inputs are quantized, else 0.5.
        aug_loss: aim at the dense block's output on quantized inputs too.
        fold: as in :class:`SmoothQuantConfig`.
    """

    clip: bool = True
    transform: bool | None = None
    shift: bool | None = None
    epochs: int | None = None
    clip_rate: float = 1e-2
    scale_rate: float | None = None
    batch_size: int = 1
    alpha: float | None = None
    aug_loss: bool = False
    fold: bool | None = None
    kind: ClassVar[str] = "omniquant"
    needs_calibration: ClassVar[bool] = True
    needs_reference: ClassVar[bool] = True
    chooses_codes: ClassVar[bool] = False
    chooses_scales: ClassVar[bool] = True
    reconstructs_blocks: ClassVar[bool] = True

    @property
    def summary(self) -> str:
        parts = [name for name, used in (("clips", self.clip), ("scales", self.transform is not False)) if used]
        return f"OmniQuant ({' and '.join(parts)}, {'20-40' if self.epochs is None else self.epochs} epochs)"

    def __post_init__(self) -> None:
        if not self.clip and self.transform is False:
            raise ConfigError(
                "OmniQuantConfig: nothing is learned with clip=False and transform=False. Set one of them."
            )
        for name in ("transform", "shift"):
            if getattr(self, name) not in (True, False, None):
                raise ConfigError(f"OmniQuantConfig: {name} is True, False or None, got {getattr(self, name)!r}.")
        if self.shift and self.transform is False:
            raise ConfigError("OmniQuantConfig: shifts are learned with scales, got shift=True with transform=False.")
        if (self.epochs is not None and self.epochs < 0) or self.batch_size < 1:
            raise ConfigError(
                f"OmniQuantConfig: need epochs >= 0 and batch_size >= 1, got epochs={self.epochs}, "
                f"batch_size={self.batch_size}."
            )
        if self.clip_rate <= 0 or (self.scale_rate is not None and self.scale_rate <= 0):
            raise ConfigError(
                f"OmniQuantConfig: need positive rates, got clip_rate={self.clip_rate}, scale_rate={self.scale_rate}."
            )
        if self.alpha is not None and not 0 <= self.alpha <= 1:
            raise ConfigError(f"OmniQuantConfig: alpha must be in [0, 1], got {self.alpha}.")
        check_fold("OmniQuantConfig", self.fold)

    def scales_input(self, layer: nn.Module, scheme: Scheme) -> bool:
        wanted = scheme.activation is not None if self.transform is None else self.transform
        return wanted and takes_scale(layer) and scheme.input_rotation is None

    def shift_bytes(self, layer: nn.Module, scheme: Scheme) -> int:
        moves = self.scales_input(layer, scheme) and not scheme.has_static_inputs
        return bytes_of_shift(layer) if moves and self.shift else 0

    def for_search(self) -> AlgorithmConfig:
        """Rounding in ranges of least squares, where it starts."""
        return RTNConfig()


@register_block
def calibrate(work: BlockWork, config: OmniQuantConfig) -> None:
    """Learn ranges, scales and shifts of the layers of a block that have no codes yet."""
    groups = [group for names in work.subsets for group in _groups(work, names, config)]
    work.observe_inputs()
    moves: dict[str, _Transform] = {}
    for group in groups:
        move = _transform(work, group, config)
        moves |= {} if move is None else dict.fromkeys((layer.name for layer in group), move)
    reached = {name for names in work.subsets for name in names}
    layers = [layer for name, layer in work.layers.items() if layer.quantized is None and name in reached]
    soft = [_Soft(layer, moves.get(layer.name), config.clip) for layer in layers]
    if soft and config.epochs != 0 and any(one.clip is not None or one.move is not None for one in soft):
        _learn(work, soft, config)


# --- what is learned ---------------------------------------------------------------------------------------------


def _groups(work: BlockWork, names: Sequence[str], config: OmniQuantConfig) -> list[list[LayerWork]]:
    """Layers with one input whose scale is learned, with the one it starts at; those of an earlier scale together."""
    layers = [work.layers[name] for name in names if _can_move(work.layers[name])]
    fresh = [
        layer for layer in layers if layer.act_pre_scale is None and config.scales_input(layer.dense, layer.scheme)
    ]
    if fresh:
        collector = RangeCollector(fresh[0])
        work.collect({fresh[0].name: collector})
        if collector.low is not None and collector.high is not None:
            alpha = config.alpha
            if alpha is None:
                alpha = 0.5 if all(layer.scheme.activation is None for layer in fresh) else 0.75
            smooth(work, fresh, torch.maximum(-collector.low, collector.high), alpha, config.fold)
    found: dict[int, list[LayerWork]] = {}
    for layer in layers:
        if layer.act_pre_scale is not None and config.transform is not False:
            found.setdefault(id(layer.act_pre_scale), []).append(layer)
    return list(found.values())


def _can_move(layer: LayerWork) -> bool:
    # A branch, and a rotation that comes after the scale, were chosen for the scale that there is.
    fixed = layer.low_rank is not None or layer.weight is not None or layer.scheme.input_rotation is not None
    return layer.quantized is None and takes_scale(layer.dense) and not fixed


class _Transform:
    """Scale, and perhaps shift, of the input that some layers share.

    Attributes:
        group: the layers.
        log: fp32 [C], logarithm of what the scale at the start is multiplied by.
        part: fp32 [K], share of a channel's half range that is added to the shift at the start; None without a shift.
    """

    def __init__(self, group: Sequence[LayerWork], width: torch.Tensor | None) -> None:
        assert group[0].act_pre_scale is not None
        self.group, self._start, self._width = group, group[0].act_pre_scale, width
        self._first_shift = group[0].act_pre_shift
        self.log = torch.zeros_like(self._start).requires_grad_()
        self.part = None if width is None else torch.zeros_like(width).requires_grad_()

    def scale(self) -> torch.Tensor:
        """``act_pre_scale``."""
        return self._start * self.log.exp()

    def shift(self) -> torch.Tensor | None:
        """``act_pre_shift``."""
        if self.part is None or self._width is None:
            return self._first_shift
        moved = self.part * self._width
        return moved if self._first_shift is None else self._first_shift + moved


def _transform(work: BlockWork, group: list[LayerWork], config: OmniQuantConfig) -> _Transform | None:
    """What is learned of a group; None of static inputs, whose ranges are chosen."""
    if any(layer.scheme.has_static_inputs for layer in group):
        return None
    wanted = config.shift
    if wanted is None:
        biased = all(layer.dense.bias is not None for layer in group)
        wanted = biased and folds(work, config.fold) and takes_shift(work, [layer.name for layer in group])
    width = None
    if wanted and all(isinstance(layer.dense, nn.Linear) for layer in group):
        collector = RangeCollector(group[0])
        work.collect({group[0].name: collector})
        if collector.low is not None and collector.high is not None:
            width = (collector.high - collector.low) / 2
    return _Transform(group, width)


class _Soft:
    """A layer whose weight is rounded with what is learned.

    Attributes:
        layer: its work.
        move: of its input, shared with others; None leaves it.
        clip: fp32 [2, elements], logits of the shares of low and high ends ([1, elements] where they are alike); None
            keeps those that it starts at.
        first: fp32 [N, K], the weight that it has before anything is learned.
    """

    def __init__(self, layer: LayerWork, move: _Transform | None, clip: bool) -> None:
        self.layer, self.move = layer, move
        scheme, target = layer.scheme.weight, layer.target()
        self._fixed = target if move is None else layer.rest()
        if layer.ranges is not None:
            self.first = fake_quantize(target, scheme, choose_qparams(layer.ranges, scheme))
        else:
            self.first = dequantize(quantize(target, scheme, RTNConfig()))
        self._logits = _first_logits(layer, target).requires_grad_(clip)
        self.clip = self._logits if clip else None

    def weight(self) -> torch.Tensor:
        """fp32 [N, K] on its grid, for the input as it meets the codes."""
        if self.move is None and self.clip is None:
            return self.first
        scheme = self.layer.scheme.weight
        return soft_weight(self._exact(), scheme, *self._shares())

    def _exact(self) -> torch.Tensor:
        if self.move is None:
            return self._fixed
        return self._fixed / self.layer.per_column(self.move.scale())

    def _shares(self) -> tuple[torch.Tensor, torch.Tensor]:
        shares = torch.sigmoid(self._logits)
        return shares[0], shares[-1]

    def enter(self, x: torch.Tensor) -> torch.Tensor:
        """The shifted input as it meets the codes."""
        if self.move is None:
            return as_the_layer_sees_it(x, self.layer)
        shape = (-1,) if isinstance(self.layer.dense, nn.Linear) else (-1, 1, 1)
        scaled = (x.float() * self.move.scale().reshape(shape)).to(x.dtype)
        act = self.layer.scheme.activation
        return scaled if act is None else soft_input(scaled, act, 1 if len(shape) == 1 else 3)

    def shift(self) -> torch.Tensor | None:
        """What is subtracted from its input."""
        return self.layer.act_pre_shift if self.move is None else self.move.shift()

    def finish(self) -> None:
        """Write the ranges, of the scale that the layer has now."""
        if self.move is None and self.clip is None:
            return
        scheme, weight = self.layer.scheme.weight, self.layer.target()
        low, high = clipped_range(weight, scheme, *self._shares())
        self.layer.ranges = weight.clamp(per_column(low, weight.shape, scheme), per_column(high, weight.shape, scheme))


def _first_logits(layer: LayerWork, target: torch.Tensor) -> torch.Tensor:
    """fp32 [1 or 2, rows, elements] of the ranges that an algorithm before chose, or of those of least squares."""
    scheme = layer.scheme.weight
    whole = _range(target, scheme)
    if layer.ranges is not None:
        found = _range(layer.ranges, scheme)
    elif isinstance(scheme.granularity, TwoLevel):
        found = whole
    else:
        qparams = weight_qparams(target, scheme, RTNConfig().observer)
        found = _range_of(qparams, scheme)
    ends = [torch.where(all_ == 0, 1.0, part / all_) for part, all_ in zip(found, whole, strict=True)]
    if scheme.symmetric:
        largest = torch.maximum(-whole[0], whole[1])
        amax = torch.maximum(-found[0], found[1])
        ends = [torch.where(largest == 0, 1.0, amax / largest)]
    widest = _FIRST if scheme.format.bits < 8 else _FIRST_OF_8_BITS
    return torch.stack([torch.logit(end.clamp(1e-4, 1 - 1e-4)).clamp(_NARROWEST, widest) for end in ends])


def _range(weight: torch.Tensor, scheme: WeightScheme) -> tuple[torch.Tensor, torch.Tensor]:
    """Ends of each element, widened to include 0; of a whole row where scales have two levels. Differentiable."""
    rows, columns = weight.shape
    size = None if isinstance(scheme.granularity, TwoLevel) else scheme.group_size
    if isinstance(scheme.granularity, PerTensor):
        grouped = weight.reshape(1, 1, -1)
    elif size is None:
        grouped = weight.unsqueeze(1)
    else:
        grouped = nn.functional.pad(weight, (0, -columns % size)).reshape(rows, -1, size)
    return grouped.amin(dim=-1).clamp(max=0), grouped.amax(dim=-1).clamp(min=0)


def _range_of(qparams: QParams, scheme: WeightScheme) -> tuple[torch.Tensor, torch.Tensor]:
    """Ends of the codes of each element."""
    if not scheme.format.is_integer:
        return -FLOAT8_MAX * qparams.scale, FLOAT8_MAX * qparams.scale
    low, high = scheme.range
    if qparams.zero_point is None:
        return -high * qparams.scale, high * qparams.scale
    zero = qparams.zero_point.float()
    if scheme.additive_zero_point:
        return low * qparams.scale + zero, high * qparams.scale + zero
    return (low - zero) * qparams.scale, (high - zero) * qparams.scale


# --- rounding with gradients ------------------------------------------------------------------------------------


def clipped_range(
    weight: torch.Tensor, scheme: WeightScheme, low: torch.Tensor | None, high: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ends of each element of a weight [N, K] times the shares ``low`` and ``high`` of its shape (None: all of it)."""
    ends = _range(weight, scheme)
    if low is None or high is None:
        return ends
    if scheme.symmetric:
        amax = torch.maximum(-ends[0], ends[1]) * high
        return torch.maximum(ends[0], -amax), torch.minimum(ends[1], amax)
    return ends[0] * low, ends[1] * high


def soft_weight(
    weight: torch.Tensor, scheme: WeightScheme, low: torch.Tensor | None = None, high: torch.Tensor | None = None
) -> torch.Tensor:
    """A weight [N, K] rounded in a share of its range; gradients reach weight, shares, and through steps the range.

    Args:
        weight: fp32.
        scheme: any.
        low: share of the lower end of each element, fp32; None is all of both.
        high: of the upper end.

    Returns:
        fp32 [N, K]: what the codes of those ranges stand for.
    """
    ends = clipped_range(weight, scheme, low, high)
    if isinstance(scheme.granularity, TwoLevel):
        step, zero = _two_level_step(weight, ends, scheme), None
    else:
        qparams = qparams_from_range(*ends, scheme)
        step, zero = qparams.scale, qparams.zero_point
    step = per_column(step, weight.shape, scheme)
    if not scheme.format.is_integer:
        return _straight(weight / step, lambda x: x.to(FLOAT8).float(), -FLOAT8_MAX, FLOAT8_MAX) * step
    if zero is None:
        return _straight(weight / step, torch.round, *scheme.range) * step
    zero = per_column(zero.float(), weight.shape, scheme)
    if scheme.additive_zero_point:
        return _straight((weight - zero) / step, torch.round, *scheme.range) * step + zero
    if scheme.float_zero_point:
        return (_straight(weight / step + zero, torch.round, *scheme.range) - zero) * step
    lowest, highest = scheme.range
    return _straight(weight / step, torch.round, lowest - zero, highest - zero) * step


def _two_level_step(
    weight: torch.Tensor, ends: tuple[torch.Tensor, torch.Tensor], scheme: WeightScheme
) -> torch.Tensor:
    """fp32 [N, G]; the integers of the groups are those of the clipped weight, and have no gradient."""
    row = torch.maximum(-ends[0], ends[1])
    scale = (row / (scheme.format.qmax * TWO_LEVEL_MAX_GROUP_SCALE)).clamp(min=MIN_SCALE)
    chosen = choose_qparams(weight.detach().clamp(ends[0].detach(), ends[1].detach()), scheme)
    assert chosen.group_scale is not None
    return scale * chosen.group_scale.float()


def soft_input(x: torch.Tensor, scheme: ActivationScheme, feature_dims: int = 1) -> torch.Tensor:
    """A dynamic input rounded as ``fake_quantize_activation`` does, with a gradient through its step too."""
    dims = tuple(range(-feature_dims, 0)) if isinstance(scheme.granularity, PerToken) else tuple(range(-x.dim(), 0))
    values = x.float()
    largest = scheme.format.qmax if scheme.format.is_integer else FLOAT8_MAX
    step = (values.abs().amax(dim=dims, keepdim=True) / largest).clamp(min=MIN_SCALE)
    decode = torch.round if scheme.format.is_integer else (lambda codes: codes.to(FLOAT8).float())
    return (_straight(values / step, decode, -largest, largest) * step).to(x.dtype)


def _straight(x: torch.Tensor, decode: Callable[[torch.Tensor], torch.Tensor], low: Any, high: Any) -> torch.Tensor:
    """Clamped and rounded, with the gradient of the clamping."""
    inside = torch.minimum(torch.maximum(x, torch.as_tensor(low).to(x)), torch.as_tensor(high).to(x))
    return inside + (decode(inside) - inside).detach()


# --- training ---------------------------------------------------------------------------------------------------


def _learn(work: BlockWork, soft: Sequence[_Soft], config: OmniQuantConfig) -> None:
    """Train on the block's output, and keep what was learned if that is nearer to what it should be."""
    targets = [targets_of(work)]
    if config.aug_loss:
        targets.append(targets_of(work, work.calls))
    with contextlib.ExitStack() as stack:
        for one in soft:
            stack.enter_context(seen_as_quantized(one.layer, enter=one.enter, shift=one.shift))
        error = block_error(work, _weights(soft, [one.first for one in soft]), *targets)
        if error <= 0:
            return
        optimizer = _optimizer(soft, config)
        size = sum(leaf.numel() for group in optimizer.param_groups for leaf in group["params"])
        descend(
            work,
            optimizer,
            functools.partial(_parameters, soft),
            targets,
            epochs=_epochs(soft, config),
            batch_size=config.batch_size,
            # Gradients of a size that Adam's epsilon does not matter for.
            scale=size * len(work.calls) / error,
            explain=("OmniQuant", "AWQConfig() needs none"),
        )
        with torch.no_grad():
            better = block_error(work, _parameters(soft), *targets) < error
    if better:
        _write(work, soft, config)


def _write(work: BlockWork, soft: Sequence[_Soft], config: OmniQuantConfig) -> None:
    with torch.no_grad():
        for move in {id(one.move): one.move for one in soft if one.move is not None}.values():
            shift = move.shift()
            set_scale(work, move.group, move.scale(), config.fold, None if shift is None else shift.detach().clone())
        for one in soft:
            one.finish()


def _parameters(soft: Sequence[_Soft]) -> Parameters:
    return _weights(soft, [one.weight() for one in soft])


def _weights(soft: Sequence[_Soft], values: Sequence[torch.Tensor]) -> Parameters:
    """The block's parameters that stand for these weights [N, K], by name."""
    return {
        parameter_name(one.layer.name, "weight"): value.reshape(one.layer.dense.weight.shape).to(one.layer.dense.weight)
        for one, value in zip(soft, values, strict=True)
    }


def _epochs(soft: Sequence[_Soft], config: OmniQuantConfig) -> int:
    if config.epochs is not None:
        return config.epochs
    return 40 if any(one.layer.scheme.weight.format is NumberFormat.INT2 for one in soft) else 20


def _optimizer(soft: Sequence[_Soft], config: OmniQuantConfig) -> torch.optim.Optimizer:
    rate = config.scale_rate
    if rate is None:
        acts = [one.layer.scheme.activation for one in soft if one.move is not None]
        rate = 1e-3 if any(act is not None and act.format.bits <= 4 for act in acts) else 5e-3
    moves = {id(one.move): one.move for one in soft if one.move is not None}.values()
    leaves = [leaf for move in moves for leaf in (move.log, move.part) if leaf is not None]
    clips = [one.clip for one in soft if one.clip is not None]
    groups = [{"params": leaves, "lr": rate}, {"params": clips, "lr": config.clip_rate}]
    return torch.optim.AdamW([group for group in groups if group["params"]], weight_decay=0.0)

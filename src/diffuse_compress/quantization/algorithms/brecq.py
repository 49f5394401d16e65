"""BRECQ: learn the rounding of all layers of a block together, so that the block's output stays.

Li et al. 2021, "BRECQ: Pushing the Limit of Post-Training Quantization by Block Reconstruction", arXiv 2102.05426,
algorithm 1, with AdaRound's variables (``adaround.py``). The block runs on the outputs of the blocks quantized before
it and aims at what it gives in the unchanged model; where the inputs of layers are quantized, they are rounded in the
loop.

Deviations: AdaRound does each layer first, on what the ones before it became; then the code of each weight and its
neighbour downhill are learned from. The errors of the layers, as AdaRound counts them, are added to the block's: the
outputs of a few calls say little of most weights. The squared error of the output counts alike in all its elements (the
paper's Fisher weights need gradients of the whole model). Scales of inputs are those of the scheme and not learned.
Errors, regulariser, rate and steps are as in AdaRound here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

import torch

from diffuse_compress.errors import ConfigError
from diffuse_compress.quantization.algorithms.adaround import (
    Aim,
    Annealing,
    LearnedRoundingConfig,
    SoftRounding,
    aim_of,
    first_rounding,
    round_adaptively,
)
from diffuse_compress.quantization.algorithms.base import register_block
from diffuse_compress.quantization.algorithms.block import BlockWork, LayerWork
from diffuse_compress.quantization.algorithms.gptq import HessianCollector, collected
from diffuse_compress.quantization.algorithms.reconstruction import (
    block_error,
    block_loss,
    gradients_explained,
    parameter_name,
    targets_of,
)
from diffuse_compress.quantization.algorithms.simulation import seen_as_quantized

__all__ = ["BRECQConfig", "Learned", "Reconstruction", "inputs_of", "weights_of"]

_Rounding = TypeVar("_Rounding")


@dataclass(frozen=True)
class BRECQConfig(LearnedRoundingConfig):
    """Learned rounding of whole blocks; the other fields are those of :class:`LearnedRoundingConfig`.

    Args:
        iterations: steps of Adam for each layer, and then for the block; the authors take 20000.
        batch_size: calls that are looked at in a step, drawn anew for each.
    """

    batch_size: int = 4
    kind: ClassVar[str] = "brecq"
    is_random: ClassVar[bool] = True
    reconstructs_blocks: ClassVar[bool] = True

    @property
    def summary(self) -> str:
        return f"BRECQ ({self.iterations} steps)"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch_size < 1:
            raise ConfigError(f"BRECQConfig: need batch_size >= 1, got {self.batch_size}.")


@register_block
def calibrate(work: BlockWork, config: BRECQConfig) -> None:
    """Learn the layers of a block that have no codes yet."""
    with contextlib.ExitStack() as stack:
        learned = [_begin(work, name, collector, config, stack) for name, collector in inputs_of(work)]
        if learned:
            _reconstruct(work, learned, config)
    for one in learned:
        one.layer.quantized = one.rounding.quantized()
        work.install(one.layer)


@dataclass
class Learned(Generic[_Rounding]):
    """A layer whose rounding is learned, and what its codes cost at first."""

    layer: LayerWork
    aim: Aim
    rounding: _Rounding
    cost: float

    def gradient(self, weight: torch.Tensor) -> torch.Tensor:
        """fp32 [N, K]: of the layer's own cost, relative to that at first, times its number of weights."""
        return self.aim.downhill(weight).mul_(-2 * weight.numel() / self.cost if self.cost > 0 else 0.0)


def inputs_of(work: BlockWork) -> Iterator[tuple[str, HessianCollector]]:
    """What each layer without codes is given, once those that run before it have begun."""
    reached = set[str]()
    for names in work.subsets:
        reached.update(names)
        yield from collected(work, names, pairs=True).items()
    for name, layer in work.layers.items():
        if name not in reached and layer.quantized is None:
            weight = layer.dense.weight
            yield name, HessianCollector(weight.flatten(1).shape[1], weight.device)


def _begin(
    work: BlockWork, name: str, collector: HessianCollector, config: BRECQConfig, stack: contextlib.ExitStack
) -> Learned[SoftRounding]:
    """The layer by itself; until ``stack`` is closed it computes as its quantized form will."""
    layer = work.layers[name]
    aim = aim_of(layer, collector, config)
    rounding = first_rounding(layer, aim, config)
    round_adaptively(rounding, aim, config)
    codes = rounding.hard()
    rounding.begin_at(codes, aim.downhill(codes))
    stack.enter_context(seen_as_quantized(layer, codes))
    return Learned(layer, aim, rounding, float(aim.cost(codes).sum()))


def _reconstruct(work: BlockWork, learned: Sequence[Learned[SoftRounding]], config: BRECQConfig) -> None:
    """Learn roundings so that ``|block(call) - unchanged(reference)|^2``, weighted and summed, is small."""
    roundings = [one.rounding for one in learned]
    block = Reconstruction(work, learned, config.batch_size, "BRECQ")
    start = [rounding.v.clone() for rounding in roundings]
    if block.error_at_first <= 0:
        return
    annealing = Annealing(config.iterations, config.warmup)
    optimizer = torch.optim.Adam([rounding.v for rounding in roundings], lr=config.learning_rate)
    for step in range(config.iterations):
        gradients = block.gradients([rounding.soft() for rounding in roundings])
        for rounding, gradient in zip(roundings, gradients, strict=True):
            rounding.v.grad = rounding.gradient(gradient, config.regularization, annealing(step))
        optimizer.step()
    if block.error([rounding.hard() for rounding in roundings]) > block.error_at_first:
        for rounding, v in zip(roundings, start, strict=True):  # nothing promises that what was learned is better
            rounding.v = v


class Reconstruction:
    """A block's output, as a function of the weights of the layers that are learned, beside the unchanged block's.

    Args:
        work: the block; the layers compute as their quantized forms will (:func:`seen_as_quantized`).
        learned: the layers; what their roundings come to now is where the errors are counted from.
        batch_size: calls that each gradient looks at.
        name: of the algorithm, for messages.

    Attributes:
        error_at_first: of the codes that the layers begin with.
    """

    def __init__(self, work: BlockWork, learned: Sequence[Learned[Any]], batch_size: int, name: str) -> None:
        self.work, self.learned, self.name = work, learned, name
        self._targets = targets_of(work)
        self._batch = min(batch_size, len(self._targets))
        self._generator = work.generators(learned[0].layer.name)
        values = [one.rounding.hard() for one in learned]
        # Gradients of a size that Adam's epsilon does not matter for.
        self._size = sum(value.numel() for value in values)
        self.error_at_first = self.error(values)

    def error(self, values: Sequence[torch.Tensor]) -> float:
        """Squared error of the block's output over all calls with weights ``values``, fp32 [N, K] of each layer."""
        return block_error(self.work, weights_of(self.learned, values), self._targets)

    def gradients(self, values: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Gradient in the weights, fp32 [N, K] each, on calls that are drawn anew, relative to the error at first.

        The gradients of the layers' own errors are added.
        """
        gradients = [one.gradient(value) for one, value in zip(self.learned, values, strict=True)]
        weights = weights_of(self.learned, values)
        leaves = [weight.requires_grad_() for weight in weights.values()]
        factor = self._size * len(self._targets) / self._batch / self.error_at_first
        for index in torch.randperm(len(self._targets), generator=self._generator)[: self._batch].tolist():
            with gradients_explained(self.work, self.name, "AdaRoundConfig() needs none"), torch.enable_grad():
                loss = block_loss(self.work, weights, index, self._targets) * factor
                slopes = torch.autograd.grad(loss, leaves, allow_unused=True)
            for total, found in zip(gradients, slopes, strict=True):
                if found is not None:
                    total.add_(found.flatten(1))
        return gradients


def weights_of(learned: Sequence[Learned[Any]], values: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    """The block's parameters that stand for these weights [N, K], by name."""
    layers = (one.layer for one in learned)
    return {
        parameter_name(layer.name, "weight"): value.to(layer.dense.weight.dtype).reshape(layer.dense.weight.shape)
        for layer, value in zip(layers, values, strict=True)
    }

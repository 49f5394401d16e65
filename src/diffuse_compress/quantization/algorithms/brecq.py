"""BRECQ: learn the rounding of all layers of a block together, so that the block's output stays.

Li et al. 2021, "BRECQ: Pushing the Limit of Post-Training Quantization by Block Reconstruction", arXiv 2102.05426,
algorithm 1, with AdaRound's variables (``adaround.py``). The block runs on the outputs of the blocks quantized before
it and aims at what it gives in the unchanged model; where the inputs of layers are quantized, they are rounded in the
loop.

Deviations: the squared error of the output counts alike in all its elements (the paper's Fisher weights need gradients
of the whole model); scales of inputs are those of the scheme and not learned; error, regulariser, rate and steps are as
in AdaRound here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves

from diffuse_compress.errors import ConfigError
from diffuse_compress.quantization.algorithms.adaround import (
    Annealing,
    LearnedRoundingConfig,
    SoftRounding,
    nearest_rounding,
)
from diffuse_compress.quantization.algorithms.base import register_block
from diffuse_compress.quantization.algorithms.block import BlockWork, LayerWork, as_rows, as_the_layer_sees_it

__all__ = ["BRECQConfig"]


@dataclass(frozen=True)
class BRECQConfig(LearnedRoundingConfig):
    """Learned rounding of whole blocks; the other fields are those of :class:`LearnedRoundingConfig`.

    Args:
        iterations: steps of Adam for each block; the authors take 20000.
        batch_size: calls that are looked at in a step, drawn anew for each.
    """

    batch_size: int = 4
    kind: ClassVar[str] = "brecq"
    is_random: ClassVar[bool] = True

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
    layers = [layer for layer in work.layers.values() if layer.quantized is None]
    if not layers:
        return
    work.require_finite()
    roundings = [nearest_rounding(layer, config.observer) for layer in layers]
    with _seen_as_quantized(layers):
        _reconstruct(work, layers, roundings, config)
    for layer, rounding in zip(layers, roundings, strict=True):
        layer.quantized = rounding.quantized()
        work.install(layer)


def _reconstruct(
    work: BlockWork, layers: Sequence[LayerWork], roundings: Sequence[SoftRounding], config: BRECQConfig
) -> None:
    """Learn ``roundings`` so that ``|block(call) - unchanged(reference)|^2``, weighted and summed, is small."""
    targets = _targets(work)

    def error_of_codes() -> float:
        weights = _weights(layers, [rounding.hard() for rounding in roundings])
        with torch.no_grad():
            return sum(float(_loss(work, weights, index, targets)) for index in range(len(targets)))

    error, start = error_of_codes(), [rounding.v.clone() for rounding in roundings]
    if error <= 0:
        return
    annealing = Annealing(config.iterations, config.warmup)
    strength = config.regularization / sum(rounding.v.numel() for rounding in roundings)
    optimizer = torch.optim.Adam([rounding.v for rounding in roundings], lr=config.learning_rate)
    generator, batch = work.generators(layers[0].name), min(config.batch_size, len(targets))
    for step in range(config.iterations):
        weights = _weights(layers, [rounding.soft() for rounding in roundings])
        leaves = [weight.requires_grad_() for weight in weights.values()]
        gradients = [torch.zeros_like(rounding.v) for rounding in roundings]
        for index in torch.randperm(len(targets), generator=generator)[:batch].tolist():
            with torch.enable_grad():
                loss = _loss(work, weights, index, targets) * (len(targets) / batch / error)
            for total, found in zip(gradients, torch.autograd.grad(loss, leaves, allow_unused=True), strict=True):
                if found is not None:
                    total.add_(found.flatten(1))
        for rounding, gradient in zip(roundings, gradients, strict=True):
            rounding.v.grad = rounding.gradient(gradient, strength, annealing(step))
        optimizer.step()
    if error_of_codes() > error:  # nothing promises that what was learned is better
        for rounding, v in zip(roundings, start, strict=True):
            rounding.v = v


def _targets(work: BlockWork) -> list[list[torch.Tensor]]:
    """For each call the floating-point tensors that the unchanged block gives, kept where the call is."""
    found = []
    with torch.no_grad():
        for call in work.reference_calls:
            home = next((leaf.device for leaf in tree_leaves((call.args, dict(call.kwargs))) if _is_float(leaf)), None)
            output = work.here(call).run(work.reference_block)
            found.append([leaf if home is None else leaf.to(home) for leaf in tree_leaves(output) if _is_float(leaf)])
    return found


def _is_float(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.is_floating_point()


def _weights(layers: Sequence[LayerWork], values: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    """The block's parameters that stand for these weights [N, K], by name."""
    return {
        f"{layer.name}.weight".lstrip("."): value.to(layer.dense.weight.dtype).reshape(layer.dense.weight.shape)
        for layer, value in zip(layers, values, strict=True)
    }


def _loss(
    work: BlockWork, weights: dict[str, torch.Tensor], index: int, targets: Sequence[Sequence[torch.Tensor]]
) -> torch.Tensor:
    """Squared error of the rows of the block's output on a call that count, times the call's weight; fp32 scalar."""
    call = work.here(work.calls[index])
    output = functional_call(work.block, weights, call.args, dict(call.kwargs))
    pairs = zip([leaf for leaf in tree_leaves(output) if _is_float(leaf)], targets[index], strict=True)
    differences = [found.float() - target.to(found.device).float() for found, target in pairs]
    errors = [work.counted(difference, index).square().sum() for difference in differences]
    return torch.stack(errors).sum() * work.weight(index)


@contextlib.contextmanager
def _seen_as_quantized(layers: Sequence[LayerWork]) -> Iterator[None]:
    """Inside, the dense layers smooth and round their inputs and add their low-rank branch, as quantized ones will."""
    handles = []
    try:
        for layer in layers:
            given: list[torch.Tensor] = []
            handles.append(layer.dense.register_forward_pre_hook(_enter(layer, given)))
            if layer.low_rank is not None:
                handles.append(layer.dense.register_forward_hook(_leave(layer, given)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _enter(layer: LayerWork, given: list[torch.Tensor]) -> Any:
    def enter(module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        if layer.low_rank is not None:
            given.append(args[0])
        return (as_the_layer_sees_it(args[0], layer), *args[1:])

    return enter


def _leave(layer: LayerWork, given: list[torch.Tensor]) -> Any:
    def leave(module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        assert layer.low_rank is not None
        down, up = (part.to(output.dtype) for part in layer.low_rank)
        branch = as_rows(layer.dense, given.pop()) @ down.t() @ up.t()
        if output.dim() == 4 and isinstance(layer.dense, nn.Conv2d):
            batch, channels = output.shape[:2]
            branch = branch.reshape(batch, -1, channels).transpose(1, 2)
        return output + branch.reshape(output.shape)

    return leave

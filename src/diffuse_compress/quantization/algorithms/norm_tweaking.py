"""Norm tweaking: train the norms of a quantized block so that its output comes near that of the dense one.

Li et al. 2023, "Norm Tweaking: High-performance Low-bit Quantization of Large Language Models", arXiv 2309.02784,
algorithm 1. Codes stay; of a block only weights and biases of its norms move, with a rate that grows with the depth.

Deviations: the error is the squared one of the block's output, and not that of its channels' means and variances; the
block aims at its output in the unchanged model, on the inputs that it has there. Samples are those of the
calibration, not generated ones. The rate is higher than the authors', whose 1e-5 moves no bfloat16 number in so few
steps. What was learned is rounded to the norm's dtype, and stays only if the error on all samples is lower then.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from diffuse_compress.errors import ConfigError
from diffuse_compress.quantization.algorithms.base import AlgorithmConfig, register_block
from diffuse_compress.quantization.algorithms.block import BlockWork
from diffuse_compress.quantization.algorithms.reconstruction import block_error, descend, parameter_name, targets_of
from diffuse_compress.quantization.algorithms.rtn import RTNConfig

__all__ = ["NormTweakingConfig"]


@dataclass(frozen=True)
class NormTweakingConfig(AlgorithmConfig):
    """Learned weights and biases of norms, after whatever chose the codes. Needs calibration data.

    It goes last in a sequence; alone, codes are rounded to nearest before.

    Args:
        learning_rate: of Adam, in the first block.
        gamma: block i of L has the rate ``learning_rate * (1 + gamma * i / L)``.
        epochs: how often it goes over the calls.
        batch_size: calls whose gradients make a step.
    """

    learning_rate: float = 1e-3
    gamma: float = 1e-3
    epochs: int = 10
    batch_size: int = 1
    kind: ClassVar[str] = "norm_tweaking"
    needs_calibration: ClassVar[bool] = True
    needs_reference: ClassVar[bool] = True
    chooses_codes: ClassVar[bool] = False
    follows_codes: ClassVar[bool] = True

    @property
    def summary(self) -> str:
        return f"norm tweaking ({self.epochs} epochs)"

    def __post_init__(self) -> None:
        if self.learning_rate < 0 or self.gamma < 0 or self.epochs < 0 or self.batch_size < 1:
            raise ConfigError(
                "NormTweakingConfig: need learning_rate >= 0, gamma >= 0, epochs >= 0 and batch_size >= 1, got "
                f"learning_rate={self.learning_rate}, gamma={self.gamma}, epochs={self.epochs}, "
                f"batch_size={self.batch_size}."
            )

    def idle_in(self, blocks: Sequence[nn.Module]) -> str | None:
        if any(True for block in blocks for _ in _norms(block)):
            return None
        return "no block has a norm with weights of its own, as where they come from the timestep (AdaLN)"

    def for_search(self) -> AlgorithmConfig:
        """Rounding: a search compares formats before any norm is trained."""
        return RTNConfig()


def _norms(block: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Norms of a block that have weights of their own, by name."""
    for name, module in block.named_modules():
        if "norm" in type(module).__name__.lower() and not module._modules and any(True for _ in module.parameters()):
            yield name, module


@register_block
def calibrate(work: BlockWork, config: NormTweakingConfig) -> None:
    """Train the norms of a block whose layers are quantized."""
    dense = _trainable(work)
    if not dense or work.change is None or not work.calls:
        return
    targets = targets_of(work)
    error = block_error(work, {}, targets)
    if error <= 0 or config.learning_rate == 0:
        return
    learned = {name: value.float().clone().requires_grad_() for name, value in dense.items()}
    rate = config.learning_rate * (1 + config.gamma * work.depth)
    descend(
        work,
        torch.optim.Adam(learned.values(), lr=rate),
        lambda: {name: value.to(dense[name].dtype) for name, value in learned.items()},
        [targets],
        epochs=config.epochs,
        batch_size=config.batch_size,
        # Gradients of a size that Adam's epsilon does not matter for.
        scale=sum(value.numel() for value in learned.values()) * len(targets) / error,
        explain=("norm tweaking", "Leave NormTweakingConfig() out"),
    )
    found = {name: value.detach().to(dense[name].dtype) for name, value in learned.items()}
    if block_error(work, found, targets) < error:
        for name, value in found.items():
            if not torch.equal(value, dense[name]):
                work.change(name, value)


def _trainable(work: BlockWork) -> dict[str, torch.Tensor]:
    """Parameters of the block's norms that nothing else shares, by name."""
    return {
        parameter_name(name, leaf): parameter.detach()
        for name, module in _norms(work.block)
        for leaf, parameter in module.named_parameters()
        if parameter.is_floating_point() and id(parameter) not in work.shared
    }

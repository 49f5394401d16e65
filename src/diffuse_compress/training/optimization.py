"""AdamW on groups of parameters, its learning rate, the norm of the gradients, and averages of the weights."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from diffuse_compress.errors import MissingDependencyError
from diffuse_compress.training.sharding import is_sharded, whole

__all__ = ["Average", "clip_gradients", "learning_rate_factor", "make_optimizer"]


def make_optimizer(
    groups: Iterable[Mapping[str, Any]], *, betas: tuple[float, float], eps: float, in_8bit: bool = False
) -> torch.optim.Optimizer:
    """AdamW on ``groups`` (params, lr, weight_decay); sharded and whole parameters apart, as its kernels want them.

    Raises:
        MissingDependencyError: 8 bits without bitsandbytes.
    """
    split = []
    for group in groups:
        for sharded in (False, True):
            parameters = [p for p in group["params"] if is_sharded(p) is sharded]
            if parameters:
                split.append({**group, "params": parameters, "initial_lr": group["lr"]})
    if in_8bit:
        try:
            AdamW8bit = importlib.import_module("bitsandbytes.optim").AdamW8bit
        except ImportError as error:
            raise MissingDependencyError(
                "training: moments in 8 bits need bitsandbytes: pip install bitsandbytes. Or leave use_8bit_adam out."
            ) from error
        made: torch.optim.Optimizer = AdamW8bit(split, betas=betas, eps=eps)
        return made
    return torch.optim.AdamW(split, betas=betas, eps=eps)


def learning_rate_factor(step: int, total: int, warmup: float) -> float:
    """Of the optimizer step ``step`` of ``total``: a linear rise over a share ``warmup``, then half a cosine to 0."""
    rising = int(total * warmup)
    if step < rising:
        return (step + 1) / (rising + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, total - rising)))


def clip_gradients(parameters: Sequence[nn.Parameter], limit: float) -> torch.Tensor:
    """Scale gradients so that their norm together is at most ``limit``; returns the norm as it was."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not gradients:
        return torch.zeros(())
    squares = [whole(torch.linalg.vector_norm(g.float())).square() for g in gradients]
    norm = torch.stack([square.to(squares[0].device) for square in squares]).sum().sqrt()
    factor = (limit / (norm + 1e-6)).clamp_max(1.0)
    for gradient in gradients:
        gradient.mul_(factor.to(gradient.device, gradient.dtype))
    return norm


class Average:
    """Exponential moving averages of parameters, in float32.

    Args:
        parameters: by name.
        decay: kept of the average in each step; less in the first ones, (1 + n) / (10 + n), as in diffusers' EMAModel.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        self.decay, self.steps = decay, 0
        self._parameters = dict(parameters)
        self.values = {name: p.detach().float().clone() for name, p in self._parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Take the parameters of this step in."""
        self.steps += 1
        kept = min(self.decay, (1 + self.steps) / (10 + self.steps))
        for sharded in (False, True):
            names = [name for name, p in self._parameters.items() if is_sharded(p) is sharded]
            if names:
                now = [self._parameters[name].detach().float() for name in names]
                torch._foreach_lerp_([self.values[name] for name in names], now, 1 - kept)

    @torch.no_grad()
    def copy_to(self) -> None:
        """Put the averages in the parameters' places."""
        for name, parameter in self._parameters.items():
            parameter.copy_(self.values[name])

    @torch.no_grad()
    def exchange(self) -> None:
        """Averages and parameters in each other's place; the second call puts them back."""
        for name, parameter in self._parameters.items():
            before = parameter.detach().clone()
            parameter.copy_(self.values[name])
            self.values[name] = before.float()

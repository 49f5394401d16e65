"""AdamW on groups of parameters, its learning rate, the norm of the gradients, and averages of the weights."""

from __future__ import annotations

import contextlib
import importlib.util
import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from diffuse_compress.errors import ConfigError
from diffuse_compress.training.processes import like
from diffuse_compress.training.sharding import is_sharded, whole

__all__ = ["Average", "clip_gradients", "learning_rate_factor", "make_optimizer", "restored_state"]
__all__ += ["set_learning_rates", "stored_state", "uncompiled_on_cpu"]

_PARTS = ("codes", "scale", "qmap")  # of torchao's moments in 8 bits


def make_optimizer(
    groups: Iterable[Mapping[str, Any]], *, betas: tuple[float, float], eps: float, in_8bit: bool = False
) -> torch.optim.Optimizer:
    """AdamW on ``groups`` (params, lr, weight_decay); sharded and whole parameters apart, as its kernels want them.

    Moments in 8 bits are bitsandbytes' on a GPU where it is installed, else torchao's, whose step is compiled.

    Raises:
        ConfigError: 8 bits of sharded parameters.
    """
    split = []
    for group in groups:
        for sharded in (False, True):
            parameters = [p for p in group["params"] if is_sharded(p) is sharded]
            if parameters:
                split.append({**group, "params": parameters, "initial_lr": group["lr"]})
    if in_8bit:
        if any(is_sharded(p) for group in split for p in group["params"]):
            raise ConfigError(
                "training: moments in 8 bits of sharded weights could not be resumed from; sharding has made them "
                "smaller already. Leave use_8bit_adam out, or do not shard."
            )
        on_gpu = all(p.is_cuda for group in split for p in group["params"])
        there = on_gpu and importlib.util.find_spec("bitsandbytes") is not None
        AdamW8bit = importlib.import_module("bitsandbytes.optim" if there else "torchao.optim").AdamW8bit
        made: torch.optim.Optimizer = AdamW8bit(split, betas=betas, eps=eps)
        return made
    return torch.optim.AdamW(split, betas=betas, eps=eps)


def set_learning_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Let every group learn at ``factor`` times its own rate."""
    for group in optimizer.param_groups:
        rate = group["initial_lr"] * factor
        if isinstance(group["lr"], torch.Tensor):  # torchao's, which its compiled step reads
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


@contextlib.contextmanager
def uncompiled_on_cpu(device: torch.device) -> Iterator[None]:
    """Inside, torchao's step runs as it is written on a CPU: compiling it takes minutes there, and a compiler."""
    if device.type != "cpu" or "torch._dynamo" not in sys.modules:
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


def stored_state(state: Mapping[str, Any]) -> dict[str, Any]:
    """State of a parameter as plain tensors and numbers."""
    return {
        name: {"signed": value.signed, **{part: getattr(value, part) for part in _PARTS}} if _is_8bit(value) else value
        for name, value in state.items()
    }


def restored_state(state: Mapping[str, Any], parameter: torch.Tensor) -> dict[str, Any]:
    """:func:`stored_state` as the optimizer wants it, beside its parameter."""
    found: dict[str, Any] = {}
    for name, value in state.items():
        if isinstance(value, Mapping):
            from torchao.optim.subclass_8bit import OptimState8bit

            parts = [value[part].to(parameter.device) for part in _PARTS]
            found[name] = OptimState8bit(*parts, bool(value["signed"]), parameter.dtype)
        else:
            found[name] = like(value, parameter, name)
    return found


def _is_8bit(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and all(hasattr(value, part) for part in _PARTS)


def learning_rate_factor(step: int, total: int, warmup: float, schedule: str = "cosine", cycles: int = 1) -> float:
    """Of the optimizer step ``step`` of ``total``: a linear rise over a share ``warmup``, then half a cosine to 0, so
    many of them ("cosine_with_restarts"), a line to 0 ("linear"), or all of it ("constant")."""
    rising = int(total * warmup)
    if step < rising:
        return (step + 1) / (rising + 1)
    share = (step - rising) / max(1, total - rising)
    if schedule == "constant":
        return 1.0
    if schedule == "linear":
        return 1.0 - share
    if schedule == "cosine_with_restarts":
        share = share * cycles % 1.0
    return 0.5 * (1 + math.cos(math.pi * share))


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

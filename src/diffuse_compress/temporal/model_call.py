"""What a denoiser's forward takes, and what must be done before parts of it are run without its hooks."""

from __future__ import annotations

import inspect
import numbers
from typing import Any

import torch
from torch import nn

from diffuse_compress.families.base import TIMESTEP_NAMES

__all__ = ["arguments_of", "bring_weights", "single_timestep"]


def arguments_of(model: nn.Module) -> tuple[list[str], str]:
    """Names of the forward's arguments, and which of them is the timestep."""
    names = list(inspect.signature(type(model).forward).parameters)[1:]
    return names, next((name for name in TIMESTEP_NAMES if name in names), "")


def bring_weights(model: nn.Module, device: torch.device) -> None:
    """Let the hook of ``enable_model_cpu_offload`` do now what it does right before the forward, for parts that run
    sooner."""
    hook = getattr(model, "_hf_hook", None)
    there = next((parameter.device for parameter in model.parameters()), device)
    if hook is not None and there.type not in (device.type, "meta"):
        hook.pre_forward(model)


def single_timestep(given: Any) -> float | None:
    """The one timestep of a call, read from wherever it is; None if samples or tokens have several."""
    if isinstance(given, numbers.Real):
        return float(given)
    if not isinstance(given, torch.Tensor) or given.numel() == 0:
        return None
    values = given.detach().double().flatten().unique().tolist()
    return values[0] if len(values) == 1 else None

"""Around the loop of a training: which model, on which processes, in which dtypes."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from diffuse_compress.components import resolve_names
from diffuse_compress.errors import ConfigError, MissingDependencyError, nearest
from diffuse_compress.quantization.layer_base import QuantizedLayer
from diffuse_compress.training.config import QVGenConfig
from diffuse_compress.training.options import TrainerOptions
from diffuse_compress.training.processes import refuse_launcher

__all__ = ["accelerated", "cast_back", "checkpoint_blocks", "component_of", "make_accelerator", "precision_of"]


def component_of(target: Any, asked: str | None) -> str:
    names = resolve_names([asked if asked is not None else "denoisers"], target)
    found = next(iter(names.values()))
    if asked is None and len(found) > 1:
        raise ConfigError(
            f"training: {type(target).__name__} has several denoisers ({', '.join(found)}). Train one after the other: "
            f"component={found[0]!r}."
        )
    return found[0]


@contextlib.contextmanager
def accelerated(options: TrainerOptions, given: Any, config: QVGenConfig) -> Iterator[Any]:
    """The accelerator of a training: the caller's, or one of its own where there are other processes or trackers."""
    refuse_launcher()
    if given is None and not options.report_to and int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield None
        return
    made = given
    if given is None:
        made = make_accelerator(options.report_to, options.output_dir)
    if options.report_to:
        plain = {key: value for key, value in config.to_dict().items() if isinstance(value, str | int | float)}
        made.init_trackers(options.tracker_name, plain, {k: dict(v) for k, v in options.tracker_settings.items()})
    try:
        yield made
    finally:
        if options.report_to:
            made.end_training()


def make_accelerator(report_to: Any, folder: Any, *, cpu: bool = False) -> Any:
    """accelerate's, with these trackers.

    Raises:
        ConfigError: a tracker that accelerate does not know.
        MissingDependencyError: one whose package is not installed; accelerate itself would log nowhere.
    """
    from accelerate import Accelerator
    from accelerate.tracking import get_available_trackers
    from accelerate.utils import LoggerType

    asked = list(report_to) if isinstance(report_to, list | tuple) else [report_to] if report_to else []
    known = [kind.value for kind in LoggerType]
    there = [str(getattr(kind, "value", kind)) for kind in get_available_trackers()]
    for name in asked:
        if isinstance(name, str) and name not in known:
            raise ConfigError(f"training: unknown report_to={name!r}; {nearest(name, known)}")
        if isinstance(name, str) and name != "all" and name not in there:
            raise MissingDependencyError(f"training: report_to={name!r} needs its package: pip install {name}.")
    where = None if folder is None else str(folder)
    return Accelerator(log_with=asked or None, project_dir=where, cpu=cpu)


def precision_of(asked: str | None, dtype: torch.dtype, accelerator: Any = None) -> torch.dtype | None:
    """dtype of the products; the weights themselves are float32 then. None for models in float32. What a launcher was
    told counts where the config says nothing."""
    told = None if accelerator is None else getattr(accelerator, "mixed_precision", None)
    if asked is None and told in ("bf16", "fp16"):
        asked = told
    if asked is not None:
        return torch.bfloat16 if asked == "bf16" else torch.float16
    return dtype if dtype in (torch.bfloat16, torch.float16) else None


def cast_back(model: nn.Module, dtypes: Mapping[str, torch.dtype], dtype: torch.dtype) -> None:
    for module in model.modules():
        if isinstance(module, QuantizedLayer):
            module.to(dtype)
    for name, parameter in model.named_parameters():
        if name in dtypes and parameter.is_floating_point() and parameter.dtype != dtypes[name]:
            parameter.data = parameter.data.to(dtypes[name])


def checkpoint_blocks(model: nn.Module) -> None:
    """Let the backward pass compute blocks again, as the model's library does it."""
    enable = getattr(model, "enable_gradient_checkpointing", None)
    enable = enable or getattr(model, "gradient_checkpointing_enable", None)
    if enable is None:
        raise ConfigError(
            f"training: {type(model).__name__} has no gradient checkpointing of its own; leave "
            "gradient_checkpointing=True out, or apply it to its blocks."
        )
    enable()
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False):
            module.training = True  # of transformers' blocks, the condition

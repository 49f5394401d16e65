"""Learned clips of a whole model: the hook that tells its layers which group of timesteps a call is in.

The timestep is read where the step protocol reads it, from the arguments of the model's own forward, so that neither
the number of steps, nor calls that a cache leaves out, nor guidance in one or two calls make a difference. What the
hook has seen stays until the next call: checkpointed blocks are computed again in backward, outside of any call.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from diffuse_compress.components import unwrap
from diffuse_compress.errors import CheckpointError, ModelStateError
from diffuse_compress.quantization.clips import TimestepGroups
from diffuse_compress.quantization.layers import QuantizedLinear
from diffuse_compress.runtime import steps
from diffuse_compress.runtime.timestep import TimestepArgument
from diffuse_compress.training.layers import TrainedLinear

__all__ = [
    "CLIP_KIND",
    "GroupFollower",
    "InputClips",
    "attach_clips",
    "clips_of",
    "clips_of_training",
    "describe_clips",
    "detach_clips",
    "follow_groups",
    "stop_following",
]

CLIP_KIND = "input_clips"


@dataclass(frozen=True)
class InputClips:
    """Clips of the layers of one model, as a checkpoint holds them.

    Attributes:
        layers: names.
        values: fp32 [layers, G], in (0, 1).
        low: timestep at which the first group begins.
        high: timestep at which the last ends.
    """

    layers: tuple[str, ...]
    values: torch.Tensor
    low: float
    high: float

    @property
    def groups(self) -> int:
        """G."""
        return self.values.shape[1]

    def to_tensors(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """(tensors, JSON-able rest); :meth:`from_tensors` reads them."""
        return {"values": self.values}, {"layers": list(self.layers), "low": self.low, "high": self.high}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, torch.Tensor], meta: Mapping[str, Any]) -> InputClips:
        """Read :meth:`to_tensors`. Raises CheckpointError if they do not fit each other."""
        layers, values = tuple(meta["layers"]), tensors.get("values")
        if values is None or values.dim() != 2 or values.shape[0] != len(layers) or not values.numel():
            found = None if values is None else list(values.shape)
            raise CheckpointError(
                f"input clips: the tensor 'values' must be of [{len(layers)}, groups], found {found}. The checkpoint "
                "was changed: save it again from the trained model."
            )
        return cls(layers, values.float(), float(meta["low"]), float(meta["high"]))


def describe_clips(groups: int, layers: int) -> str:
    """In one line."""
    each = "one clip" if groups == 1 else f"a clip for each of {groups} groups of timesteps"
    return f"{each}, in {layers} layers"


class GroupFollower:
    """Keeps ``groups`` current with the calls of one model; made by :func:`follow_groups`."""

    def __init__(self, argument: TimestepArgument, groups: TimestepGroups) -> None:
        self.argument = argument
        self.groups = groups

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook."""
        self.groups.see(self.argument.read(args, kwargs))


def follow_groups(model: nn.Module, groups: TimestepGroups) -> GroupFollower:
    """Give ``model`` the hook that keeps ``groups`` current, in place of one that it has."""
    stop_following(model)
    follower = GroupFollower(TimestepArgument.of(model), groups)
    model.register_forward_pre_hook(follower.before, with_kwargs=True)
    return follower


def stop_following(model: nn.Module) -> None:
    """Take the hook off; without one, nothing happens."""
    follower = steps.hook_owner(model, GroupFollower)
    if follower is not None:
        steps.remove_hooks(model, follower)


def attach_clips(model: nn.Module, clips: InputClips) -> None:
    """Let the quantized layers of ``model`` clip their inputs.

    Raises:
        ModelStateError: it has no such layer, or one whose inputs are not quantized dynamically.
    """
    model = unwrap(model)
    found = {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}
    missing = next((name for name in clips.layers if name not in found), None)
    if missing is not None:
        raise ModelStateError(
            f"{type(model).__name__}: input clips are of other layers than it has: {missing} is not quantized. Attach "
            "those of this model."
        )
    groups = TimestepGroups(clips.groups, clips.low, clips.high)
    for name, values in zip(clips.layers, clips.values, strict=True):
        found[name].set_input_clip(values, groups)
    follow_groups(model, groups)


def detach_clips(model: nn.Module) -> None:
    """Let inputs keep their range; without clips, nothing happens."""
    for _, layer in _clipped(unwrap(model)):
        layer.set_input_clip(None)
    stop_following(unwrap(model))


def clips_of(model: nn.Module) -> InputClips | None:
    """The clips that quantized layers of ``model`` have, or None."""
    layers = dict(_clipped(unwrap(model)))
    follower = steps.hook_owner(model, GroupFollower)
    if not layers or follower is None:
        return None
    values = torch.stack([layer.input_clip.detach().float().cpu() for layer in layers.values()])  # type: ignore[union-attr]
    return InputClips(tuple(layers), values, follower.groups.low, follower.groups.high)


def _clipped(model: nn.Module) -> Iterator[tuple[str, QuantizedLinear]]:
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear) and module.input_clip is not None:
            yield name, module


def clips_of_training(layers: Mapping[str, TrainedLinear], low: float, high: float) -> InputClips | None:
    """What the layers have learned; None without clips."""
    values = {name: clips for name, layer in layers.items() if (clips := layer.clips()) is not None}
    if not values:
        return None
    return InputClips(tuple(values), torch.stack([value.detach().cpu() for value in values.values()]), low, high)

"""Where other features have put a model's weights, and what cannot be done with the layers while they are there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from diffuse_compress.components import diffusers_hooks, groups_on_disk
from diffuse_compress.errors import CheckpointError, ModelStateError

__all__ = ["require_bytes", "require_free", "require_memory", "require_own_weights"]

_DISK = "disk"


def require_free(where: str, model: nn.Module, verb: str = "compress") -> None:
    """Raise ModelStateError unless every layer of ``model`` can be replaced: loaded, under no per-layer hook.

    Hooks on the model as a whole (``enable_model_cpu_offload``) are no obstacle.
    """
    require_own_weights(where, model, verb)
    # Hooks first: under accelerate's per-layer hooks the tensors are on meta between calls, and the hook is the cause.
    for name, module in model.named_modules():
        place = f"{where}.{name}" if name else where
        if _offload_hook(module) is not None:
            raise ModelStateError(
                f"{place}: {verb} cannot replace layers under the hook {_offload_hook(module)!r}. Call {verb} first, "
                "then enable_group_offload(); diffusers cannot take that hook off again, so load the model anew."
            )
        if name and getattr(module, "_hf_hook", None) is not None and _own_tensors(module):
            raise ModelStateError(
                f"{place}: {verb} cannot replace layers under accelerate's per-layer hooks. Call {verb} before "
                "enable_sequential_cpu_offload() or dispatching with a device_map; pipe.remove_all_hooks() takes the "
                "former's off again."
            )
    for key, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.device.type == "meta":
            hint = " A plan alone works on meta models: compression_plan(...)." if verb == "compress" else ""
            raise ModelStateError(
                f"{where}.{key}: {verb} needs loaded weights, found a meta tensor. Load the weights first; if they "
                f"are offloaded (sequential or disk), call {verb} before enable_sequential_cpu_offload() or "
                f"device_map=.{hint}"
            )


def require_own_weights(where: str, model: nn.Module, verb: str = "compress") -> None:
    """Raise ModelStateError if the weights are cast by hooks or fused: they are not what a checkpoint would hold."""
    for name, module in model.named_modules():
        place = f"{where}.{name}" if name else where
        casting = [hook for hook in diffusers_hooks(module) if "casting" in hook]
        if casting:
            raise ModelStateError(
                f"{place}: {verb} needs the weights themselves, found them cast by the hook {casting[0]!r}. A "
                "compressed model takes no enable_layerwise_casting(): load the model anew and leave it out."
            )
        if getattr(module, "fused_projections", False) and hasattr(module, "fuse_projections"):
            raise ModelStateError(
                f"{place}: {verb} needs separate projections, found them fused. Fused ones are copies that a "
                "checkpoint cannot be reloaded with: call unfuse_qkv_projections(), or load the model anew."
            )


def require_bytes(model: nn.Module) -> None:
    """Raise CheckpointError if the tensors of ``model`` are not in memory: saving would write other bytes."""
    name = type(model).__name__
    for key, tensor in model.named_parameters():
        if tensor.device.type == "meta":
            raise CheckpointError(
                f"{name}.{key}: save_pretrained needs the weights in memory, found a meta tensor. Save before "
                "offloading; pipe.remove_all_hooks() undoes enable_sequential_cpu_offload(), and a model that a "
                "device_map= put on disk is loaded without it."
            )
    for layer, _ in groups_on_disk(model):
        raise CheckpointError(
            f"{name}.{layer}: save_pretrained needs the weights in memory, found them offloaded to disk by "
            "enable_group_offload(offload_to_disk_path=). Save before, or load the model anew and save it."
        )


def require_memory(device_map: Any) -> None:
    """Raise ModelStateError if a device map keeps weights on disk, which then cannot be quantized as they arrive."""
    if not isinstance(device_map, Mapping):
        return
    on_disk = [name for name, device in device_map.items() if device in (_DISK, torch.device("meta"))]
    if on_disk:
        raise ModelStateError(
            f"device_map: quantizing while loading needs every weight in memory, found {len(on_disk)} modules on disk "
            f"({on_disk[0] or 'the whole model'!r}, ...). Load without device_map=, compress and save; that checkpoint "
            "can be loaded with device_map= and max_memory=."
        )


def _offload_hook(module: nn.Module) -> str | None:
    return next((hook for hook in diffusers_hooks(module) if "offload" in hook), None)


def _own_tensors(module: nn.Module) -> bool:
    return "weight" in module._parameters or "qweight" in module._parameters

"""Which parts of a pipeline are models, and the groups they go by."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from diffuse_compress.errors import ConfigError, nearest

__all__ = [
    "GROUPS",
    "compute_dtype_of",
    "diffusers_hooks",
    "generates_text",
    "groups_on_disk",
    "is_pipeline",
    "model_components",
    "resolve_names",
    "unwrap",
]

GROUPS: dict[str, re.Pattern[str]] = {
    "denoisers": re.compile(r"(?:transformer|unet|prior|decoder|denoiser|dit)(?:_\d+)?\Z|super_res_(?:first|last)\Z"),
    "text_encoders": re.compile(r"text_encoder(?:_\d+)?\Z|t5\Z|llm\Z|mllm\Z"),
    "vaes": re.compile(r"(?:vae|vqvae|movq|vqgan|audio_vae|video_vae)(?:_\d+)?\Z"),
    "image_encoders": re.compile(r"image_encoder(?:_\d+)?\Z"),
    "controlnets": re.compile(r"controlnet(?:_\w+)?\Z|adapter\Z"),
}
_ALL = "all"
SELF = ""
"""Component name of a bare model: it is its own only component."""


def is_pipeline(obj: Any) -> bool:
    """True for diffusers' DiffusionPipeline and ModularPipeline (anything that lists its components)."""
    return not isinstance(obj, nn.Module) and isinstance(getattr(obj, "components", None), dict)


def generates_text(model: Any) -> bool:
    """True for a transformers model with a language head, of which ``generate`` makes text."""
    return callable(getattr(model, "can_generate", None)) and bool(model.can_generate())


def unwrap(module: Any) -> Any:
    """The module inside ``torch.compile``'s wrapper."""
    return getattr(module, "_orig_mod", module)


def compute_dtype_of(model: nn.Module) -> torch.dtype:
    """dtype that a model says it computes in, else that of its first floating point parameter."""
    dtype = getattr(model, "dtype", None)
    if isinstance(dtype, torch.dtype) and dtype.is_floating_point:
        return dtype
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def model_components(obj: Any) -> dict[str, nn.Module]:
    """Models of a pipeline by component name; a bare model is ``{"": model}``.

    Raises:
        ConfigError: neither a pipeline nor a model.
    """
    if isinstance(obj, nn.Module):
        return {SELF: unwrap(obj)}
    if not is_pipeline(obj):
        raise ConfigError(f"compress needs a diffusers pipeline or a model, got {type(obj).__name__}.")
    parts = {name: unwrap(part) for name, part in obj.components.items()}
    return {name: part for name, part in parts.items() if isinstance(part, nn.Module)}


def resolve_names(keys: Iterable[str], obj: Any) -> dict[str, list[str]]:
    """{key: component names} for component names and groups.

    Raises:
        ConfigError: a key that names no component or group, a component that is not loaded, or a group that is
            empty here (naming what the pipeline does have).
    """
    models = model_components(obj)
    listed = set(obj.components) if is_pipeline(obj) else {SELF}
    resolved = {}
    for key in keys:
        if key in models:
            resolved[key] = [key]
        elif isinstance(obj, nn.Module) and key not in (*GROUPS, _ALL):
            raise ConfigError(
                f"{type(obj).__name__} is a single model and has no component {key!r}: pass the preset or "
                "configuration itself (of a recipe, recipe.components[name][0])."
            )
        elif key == _ALL:
            resolved[key] = list(models)
        elif key in GROUPS:
            resolved[key] = [name for name in models if GROUPS[key].match(name)] or _empty_group(key, obj, models)
        elif key in listed:
            raise ConfigError(
                f"{type(obj).__name__}: component {key!r} is not a loaded model, it is "
                f"{type(obj.components[key]).__name__}. Load it, or leave it out."
            )
        else:
            choices = [*models, *GROUPS, _ALL]
            raise ConfigError(f"{type(obj).__name__} has no component or group {key!r}; {nearest(key, choices)}.")
    return resolved


def _empty_group(group: str, obj: Any, models: dict[str, nn.Module]) -> list[str]:
    if isinstance(obj, nn.Module) and group == "denoisers":
        return [SELF]
    what = "no denoiser" if group == "denoisers" else f"no component of group {group!r}"
    raise ConfigError(
        f"{type(obj).__name__}: {what} found among its models ({', '.join(models) or 'none'}). "
        f'Name the components: compress({{"{next(iter(models), "transformer")}": "w8a8"}}).'
    )


def diffusers_hooks(module: nn.Module) -> dict[str, Any]:
    """Hooks of diffusers on a module, by name."""
    hooks = getattr(getattr(module, "_diffusers_hook", None), "hooks", None)
    return hooks if isinstance(hooks, dict) else {}


def groups_on_disk(model: nn.Module) -> Iterator[tuple[str, Iterable[torch.Tensor]]]:
    """(qualified name, tensors) of modules whose group ``enable_group_offload(offload_to_disk_path=)`` put on disk.

    Between calls these tensors are uninitialised memory of the right shape, and they are read from there for each.
    """
    for name, module in model.named_modules():
        group = getattr(diffusers_hooks(module).get("group_offloading"), "group", None)
        if getattr(group, "offload_to_disk_path", None) is not None:
            yield name, getattr(group, "tensor_to_key", {})

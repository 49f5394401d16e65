"""Which adapters a model runs with, as a value that changes when they do."""

from __future__ import annotations

from typing import Any

from torch import nn

__all__ = ["adapters_of"]


def adapters_of(model: nn.Module) -> Any:
    """Names, scales and states of the adapters in ``model``'s layers; () without any, at no cost."""
    if not getattr(model, "_hf_peft_config_loaded", False) and not hasattr(model, "peft_config"):
        return ()
    return tuple(_state(layer) for layer in model.modules() if hasattr(layer, "merged_adapters"))


def _state(layer: Any) -> tuple[Any, ...]:
    scaling = getattr(layer, "scaling", None)
    scales = tuple(scaling.items()) if isinstance(scaling, dict) else ()
    return tuple(layer.active_adapters), layer.disable_adapters, tuple(layer.merged_adapters), scales

"""What ``import diffuse_compress`` adds to the classes of diffusers and transformers."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from torch import nn

from diffuse_compress.errors import ConfigError
from diffuse_compress.integrations.compat import has
from diffuse_compress.integrations.component import get_state

__all__ = ["NO_PATCH_VARIABLE", "attach", "marks_of", "register_quantizers"]

NO_PATCH_VARIABLE = "DIFFUSE_COMPRESS_NO_PATCH"
_MARK = "_diffuse_compress"


def register_quantizers() -> None:
    """Make both libraries' ``from_pretrained`` know our method. Idempotent."""
    if has("diffusers"):
        from diffuse_compress.integrations.diffusers import register as register_diffusers

        register_diffusers()
    if has("transformers"):
        from diffuse_compress.integrations.transformers import register as register_transformers

        register_transformers()


def attach(methods: dict[str, Callable[..., Any]]) -> None:
    """Add ``methods`` to the pipeline and model classes, and wrap what must know of compressed objects.

    Nothing is replaced that another package put there, a second call changes nothing, and with
    ``DIFFUSE_COMPRESS_NO_PATCH=1`` classes stay as they are.
    """
    if os.environ.get(NO_PATCH_VARIABLE, "") not in ("", "0"):
        return
    from diffuse_compress.integrations.saving import wrap_save_pretrained

    for cls in _classes():
        for name, function in methods.items():
            if not hasattr(cls, name):
                setattr(cls, name, function)
        wrap_save_pretrained(cls)
        if isinstance(cls.__dict__.get("dtype"), property):
            _wrap_dtype(cls)


def marks_of(model: nn.Module) -> tuple[Callable[..., None], Callable[..., None]]:
    """(mark_compressed, unmark) of the library that ``model`` comes from.

    Raises:
        ConfigError: the model is neither a diffusers ModelMixin nor a transformers PreTrainedModel.
    """
    if has("diffusers"):
        from diffusers import ModelMixin

        if isinstance(model, ModelMixin):
            from diffuse_compress.integrations import diffusers as door

            return door.mark_compressed, door.unmark
    if has("transformers"):
        from transformers import PreTrainedModel

        if isinstance(model, PreTrainedModel):
            from diffuse_compress.integrations import transformers as other_door

            return other_door.mark_compressed, other_door.unmark
    raise ConfigError(
        f"compress needs a diffusers ModelMixin or a transformers PreTrainedModel, got {type(model).__name__}. For a "
        "plain torch module, convert its layers with diffuse_compress.quantization.convert.quantize_module."
    )


def _classes() -> list[type]:
    classes: list[type] = []
    if has("diffusers"):
        from diffusers import DiffusionPipeline, ModelMixin

        classes += [DiffusionPipeline, ModelMixin]
        try:
            from diffusers import ModularPipeline
        except ImportError:  # older diffusers, or one of its optional parts is missing
            pass
        else:
            classes.append(ModularPipeline)
    if has("transformers"):
        from transformers import PreTrainedModel

        classes.append(PreTrainedModel)
    return classes


def _wrap_dtype(cls: type) -> None:
    """``component.dtype`` is the compute dtype even where a layer's fp32 scale is the first floating parameter."""
    stock = cls.__dict__["dtype"]
    if getattr(stock.fget, _MARK, False):
        return

    def dtype(self: Any) -> Any:
        state = get_state(self)
        return stock.fget(self) if state is None else compute_dtype(self, stock.fget)

    setattr(dtype, _MARK, True)
    cls.dtype = property(dtype, doc=stock.__doc__)  # type: ignore[attr-defined]


def compute_dtype(model: Any, stock: Callable[[Any], Any]) -> Any:
    """dtype of a compressed model's first layer that computes: its own, or a quantized layer's ``compute_dtype``."""
    for module in model.modules():
        found = getattr(module, "compute_dtype", None)
        if found is not None:
            return found
        for parameter in module.parameters(recurse=False):
            if parameter.is_floating_point():
                return parameter.dtype
    return stock(model)

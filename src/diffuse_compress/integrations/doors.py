"""Our module for the library that a model comes from."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

from torch import nn

from diffuse_compress.errors import ConfigError
from diffuse_compress.integrations.compat import usable

__all__ = ["door", "library_of", "marks_of", "untie_head"]


def marks_of(model: nn.Module) -> tuple[Callable[..., None], Callable[..., None]]:
    """(mark_compressed, unmark) of the library that ``model`` comes from.

    Raises:
        ConfigError: the model is neither a diffusers ModelMixin nor a transformers PreTrainedModel.
    """
    ours = door(library_of(model))
    return ours.mark_compressed, ours.unmark


def library_of(model: nn.Module) -> str:
    """ "diffusers" or "transformers". Raises ConfigError for a model of neither."""
    for library, base in (("diffusers", "ModelMixin"), ("transformers", "PreTrainedModel")):
        if usable(library) and isinstance(model, getattr(import_module(library), base)):
            return library
    raise ConfigError(
        f"compress needs a diffusers ModelMixin or a transformers PreTrainedModel, got {type(model).__name__}. For a "
        "plain torch module, convert its layers with diffuse_compress.quantization.convert.quantize_module."
    )


def door(library: str) -> Any:
    """Our module for ``library``; it imports that library, so it is imported only where that can be."""
    return import_module(f"diffuse_compress.integrations.{library}")


def untie_head(model: Any, head: str, embedding: str) -> Callable[[], None]:
    """Give the output layer of a transformers model a weight of its own, and return what undoes that."""
    layer, config = model.get_submodule(head), model.config
    weight, tied = layer.weight, getattr(model, "all_tied_weights_keys", None)
    if weight is not model.get_submodule(embedding).weight:
        return lambda: None

    def undo() -> None:
        layer.weight, config.tie_word_embeddings = weight, True
        if tied is not None:
            model.all_tied_weights_keys = tied

    layer.weight, config.tie_word_embeddings = nn.Parameter(weight.detach().clone(), weight.requires_grad), False
    if tied is not None:
        model.all_tied_weights_keys = {key: value for key, value in tied.items() if key != f"{head}.weight"}
    return undo

"""Which layers of a live model are foreign, and the marks that another quantizer left on it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from diffuse_compress.integrations.compat import remove_from_diffusers_config
from diffuse_compress.integrations.imports import bfl, gguf, torchao
from diffuse_compress.integrations.imports.base import ForeignLayer, NotImportableError

__all__ = ["SOURCES", "dense_parameters", "foreign_layers", "marks_aside", "reader_of"]

SOURCES = "torchao Int8Tensor and Float8Tensor, GGUF Q8_0, Q4_0 and Q4_1, BFL fp8r"
"""What can be read from a live model, for messages."""
Reader = Callable[[nn.Module], ForeignLayer]
_MARKS = ("hf_quantizer", "quantization_method", "is_quantized", "_weight_conversions")


def reader_of(module: nn.Module) -> Reader | None:
    """The reader for a linear layer of another library, or None for a layer of nobody's."""
    if bfl.is_layer(module):
        return bfl.read
    weight = module._parameters.get("weight")
    if weight is None:
        return None
    if gguf.holds(weight):
        return gguf.read if gguf.dense_values(weight) is None else None
    return torchao.read if torchao.holds(weight) else None


def foreign_layers(model: nn.Module) -> dict[str, Reader]:
    """{qualified name: reader} of the layers to import, each shared module once."""
    found = {}
    for name, module in model.named_modules():
        reader = reader_of(module)
        if reader is not None:
            found[name] = reader if isinstance(module, nn.Linear) else _not_linear
    return found


def _not_linear(module: nn.Module) -> ForeignLayer:
    weight: Any = module.weight
    kind = f"GGUF {gguf.type_name(weight)}" if gguf.holds(weight) else f"torchao {type(weight).__name__}"
    raise NotImportableError(
        f"{kind} in a {type(module).__name__} (only linear layers can be): quantize that one not, or call dequantize() "
        "on the model, then compress()"
    )


def dense_parameters(model: nn.Module) -> dict[str, torch.Tensor]:
    """{parameter name: values} of parameters that another library only wraps: GGUF's bfloat16."""
    found = {}
    for name, parameter in model.named_parameters():
        values = gguf.dense_values(parameter) if gguf.holds(parameter) else None
        if values is not None:
            found[name] = values
    return found


class marks_aside:
    """Take another quantizer's marks off ``model``; :meth:`restore` puts every one back."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._marks = {name: model.__dict__[name] for name in _MARKS if name in model.__dict__}
        self._config = getattr(model, "_internal_dict", None)
        holder = getattr(model, "config", None)
        self._quantization = getattr(holder, "quantization_config", None)
        for name in self._marks:
            if name != "_weight_conversions":
                del model.__dict__[name]
        if self._config is not None:
            remove_from_diffusers_config(model, "quantization_config")
        elif holder is not None and self._quantization is not None:
            del holder.quantization_config
        self._drop_conversions()

    def _drop_conversions(self) -> None:
        """Forget how transformers assembled tensor subclasses from a file: plain tensors are saved as they are."""
        conversions = self._marks.get("_weight_conversions")
        if conversions is not None:
            self._model._weight_conversions = [item for item in conversions if not _assembles(item)]

    def restore(self) -> None:
        """The marks as they were."""
        model = self._model
        for name in _MARKS:
            model.__dict__.pop(name, None)
        model.__dict__.update(self._marks)
        if self._config is not None:
            model._internal_dict = self._config
        elif self._quantization is not None:
            model.config.quantization_config = self._quantization


def _assembles(conversion: Any) -> bool:
    operations = getattr(conversion, "operations", ())
    return any(type(operation).__module__ == "transformers.integrations.torchao" for operation in operations)

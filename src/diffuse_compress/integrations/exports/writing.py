"""Checking that a model can be written in a format of others, and writing it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from diffuse_compress.assignment import LayerAssignment
from diffuse_compress.errors import ConfigError, reasons_text
from diffuse_compress.integrations.component import quantized_layers
from diffuse_compress.integrations.doors import door, library_of
from diffuse_compress.integrations.exports.awq import AWQ
from diffuse_compress.integrations.exports.base import LanguageFormat, LayerFacts, layout_of
from diffuse_compress.integrations.exports.compressed_tensors import CompressedTensors
from diffuse_compress.integrations.exports.fp8 import FP8
from diffuse_compress.integrations.exports.gptq import GPTQ
from diffuse_compress.integrations.peft import has_adapters
from diffuse_compress.integrations.refusals import require_none_carried
from diffuse_compress.quantization.layers import QuantizedLinear

__all__ = ["LANGUAGE_FORMATS", "require_exact", "written_as"]

LANGUAGE_FORMATS: dict[str, LanguageFormat] = {item.name: item for item in (CompressedTensors(), FP8(), GPTQ(), AWQ())}


def require_exact(
    where: str, model: nn.Module, fmt: LanguageFormat, planned: Mapping[str, LayerAssignment] | None = None
) -> None:
    """Raise ConfigError if ``fmt`` cannot hold the model as it is computed here, naming every layer and why.

    Args:
        where: the component's name, for the message.
        model: with the layers, or on the meta device.
        fmt: one of ``LANGUAGE_FORMATS``.
        planned: what is about to be done to its dense layers, on top of those that are quantized.
    """
    asked = f'{where}: format="{fmt.name}"'
    if library_of(model) != "transformers":
        raise ConfigError(
            f"{asked} needs a transformers model, got {type(model).__name__} of diffusers, which reads no such files. "
            'Leave format= out, or take format="torchao".'
        )
    if has_adapters(model):
        raise ConfigError(f"{asked} needs a model without adapters, found peft layers. Fuse or unload them first.")
    require_none_carried(asked, model)
    facts = {name: LayerFacts.of(layer) for name, layer in quantized_layers(model).items()}
    for name, item in (planned or {}).items():
        if item.scheme is not None:
            layer = model.get_submodule(name)
            rows, columns = item.shape[0], int(torch.Size(item.shape[1:]).numel())
            facts[name] = LayerFacts(item.scheme, (rows, columns), isinstance(layer, nn.Conv2d))
    reasons = {name: reason for name, layer in facts.items() if (reason := fmt.reason(layer)) is not None}
    if reasons:
        raise ConfigError(
            f"{asked} needs layers that it holds exactly, got {len(reasons)} of {len(facts)} that it does not. "
            f"{reasons_text(reasons)}. Nothing was written. Leave format= out, or compress these layers otherwise."
        )
    whole = fmt.whole_reason(layout_of(model, {name: layer.scheme for name, layer in facts.items()}))
    if whole is not None:
        raise ConfigError(
            f"{asked} cannot describe this model: {whole}. Nothing was written. Leave format= out, take "
            'format="compressed-tensors", which names every layer, or compress it otherwise.'
        )


@contextmanager
def written_as(model: Any, fmt: LanguageFormat) -> Iterator[None]:
    """While it lasts, the stock ``save_pretrained`` of ``model`` writes ``fmt``. The layers stay ours."""
    layout = layout_of(model, {name: layer.scheme for name, layer in quantized_layers(model).items()})
    config = fmt.config(layout)
    had, quantizer = "hf_quantizer" in model.__dict__, getattr(model, "hf_quantizer", None)
    ours = getattr(model.config, "quantization_config", None)
    model.hf_quantizer = door(library_of(model)).WritingQuantizer(lambda: _state_dict(model, fmt))
    model.config.quantization_config = config
    try:
        yield
    finally:
        if had:
            model.hf_quantizer = quantizer
        else:
            del model.hf_quantizer
        if ours is not None:
            model.config.quantization_config = ours
        else:
            del model.config.quantization_config


def _state_dict(model: nn.Module, fmt: LanguageFormat) -> dict[str, torch.Tensor]:
    tensors = dict(model.state_dict())
    found: dict[int, dict[str, torch.Tensor]] = {}
    for name, layer in model.named_modules(remove_duplicate=False):
        if isinstance(layer, QuantizedLinear):
            for leaf in layer.state_dict():
                if leaf != "bias":
                    del tensors[f"{name}.{leaf}"]
            # A shared layer keeps sharing its tensors.
            written = found.setdefault(id(layer), {}) or fmt.tensors(layer)
            found[id(layer)] = written
            tensors |= {f"{name}.{leaf}": tensor for leaf, tensor in written.items()}
    return tensors

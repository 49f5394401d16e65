"""What is written about a compressed model, brought up to date with the model as it is when it is saved."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import nn

from diffuse_compress.components import is_pipeline, model_components
from diffuse_compress.errors import CheckpointError
from diffuse_compress.integrations.component import ComponentState, get_state, layer_entries, quantized_layers
from diffuse_compress.integrations.doors import marks_of
from diffuse_compress.integrations.methods import Stored, stored_methods
from diffuse_compress.integrations.origin import base_model_of
from diffuse_compress.integrations.peft import has_adapters, merge_errors
from diffuse_compress.integrations.placement import require_bytes
from diffuse_compress.integrations.quantization_config import QuantizationConfig
from diffuse_compress.patterns import generalize

__all__ = ["up_to_date"]


@contextmanager
def up_to_date(obj: Any) -> Iterator[None]:
    """While a model is saved, its config and layer map say what it is.

    * A cast since it was compressed: layer map and ``compute_dtype`` follow.
    * A part of it was compressed on its own (a language model inside a vision-language one): the whole gets a state.
    * What it carries beside weights (``methods.py``) is put into its state for the writers.
    * A dense model whose config object is shared with a compressed one: its config is written without ours.

    Raises:
        CheckpointError: it holds quantized layers of which nothing is known here, or that are offloaded.
    """
    if not isinstance(obj, nn.Module):
        # Before the first component is written: a dense one among offloaded ones would fail in a way of its own.
        for model in model_components(obj).values() if is_pipeline(obj) else ():
            if quantized_layers(model):
                require_bytes(model)
        yield
        return
    layers = quantized_layers(obj)
    holder: Any = getattr(obj, "config", None)
    config = getattr(holder, "quantization_config", None)
    if not layers and get_state(obj) is None and isinstance(config, QuantizationConfig):
        del holder.quantization_config
        try:
            yield
        finally:
            holder.quantization_config = config
        return
    if not layers and get_state(obj) is None:
        yield
        return
    stored = stored_methods(obj)
    if layers:
        require_bytes(obj)
        _require_no_adapters(obj)
    elif not stored:  # what a dense model carried has been taken off
        marks_of(obj)[1](obj)
        yield
        return
    state = _refresh(obj, get_state(obj) or _state_of_parts(obj), stored)
    state.merge_errors = merge_errors(obj) if layers else {}
    state.stored = stored
    try:
        yield
    finally:
        state.stored = {}


def _require_no_adapters(model: Any) -> None:
    # Of adapters that transformers has loaded, it saves these alone, as ever. Otherwise both libraries would write the
    # base and them under names that do not load.
    saved_alone = not hasattr(model, "save_lora_adapter") and getattr(model, "_hf_peft_config_loaded", False)
    if has_adapters(model) and not saved_alone:
        raise CheckpointError(
            f"{type(model).__name__}: a checkpoint holds no adapters, found peft layers. Call unload_lora_weights() "
            "and save, after fuse_lora() if their effect is to stay; save_lora_weights() saves adapters. "
            "Of a PeftModel: unload() or merge_and_unload(); its own save_pretrained() saves adapters."
        )


def _refresh(model: Any, state: ComponentState, stored: Mapping[str, Stored]) -> ComponentState:
    entries, dtype = layer_entries(model), model.dtype
    base_model = base_model_of(model, state)
    methods = {kind: dict(method.config) for kind, method in stored.items()}
    same = entries == state.layers and dtype == state.config.compute_dtype and base_model == state.base_model
    same = same and methods == state.config.methods
    if get_state(model) is state and same:
        return state
    config = QuantizationConfig.from_spec(state.config.spec, dtype, state.config.calibration, methods)
    fresh = replace(state, config=config, layers=entries, base_model=base_model)
    marks_of(model)[0](model, fresh)
    return fresh


def _state_of_parts(model: nn.Module) -> ComponentState:
    layers = quantized_layers(model)
    states = [state for state in map(get_state, model.modules()) if state is not None]
    if not states:
        raise CheckpointError(
            f"{type(model).__name__}: {len(layers)} of its layers were quantized as part of a larger model, which "
            "knows their configuration. Save that model, or call decompress() on it first."
        )
    schemes = {
        name: layers[name].scheme if name in layers else None
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    }
    spec = states[0].config.spec.resolved(tuple(generalize(schemes)))
    config = QuantizationConfig.from_spec(spec, calibration=states[0].config.calibration)
    return ComponentState(config, layer_entries(model), base_model=states[0].base_model)

"""The transformers door: an HfQuantizer for loading and saving, and the marks of a compressed PreTrainedModel.

transformers only warns about a quantization method it does not know and goes on with random weights. So on disk a
layer's packed codes stand under the stock key ``<layer>.weight`` with a leading axis of 1: a load without this
package meets a shape it cannot accept and stops.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

from diffuse_compress.integrations.component import (
    ComponentState,
    LayerEntry,
    install_placeholders,
    layers_of_checkpoint,
    metadata_of,
    quantized_layers,
    read_metadata,
    require_keys,
)
from diffuse_compress.integrations.methods import method_keys
from diffuse_compress.integrations.peft import support_adapters
from diffuse_compress.integrations.quantization_config import QUANT_METHOD, QuantizationConfig
from diffuse_compress.integrations.quantizer import QuantizerMixin

__all__ = ["DiffuseCompressHfQuantizer", "WritingQuantizer", "mark_compressed", "register", "unmark"]


class _DropLeadingAxis(ConversionOps):  # type: ignore[misc]
    """[1, ...] on disk, [...] in memory."""

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, Any]:
        (value,) = input_dict.values()
        tensor = value[0] if isinstance(value, list) else value
        return {kwargs["full_layer_name"]: tensor.squeeze(0)}

    @property
    def reverse_op(self) -> ConversionOps:
        raise NotImplementedError  # saving goes through get_state_dict_and_metadata


class _PackedWeights(WeightConverter):  # type: ignore[misc]
    """Renames ``<layer>.weight`` to ``<layer>.qweight`` for exactly the converted layers.

    One object answers for all of them by set membership; a regular expression per layer would be tried against
    every key of the checkpoint.
    """

    def __init__(self, layers: Collection[str], base_model_prefix: str) -> None:
        super().__init__(["diffuse_compress.weight"], ["diffuse_compress.qweight"], [_DropLeadingAxis()])
        prefix = f"{base_model_prefix}."
        names = set(layers)
        # A headless model loads a headed one's checkpoint and the other way round: keys differ by this prefix.
        names |= {prefix + name for name in layers} | {name.removeprefix(prefix) for name in layers}
        object.__setattr__(self, "_keys", {f"{name}.weight" for name in names})

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        if source_key not in self._keys:
            return source_key, None
        self._was_used = True
        return f"{source_key.removesuffix('weight')}qweight", self.source_patterns[0]

    def __deepcopy__(self, memo: dict[int, Any]) -> WeightConverter:
        # Loading copies the converter once per tensor; the set of keys is not needed any more by then.
        return WeightConverter(list(self.source_patterns), list(self.target_patterns), [_DropLeadingAxis()])


class _QuantizeOnLoad(ConversionOps):  # type: ignore[misc]
    """Replaces the dense layer by its quantized form when its weight arrives."""

    def __init__(self, quantizer: DiffuseCompressHfQuantizer) -> None:
        self.quantizer = quantizer

    def convert(self, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        (value,) = input_dict.values()
        weight = value[0] if isinstance(value, list) else value
        key, model = kwargs["full_layer_name"], kwargs["model"]
        self.quantizer._quantize_arrived(model, key, weight, weight.device)
        missing = kwargs.get("missing_keys")
        if missing is not None:
            missing.discard(key)
        return {}


class DiffuseCompressHfQuantizer(QuantizerMixin, HfQuantizer):  # type: ignore[misc]
    """Loads and saves our checkpoints; quantizes tensor by tensor when given a config with dense weights."""

    requires_calibration = False

    def __init__(self, quantization_config: QuantizationConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._setup()
        self._layers: dict[str, LayerEntry] = {}

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        spec = self.quantization_config.spec
        self._base_model_prefix = getattr(model, "base_model_prefix", "")
        if not self.pre_quantized:
            self._await_dense_weights(model)
            return
        self._metadata = read_metadata(checkpoint_files)
        self._files = [str(file) for file in checkpoint_files or ()]
        if (self._metadata or {}).get("methods"):  # their tensors are read past the loader
            ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
            model._keys_to_ignore_on_load_unexpected = {*ignored, rf"{QUANT_METHOD}\."}
        layers = layers_of_checkpoint(model, spec, self._metadata, model.dtype)
        self._layers = _matching_prefix(model, layers, self._base_model_prefix)
        install_placeholders(model, self._layers)
        keys = _renamed(model, self, _keys_of(checkpoint_files))
        if keys is not None:
            require_keys(model, self._layers, keys)

    def get_weight_conversions(self) -> list[WeightConverter]:
        return [_PackedWeights(self._layers, self._base_model_prefix)] if self._layers else []

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        # An fp8 weight inside a layer that the class keeps in fp32 (T5's ``wo``) must not be cast with it.
        if hasattr(param, "get_dtype") and param.get_dtype().startswith("F8"):
            return None
        return super().get_new_dtype(converter, param, dtype)

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        return self._is_awaited(param_name)

    def param_element_size(self, model: Any, param_name: str, param: torch.Tensor) -> float:
        """Bytes of an element once it is loaded; transformers sets the sum aside on a GPU before it loads any."""
        if self._is_awaited(param_name):
            return self.pending[param_name.rpartition(".")[0]].weight.format.bits / 8
        return float(super().param_element_size(model, param_name, param))

    def get_quantize_ops(self) -> _QuantizeOnLoad:
        return _QuantizeOnLoad(self)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        state = self._loaded_state(model, model.dtype)
        conversions = getattr(model, "_weight_conversions", None)
        if conversions is not None:
            model._weight_conversions = [item for item in conversions if not isinstance(item, _PackedWeights)]
        _mark(model, self, state)
        self._restore_methods(model)
        return model

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        state_dict = model.state_dict()
        for name in quantized_layers(model):
            state_dict[f"{name}.weight"] = state_dict.pop(f"{name}.qweight").unsqueeze(0)
        if self.state is None:
            return state_dict, {}
        return {**state_dict, **method_keys(self.state.stored)}, metadata_of(self.state)

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        self._restore_dense_layers(model)
        return model

    def is_serializable(self, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True


class WritingQuantizer(HfQuantizer):  # type: ignore[misc]
    """Stands in for a model's quantizer while it is saved in a format of others, whose package need not be there."""

    requires_calibration = False

    def __init__(self, state_dict: Callable[[], dict[str, torch.Tensor]]) -> None:
        self._state_dict = state_dict

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        return self._state_dict(), {}

    def is_serializable(self, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


def mark_compressed(model: Any, state: ComponentState) -> None:
    """Make a live PreTrainedModel whose layers were converted save and reload as a compressed one."""
    quantizer = DiffuseCompressHfQuantizer(state.config, pre_quantized=True)
    quantizer._base_model_prefix = getattr(model, "base_model_prefix", "")
    _mark(model, quantizer, state)


def _mark(model: Any, quantizer: DiffuseCompressHfQuantizer, state: ComponentState) -> None:
    quantizer.state, quantizer.quantization_config, quantizer.pre_quantized = state, state.config, True
    quantizer._layers = state.layers
    model.hf_quantizer = quantizer
    model.quantization_method = state.config.quant_method
    model.is_quantized = True
    model.config.quantization_config = state.config
    support_adapters()


def unmark(model: Any) -> None:
    """Undo :func:`mark_compressed`; the layers are the caller's business."""
    for name in ("hf_quantizer", "quantization_method", "is_quantized"):
        model.__dict__.pop(name, None)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config


def _matching_prefix(model: Any, layers: dict[str, LayerEntry], prefix: str) -> dict[str, LayerEntry]:
    """Layer names as this class has them.

    A checkpoint of the headed class, or of another version of transformers, differs by leading components
    (``model.``, ``text_model.``). Layers of a part that this class lacks are left out.
    """
    names = {name for name, _ in model.named_modules()}
    tops = [prefix, *(name for name, _ in model.named_children())]
    found = {}
    for name, entry in layers.items():
        parts = name.split(".")
        shorter = [".".join(parts[start:]) for start in range(1, min(3, len(parts)))]
        candidates = [name, *(f"{top}.{name}" for top in tops), *shorter]
        match = next((candidate for candidate in candidates if candidate in names), None)
        if match is not None:
            found[match] = entry
    if layers and not found:
        return layers  # another model altogether: install_placeholders says so
    return found


def _renamed(model: Any, quantizer: DiffuseCompressHfQuantizer, keys: set[str] | None) -> set[str] | None:
    """The model's names for a file's keys; None if this version of transformers does not let us ask.

    They differ: Qwen2.5-VL's ``model.layers`` is ``model.language_model.layers`` in the model, and so on.
    """
    if keys is None:
        return None
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming, rename_source_key

        mapping = get_model_conversion_mapping(model, None, quantizer)
        renamings = [item for item in mapping if isinstance(item, WeightRenaming)]
        converters = [item for item in mapping if isinstance(item, WeightConverter)]
        prefix, expected = model.base_model_prefix, model.state_dict()
        found = {rename_source_key(key, renamings, converters, prefix, expected)[0] for key in keys}
    except (ImportError, TypeError, AttributeError):  # transformers itself still lists what is missing
        return None
    # As transformers does: a key that the model has, but not under its new name, keeps its old one.
    return found | {key for key in keys if key in expected}


def _keys_of(checkpoint_files: list[str] | None) -> set[str] | None:
    from safetensors import safe_open

    keys: set[str] = set()
    for file in checkpoint_files or ():
        if not str(file).endswith(".safetensors"):
            return None
        with safe_open(str(file), framework="pt") as handle:
            keys.update(handle.keys())
    return keys or None


def register() -> None:
    """Register our method with transformers. Idempotent; never clobbers."""
    if QUANT_METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(QUANT_METHOD)(QuantizationConfig)
    if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantizer(QUANT_METHOD)(DiffuseCompressHfQuantizer)

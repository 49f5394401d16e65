"""The diffusers door: a DiffusersQuantizer for loading, and the marks of a compressed ModelMixin."""

from __future__ import annotations

import math
import warnings
from contextlib import suppress
from typing import Any

import torch
from diffusers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from diffusers.quantizers.base import DiffusersQuantizer

from diffuse_compress.errors import DiffuseCompressWarning, MissingDependencyError
from diffuse_compress.integrations.attention import set_attention
from diffuse_compress.integrations.compat import add_to_diffusers_config, may_patch, remove_from_diffusers_config
from diffuse_compress.integrations.component import (
    FP32_PARAMETER_NAMES,
    ComponentState,
    install_placeholders,
    layers_of_checkpoint,
    metadata_of,
    quantized_layers,
    read_metadata,
    require_keys,
)
from diffuse_compress.integrations.methods import is_method_key, method_keys
from diffuse_compress.integrations.peft import support_adapters
from diffuse_compress.integrations.quantization_config import QUANT_METHOD, QuantizationConfig
from diffuse_compress.integrations.quantizer import QuantizerMixin
from diffuse_compress.integrations.refusals import wrap_fusing, wrap_ip_adapters
from diffuse_compress.runtime.sampling import SamplingSettings
from diffuse_compress.runtime.steps import Consumer, track, untrack

__all__ = ["DiffuseCompressQuantizer", "mark_compressed", "register", "unmark"]


_STATIC_SCALES = "static input scales"


class DiffuseCompressQuantizer(QuantizerMixin, DiffusersQuantizer):  # type: ignore[misc]
    """Loads our checkpoints, and quantizes tensor by tensor when given a config with dense weights."""

    # False makes diffusers hand over a fresh keep_in_fp32 list instead of the model class's own object, so that
    # it can be extended without changing the class.
    use_keep_in_fp32_modules = False

    def __init__(self, quantization_config: QuantizationConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        # from_single_file does not say whether it is; its tensors do, in _process_model_before_weight_loading.
        stored = bool(kwargs.get("pre_quantized", True))
        self.pre_quantized = stored and quantization_config.spec.rules is not None
        self._setup()
        self._dtype: torch.dtype | None = None
        self._is_dtype_given = False
        self._loaded_keys: list[str] | None = None

    def update_torch_dtype(self, torch_dtype: torch.dtype | None) -> torch.dtype | None:
        # Without a dtype, diffusers would load the unquantized layers of a bf16 checkpoint as fp32.
        self._is_dtype_given = torch_dtype is not None
        self._dtype = torch_dtype if torch_dtype is not None else self.quantization_config.compute_dtype
        return self._dtype

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: list[str]) -> list[str]:
        if self.pre_quantized:
            self._metadata = read_metadata(checkpoint_files)
            self._files = [str(file) for file in checkpoint_files]
            loaded_keys = [key for key in loaded_keys if not is_method_key(key)]
            self._loaded_keys = loaded_keys
            self._warn_of_another_dtype()
        return loaded_keys

    def _warn_of_another_dtype(self) -> None:
        """A load without ``dtype=`` goes by config.json, which of two variants tells of the one saved last."""
        own = (self._metadata or {}).get("compute_dtype")
        if self._is_dtype_given or own is None or getattr(torch, own) == self._dtype:
            return
        warnings.warn(
            f"{QUANT_METHOD}: these weights were saved in {own}, and are loaded in "
            f"{str(self._dtype).removeprefix('torch.')}, which config.json gives for the variant saved last. Pass "
            f"dtype=torch.{own} to from_pretrained to get what was saved.",
            DiffuseCompressWarning,
            stacklevel=2,
        )

    def _process_model_before_weight_loading(
        self,
        model: Any,
        keep_in_fp32_modules: list[str] | None = None,
        state_dict: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        spec = self.quantization_config.spec
        if state_dict is not None:  # from_single_file
            self.pre_quantized = False
        # from_single_file hands over the class's own list, which must stay as it is.
        if keep_in_fp32_modules is not None and keep_in_fp32_modules is not model._keep_in_fp32_modules:
            keep_in_fp32_modules.extend([*(model._keep_in_fp32_modules or ()), *FP32_PARAMETER_NAMES])
        if not self.pre_quantized:
            self._await_dense_weights(model)
            return
        layers = layers_of_checkpoint(model, spec, self._metadata, self._dtype or torch.float32)
        install_placeholders(model, layers)
        if self._loaded_keys is not None:
            require_keys(model, layers, self._loaded_keys)

    def get_cuda_warm_up_factor(self) -> int:
        """diffusers sets elements / this, in the model's dtype, aside on a GPU: no more than will be used."""
        bits = min((scheme.weight.format.bits for scheme in self.pending.values()), default=8)
        return max(1, math.ceil((self._dtype or torch.float32).itemsize * 8 / bits))

    def maybe_update_state_dict(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Called with every shard. What stays dense is copied: as a view of the mapped file it would keep all of it."""
        if not self.pending:
            return state_dict
        return {key: value if self._is_awaited(key) else value.clone() for key, value in state_dict.items()}

    def check_if_quantized_param(
        self, model: Any, param_value: torch.Tensor, param_name: str, state_dict: dict[str, Any], **kwargs: Any
    ) -> bool:
        return self._is_awaited(param_name)

    def create_quantized_param(
        self,
        model: Any,
        param_value: torch.Tensor,
        param_name: str,
        target_device: torch.device,
        state_dict: dict[str, Any] | None = None,
        unexpected_keys: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        self._quantize_arrived(model, param_name, param_value, target_device)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        for layer in quantized_layers(model).values():
            # diffusers casts all that stands in a module which the class keeps in fp32 (Wan's time_embedder), float8
            # codes too. The way back is exact.
            if not layer.scheme.weight.format.is_integer and layer.qweight.dtype == torch.float32:
                layer.qweight.data = layer.qweight.data.to(torch.float8_e4m3fn)
        _mark(model, self, self._loaded_state(model, self._dtype or model.dtype))
        self._restore_methods(model)
        return model

    def get_state_dict_and_metadata(
        self, state_dict: dict[str, Any], safe_serialization: bool = False
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        if self.state is None:
            return state_dict, {}
        return {**state_dict, **method_keys(self.state.stored)}, metadata_of(self.state)

    def _dequantize(self, model: Any) -> Any:
        self._restore_dense_layers(model)
        remove_from_diffusers_config(model, "quantization_config")
        model.__dict__.pop("quantization_method", None)
        untrack(model, _STATIC_SCALES)
        set_attention(model, None)
        return model

    @property
    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True


def mark_compressed(model: Any, state: ComponentState) -> None:
    """Make a live ModelMixin whose layers were converted save and reload as a compressed one."""
    _mark(model, DiffuseCompressQuantizer(state.config, pre_quantized=True), state)


def _mark(model: Any, quantizer: DiffuseCompressQuantizer, state: ComponentState) -> None:
    quantizer.state, quantizer.quantization_config, quantizer.pre_quantized = state, state.config, True
    model.hf_quantizer = quantizer
    model.quantization_method = state.config.quant_method
    # Our layers follow .to(dtype) by themselves (scales stay fp32), so diffusers' guard is not needed.
    model.is_quantized = False
    add_to_diffusers_config(model, "quantization_config", state.config)
    wrap_fusing(model)
    wrap_ip_adapters(model)
    support_adapters()
    set_attention(model, state.config.spec.attention)
    _compare_settings(model, state)


def _compare_settings(model: Any, state: ComponentState) -> None:
    """Let runs that are far from the calibration be told of, where something static depends on it."""
    found = SamplingSettings.from_dict((state.config.calibration or {}).get("sampling", {}))
    is_static = any(entry.scheme.has_static_inputs for entry in state.layers.values())
    if is_static and found != SamplingSettings() and may_patch():
        with suppress(MissingDependencyError):  # a part of diffusers cannot be imported: nothing will tell of steps
            track(model, Consumer(_STATIC_SCALES, saves=False, calibrated=found))


def unmark(model: Any) -> None:
    """Undo :func:`mark_compressed`; the layers are the caller's business."""
    set_attention(model, None)
    untrack(model, _STATIC_SCALES)
    for name in ("hf_quantizer", "quantization_method", "is_quantized"):
        model.__dict__.pop(name, None)
    remove_from_diffusers_config(model, "quantization_config")


def register() -> None:
    """Add our method to diffusers' tables (it has no register function). Idempotent; never clobbers."""
    AUTO_QUANTIZER_MAPPING.setdefault(QUANT_METHOD, DiffuseCompressQuantizer)
    AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault(QUANT_METHOD, QuantizationConfig)

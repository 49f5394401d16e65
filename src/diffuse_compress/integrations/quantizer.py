"""What our quantizers of both libraries do alike; each library's calls and names are in its own module."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

from diffuse_compress.assignment import assign_layers, require_patterns_match, resolve_rules
from diffuse_compress.errors import CheckpointError, ConfigError, DiffuseCompressWarning
from diffuse_compress.integrations.component import (
    ASK_THE_MODEL,
    ComponentState,
    align_tensors,
    layer_entries,
    quantized_layers,
)
from diffuse_compress.integrations.methods import read_methods, remove_methods, restore_methods
from diffuse_compress.integrations.origin import repository_of
from diffuse_compress.integrations.peft import restore_merge_errors
from diffuse_compress.integrations.placement import require_free, require_memory
from diffuse_compress.integrations.quantization_config import QuantizationConfig
from diffuse_compress.logging import get_logger
from diffuse_compress.quantization.convert import quantize_module, replace_module
from diffuse_compress.quantization.scheme import Scheme
from diffuse_compress.quantization.spec import Rules
from diffuse_compress.quantization.split import SplitConv2d

__all__ = ["QuantizerMixin"]

_logger = get_logger(__name__)


class QuantizerMixin:
    """Quantizing while dense weights load, the state of a loaded model, and the way back to dense layers.

    Attributes:
        state: of the model this quantizer is attached to; None until it is loaded or marked.
        pending: {layer: scheme} still waiting for its dense weight.
    """

    quantization_config: QuantizationConfig
    pre_quantized: bool
    state: ComponentState | None = None

    def _setup(self) -> None:
        self.pending: dict[str, Scheme] = {}
        self._rules: Rules = ()
        self._metadata: dict[str, Any] | None = None
        self._files: list[str] = []

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Both libraries call this with the device map, as given and as resolved, before they load a weight."""
        if not self.pre_quantized:
            require_memory(kwargs.get("device_map"))

    def _await_dense_weights(self, model: Any) -> None:
        """Decide, on the meta-device model, which layers are quantized as their weights arrive."""
        spec = self.quantization_config.spec
        if spec.needs_calibration:
            what = spec.algorithm.summary if spec.algorithm.needs_calibration else "a static input scale"
            raise ConfigError(
                f"{type(model).__name__}: {what} needs calibration data, and weights quantized while they load see "
                "none. Load the dense model, then call compress(..., calibration=...)."
            )
        if spec.algorithm.rotates_residual:
            raise ConfigError(
                f"{type(model).__name__}: {spec.algorithm.summary} needs the whole model, and weights quantized while "
                "they load come one by one. Load the dense model, then call compress(...)."
            )
        if spec.split_skips or spec.attention is not None:
            asked = "split_skips=True" if spec.split_skips else f'attention="{spec.attention}"'
            raise ConfigError(
                f"{type(model).__name__}: {asked} changes modules, and weights quantized while they load find them as "
                "they are. Load the dense model, then call compress(...)."
            )
        if spec.rules is None:
            require_patterns_match({"": model}, spec)
        assigned = assign_layers(model, spec)
        self.pending = {name: item.scheme for name, item in assigned.items() if item.scheme is not None}
        self._rules = resolve_rules(assigned)

    def _is_awaited(self, key: str) -> bool:
        layer, _, leaf = key.rpartition(".")
        return leaf == "weight" and layer in self.pending

    def _quantize_arrived(self, model: Any, key: str, weight: torch.Tensor, device: torch.device | str) -> None:
        """Replace the (meta) layer of ``key`` by its quantized form, so that both never stand in memory.

        ``weight`` is the checkpoint's tensor in the dtype the model is loaded in. A bias that was loaded before is
        carried over; one that comes later finds its placeholder.
        """
        name = key.rpartition(".")[0]
        scheme, spec = self.pending.pop(name), self.quantization_config.spec
        dense = model.get_submodule(name)
        dense.weight = nn.Parameter(weight.to(device), requires_grad=False)
        layer = quantize_module(
            dense, scheme, spec.algorithm, compute_dtype=weight.dtype, name=name, generator=spec.generator(name)
        )
        replace_module(model, name, layer)

    def _loaded_state(self, model: Any, dtype: torch.dtype) -> ComponentState:
        """State of a model whose weights are all there. Raises CheckpointError if an awaited one never came."""
        if self.pending:
            raise CheckpointError(
                f"{type(model).__name__}: the checkpoint holds no weight for {len(self.pending)} layers that were to "
                f"be quantized, e.g. {next(iter(self.pending))}."
            )
        align_tensors(model)
        verb = "loaded" if self.pre_quantized else "quantized while loading"
        _logger.info("%s: %d layers %s", type(model).__name__, len(quantized_layers(model)), verb)
        restore_merge_errors(model, (self._metadata or {}).get("merge_errors", {}))
        if not self.pre_quantized:
            spec = self.quantization_config.spec.resolved(self._rules)
            config = QuantizationConfig.from_spec(spec, dtype)
            # transformers has told the model its name by now; asked later, a relative path may read like an id.
            named = getattr(getattr(model, "config", None), "_name_or_path", None)
            return ComponentState(
                config, layer_entries(model), base_model=repository_of(model) if named else ASK_THE_MODEL
            )
        stored = self._metadata or {}
        report, base_model = stored.get("report"), stored.get("base_model")
        return ComponentState(self.quantization_config, layer_entries(model), report, base_model=base_model)

    def _restore_methods(self, model: Any) -> None:
        """Put on ``model`` what its checkpoint holds beside weights."""
        restore_methods(model, read_methods(self._files, (self._metadata or {}).get("methods", {})))

    @staticmethod
    def _restore_dense_layers(model: Any) -> None:
        require_free(type(model).__name__, model, "decompress")
        remove_methods(model)
        gained = [name for name, layer in quantized_layers(model).items() if layer.gained_bias]
        for name, layer in quantized_layers(model).items():
            replace_module(model, name, layer.to_dense())
        if gained:
            warnings.warn(
                f"decompress: {len(gained)} layers, e.g. {gained[0]}, have a bias now that the model's class does not "
                "have: the shift of their inputs. The model computes with it, but saved weights do not reload with it. "
                "Compress with shift=False where that matters.",
                DiffuseCompressWarning,
                stacklevel=3,
            )
        for name, module in list(model.named_modules()):
            if isinstance(module, SplitConv2d):
                replace_module(model, name, module.merged())

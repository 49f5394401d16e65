"""transformers' cache of keys and values, quantized: a DynamicCache whose full-attention layers are packed codes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer

from diffuse_compress.errors import ConfigError, IncompatibleShapeError, ModelStateError
from diffuse_compress.quantization.kv_cache import (
    KIVIConfig,
    KVMethod,
    QuantizedStates,
    dequantize_states,
    quantize_states,
)

__all__ = ["QuantizedKVCache", "QuantizedKVLayer"]


class QuantizedKVLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values of one attention layer: sink tokens, then packed blocks, then the newest tokens.

    An update returns all of them in the dtype that they came in, those of this very call as they are; so a prompt
    attends to itself exactly, as in the paper. Then the oldest blocks of the window are quantized, each once and for
    all, and ``residual_length`` to ``residual_length + group_size - 1`` tokens remain in it.

    Attributes:
        keys, values: of all tokens, [B, H, T, D], dequantized at each access: some models read them past ``update``
            (Llama 3.2 Vision's cross attention).
        window: (keys, values) of the newest tokens [B, H, t, D]; with the sink tokens while nothing is quantized.
        sinks: (keys, values) [B, H, num_sink_tokens, D], once something is.
        packed: (keys, values) as codes, once there are some.
        record_past: nothing is quantized until the next ``crop``, which is therefore exact.
    """

    is_croppable = True

    def __init__(self, config: KIVIConfig) -> None:
        self.window: tuple[torch.Tensor, torch.Tensor] | None = None
        super().__init__()
        self.config = config
        self.sinks: tuple[torch.Tensor, torch.Tensor] | None = None
        self.packed: tuple[QuantizedStates, QuantizedStates] | None = None
        self.record_past = False

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.config.summary}, {self.get_seq_length()} tokens)"

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Start empty. Raises IncompatibleShapeError if groups do not fit the heads."""
        for states in (key_states, value_states):
            self.config.value_group(states.shape[-1])
        self.device, self.is_initialized = key_states.device, True
        self.window = key_states[..., :0, :], value_states[..., :0, :]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Take in keys and values [B, H, t, D] of new tokens; returns those of all tokens [B, H, T, D]."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        keys, values = self._window
        self.window = torch.cat([keys, key_states], dim=-2), torch.cat([values, value_states], dim=-2)
        found = self._states(0), self._states(1)
        if not self.record_past:
            self._quantize_oldest()
        return found

    @property
    def _window(self) -> tuple[torch.Tensor, torch.Tensor]:
        assert self.window is not None
        return self.window

    @property
    def keys(self) -> torch.Tensor | None:
        return None if self.window is None else self._states(0)

    @keys.setter
    def keys(self, states: torch.Tensor | None) -> None:
        self._forget(states)

    @property
    def values(self) -> torch.Tensor | None:
        return None if self.window is None else self._states(1)

    @values.setter
    def values(self, states: torch.Tensor | None) -> None:
        self._forget(states)

    def _forget(self, states: torch.Tensor | None) -> None:
        # transformers' own layers set None, at the start and in reset.
        if states is not None:
            raise ModelStateError("QuantizedKVLayer: keys and values are read-only here; update() takes in new ones.")
        self.window = None

    def _states(self, which: int) -> torch.Tensor:
        """Keys (0) or values (1) of all tokens, [B, H, T, D]."""
        window = self._window[which]
        if self.packed is None:
            return window
        sinks = [] if self.sinks is None else [self.sinks[which]]
        return torch.cat([*sinks, dequantize_states(self.packed[which], self.config, window.dtype), window], dim=-2)

    def _quantize_oldest(self) -> None:
        sinks = 0 if self.packed is not None else self.config.num_sink_tokens
        window = self._window
        count = window[0].shape[-2] - sinks - self.config.residual_length
        count -= count % self.config.group_size
        if count <= 0:
            return
        old = [part[..., sinks : sinks + count, :] for part in window]
        per_channel = self.config.method is KVMethod.KIVI
        keys = quantize_states(old[0], self.config, per_channel=per_channel)
        values = quantize_states(old[1], self.config, per_channel=False)
        if sinks:
            self.sinks = window[0][..., :sinks, :].clone(), window[1][..., :sinks, :].clone()
        self.packed = (
            (keys, values) if self.packed is None else (self.packed[0].append(keys), self.packed[1].append(values))
        )
        # Copies: a view would keep what was just quantized in memory.
        self.window = window[0][..., sinks + count :, :].clone(), window[1][..., sinks + count :, :].clone()

    @property
    def num_quantized(self) -> int:
        """Tokens kept as codes."""
        return 0 if self.packed is None else self.packed[0].num_tokens

    @property
    def nbytes(self) -> int:
        """Of everything kept."""
        dense = [*(self.window or ()), *(self.sinks or ())]
        return sum(part.nbytes for part in dense) + self.quantized_nbytes

    @property
    def quantized_nbytes(self) -> int:
        """Of codes and scales."""
        return 0 if self.packed is None else sum(part.nbytes for part in self.packed)

    def get_seq_length(self) -> int:
        """Tokens of all three parts."""
        if not self.is_initialized:
            return 0
        sinks = 0 if self.sinks is None else self.sinks[0].shape[-2]
        return sinks + self.num_quantized + self._window[0].shape[-2]

    def activate_past_recording(self) -> None:
        """Quantize in ``crop`` from now on, not in ``update``: what is not yet accepted can be taken back exactly."""
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the newest ``-tokens_to_remove`` tokens (0 or negative, as transformers has it).

        Raises:
            ValueError: a positive number.
            ModelStateError: more than are kept in full precision; nothing is changed.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"crop: needs 0 or minus the number of tokens to remove, got {tokens_to_remove}.")
        if not self.is_initialized:
            return
        kept = self._window[0].shape[-2]
        left = kept + tokens_to_remove
        if left < 0 and -tokens_to_remove < self.get_seq_length():
            raise ModelStateError(
                f"crop: {kept} newest tokens are kept in full precision, cannot take back "
                f"{-tokens_to_remove}: older ones are quantized. Call activate_past_recording() before these tokens, "
                "take a larger residual_length, or start anew with reset()."
            )
        if left < 0:
            return self.reset()
        self.window = self._window[0][..., :left, :], self._window[1][..., :left, :]
        self._quantize_oldest()

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.sinks = self.packed = None

    def _map(self, on_sequences: Callable[[torch.Tensor], torch.Tensor]) -> None:
        if not self.is_initialized:
            return
        self.window = on_sequences(self._window[0]), on_sequences(self._window[1])
        if self.sinks is not None:
            self.sinks = on_sequences(self.sinks[0]), on_sequences(self.sinks[1])
        if self.packed is not None:
            self.packed = self.packed[0].map(on_sequences), self.packed[1].map(on_sequences)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Sequences of the batch in the order of ``beam_idx`` [B]: codes are moved, never made again."""
        self._map(lambda part: part.index_select(0, beam_idx.to(part.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every sequence ``repeats`` times."""
        self._map(lambda part: part.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Only these sequences."""
        self._map(lambda part: part[indices.to(part.device)])

    def offload(self) -> None:
        """Everything to the CPU."""
        self._map(lambda part: part.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Everything back to the device of the layer."""
        if self.is_initialized and self._window[0].device != self.device:
            self._map(lambda part: part.to(self.device, non_blocking=True))


class QuantizedKVCache(DynamicCache):  # type: ignore[misc]
    """A cache for ``generate`` and ``forward`` that keeps past keys and values as packed codes.

    ``generate(..., past_key_values=QuantizedKVCache(model.config))``; a model that was compressed with a
    :class:`KIVIConfig` makes its own. Layers of full attention are quantized; layers of a sliding window, of linear
    attention and of other kinds are those of ``DynamicCache``. Batches, beams, assisted generation, several devices and
    models with fewer key-value heads work as with that one. There is no fused kernel: each step dequantizes one layer
    after the other, so memory is saved and not time.

    Args:
        config: the model's, which knows the kinds of its layers.
        kv: how to quantize; None for ``KIVIConfig()``.
        offloading: keep all layers but the current one on the CPU; needs a GPU, as with ``DynamicCache``.

    Raises:
        ConfigError: the model has no layer of full attention.
        IncompatibleShapeError: groups do not fit the heads; from the first ``update`` where the configuration does not
            tell how wide they are.

    Attributes:
        kv: as given.
        head_dim: channels of a head, None where the configuration does not tell.

    Source: Liu et al. 2024, arXiv 2402.02750.
    """

    def __init__(self, config: PreTrainedConfig, kv: KIVIConfig | None = None, *, offloading: bool = False) -> None:
        if kv is not None and not isinstance(kv, KIVIConfig):
            raise ConfigError(f"QuantizedKVCache: needs a KIVIConfig, got {type(kv).__name__}.")
        self.kv = kv or KIVIConfig()
        self.head_dim = _head_dim(config, self.kv)
        super().__init__(config=config, offloading=offloading)
        for index, layer in enumerate(self.layers):
            if type(layer) is DynamicLayer:
                self.layers[index] = QuantizedKVLayer(self.kv)
        if not self.quantized_layers:
            raise ConfigError(
                "QuantizedKVCache: needs layers of full attention, and this model has none: a sliding window is short."
            )

    @property
    def quantized_layers(self) -> list[QuantizedKVLayer]:
        """Those that are quantized."""
        return [layer for layer in self.layers if isinstance(layer, QuantizedKVLayer)]

    @property
    def nbytes(self) -> int:
        """Of all layers; recurrent states of linear attention are not counted."""
        dense = [layer for layer in self.layers if not isinstance(layer, QuantizedKVLayer)]
        parts = [part for layer in dense for part in (getattr(layer, "keys", None), getattr(layer, "values", None))]
        kept = sum(part.nbytes for part in parts if part is not None)
        return kept + sum(layer.nbytes for layer in self.quantized_layers)


def _head_dim(config: PreTrainedConfig, kv: KIVIConfig) -> int | None:
    """Channels of a head as the configuration tells them, to which ``kv`` fits; None where it does not tell."""
    text = config.get_text_config(decoder=True)
    found = getattr(text, "head_dim", None)
    latent = getattr(text, "kv_lora_rank", None)  # latent attention: head_dim is that of a part of the keys
    if found is None and getattr(text, "num_attention_heads", None) and not latent:
        found = getattr(text, "hidden_size", 0) // text.num_attention_heads
    if not isinstance(found, int) or not found or latent:
        return None
    try:
        kv.value_group(found)
    except IncompatibleShapeError as error:
        raise ConfigError(str(error)) from error
    return found

"""transformers' cache of keys and values, quantized: a DynamicCache whose full-attention layers are packed codes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import PreTrainedConfig

from diffuse_compress.errors import ConfigError, IncompatibleShapeError
from diffuse_compress.integrations.kv_base import KeptKVCache, KeptKVLayer
from diffuse_compress.quantization.kv_cache import (
    KIVIConfig,
    KVMethod,
    QuantizedStates,
    dequantize_states,
    quantize_states,
)

__all__ = ["QuantizedKVCache", "QuantizedKVLayer"]


class QuantizedKVLayer(KeptKVLayer):
    """Keys and values of one attention layer: sink tokens, then packed blocks, then the newest tokens.

    An update returns all of them in the dtype that they came in, those of this very call as they are; so a prompt
    attends to itself exactly, as in the paper. Then the oldest blocks of the window are quantized, each once and for
    all, and ``residual_length`` to ``residual_length + group_size - 1`` tokens remain in it.

    Attributes:
        keys, values: of all tokens, [B, H, T, D], dequantized at each access.
        window: (keys, values) of the newest tokens [B, H, t, D]; with the sink tokens while nothing is quantized.
        sinks: (keys, values) [B, H, num_sink_tokens, D], once something is.
        packed: (keys, values) as codes, once there are some.
        record_past: nothing is quantized until the next ``crop``, which is therefore exact.
    """

    def __init__(self, config: KIVIConfig) -> None:
        super().__init__()
        self.config = config
        self.sinks: tuple[torch.Tensor, torch.Tensor] | None = None
        self.packed: tuple[QuantizedStates, QuantizedStates] | None = None

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.config.summary}, {self.get_seq_length()} tokens)"

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Start empty. Raises IncompatibleShapeError if groups do not fit the heads."""
        for states in (key_states, value_states):
            self.config.value_group(states.shape[-1])
        super().lazy_initialization(key_states, value_states)

    def _states(self, which: int) -> torch.Tensor:
        """Keys (0) or values (1) of all tokens, [B, H, T, D]."""
        window = self._window[which]
        if self.packed is None:
            return window
        sinks = [] if self.sinks is None else [self.sinks[which]]
        return torch.cat([*sinks, dequantize_states(self.packed[which], self.config, window.dtype), window], dim=-2)

    def _settle(self) -> None:
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

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.sinks = self.packed = None

    def _map(self, on_sequences: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super()._map(on_sequences)
        if self.sinks is not None:
            self.sinks = on_sequences(self.sinks[0]), on_sequences(self.sinks[1])
        if self.packed is not None:
            self.packed = self.packed[0].map(on_sequences), self.packed[1].map(on_sequences)


class QuantizedKVCache(KeptKVCache):
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

    config_class = KIVIConfig

    def _prepare(self, config: PreTrainedConfig) -> None:
        self.head_dim = _head_dim(config, self.kv)

    def _layer(self) -> QuantizedKVLayer:
        return QuantizedKVLayer(self.kv)

    @property
    def quantized_layers(self) -> list[QuantizedKVLayer]:
        """Those that are quantized."""
        return self.kept_layers


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

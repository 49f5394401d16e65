"""What our caches of keys and values share: a DynamicCache whose layers keep other parts, or fewer tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer

from diffuse_compress.errors import ConfigError, ModelStateError
from diffuse_compress.quantization.kv_config import KVCacheConfig

__all__ = ["KeptKVCache", "KeptKVLayer", "first_places", "given_positions"]

Pair = tuple[torch.Tensor, torch.Tensor]


class KeptKVLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values of one attention layer, the newest of them as they are.

    Attributes:
        keys, values: of all tokens kept, [B, H, T, D], made at each access: some models read them past ``update``
            (Llama 3.2 Vision's cross attention).
        window: (keys, values) of the newest tokens [B, H, t, D].
        record_past: nothing is taken from the window until the next ``crop``, which is therefore exact.
    """

    is_croppable = True

    def __init__(self) -> None:
        self.window: Pair | None = None
        super().__init__()
        self.record_past = False

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Start empty."""
        self.device, self.is_initialized = key_states.device, True
        self.window = key_states[..., :0, :], value_states[..., :0, :]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Take in keys and values [B, H, t, D] of new tokens; returns those of all tokens kept, [B, H, T, D]."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._extend(key_states, value_states)
        found = self._states(0), self._states(1)
        if not self.record_past:
            self._settle()
        return found

    def _extend(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        keys, values = self._window
        self.window = torch.cat([keys, key_states], dim=-2), torch.cat([values, value_states], dim=-2)

    @property
    def _window(self) -> Pair:
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
            raise ModelStateError(
                f"{type(self).__name__}: keys and values are read-only here; update() takes in new ones."
            )
        self.window = None

    def _states(self, which: int) -> torch.Tensor:
        """Keys (0) or values (1) of all tokens kept, [B, H, T, D]."""
        raise NotImplementedError

    def _settle(self) -> None:
        """Take from the window what is no longer to be in it."""
        raise NotImplementedError

    def activate_past_recording(self) -> None:
        """Settle in ``crop`` from now on, not in ``update``: what is not yet accepted can be taken back exactly."""
        self.record_past = True

    def _least_left(self) -> int:
        """Tokens of the window that ``crop`` must leave, since what was before them is not there as it was."""
        return 0

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the newest ``-tokens_to_remove`` tokens (0 or negative, as transformers has it).

        Raises:
            ValueError: a positive number.
            ModelStateError: more than can be taken back exactly; nothing is changed.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"crop: needs 0 or minus the number of tokens to remove, got {tokens_to_remove}.")
        if not self.is_initialized:
            return
        kept = self._window[0].shape[-2]
        left, length = kept + tokens_to_remove, self.get_seq_length()
        if length + tokens_to_remove <= 0:
            return self.reset()
        if left < self._least_left():
            raise ModelStateError(
                f"crop: {kept - self._least_left()} newest tokens are kept in full precision, cannot take back "
                f"{-tokens_to_remove}: older ones are not there as they were. Call activate_past_recording() before "
                "these tokens, take a larger window, or start anew with reset()."
            )
        self._cut(left)
        self._settle()

    def _cut(self, left: int) -> None:
        self.window = self._window[0][..., :left, :], self._window[1][..., :left, :]

    def _map(self, on_sequences: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """``on_sequences`` of everything kept, the sequences of the batch as the first axis."""
        self.window = on_sequences(self._window[0]), on_sequences(self._window[1])

    def _move(self, on_sequences: Callable[[torch.Tensor], torch.Tensor]) -> None:
        if self.is_initialized:
            self._map(on_sequences)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Sequences of the batch in the order of ``beam_idx`` [B]: what is kept is moved, never made again."""
        self._move(lambda part: part.index_select(0, beam_idx.to(part.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every sequence ``repeats`` times."""
        self._move(lambda part: part.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Only these sequences."""
        self._move(lambda part: part[indices.to(part.device)])

    def offload(self) -> None:
        """Everything to the CPU."""
        self._move(lambda part: part.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Everything back to the device of the layer."""
        if self.is_initialized and self._window[0].device != self.device:
            self._map(lambda part: part.to(self.device, non_blocking=True))

    @property
    def nbytes(self) -> int:
        """Of everything kept."""
        return sum(part.nbytes for part in self.window or ())


class KeptKVCache(DynamicCache):  # type: ignore[misc]
    """Base: layers of full attention are of a class of ours, others those of ``DynamicCache``.

    Args:
        config: the model's, which knows the kinds of its layers.
        kv: one of ``config_class``; None for its defaults.
        offloading: keep all layers but the current one on the CPU; needs a GPU, as with ``DynamicCache``.

    Raises:
        ConfigError: the model has no layer of full attention, or what the subclass says.

    Attributes:
        kv: as given.
    """

    config_class: ClassVar[type[KVCacheConfig]]

    def __init__(self, config: PreTrainedConfig, kv: Any = None, *, offloading: bool = False) -> None:
        name = type(self).__name__
        if kv is not None and not isinstance(kv, self.config_class):
            raise ConfigError(f"{name}: needs a {self.config_class.__name__}, got {type(kv).__name__}.")
        self.kv: Any = kv or self.config_class()
        self._prepare(config)
        super().__init__(config=config, offloading=offloading)
        for index, layer in enumerate(self.layers):
            if type(layer) is DynamicLayer:
                self.layers[index] = self._layer()
        if not self.kept_layers:
            raise ConfigError(
                f"{name}: needs layers of full attention, and this model has none: a sliding window is short."
            )

    def _prepare(self, config: PreTrainedConfig) -> None:
        """What layers need to know of the model. Raises ConfigError if it does not fit."""

    def _layer(self) -> KeptKVLayer:
        """An empty layer."""
        raise NotImplementedError

    @property
    def kept_layers(self) -> list[Any]:
        """Those of full attention."""
        return [layer for layer in self.layers if isinstance(layer, KeptKVLayer)]

    @property
    def nbytes(self) -> int:
        """Of all layers; recurrent states of linear attention are not counted."""
        dense = [layer for layer in self.layers if not isinstance(layer, KeptKVLayer)]
        parts = [part for layer in dense for part in (getattr(layer, "keys", None), getattr(layer, "values", None))]
        kept = sum(part.nbytes for part in parts if part is not None)
        return kept + sum(layer.nbytes for layer in self.kept_layers)


def given_positions(states: torch.Tensor, past: int, kwargs: dict[str, Any]) -> torch.Tensor:
    """Positions [B, t] of new tokens with these states [B, H, t, D].

    Models hand them over with the other arguments of attention, since transformers 5.24. Others count from 0, as the
    model itself does, which is right but for padding on the left.

    Raises:
        ModelStateError: a batch whose positions are not handed over, or positions in several dimensions.
    """
    batch, _, tokens, _ = states.shape
    given = (kwargs.get("kwargs") or {}).get("position_ids")
    if given is None and batch > 1:
        raise ModelStateError(
            "SinkKV, ShadowKV: this model does not tell its cache the positions of tokens, without which padding "
            "cannot be told. pip install -U transformers, or give it one sequence at a time."
        )
    if given is None:
        return torch.arange(past, past + tokens, device=states.device)[None]
    if given.dim() != 2 or given.shape[-1] != tokens:
        raise ModelStateError(
            f"SinkKV, ShadowKV: need one position for each of {tokens} tokens, got {list(given.shape)}: pictures and "
            "videos have several. Use KIVIConfig()."
        )
    return given.to(states.device).expand(batch, -1)


def first_places(positions: torch.Tensor) -> torch.Tensor:
    """Place [B] of the first token that is no padding, from the positions [B, T] of a sequence from its start."""
    return (positions.shape[1] - 1 - positions[:, -1]).clamp_min(0)

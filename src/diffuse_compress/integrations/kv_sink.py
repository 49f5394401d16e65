"""transformers' cache with the first and the newest tokens only, as in StreamingLLM."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedConfig

from diffuse_compress.errors import ConfigError
from diffuse_compress.integrations.kv_base import KeptKVCache, KeptKVLayer, first_places, given_positions
from diffuse_compress.integrations.rotary import Rotary
from diffuse_compress.quantization.kv_config import SinkKVConfig

__all__ = ["SinkKVCache", "SinkKVLayer"]


class SinkKVLayer(KeptKVLayer):
    """Keys and values of one attention layer: those of the first tokens, and of the newest.

    An update returns what is kept and the new tokens, which see each other all, so a prompt attends to itself exactly.
    Then the oldest tokens after the first ones are forgotten: ``window_length - 1`` newest remain, and the next token
    is the last of its window.

    Attention reads distances alone. Tokens of the window have those of the text; the first ones are turned by as many
    positions as were forgotten between them and the window, which is to give all the positions that they have in the
    cache. Masks are laid out by a cache's offset, for which column ``j`` of E forgotten ones is token ``E + j``. In a
    batch padded on the left by ``start``, column ``j`` of the first ones holds token ``min(start, E) + j``: theirs once
    they are that far back, masked as padding where the sequence is all in the window.

    Attributes:
        window: (keys, values) of all tokens kept; once something is forgotten, the first ``num_sink_tokens`` are those
            of the sequence, at the positions that they had.
        num_forgotten: E.
        start: [B], place of each sequence's first token.
    """

    def __init__(self, config: SinkKVConfig, rotary: Rotary) -> None:
        super().__init__()
        self.config, self.rotary = config, rotary
        self.num_forgotten = 0
        self.start: torch.Tensor | None = None

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.config.summary}, {self.get_seq_length()} tokens)"

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As the base class has it. Raises ModelStateError where padding cannot be told."""
        positions = given_positions(key_states, self.get_seq_length(), kwargs)
        if self.start is None:
            self.start = first_places(positions).expand(key_states.shape[0])
        return super().update(key_states, value_states, *args, **kwargs)

    @property
    def _capacity(self) -> int:
        """Tokens that stay."""
        return self.config.num_sink_tokens + self.config.window_length - 1

    def _shift(self) -> torch.Tensor:
        """[B]: positions between where the first tokens were and where they stand now."""
        assert self.start is not None
        return (self.num_forgotten - self.start).clamp_min(0)

    def _states(self, which: int) -> torch.Tensor:
        states, sinks = self._window[which], self.config.num_sink_tokens
        if which or not self.num_forgotten or not sinks:
            return states
        first = states[..., :sinks, :]
        turned = self.rotary.turn(first, self._shift().unsqueeze(1).expand(-1, first.shape[-2]))
        return torch.cat([turned, states[..., sinks:, :]], dim=-2)

    def _settle(self) -> None:
        count = self._window[0].shape[-2] - self._capacity
        if count <= 0:
            return
        assert self.start is not None
        sinks, before = self.config.num_sink_tokens, self.num_forgotten
        columns = torch.arange(sinks, device=self.start.device)
        # A sequence whose first tokens were in the window until now lies in one piece.
        begin = torch.minimum(self.start, self.start.new_tensor(before + count)) - before
        places = torch.where(self.start <= before, 0, begin).unsqueeze(1) + columns
        self.window = self._without(0, places, count), self._without(1, places, count)
        self.num_forgotten += count

    def _without(self, which: int, places: torch.Tensor, count: int) -> torch.Tensor:
        states, sinks = self._window[which], self.config.num_sink_tokens
        index = places.to(states.device)[:, None, :, None].expand(-1, states.shape[1], -1, states.shape[-1])
        return torch.cat([states.gather(2, index), states[..., sinks + count :, :]], dim=-2)

    def _least_left(self) -> int:
        return self._capacity if self.num_forgotten else 0

    def get_seq_length(self) -> int:
        """Tokens seen, those that are forgotten among them: what positions and masks count."""
        return self.num_forgotten + (self._window[0].shape[-2] if self.is_initialized else 0)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(tokens kept and new, how many come before these by the mask)."""
        return self.get_seq_length() - self.num_forgotten + query_length, self.num_forgotten

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.num_forgotten, self.start = 0, None

    def _map(self, on_sequences: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super()._map(on_sequences)
        if self.start is not None:
            self.start = on_sequences(self.start)


class SinkKVCache(KeptKVCache):
    """A cache for ``generate`` and ``forward`` of bounded size: the first tokens and the newest.

    ``generate(..., past_key_values=SinkKVCache(model.config, SinkKVConfig()))``; a model that was compressed with a
    :class:`SinkKVConfig` makes its own. Batches with padding on the left, beams, assisted generation and models with
    fewer key-value heads work as with ``DynamicCache``, and any attention implementation; a cache that is handed on to
    the next turn has forgotten what it has.

    Args:
        config: the model's.
        kv: what to keep; None for ``SinkKVConfig()``.
        offloading: as of ``DynamicCache``.

    Raises:
        ConfigError: layers that are not of full attention, or no rotary embedding that turns keys by their position.

    Source: Xiao et al. 2023, arXiv 2309.17453.
    """

    config_class = SinkKVConfig

    def _prepare(self, config: PreTrainedConfig) -> None:
        self.rotary = Rotary(type(self).__name__, config)

    def _layer(self) -> SinkKVLayer:
        return SinkKVLayer(self.kv, self.rotary)

    def __init__(self, config: PreTrainedConfig, kv: SinkKVConfig | None = None, *, offloading: bool = False) -> None:
        super().__init__(config, kv, offloading=offloading)
        other = next((layer for layer in self.layers if not isinstance(layer, SinkKVLayer)), None)
        if other is not None:
            raise ConfigError(
                f"SinkKVCache: needs full attention in every layer, and this model has a {type(other).__name__}: "
                "their masks count tokens otherwise. Use KIVIConfig(), which leaves them alone."
            )

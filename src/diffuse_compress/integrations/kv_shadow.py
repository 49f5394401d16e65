"""transformers' cache with keys of low rank and values on the CPU, of which each new token fetches chunks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from transformers import PreTrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from diffuse_compress.errors import ConfigError, ModelStateError
from diffuse_compress.integrations.compat import NO_PATCH_VARIABLE, may_patch
from diffuse_compress.integrations.kv_base import KeptKVCache, KeptKVLayer, Pair, first_places, given_positions
from diffuse_compress.integrations.rotary import Rotary
from diffuse_compress.integrations.wrapping import is_wrapped, wrapping
from diffuse_compress.quantization.kv_config import ShadowKVConfig
from diffuse_compress.quantization.kv_low_rank import LowRankKeys, chunk_scores, landmarks, least_similarity

__all__ = ["ShadowKVCache", "ShadowKVLayer"]

_LAYER = "_diffuse_compress_shadow"
_IMPLEMENTATION = "sdpa"
# Of attention functions: what would change the shares of tokens.
_UNKNOWN = ("s_aux", "softcap", "position_bias")


class ShadowKVLayer(KeptKVLayer):
    """Keys and values of one attention layer: chunks that are fetched, outlier chunks, and the newest tokens.

    Several new tokens at once see all tokens, keys as they are rebuilt; so a prompt attends to itself exactly. One new
    token sees the window, the outlier chunks and the chunks that its query asks for: attention is computed here, in
    place of the model's function, once :func:`_serve` has installed it. Chunks are whole and lie at multiples of their
    size, counted with the padding.

    Attributes:
        window: (keys, values) of the newest tokens.
        low_rank: keys of the others before rotation, padding as zeros.
        stored_values: theirs [B, H, T, D] on the CPU, in pinned memory beside a GPU.
        means: landmarks [B, H, C, D] of their chunks.
        outlier_chunks: [B, H, O], places of the chunks that stay as they are, also.
        outliers: (keys, values) [B, H, O * chunk_size, D] of those.
        positions: [B, T] of all tokens.
        start: [B], place of each sequence's first token.
    """

    def __init__(self, config: ShadowKVConfig, rotary: Rotary) -> None:
        super().__init__()
        self.config, self.rotary = config, rotary
        self._clear()

    def _clear(self) -> None:
        self.low_rank: LowRankKeys | None = None
        self.stored_values: torch.Tensor | None = None
        self.means: torch.Tensor | None = None
        self.outlier_chunks: torch.Tensor | None = None
        self.outliers: Pair | None = None
        self._similarity: torch.Tensor | None = None
        self.positions: torch.Tensor | None = None
        self.start: torch.Tensor | None = None
        self._awaits_attention = self._in_prompt = False

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.config.summary}, {self.get_seq_length()} tokens)"

    # --- taking in --------------------------------------------------------------------------------------------------

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As the base class has it for several tokens; for one the window, marked for the attention function.

        Raises:
            ModelStateError: padding cannot be told, or the model's attention did not read the last token's marks.
        """
        if self._awaits_attention:
            raise ModelStateError(
                "ShadowKV: the model's attention did not read what its cache had chosen. It must go by transformers' "
                f'attention interface: set_attn_implementation("{_IMPLEMENTATION}"), or use KIVIConfig().'
            )
        batch, _, tokens, _ = key_states.shape
        self._in_prompt = tokens > 1
        positions = given_positions(key_states, self.get_seq_length(), kwargs).expand(batch, -1)
        if self.start is None or self.positions is None:
            self.start, self.positions = first_places(positions), positions
        else:
            self.positions = torch.cat([self.positions, positions], dim=1)
        if tokens > 1 or self.low_rank is None:
            return super().update(key_states, value_states, *args, **kwargs)
        # Before the new token is in: the window is read once more, by its attention.
        if not self.record_past:
            self._settle()
        self._extend(key_states, value_states)
        keys, values = (part.view_as(part) for part in self._window)
        setattr(keys, _LAYER, self)
        self._awaits_attention = True
        return keys, values

    def _settle(self) -> None:
        size = self.config.chunk_size
        count = (self._window[0].shape[-2] - self.config.residual_length) // size * size
        # After the first prompt many tokens are gathered, for each decomposition costs time.
        least = size if self.low_rank is None and self._in_prompt else self.config.segment_length
        if count >= least:
            self._take(count)

    def _take(self, count: int) -> None:
        """The oldest ``count`` tokens of the window to the others."""
        assert self.positions is not None
        assert self.start is not None
        past, (keys, values) = self.num_stored, (part[..., :count, :] for part in self._window)
        places = torch.arange(past, past + count, device=keys.device)
        valid = places >= self.start.unsqueeze(1)
        plain = self.rotary.turn(keys, self.positions[:, past : past + count], back=True) * valid[:, None, :, None]
        if self.low_rank is None:
            self.low_rank = LowRankKeys.of(plain, self.config.rank)
        else:
            self.low_rank = self.low_rank.append(plain, self.config.rank)
        self.stored_values = _on_cpu(self.stored_values, values)
        self._choose_outliers(keys, values, valid, past)
        self.window = self._window[0][..., count:, :].clone(), self._window[1][..., count:, :].clone()

    def _choose_outliers(self, keys: torch.Tensor, values: torch.Tensor, valid: torch.Tensor, past: int) -> None:
        """Landmarks of new chunks, and which of all chunks stay: those whose keys agree least with their landmark."""
        size = self.config.chunk_size
        chunks, valid = keys.unflatten(2, (-1, size)), valid.unflatten(1, (-1, size))
        means = landmarks(chunks, valid)
        similarity = least_similarity(chunks, means, valid)
        places = torch.arange(past // size, past // size + means.shape[2], device=keys.device)
        places = places.expand(*means.shape[:2], -1)
        if self.means is not None and self.outliers is not None:
            assert self._similarity is not None
            assert self.outlier_chunks is not None
            old_keys, old_values = (part.unflatten(2, (-1, size)) for part in self.outliers)
            chunks = torch.cat([old_keys, chunks], dim=2)
            values_of = torch.cat([old_values, values.unflatten(2, (-1, size))], dim=2)
            similarity = torch.cat([self._similarity, similarity], dim=2)
            places = torch.cat([self.outlier_chunks, places], dim=2)
            self.means = torch.cat([self.means, means], dim=2)
        else:
            values_of, self.means = values.unflatten(2, (-1, size)), means
        kept = min(self.config.num_outlier_chunks, places.shape[2])
        self._similarity, chosen = similarity.topk(kept, dim=2, largest=False)
        self.outlier_chunks = places.gather(2, chosen)
        index = chosen[..., None, None].expand(-1, -1, -1, size, keys.shape[-1])
        values_index = chosen[..., None, None].expand(-1, -1, -1, size, values.shape[-1])
        self.outliers = chunks.gather(2, index).flatten(2, 3), values_of.gather(2, values_index).flatten(2, 3)

    # --- giving back ------------------------------------------------------------------------------------------------

    def _states(self, which: int) -> torch.Tensor:
        window = self._window[which]
        if self.low_rank is None or self.stored_values is None:
            return window
        assert self.positions is not None
        if which:
            return torch.cat([self.stored_values.to(window.device), window], dim=-2)
        keys = self.rotary.turn(self.low_rank.all(), self.positions[:, : self.num_stored])
        if self.outliers is not None and self.outlier_chunks is not None:
            index = self._tokens(self.outlier_chunks).unsqueeze(-1).expand_as(self.outliers[0])
            keys = keys.scatter(2, index, self.outliers[0])
        return torch.cat([keys, window], dim=-2)

    def attend(self, query: torch.Tensor, mask: torch.Tensor | None, scaling: float) -> torch.Tensor:
        """Attention [B, 1, H * G, D] of one token's queries [B, H * G, 1, D] to what they ask for.

        Args:
            query: G heads read each head of the keys.
            mask: of all tokens, broadcastable to [B, 1, 1, T]: boolean, True takes part; or added to the logits.
            scaling: of the logits.
        """
        self._awaits_attention = False
        places, keys, values = self._chosen(query, scaling)
        if mask is not None:
            mask = mask[..., -1:, :].expand(query.shape[0], places.shape[1], -1, -1)
            mask = mask.gather(3, places.unsqueeze(2).to(mask.device))
        grouped = query.squeeze(2).unflatten(1, (keys.shape[1], -1))
        found = F.scaled_dot_product_attention(grouped, keys, values, mask, scale=scaling)
        return found.flatten(1, 2).unsqueeze(1)

    def _chosen(self, query: torch.Tensor, scaling: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(places [B, H, n], keys, values [B, H, n, D]) of the tokens that the query attends to."""
        assert self.low_rank is not None
        assert self.means is not None
        assert self.positions is not None
        assert self.stored_values is not None
        assert self.outliers is not None
        assert self.outlier_chunks is not None
        window, size = self._window, self.config.chunk_size
        batch, heads, chunks, _ = self.means.shape
        count = min(self.config.sparse_budget // size, chunks - self.outlier_chunks.shape[2])
        scores = chunk_scores(query, self.means, scaling).scatter(2, self.outlier_chunks, -2.0)
        # Chunks of padding alone come after all others, but before those that are there anyway.
        assert self.start is not None
        last = torch.arange(1, chunks + 1, device=scores.device) * size - 1
        scores = scores.masked_fill((last < self.start.unsqueeze(1)).unsqueeze(1) & (scores > -2.0), -1.0)
        fetched = self._tokens(scores.topk(count, dim=2).indices)
        positions = self.positions.unsqueeze(1).expand(-1, heads, -1).gather(2, fetched)
        keys = self.rotary.turn_each(self.low_rank.rows(fetched), positions)
        index = fetched.to("cpu").unsqueeze(-1).expand(-1, -1, -1, self.stored_values.shape[-1])
        values = self.stored_values.gather(2, index).to(window[1].device, non_blocking=True)
        newest = torch.arange(self.num_stored, self.get_seq_length(), device=fetched.device).expand(batch, heads, -1)
        return (
            torch.cat([fetched, self._tokens(self.outlier_chunks), newest], dim=2),
            torch.cat([keys, self.outliers[0], window[0]], dim=2),
            torch.cat([values, self.outliers[1], window[1]], dim=2),
        )

    def _tokens(self, chunks: torch.Tensor) -> torch.Tensor:
        """Places [B, H, n * chunk_size] of the tokens of chunks [B, H, n]."""
        inside = torch.arange(self.config.chunk_size, device=chunks.device)
        return (chunks.unsqueeze(-1) * self.config.chunk_size + inside).flatten(2)

    # --- what a cache is asked --------------------------------------------------------------------------------------

    @property
    def num_stored(self) -> int:
        """Tokens beside the window."""
        return 0 if self.low_rank is None else self.low_rank.num_tokens

    @property
    def nbytes(self) -> int:
        """Of everything on the device."""
        kept = [*(self.window or ()), *(self.outliers or ()), self.means, self.positions, self._similarity]
        tensors = [*kept, self.outlier_chunks, self.start]
        return sum(part.nbytes for part in tensors if part is not None) + (
            0 if self.low_rank is None else self.low_rank.nbytes
        )

    @property
    def cpu_nbytes(self) -> int:
        """Of the values on the CPU."""
        return 0 if self.stored_values is None else self.stored_values.nbytes

    def get_seq_length(self) -> int:
        """Tokens of all parts."""
        return self.num_stored + (self._window[0].shape[-2] if self.is_initialized else 0)

    def _cut(self, left: int) -> None:
        super()._cut(left)
        assert self.positions is not None
        self.positions = self.positions[:, : self.num_stored + left]

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self._clear()

    def _map(self, on_sequences: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super()._map(on_sequences)
        for name in ("means", "outlier_chunks", "_similarity", "positions", "start"):
            part = getattr(self, name)
            setattr(self, name, None if part is None else on_sequences(part))
        if self.outliers is not None:
            self.outliers = on_sequences(self.outliers[0]), on_sequences(self.outliers[1])
        if self.low_rank is not None:
            low = self.low_rank
            self.low_rank = LowRankKeys(on_sequences(low.left), on_sequences(low.right), low.heads)
        if self.stored_values is not None:
            self.stored_values = on_sequences(self.stored_values).to("cpu")


def _on_cpu(stored: torch.Tensor | None, new: torch.Tensor) -> torch.Tensor:
    """``new`` after ``stored``, [B, H, T, D], on the CPU; pinned where they come from a GPU."""
    batch, heads, tokens, size = new.shape
    past = 0 if stored is None else stored.shape[2]
    shape = (batch, heads, past + tokens, size)
    both = torch.empty(shape, dtype=new.dtype, device="cpu", pin_memory=new.is_cuda)
    if stored is not None:
        both[:, :, :past] = stored
    both[:, :, past:] = new
    return both


class ShadowKVCache(KeptKVCache):
    """A cache for ``generate`` and ``forward`` that keeps keys as a product of low rank, and values on the CPU.

    ``generate(..., past_key_values=ShadowKVCache(model.config, ShadowKVConfig()))``; a model that was compressed with a
    :class:`ShadowKVConfig` makes its own. Layers of full attention are kept so, others as in ``DynamicCache``. Batches
    with padding on the left, beams, assisted generation and models with fewer key-value heads work as with that one.

    Args:
        config: the model's.
        kv: how; None for ``ShadowKVConfig()``.
        offloading: as of ``DynamicCache``.

    Raises:
        ConfigError: no layers of full attention, no rotary embedding that turns keys by their position, or attention
            other than "sdpa": what a token asks for is told by its query, which a cache is not given.

    Source: Sun et al. 2024, arXiv 2410.21465.
    """

    config_class = ShadowKVConfig

    def _prepare(self, config: PreTrainedConfig) -> None:
        self.rotary = Rotary(type(self).__name__, config)
        _serve(config)

    def _layer(self) -> ShadowKVLayer:
        return ShadowKVLayer(self.kv, self.rotary)


def _serve(config: PreTrainedConfig) -> None:
    """Let the attention function of ``config`` hand marked keys to their layer; others go on as ever.

    Raises:
        ConfigError: another attention implementation, or the libraries are to be left alone.
    """
    used = getattr(config.get_text_config(decoder=True), "_attn_implementation", None) or _IMPLEMENTATION
    if used != _IMPLEMENTATION:
        raise ConfigError(
            f"ShadowKVCache: needs attention of transformers' {_IMPLEMENTATION!r}, where it chooses what a token sees, "
            f'got {used!r}. Call set_attn_implementation("{_IMPLEMENTATION}").'
        )
    stock = ALL_ATTENTION_FUNCTIONS[used]
    if is_wrapped(stock):
        return
    if not may_patch():
        raise ConfigError(f"ShadowKVCache: {NO_PATCH_VARIABLE} is set, so attention cannot choose. Unset it.")

    @wrapping(stock)
    def attention(
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: Any,  # by position or by this name, as models like
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        layer = getattr(key, _LAYER, None)
        if layer is None:
            return stock(module, query, key, value, attention_mask, *args, **kwargs)
        unknown = next((name for name in _UNKNOWN if kwargs.get(name) is not None), None)
        if unknown is not None:
            raise ModelStateError(f"ShadowKV: attention with {unknown} is not supported. Use KIVIConfig().")
        scaling = kwargs.get("scaling")
        return layer.attend(query, attention_mask, query.shape[-1] ** -0.5 if scaling is None else scaling), None

    ALL_ATTENTION_FUNCTIONS.register(used, attention)

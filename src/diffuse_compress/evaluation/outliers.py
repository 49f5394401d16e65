"""Outlier channels for a small model, without changing its function.

Large transformers have a few input channels that are tens of times larger than the rest, and these decide which
formats work; small ones trained for a demonstration have none. Here a producer's channel is multiplied by s and the
consumers' matching column divided by s. In exact arithmetic the function stays; for a quantizer it is another model.

Three places of a PixArt-like transformer (AdaLN-single blocks with ``scale_shift_table``) allow this exactly:

``attn.value``
    ``to_v`` rows and bias times s, ``to_out.0`` columns over s, for self- and cross-attention of each block:
    attention is linear in its values, channel by channel.
``modulation``
    The input of a block's self-attention (or feed-forward) is ``norm(x) * (1 + scale) + shift`` with
    ``scale = scale_shift_table[i] + linear(t)[i]``. The table belongs to the block and the linear to all blocks, so
    equal channels and factors are used in every block: rows i of ``adaln_single.linear`` and its bias times s,
    ``table[i] <- s (1 + table[i]) - 1`` for a scale and ``s table[i]`` for a shift, columns of ``to_q``, ``to_k``,
    ``to_v`` (or ``ff.net.0.proj``) of every block over s.
``caption``
    ``caption_projection.linear_2`` rows and bias times s, columns of ``attn2.to_k`` and ``attn2.to_v`` of every block
    over s: nothing else reads the projected caption.

Decoders (Llama and alike) allow it where their family says so: channels of an RMS norm's weight and the columns of the
linears that read it, and rows of ``up_proj`` and columns of ``down_proj``.

Not exact, so left alone: ``ff.net.2`` (a GELU stands between it and its producer), ``attn2.to_q`` (it reads the
residual stream, which every norm and branch shares) and ``proj_out``. Factors are powers of two: products and
quotients are exact in every binary float format, and only the table's ``- 1`` rounds.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from diffuse_compress.errors import ConfigError
from diffuse_compress.families.base import Family
from diffuse_compress.families.registry import family_of

__all__ = ["FACTORS", "OutlierPair", "add_offset_channels", "add_outlier_channels"]

FACTORS = (16.0, 32.0, 64.0)
# Chunks of the six modulation vectors, in diffusers' order: shift, scale, gate of attention, then of feed-forward.
_MODULATION = {"attn1": (0, 1), "ff": (3, 4)}
_READERS = {"attn1": ("attn1.to_q", "attn1.to_k", "attn1.to_v"), "ff": ("ff.net.0.proj",)}


@dataclass(frozen=True)
class OutlierPair:
    """One producer and what reads it.

    Attributes:
        producer: module whose output channels grew.
        consumers: modules whose input columns shrank by the same factors.
        channels: indices of the channels.
        factors: of these channels, at least 10 and at most 100.
    """

    producer: str
    consumers: tuple[str, ...]
    channels: tuple[int, ...]
    factors: tuple[float, ...]


def add_outlier_channels(
    transformer: nn.Module, *, fraction: float = 1 / 64, factors: Sequence[float] = FACTORS, seed: int = 0
) -> list[OutlierPair]:
    """Give a PixArt-like transformer or a decoder outlier channels, in place, with the same function.

    Args:
        transformer: dense, any dtype and device; a PixArtTransformer2DModel or one built alike, or a LlamaForCausalLM,
            Qwen2, Qwen3 or Mistral.
        fraction: of the channels of each place, at least one channel.
        factors: to draw from, uniformly.
        seed: of a generator of its own.

    Returns:
        What was changed, in order.

    Raises:
        ConfigError: the model has neither AdaLN-single blocks nor those of a decoder, or is not dense.
    """
    family = family_of(transformer)
    if family is not None and family.residual is not None:
        return _scale_decoder(transformer, family, _Draw(fraction, tuple(factors), seed))
    blocks = _blocks_of(transformer)
    draw = _Draw(fraction, tuple(factors), seed)
    pairs = []
    with torch.no_grad():
        for index, block in enumerate(blocks):
            for name in ("attn1", "attn2"):
                pairs.append(_scale_values(f"transformer_blocks.{index}.{name}", getattr(block, name), draw))
        pairs += [_scale_modulation(transformer, blocks, part, draw) for part in _MODULATION]
        if getattr(transformer, "caption_projection", None) is not None:
            pairs.append(_scale_caption(transformer, blocks, draw))
    return pairs


def add_offset_channels(
    transformer: nn.Module, *, fraction: float = 1 / 64, sizes: Sequence[float] = (8.0, 16.0, 32.0), seed: int = 0
) -> dict[str, tuple[int, ...]]:
    """Move channels of a PixArt-like transformer's modulated inputs far off zero, in place, with the same function.

    Such asymmetric outliers are those of language models with biased norms. In each block a number is added to channels
    of the shift of ``scale_shift_table``, and what it adds to the layers behind is taken from their biases.

    Args:
        transformer: dense, any dtype and device; a PixArtTransformer2DModel or one built alike.
        fraction: of the channels of each place, at least one channel.
        sizes: to draw from, uniformly; with a sign of its own for each channel.
        seed: of a generator of its own.

    Returns:
        {layer behind: channels that were moved}.

    Raises:
        ConfigError: the model has no AdaLN-single blocks, is not dense, or has layers without a bias there.
    """
    draw, moved = _Draw(fraction, tuple(sizes), seed), {}
    with torch.no_grad():
        for index, block in enumerate(_blocks_of(transformer)):
            for part, (shift, _) in _MODULATION.items():
                table = block.scale_shift_table
                channels, offsets = draw(table.shape[-1])
                signs = torch.randint(0, 2, channels.shape, generator=draw.generator) * 2 - 1
                offsets, places = (offsets * signs).to(table), channels.to(table.device)
                before = table[shift, places].clone()
                table[shift, places] = before + offsets
                for reader in _READERS[part]:
                    name, layer = f"transformer_blocks.{index}.{reader}", block.get_submodule(reader)
                    _require_dense(layer)
                    if layer.bias is None:
                        raise ConfigError(f"add_offset_channels: {name} needs a bias, has none.")
                    layer.bias -= layer.weight[:, places] @ (table[shift, places] - before).to(layer.weight)
                    moved[name] = tuple(channels.tolist())
    return moved


class _Draw:
    """Channels and factors for each place in turn."""

    def __init__(self, fraction: float, factors: tuple[float, ...], seed: int) -> None:
        self.fraction, self.factors = fraction, factors
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        count = max(1, round(width * self.fraction))
        channels = torch.randperm(width, generator=self.generator)[:count].sort().values
        choice = torch.randint(len(self.factors), (count,), generator=self.generator)
        return channels, torch.tensor(self.factors)[choice]


def _blocks_of(transformer: nn.Module) -> list[Any]:
    blocks = list(getattr(transformer, "transformer_blocks", ()))
    wanted = ("attn1", "attn2", "ff", "scale_shift_table")
    if not blocks or not hasattr(transformer, "adaln_single") or not all(hasattr(blocks[0], name) for name in wanted):
        raise ConfigError(
            f"add_outlier_channels: need AdaLN-single transformer blocks with {', '.join(wanted)}, got "
            f"{type(transformer).__name__}. The transform is exact for PixArt-like models only."
        )
    _require_dense(blocks[0].attn1.to_v)
    return blocks


def _require_dense(layer: nn.Module) -> None:
    if type(layer) is not nn.Linear:
        raise ConfigError(
            f"add_outlier_channels: need a dense model, got {type(layer).__name__} layers. Apply it before compress."
        )


def _scale_values(name: str, attention: Any, draw: _Draw) -> OutlierPair:
    channels, factors = draw(attention.to_v.out_features)
    _grow_rows(attention.to_v, channels, factors)
    _shrink_columns([attention.to_out[0]], channels, factors)
    return _pair(f"{name}.to_v", [f"{name}.to_out.0"], channels, factors)


def _scale_modulation(transformer: Any, blocks: Sequence[Any], part: str, draw: _Draw) -> OutlierPair:
    width = blocks[0].scale_shift_table.shape[-1]
    channels, factors = draw(width)
    shift, scale = _MODULATION[part]
    for chunk in (shift, scale):
        _grow_rows(transformer.adaln_single.linear, channels + chunk * width, factors)
    names = []
    for index, block in enumerate(blocks):
        table = block.scale_shift_table
        own, places = factors.to(table), channels.to(table.device)
        table[shift, places] = table[shift, places] * own
        table[scale, places] = (1 + table[scale, places]) * own - 1
        _shrink_columns([block.get_submodule(reader) for reader in _READERS[part]], channels, factors)
        names += [f"transformer_blocks.{index}.{reader}" for reader in _READERS[part]]
    return _pair("adaln_single.linear", names, channels, factors)


def _scale_caption(transformer: Any, blocks: Sequence[Any], draw: _Draw) -> OutlierPair:
    producer = transformer.caption_projection.linear_2
    channels, factors = draw(producer.out_features)
    _grow_rows(producer, channels, factors)
    names = []
    for index, block in enumerate(blocks):
        _shrink_columns([block.attn2.to_k, block.attn2.to_v], channels, factors)
        names += [f"transformer_blocks.{index}.attn2.{reader}" for reader in ("to_k", "to_v")]
    return _pair("caption_projection.linear_2", names, channels, factors)


def _scale_decoder(model: nn.Module, family: Family, draw: _Draw) -> list[OutlierPair]:
    pairs = []
    with torch.no_grad():
        for block_name in family.blocks(model):
            block = model.get_submodule(block_name)
            kind = family.kind_of(block)
            for entry in kind.smoothing(block) if kind is not None else ():
                if entry.producer is None or entry.unit_offset:
                    continue
                readers: list[Any] = [block.get_submodule(name) for name in entry.consumers]
                producer: Any = block.get_submodule(entry.producer)
                _require_dense(readers[0])
                channels, factors = draw(readers[0].in_features)
                if isinstance(producer, nn.Linear):
                    _grow_rows(producer, channels, factors)
                else:
                    producer.weight[channels.to(producer.weight.device)] *= factors.to(producer.weight)
                _shrink_columns(readers, channels, factors)
                names = [f"{block_name}.{name}" for name in entry.consumers]
                pairs.append(_pair(f"{block_name}.{entry.producer}", names, channels, factors))
    return pairs


def _grow_rows(layer: nn.Linear, rows: torch.Tensor, factors: torch.Tensor) -> None:
    rows, factors = rows.to(layer.weight.device), factors.to(layer.weight)
    layer.weight[rows] *= factors.unsqueeze(1)
    if layer.bias is not None:
        layer.bias[rows] *= factors


def _shrink_columns(layers: Iterable[nn.Linear], columns: torch.Tensor, factors: torch.Tensor) -> None:
    for layer in layers:
        layer.weight[:, columns.to(layer.weight.device)] /= factors.to(layer.weight)


def _pair(producer: str, consumers: Sequence[str], channels: torch.Tensor, factors: torch.Tensor) -> OutlierPair:
    return OutlierPair(producer, tuple(consumers), tuple(channels.tolist()), tuple(factors.tolist()))

"""Wan 2.1 and 2.2: video, one AdaLN table for all blocks, residuals added in float32 (arXiv 2503.20314)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from diffuse_compress.families.base import (
    BlockKind,
    Branch,
    BranchRole,
    Conditioning,
    Family,
    Smoothing,
    Streams,
    TemporalMap,
    in_lists,
    single_stream,
)
from diffuse_compress.families.embedding import Entry, Reader

__all__ = ["WAN"]

_PROCESSORS = frozenset({"WanAttnProcessor"})


def _begin(
    block: nn.Module,
    hidden_states: torch.Tensor,
    encoder_hidden_states: torch.Tensor,
    temb: torch.Tensor,
    rotary_emb: Any,
) -> tuple[Streams, Conditioning]:
    streams = {"hidden_states": hidden_states}
    return streams, Conditioning(streams, encoder_hidden_states=encoder_hidden_states, temb=temb, rotary_emb=rotary_emb)


def _modulation(block: Any, conditioning: Conditioning) -> tuple[torch.Tensor, ...]:
    """Six fp32 tensors, [batch, 1, width], or [batch, tokens, width] with per-token timesteps."""

    def compute() -> tuple[torch.Tensor, ...]:
        temb = conditioning.temb
        if temb.ndim == 4:
            parts = (block.scale_shift_table.unsqueeze(0) + temb.float()).chunk(6, dim=2)
            return tuple(part.squeeze(2) for part in parts)
        return tuple((block.scale_shift_table + temb.float()).chunk(6, dim=1))

    values: tuple[torch.Tensor, ...] = conditioning.once("modulation", compute)
    return values


def _add_in_float32(block: nn.Module, streams: Streams, deltas: Streams) -> Streams:
    x = streams["hidden_states"]
    return {"hidden_states": (x.float() + deltas["hidden_states"]).type_as(x)}


def _self_attention(block: Any, streams: Streams, conditioning: Conditioning) -> Streams:
    shift, scale = _modulation(block, conditioning)[:2]
    x = streams["hidden_states"]
    normed = (block.norm1(x.float()) * (1 + scale) + shift).type_as(x)
    return {"hidden_states": block.attn1(normed, None, None, conditioning.rotary_emb)}


def _attention_gate(block: nn.Module, outputs: Streams, conditioning: Conditioning) -> Streams:
    return {"hidden_states": outputs["hidden_states"] * _modulation(block, conditioning)[2]}


def _cross_attention(block: Any, streams: Streams, conditioning: Conditioning) -> Streams:
    x = streams["hidden_states"]
    normed = block.norm2(x.float()).type_as(x)
    return {"hidden_states": block.attn2(normed, conditioning.encoder_hidden_states, None, None)}


def _feed_forward(block: Any, streams: Streams, conditioning: Conditioning) -> Streams:
    shift, scale = _modulation(block, conditioning)[3:5]
    x = streams["hidden_states"]
    normed = (block.norm3(x.float()) * (1 + scale) + shift).type_as(x)
    return {"hidden_states": block.ffn(normed)}


def _feed_forward_gate(block: nn.Module, outputs: Streams, conditioning: Conditioning) -> Streams:
    return {"hidden_states": outputs["hidden_states"].float() * _modulation(block, conditioning)[5]}


_BRANCHES = (
    Branch("attn1", BranchRole.ATTENTION, _self_attention, ("attn1",), _add_in_float32, _attention_gate),
    Branch("attn2", BranchRole.CROSS_ATTENTION, _cross_attention, ("attn2",)),
    Branch("ffn", BranchRole.FEED_FORWARD, _feed_forward, ("ffn",), _add_in_float32, _feed_forward_gate),
)


def _smoothing(block: Any) -> tuple[Smoothing, ...]:
    # One table of timesteps serves every block, so it cannot take one block's scales.
    return (
        Smoothing(("attn1.to_q", "attn1.to_k", "attn1.to_v")),
        Smoothing(("attn2.to_q",), producer=None if isinstance(block.norm2, nn.Identity) else "norm2"),
        Smoothing(("ffn.net.0.proj",)),
        Smoothing(("ffn.net.2",)),
    )


WAN_TRANSFORMER_BLOCK = BlockKind(
    class_name="WanTransformerBlock",
    fingerprints=frozenset({"1c5bb4dcb0c3699b"}),
    begin=_begin,
    branches=lambda block: _BRANCHES,
    end=single_stream,
    processors=_PROCESSORS,
    smoothing=_smoothing,
)

_IMAGE_KEYS = ("blocks.*.attn2.add_k_proj", "blocks.*.attn2.add_v_proj")
_TEXT_KEYS = ("blocks.*.attn2.to_k", "blocks.*.attn2.to_v")
# Of the tokens that a block is given, WanAttnProcessor takes the last 512 for text wherever it has image keys.
_TEXT_TOKENS = 512


def _text(entry: Entry, layer: str) -> torch.Tensor:
    tokens: torch.Tensor = entry["encoder_hidden_states"]
    return tokens if entry.parent(layer).add_k_proj is None else tokens[:, tokens.shape[1] - _TEXT_TOKENS :]


def _image(entry: Entry, layer: str) -> torch.Tensor:
    tokens: torch.Tensor = entry["encoder_hidden_states"]
    return tokens[:, : tokens.shape[1] - _TEXT_TOKENS]


WAN = Family(
    name="wan",
    classes=("WanTransformer3DModel",),
    blocks=in_lists("blocks"),
    kinds={"WanTransformerBlock": WAN_TRANSFORMER_BLOCK},
    temporal=lambda model: TemporalMap(
        timestep=("condition_embedder.time_embedder.*", "condition_embedder.time_proj"),
        condition=(
            "condition_embedder.text_embedder.*",
            "condition_embedder.image_embedder.*",
            *_TEXT_KEYS,
            *_IMAGE_KEYS,
        ),
        readers=(
            Reader(_TEXT_KEYS, ("encoder_hidden_states",), _text, _PROCESSORS),
            Reader(_IMAGE_KEYS, ("encoder_hidden_states",), _image, _PROCESSORS),
        ),
        conditions=("encoder_hidden_states", "encoder_hidden_states_image"),
    ),
    chained=frozenset({"42e5b8a1f03961ac"}),
    sensitive=("patch_embedding", "condition_embedder", "proj_out"),
)

"""CogVideoX: joint attention and one feed-forward over text and video tokens, AdaLN before each (arXiv 2408.06072)."""

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
)
from diffuse_compress.families.embedding import modulations

__all__ = ["COGVIDEOX", "HIDDEN_THEN_TEXT", "hidden_then_text"]


def _begin(
    block: nn.Module,
    hidden_states: torch.Tensor,
    encoder_hidden_states: torch.Tensor,
    temb: torch.Tensor,
    image_rotary_emb: Any = None,
    attention_kwargs: dict[str, Any] | None = None,
) -> tuple[Streams, Conditioning]:
    streams = {"hidden_states": hidden_states, "encoder_hidden_states": encoder_hidden_states}
    return streams, Conditioning(
        streams, temb=temb, image_rotary_emb=image_rotary_emb, attention_kwargs=attention_kwargs or {}
    )


def _normed(block: Any, name: str, streams: Streams, conditioning: Conditioning) -> tuple[torch.Tensor, torch.Tensor]:
    """Modulated video and text tokens."""
    norm = getattr(block, name)
    shift, scale, _, text_shift, text_scale, _ = _modulation(block, name, conditioning)
    x = norm.norm(streams["hidden_states"]) * (1 + scale)[:, None, :] + shift[:, None, :]
    text = norm.norm(streams["encoder_hidden_states"]) * (1 + text_scale)[:, None, :] + text_shift[:, None, :]
    return x, text


def _modulation(block: Any, name: str, conditioning: Conditioning) -> tuple[torch.Tensor, ...]:
    """Shift, scale and gate [batch, width] of video tokens, then of text tokens."""
    norm = getattr(block, name)
    values: tuple[torch.Tensor, ...] = conditioning.once(
        name, lambda: norm.linear(norm.silu(conditioning.temb)).chunk(6, dim=1)
    )
    return values


def _gated(block: nn.Module, name: str, outputs: Streams, conditioning: Conditioning) -> Streams:
    _, _, gate, _, _, text_gate = _modulation(block, name, conditioning)
    return {
        "hidden_states": gate[:, None, :] * outputs["hidden_states"],
        "encoder_hidden_states": text_gate[:, None, :] * outputs["encoder_hidden_states"],
    }


def _attention_gate(block: nn.Module, outputs: Streams, conditioning: Conditioning) -> Streams:
    return _gated(block, "norm1", outputs, conditioning)


def _feed_forward_gate(block: nn.Module, outputs: Streams, conditioning: Conditioning) -> Streams:
    return _gated(block, "norm2", outputs, conditioning)


def _attention(block: Any, streams: Streams, conditioning: Conditioning) -> Streams:
    x, text = _normed(block, "norm1", streams, conditioning)
    output, text_output = block.attn1(
        hidden_states=x,
        encoder_hidden_states=text,
        image_rotary_emb=conditioning.image_rotary_emb,
        **conditioning.attention_kwargs,
    )
    return {"hidden_states": output, "encoder_hidden_states": text_output}


def _feed_forward(block: Any, streams: Streams, conditioning: Conditioning) -> Streams:
    x, text = _normed(block, "norm2", streams, conditioning)
    count = text.shape[1]
    output = block.ff(torch.cat([text, x], dim=1))
    return {"hidden_states": output[:, count:], "encoder_hidden_states": output[:, :count]}


def hidden_then_text(
    block: nn.Module, streams: Streams, conditioning: Conditioning
) -> tuple[torch.Tensor, torch.Tensor]:
    """``end`` of blocks that return (hidden_states, encoder_hidden_states)."""
    return streams["hidden_states"], streams["encoder_hidden_states"]


HIDDEN_THEN_TEXT = ("hidden_states", "encoder_hidden_states")
"""What ``BlockKind.returns`` says of them."""


_BRANCHES = (
    Branch("attn1", BranchRole.ATTENTION, _attention, ("attn1",), gate=_attention_gate),
    Branch("ff", BranchRole.FEED_FORWARD, _feed_forward, ("ff",), gate=_feed_forward_gate),
)

COGVIDEOX_BLOCK = BlockKind(
    class_name="CogVideoXBlock",
    fingerprints=frozenset({"b07b857a4d937adb"}),
    replaced=("diffusers.models.normalization:CogVideoXLayerNormZero",),
    begin=_begin,
    branches=lambda block: _BRANCHES,
    end=hidden_then_text,
    returns=lambda block: HIDDEN_THEN_TEXT,
    processors=frozenset({"CogVideoXAttnProcessor2_0"}),
    # Both token kinds read these layers, each through a modulation of its own: nothing else can take the scales.
    smoothing=lambda block: (
        Smoothing(("attn1.to_q", "attn1.to_k", "attn1.to_v")),
        Smoothing(("ff.net.0.proj",)),
        Smoothing(("ff.net.2",)),
    ),
)


def _temporal(model: nn.Module) -> TemporalMap:
    modulation = ("transformer_blocks.*.norm1.linear", "transformer_blocks.*.norm2.linear", "norm_out.linear")
    condition = ("patch_embed.text_proj", "ofs_embedding.*")
    known: dict[str, Any] = {
        "condition": condition,
        "readers": (modulations(*modulation),),
        "conditions": ("encoder_hidden_states", "ofs"),
    }
    # CogVideoX 1.5 image-to-video adds the embedding of a constant offset before the modulation.
    if getattr(model, "ofs_embedding", None) is not None:
        return TemporalMap(("time_embedding.*",), modulation, **known)
    return TemporalMap(("time_embedding.*", *modulation), (), **known)


COGVIDEOX = Family(
    name="cogvideox",
    classes=("CogVideoXTransformer3DModel",),
    blocks=in_lists("transformer_blocks"),
    kinds={"CogVideoXBlock": COGVIDEOX_BLOCK},
    temporal=_temporal,
    chained=frozenset({"5cd264377d3f4ab4"}),
    sensitive=("patch_embed", "proj_out"),
)

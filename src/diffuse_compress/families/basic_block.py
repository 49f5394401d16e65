"""``BasicTransformerBlock``, which UNets, DiT and PixArt share: self-attention, cross-attention, feed-forward."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from diffuse_compress.families.base import (
    BlockKind,
    Branch,
    BranchRole,
    Conditioning,
    Smoothing,
    Streams,
    single_stream,
)

__all__ = ["BASIC_TRANSFORMER_BLOCK", "PROCESSORS"]

PROCESSORS = frozenset({"AttnProcessor", "AttnProcessor2_0"})
_NORM_TYPES = ("ada_norm_zero", "layer_norm", "ada_norm_single")


def _begin(
    block: nn.Module,
    hidden_states: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    encoder_hidden_states: torch.Tensor | None = None,
    encoder_attention_mask: torch.Tensor | None = None,
    timestep: torch.Tensor | None = None,
    cross_attention_kwargs: dict[str, Any] | None = None,
    class_labels: torch.Tensor | None = None,
    added_cond_kwargs: dict[str, torch.Tensor] | None = None,
) -> tuple[Streams, Conditioning] | None:
    if cross_attention_kwargs is not None and "gligen" in cross_attention_kwargs:
        return None
    streams = {"hidden_states": hidden_states}
    return streams, Conditioning(
        streams,
        attention_mask=attention_mask,
        encoder_hidden_states=encoder_hidden_states,
        encoder_attention_mask=encoder_attention_mask,
        timestep=timestep,
        cross_attention_kwargs={} if cross_attention_kwargs is None else cross_attention_kwargs,
        class_labels=class_labels,
        added_cond_kwargs=added_cond_kwargs,
    )


def modulation(block: Any, conditioning: Conditioning) -> tuple[torch.Tensor, ...] | None:
    """(shift, scale, gate) of attention, then of feed-forward, as the stock forward cuts them; None without AdaLN."""

    def compute() -> tuple[torch.Tensor, ...] | None:
        x = conditioning.entry["hidden_states"]
        if block.norm_type == "ada_norm_zero":
            emb = conditioning.timestep
            if block.norm1.emb is not None:
                emb = block.norm1.emb(conditioning.timestep, conditioning.class_labels, hidden_dtype=x.dtype)
            return tuple(block.norm1.linear(block.norm1.silu(emb)).chunk(6, dim=1))
        if block.norm_type == "ada_norm_single":
            table = block.scale_shift_table[None] + conditioning.timestep.reshape(x.shape[0], 6, -1)
            return tuple(table.chunk(6, dim=1))
        return None

    values: tuple[torch.Tensor, ...] | None = conditioning.once("modulation", compute)
    return values


def _squeezed(block: nn.Module, streams: Streams, deltas: Streams) -> Streams:
    x = deltas["hidden_states"] + streams["hidden_states"]
    return {"hidden_states": x.squeeze(1) if x.ndim == 4 else x}


def _self_attention(block: Any, streams: Streams, conditioning: Conditioning) -> Streams:
    x, values = streams["hidden_states"], modulation(block, conditioning)
    if block.norm_type == "ada_norm_zero":
        shift, scale = values[:2]  # type: ignore[index]
        normed = block.norm1.norm(x) * (1 + scale[:, None]) + shift[:, None]
    else:
        normed = block.norm1(x)
        if values is not None:
            shift, scale = values[:2]
            normed = normed * (1 + scale) + shift
    output = block.attn1(
        normed,
        encoder_hidden_states=conditioning.encoder_hidden_states if block.only_cross_attention else None,
        attention_mask=conditioning.attention_mask,
        **conditioning.cross_attention_kwargs,
    )
    return {"hidden_states": output}


def _gated(block: Any, gate: int, outputs: Streams, conditioning: Conditioning) -> Streams:
    """Outputs times one of the modulation's chunks; as they are without AdaLN."""
    values, output = modulation(block, conditioning), outputs["hidden_states"]
    if values is None:
        return outputs
    return {
        "hidden_states": (values[gate].unsqueeze(1) if block.norm_type == "ada_norm_zero" else values[gate]) * output
    }


def _attention_gate(block: nn.Module, outputs: Streams, conditioning: Conditioning) -> Streams:
    return _gated(block, 2, outputs, conditioning)


def _feed_forward_gate(block: nn.Module, outputs: Streams, conditioning: Conditioning) -> Streams:
    return _gated(block, 5, outputs, conditioning)


def _cross_attention(block: Any, streams: Streams, conditioning: Conditioning) -> Streams:
    x = streams["hidden_states"]
    # PixArt's norm2 belongs to its feed-forward.
    normed = x if block.norm_type == "ada_norm_single" else block.norm2(x)
    output = block.attn2(
        normed,
        encoder_hidden_states=conditioning.encoder_hidden_states,
        attention_mask=conditioning.encoder_attention_mask,
        **conditioning.cross_attention_kwargs,
    )
    return {"hidden_states": output}


def _feed_forward(block: Any, streams: Streams, conditioning: Conditioning) -> Streams:
    x, values = streams["hidden_states"], modulation(block, conditioning)
    if block.norm_type == "ada_norm_single":
        shift, scale = values[3:5]  # type: ignore[index]
        return {"hidden_states": block.ff(block.norm2(x) * (1 + scale) + shift)}
    normed = block.norm3(x)
    if block.norm_type == "ada_norm_zero":
        shift, scale = values[3:5]  # type: ignore[index]
        return {"hidden_states": block.ff(normed * (1 + scale[:, None]) + shift[:, None])}
    return {"hidden_states": block.ff(normed)}


def _branches(block: Any) -> tuple[Branch, ...]:
    return _WITH_CROSS_ATTENTION if block.attn2 is not None else _WITHOUT_CROSS_ATTENTION


_ATTN1 = Branch("attn1", BranchRole.ATTENTION, _self_attention, ("attn1",), _squeezed, _attention_gate)
_ATTN2 = Branch("attn2", BranchRole.CROSS_ATTENTION, _cross_attention, ("attn2",))
_FF = Branch("ff", BranchRole.FEED_FORWARD, _feed_forward, ("ff",), _squeezed, _feed_forward_gate)
_WITH_CROSS_ATTENTION = (_ATTN1, _ATTN2, _FF)
_WITHOUT_CROSS_ATTENTION = (_ATTN1, _FF)


def _unsupported(block: Any) -> str | None:
    if block.norm_type not in _NORM_TYPES:
        return f"norm_type={block.norm_type!r}"
    if block.pos_embed is not None:
        return "positional embeddings inside of the block"
    if getattr(block, "fuser", None) is not None:
        return "GLIGEN"
    return "feed-forward chunking" if block._chunk_size is not None else None


def _smoothing(block: Any) -> tuple[Smoothing, ...]:
    qkv, up = ("attn1.to_q", "attn1.to_k", "attn1.to_v"), ("ff.net.0.proj",)
    last = Smoothing(("ff.net.2",))
    if block.norm_type == "ada_norm_zero":
        adaptive = "norm1.linear"
        return (
            Smoothing(qkv, modulation=adaptive, shift=0, scale=1),
            Smoothing(up, modulation=adaptive, shift=3, scale=4),
            last,
        )
    if block.norm_type == "ada_norm_single":
        # One table of timesteps serves every block, so it cannot take one block's scales.
        return (Smoothing(qkv), Smoothing(("attn2.to_q",)), Smoothing(up), last)
    entries = [Smoothing(qkv, producer="norm1"), Smoothing(up, producer="norm3"), last]
    if block.attn2 is not None:
        entries.insert(1, Smoothing(("attn2.to_q",), producer="norm2"))
    return tuple(entries)


BASIC_TRANSFORMER_BLOCK = BlockKind(
    class_name="BasicTransformerBlock",
    fingerprints=frozenset({"1a5fd24390607274"}),
    replaced=("diffusers.models.normalization:AdaLayerNormZero",),
    begin=_begin,
    branches=_branches,
    end=single_stream,
    processors=PROCESSORS,
    unsupported=_unsupported,
    smoothing=_smoothing,
)

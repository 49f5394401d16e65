"""Stable Diffusion 3 and 3.5: joint attention over picture and text tokens (arXiv 2403.03206)."""

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
from diffuse_compress.families.modulation import FF_CONTEXT, adaln_zero, gated, modulate

__all__ = ["SD3"]


def _begin(
    block: nn.Module,
    hidden_states: torch.Tensor,
    encoder_hidden_states: torch.Tensor,
    temb: torch.Tensor,
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> tuple[Streams, Conditioning]:
    streams = {"hidden_states": hidden_states, "encoder_hidden_states": encoder_hidden_states}
    return streams, Conditioning(streams, temb=temb, joint_attention_kwargs=joint_attention_kwargs or {})


def _normed(block: Any, conditioning: Conditioning) -> torch.Tensor:
    """The block's input, normed once for both attentions of a dual block."""
    normed: torch.Tensor = conditioning.once("normed", lambda: block.norm1.norm(conditioning.entry["hidden_states"]))
    return normed


def _attention(block: Any, streams: Streams, conditioning: Conditioning) -> Streams:
    shift, scale = adaln_zero(block, conditioning, "norm1", 9 if block.use_dual_attention else 6)[:2]
    x = streams["hidden_states"]
    normed = _normed(block, conditioning) if block.use_dual_attention else block.norm1.norm(x)
    text = streams["encoder_hidden_states"]
    if block.context_pre_only:
        normed_text = block.norm1_context(text, conditioning.temb)
    else:
        text_shift, text_scale = adaln_zero(block, conditioning, "norm1_context", 6)[:2]
        normed_text = modulate(block.norm1_context.norm(text), text_shift, text_scale)
    output, text_output = block.attn(
        hidden_states=modulate(normed, shift, scale),
        encoder_hidden_states=normed_text,
        **conditioning.joint_attention_kwargs,
    )
    if block.context_pre_only:
        return {"hidden_states": output}
    return {"hidden_states": output, "encoder_hidden_states": text_output}


def _attention_gate(block: Any, outputs: Streams, conditioning: Conditioning) -> Streams:
    gate = adaln_zero(block, conditioning, "norm1", 9 if block.use_dual_attention else 6)[2]
    deltas = {"hidden_states": gated(outputs["hidden_states"], gate)}
    if not block.context_pre_only:
        text_gate = adaln_zero(block, conditioning, "norm1_context", 6)[2]
        deltas["encoder_hidden_states"] = gated(outputs["encoder_hidden_states"], text_gate)
    return deltas


def _second_attention(block: Any, streams: Streams, conditioning: Conditioning) -> Streams:
    """Picture tokens alone, and of the block's input: SD3.5's dual attention."""
    shift, scale = adaln_zero(block, conditioning, "norm1", 9)[6:8]
    x = modulate(_normed(block, conditioning), shift, scale)
    return {"hidden_states": block.attn2(hidden_states=x, **conditioning.joint_attention_kwargs)}


def _second_attention_gate(block: Any, outputs: Streams, conditioning: Conditioning) -> Streams:
    return {"hidden_states": gated(outputs["hidden_states"], adaln_zero(block, conditioning, "norm1", 9)[8])}


def _feed_forward(block: Any, streams: Streams, conditioning: Conditioning) -> Streams:
    values = adaln_zero(block, conditioning, "norm1", 9 if block.use_dual_attention else 6)
    return {"hidden_states": block.ff(modulate(block.norm2(streams["hidden_states"]), values[3], values[4]))}


def _feed_forward_gate(block: Any, outputs: Streams, conditioning: Conditioning) -> Streams:
    gate = adaln_zero(block, conditioning, "norm1", 9 if block.use_dual_attention else 6)[5]
    return {"hidden_states": gated(outputs["hidden_states"], gate)}


_ATTN = Branch("attn", BranchRole.ATTENTION, _attention, ("attn",), gate=_attention_gate)
_ATTN2 = Branch("attn2", BranchRole.ATTENTION, _second_attention, ("attn2",), gate=_second_attention_gate)
_FF = Branch("ff", BranchRole.FEED_FORWARD, _feed_forward, ("ff",), gate=_feed_forward_gate)


def _branches(block: Any) -> tuple[Branch, ...]:
    first = (_ATTN, _ATTN2) if block.use_dual_attention else (_ATTN,)
    return (*first, _FF) if block.context_pre_only else (*first, _FF, FF_CONTEXT)


def _end(block: Any, streams: Streams, conditioning: Conditioning) -> tuple[torch.Tensor | None, torch.Tensor]:
    return None if block.context_pre_only else streams["encoder_hidden_states"], streams["hidden_states"]


def _smoothing(block: Any) -> tuple[Smoothing, ...]:
    chunks = 9 if block.use_dual_attention else 6
    entries = [
        Smoothing(("attn.to_q", "attn.to_k", "attn.to_v"), modulation="norm1.linear", chunks=chunks),
        Smoothing(("ff.net.0.proj",), modulation="norm1.linear", shift=3, scale=4, chunks=chunks),
        Smoothing(("ff.net.2",)),
    ]
    text = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")
    if block.use_dual_attention:
        second = ("attn2.to_q", "attn2.to_k", "attn2.to_v")
        entries.append(Smoothing(second, modulation="norm1.linear", shift=6, scale=7, chunks=9))
    if block.context_pre_only:
        # AdaLayerNormContinuous: scale comes first.
        entries.append(Smoothing(text, modulation="norm1_context.linear", shift=1, scale=0, chunks=2))
    else:
        entries.append(Smoothing(text, modulation="norm1_context.linear"))
        entries.append(Smoothing(("ff_context.net.0.proj",), modulation="norm1_context.linear", shift=3, scale=4))
        entries.append(Smoothing(("ff_context.net.2",)))
    return tuple(entries)


JOINT_TRANSFORMER_BLOCK = BlockKind(
    class_name="JointTransformerBlock",
    fingerprints=frozenset({"bdf7ec69e9a504c5"}),
    replaced=(
        "diffusers.models.normalization:AdaLayerNormZero",
        "diffusers.models.normalization:SD35AdaLayerNormZeroX",
    ),
    begin=_begin,
    branches=_branches,
    end=_end,
    returns=lambda block: ("" if block.context_pre_only else "encoder_hidden_states", "hidden_states"),
    processors=frozenset({"JointAttnProcessor2_0"}),
    unsupported=lambda block: "feed-forward chunking" if block._chunk_size is not None else None,
    smoothing=_smoothing,
)

_MODULATIONS = ("transformer_blocks.*.norm1.linear", "transformer_blocks.*.norm1_context.linear", "norm_out.linear")

# The first block's text tokens have seen no sample yet.
_FIRST_TEXT = tuple(f"transformer_blocks.0.attn.add_{part}_proj" for part in "qkv")

SD3 = Family(
    name="sd3",
    classes=("SD3Transformer2DModel",),
    blocks=in_lists("transformer_blocks"),
    kinds={"JointTransformerBlock": JOINT_TRANSFORMER_BLOCK},
    temporal=lambda model: TemporalMap(
        timestep=("time_text_embed.timestep_embedder.*",),
        timestep_and_condition=(
            *_MODULATIONS,
            *_FIRST_TEXT,
        ),
        condition=("time_text_embed.text_embedder.*", "context_embedder"),
        readers=(modulations(*_MODULATIONS),),
        conditions=("encoder_hidden_states", "pooled_projections"),
        live=_FIRST_TEXT,
    ),
    chained=frozenset({"af15fd38543f3cf2"}),
    sensitive=("pos_embed", "context_embedder", "proj_out"),
)

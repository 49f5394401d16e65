"""FLUX.1: joint blocks, then blocks that run attention and feed-forward side by side over both token kinds."""

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
    Streams,
    TemporalMap,
    in_lists,
)
from diffuse_compress.families.embedding import modulations
from diffuse_compress.families.modulation import (
    FF,
    FF_CONTEXT,
    adaln_zero,
    gated,
    joint_attention_gate,
    joint_smoothing,
    modulate,
    single_smoothing,
)

__all__ = ["FLUX", "text_then_hidden"]

_FP16_LIMIT = 65504


def _begin(
    block: nn.Module,
    hidden_states: torch.Tensor,
    encoder_hidden_states: torch.Tensor,
    temb: torch.Tensor,
    image_rotary_emb: Any = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> tuple[Streams, Conditioning]:
    streams = {"hidden_states": hidden_states, "encoder_hidden_states": encoder_hidden_states}
    return streams, Conditioning(
        streams, temb=temb, image_rotary_emb=image_rotary_emb, joint_attention_kwargs=joint_attention_kwargs or {}
    )


def _attention(block: Any, streams: Streams, conditioning: Conditioning) -> Streams:
    shift, scale = adaln_zero(block, conditioning, "norm1", 6)[:2]
    text_shift, text_scale = adaln_zero(block, conditioning, "norm1_context", 6)[:2]
    output, text_output = block.attn(
        hidden_states=modulate(block.norm1.norm(streams["hidden_states"]), shift, scale),
        encoder_hidden_states=modulate(
            block.norm1_context.norm(streams["encoder_hidden_states"]), text_shift, text_scale
        ),
        image_rotary_emb=conditioning.image_rotary_emb,
        **conditioning.joint_attention_kwargs,
    )
    return {"hidden_states": output, "encoder_hidden_states": text_output}


def _end(block: nn.Module, streams: Streams, conditioning: Conditioning) -> tuple[torch.Tensor, torch.Tensor]:
    return clipped(streams["encoder_hidden_states"]), streams["hidden_states"]


def text_then_hidden(block: nn.Module) -> tuple[str, ...]:
    """``BlockKind.returns`` of blocks that return (encoder_hidden_states, hidden_states)."""
    return "encoder_hidden_states", "hidden_states"


def clipped(x: torch.Tensor) -> torch.Tensor:
    """Within float16's range, as the stock blocks keep it."""
    return x.clip(-_FP16_LIMIT, _FP16_LIMIT) if x.dtype == torch.float16 else x


_DOUBLE = (
    Branch("attn", BranchRole.ATTENTION, _attention, ("attn",), gate=joint_attention_gate),
    FF,
    FF_CONTEXT,
)


def _single_begin(
    block: nn.Module,
    hidden_states: torch.Tensor,
    encoder_hidden_states: torch.Tensor,
    temb: torch.Tensor,
    image_rotary_emb: Any = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> tuple[Streams, Conditioning]:
    streams = {"hidden_states": torch.cat([encoder_hidden_states, hidden_states], dim=1)}
    return streams, Conditioning(
        streams,
        temb=temb,
        text_tokens=encoder_hidden_states.shape[1],
        image_rotary_emb=image_rotary_emb,
        joint_attention_kwargs=joint_attention_kwargs or {},
    )


def _single(block: Any, streams: Streams, conditioning: Conditioning) -> Streams:
    shift, scale = adaln_zero(block, conditioning, "norm", 3)[:2]
    normed = modulate(block.norm.norm(streams["hidden_states"]), shift, scale)
    mlp = block.act_mlp(block.proj_mlp(normed))
    attention = block.attn(
        hidden_states=normed,
        image_rotary_emb=conditioning.image_rotary_emb,
        **conditioning.joint_attention_kwargs,
    )
    return {"hidden_states": block.proj_out(torch.cat([attention, mlp], dim=2))}


def _single_gate(block: Any, outputs: Streams, conditioning: Conditioning) -> Streams:
    return {"hidden_states": gated(outputs["hidden_states"], adaln_zero(block, conditioning, "norm", 3)[2])}


def _single_end(block: nn.Module, streams: Streams, conditioning: Conditioning) -> tuple[torch.Tensor, torch.Tensor]:
    x, count = clipped(streams["hidden_states"]), conditioning.text_tokens
    return x[:, :count], x[:, count:]


_SINGLE = (Branch("whole", BranchRole.WHOLE, _single, ("attn", "proj_mlp", "proj_out"), gate=_single_gate),)

FLUX_TRANSFORMER_BLOCK = BlockKind(
    class_name="FluxTransformerBlock",
    fingerprints=frozenset({"286503977b8cd946"}),
    replaced=("diffusers.models.normalization:AdaLayerNormZero",),
    begin=_begin,
    branches=lambda block: _DOUBLE,
    end=_end,
    returns=text_then_hidden,
    processors=frozenset({"FluxAttnProcessor"}),
    smoothing=joint_smoothing,
)

FLUX_SINGLE_TRANSFORMER_BLOCK = BlockKind(
    class_name="FluxSingleTransformerBlock",
    fingerprints=frozenset({"823b146d7b3e758d"}),
    replaced=("diffusers.models.normalization:AdaLayerNormZeroSingle",),
    begin=_single_begin,
    branches=lambda block: _SINGLE,
    end=_single_end,
    returns=text_then_hidden,
    processors=frozenset({"FluxAttnProcessor"}),
    smoothing=single_smoothing,
)

_MODULATIONS = (
    "transformer_blocks.*.norm1.linear",
    "transformer_blocks.*.norm1_context.linear",
    "single_transformer_blocks.*.norm.linear",
    "norm_out.linear",
)

# The first block's text tokens have seen no sample yet.
_FIRST_TEXT = tuple(f"transformer_blocks.0.attn.add_{part}_proj" for part in "qkv")

FLUX = Family(
    name="flux",
    classes=("FluxTransformer2DModel",),
    blocks=in_lists("transformer_blocks", "single_transformer_blocks"),
    kinds={kind.class_name: kind for kind in (FLUX_TRANSFORMER_BLOCK, FLUX_SINGLE_TRANSFORMER_BLOCK)},
    temporal=lambda model: TemporalMap(
        # With embedded guidance, the sum of both embedders is what depends on the request.
        timestep=("time_text_embed.timestep_embedder.*",),
        timestep_and_condition=(
            *_MODULATIONS,
            *_FIRST_TEXT,
        ),
        condition=("time_text_embed.text_embedder.*", "time_text_embed.guidance_embedder.*", "context_embedder"),
        readers=(modulations(*_MODULATIONS),),
        conditions=("encoder_hidden_states", "pooled_projections", "guidance"),
        live=_FIRST_TEXT,
    ),
    chained=frozenset({"0077b1620a76c415"}),
    sensitive=("x_embedder", "context_embedder", "proj_out"),
)

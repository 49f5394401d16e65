"""HunyuanVideo: Flux's two kinds of blocks on video, text refined by a small transformer first (arXiv 2412.03603)."""

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
from diffuse_compress.families.cogvideox import hidden_then_text
from diffuse_compress.families.modulation import (
    FF,
    FF_CONTEXT,
    adaln_zero,
    joint_smoothing,
    modulate,
    single_smoothing,
)

__all__ = ["HUNYUAN_VIDEO"]


def _begin(
    block: nn.Module,
    hidden_states: torch.Tensor,
    encoder_hidden_states: torch.Tensor,
    temb: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    freqs_cis: Any = None,
    *args: Any,
    **kwargs: Any,
) -> tuple[Streams, Conditioning]:
    streams = {"hidden_states": hidden_states, "encoder_hidden_states": encoder_hidden_states}
    return streams, Conditioning(streams, temb=temb, attention_mask=attention_mask, freqs_cis=freqs_cis)


def _attention(block: Any, streams: Streams, conditioning: Conditioning) -> Streams:
    shift, scale, gate = adaln_zero(block, conditioning, "norm1", 6)[:3]
    text_shift, text_scale, text_gate = adaln_zero(block, conditioning, "norm1_context", 6)[:3]
    text = block.norm1_context.norm(streams["encoder_hidden_states"])
    output, text_output = block.attn(
        hidden_states=modulate(block.norm1.norm(streams["hidden_states"]), shift, scale),
        encoder_hidden_states=modulate(text, text_shift, text_scale),
        attention_mask=conditioning.attention_mask,
        image_rotary_emb=conditioning.freqs_cis,
    )
    return {
        "hidden_states": output * gate.unsqueeze(1),
        "encoder_hidden_states": text_output * text_gate.unsqueeze(1),
    }


_DOUBLE = (
    Branch("attn", BranchRole.ATTENTION, _attention, ("attn",)),
    FF,
    FF_CONTEXT,
)


def _single_begin(
    block: nn.Module,
    hidden_states: torch.Tensor,
    encoder_hidden_states: torch.Tensor,
    temb: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    image_rotary_emb: Any = None,
    *args: Any,
    **kwargs: Any,
) -> tuple[Streams, Conditioning]:
    streams = {"hidden_states": torch.cat([hidden_states, encoder_hidden_states], dim=1)}
    return streams, Conditioning(
        streams,
        temb=temb,
        text_tokens=encoder_hidden_states.shape[1],
        attention_mask=attention_mask,
        image_rotary_emb=image_rotary_emb,
    )


def _single(block: Any, streams: Streams, conditioning: Conditioning) -> Streams:
    shift, scale, gate = adaln_zero(block, conditioning, "norm", 3)
    normed = modulate(block.norm.norm(streams["hidden_states"]), shift, scale)
    mlp = block.act_mlp(block.proj_mlp(normed))
    count = conditioning.text_tokens
    output, text_output = block.attn(
        hidden_states=normed[:, :-count, :],
        encoder_hidden_states=normed[:, -count:, :],
        attention_mask=conditioning.attention_mask,
        image_rotary_emb=conditioning.image_rotary_emb,
    )
    joined = torch.cat([torch.cat([output, text_output], dim=1), mlp], dim=2)
    return {"hidden_states": gate.unsqueeze(1) * block.proj_out(joined)}


def _single_end(block: nn.Module, streams: Streams, conditioning: Conditioning) -> tuple[torch.Tensor, torch.Tensor]:
    x, count = streams["hidden_states"], conditioning.text_tokens
    return x[:, :-count, :], x[:, -count:, :]


_SINGLE = (Branch("whole", BranchRole.WHOLE, _single, ("attn", "proj_mlp", "proj_out")),)

HUNYUAN_VIDEO_TRANSFORMER_BLOCK = BlockKind(
    class_name="HunyuanVideoTransformerBlock",
    fingerprints=frozenset({"79f739f9fdb67ab6"}),
    replaced=("diffusers.models.normalization:AdaLayerNormZero",),
    begin=_begin,
    branches=lambda block: _DOUBLE,
    end=hidden_then_text,
    processors=frozenset({"HunyuanVideoAttnProcessor2_0"}),
    smoothing=joint_smoothing,
)

HUNYUAN_VIDEO_SINGLE_TRANSFORMER_BLOCK = BlockKind(
    class_name="HunyuanVideoSingleTransformerBlock",
    fingerprints=frozenset({"46187932135030c0"}),
    replaced=("diffusers.models.normalization:AdaLayerNormZeroSingle",),
    begin=_single_begin,
    branches=lambda block: _SINGLE,
    end=_single_end,
    processors=frozenset({"HunyuanVideoAttnProcessor2_0"}),
    smoothing=single_smoothing,
)

HUNYUAN_VIDEO = Family(
    name="hunyuan_video",
    classes=("HunyuanVideoTransformer3DModel",),
    blocks=in_lists("transformer_blocks", "single_transformer_blocks"),
    kinds={kind.class_name: kind for kind in (HUNYUAN_VIDEO_TRANSFORMER_BLOCK, HUNYUAN_VIDEO_SINGLE_TRANSFORMER_BLOCK)},
    temporal=lambda model: TemporalMap(
        timestep=(
            "time_text_embed.timestep_embedder.*",
            "context_embedder.time_text_embed.timestep_embedder.*",
        ),
        timestep_and_condition=(
            "transformer_blocks.*.norm1.linear",
            "transformer_blocks.*.norm1_context.linear",
            "single_transformer_blocks.*.norm.linear",
            "norm_out.linear",
            "context_embedder.token_refiner.refiner_blocks.*.norm_out.linear",
            # What the refiner adds to the text depends on the timestep from its first gate on.
            r"re:context_embedder\.token_refiner\.refiner_blocks\.\d+\.ff\..*",
            r"re:context_embedder\.token_refiner\.refiner_blocks\.[1-9]\d*\.attn\..*",
            "transformer_blocks.0.attn.add_q_proj",
            "transformer_blocks.0.attn.add_k_proj",
            "transformer_blocks.0.attn.add_v_proj",
        ),
        condition=(
            "time_text_embed.text_embedder.*",
            "time_text_embed.guidance_embedder.*",
            "context_embedder.time_text_embed.text_embedder.*",
            "context_embedder.proj_in",
            r"re:context_embedder\.token_refiner\.refiner_blocks\.0\.attn\..*",
        ),
    ),
    sensitive=("x_embedder", "context_embedder", "proj_out"),
)

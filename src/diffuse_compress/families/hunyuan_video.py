"""HunyuanVideo: Flux's two kinds of blocks on video, text refined by a small transformer first (arXiv 2412.03603).

Of its picture-to-video models, one ("token_replace") keeps the tokens of the first frame as the picture given, and
modulates them by the embedding of timestep 0, all others by that of the step.
"""

from __future__ import annotations

from collections.abc import Callable
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
from diffuse_compress.families.cogvideox import HIDDEN_THEN_TEXT, hidden_then_text
from diffuse_compress.families.embedding import modulations
from diffuse_compress.families.modulation import (
    FF_CONTEXT,
    adaln_zero,
    gated,
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
    token_replace_emb: torch.Tensor | None = None,
    num_tokens: int | None = None,
    *args: Any,
    **kwargs: Any,
) -> tuple[Streams, Conditioning] | None:
    if not _has_its_embeddings(block, token_replace_emb):
        return None
    streams = {"hidden_states": hidden_states, "encoder_hidden_states": encoder_hidden_states}
    return streams, Conditioning(
        streams,
        temb=temb,
        attention_mask=attention_mask,
        freqs_cis=freqs_cis,
        token_replace_emb=token_replace_emb,
        num_tokens=num_tokens,
    )


def _has_its_embeddings(block: nn.Module, token_replace_emb: torch.Tensor | None) -> bool:
    """A block of a "token_replace" model needs its second embedding; the others ignore what is given for it."""
    return ("TokenReplace" in type(block).__name__) == (token_replace_emb is not None)


def _by_frame(
    block: Any,
    conditioning: Conditioning,
    modulation: tuple[str, int],
    part: slice,
    function: Callable[..., torch.Tensor],
    x: torch.Tensor,
) -> torch.Tensor:
    """``function(x, *chunks)``, modulate or gated, with a part of the chunks that a norm (name, chunks) makes.

    Of the tokens, a given first frame's ``num_tokens`` stand first, and have chunks of their own.
    """
    chunks = adaln_zero(block, conditioning, *modulation)[part]
    if conditioning.token_replace_emb is None:
        return function(x, *chunks)
    first, count = adaln_zero(block, conditioning, *modulation, "token_replace_emb")[part], conditioning.num_tokens
    return torch.cat([function(x[:, :count], *first), function(x[:, count:], *chunks)], dim=1)


_JOINT = ("norm1", 6)
_ALONE = ("norm", 3)
_SHIFT_SCALE, _GATE = slice(0, 2), slice(2, 3)
_FF_SHIFT_SCALE, _FF_GATE = slice(3, 5), slice(5, 6)


def _attention(block: Any, streams: Streams, conditioning: Conditioning) -> Streams:
    x = block.norm1.norm(streams["hidden_states"])
    text_shift, text_scale = adaln_zero(block, conditioning, "norm1_context", 6)[:2]
    text = block.norm1_context.norm(streams["encoder_hidden_states"])
    output, text_output = block.attn(
        hidden_states=_by_frame(block, conditioning, _JOINT, _SHIFT_SCALE, modulate, x),
        encoder_hidden_states=modulate(text, text_shift, text_scale),
        attention_mask=conditioning.attention_mask,
        image_rotary_emb=conditioning.freqs_cis,
    )
    return {"hidden_states": output, "encoder_hidden_states": text_output}


def _attention_gate(block: Any, outputs: Streams, conditioning: Conditioning) -> Streams:
    text_gate = adaln_zero(block, conditioning, "norm1_context", 6)[2]
    return {
        "hidden_states": _by_frame(block, conditioning, _JOINT, _GATE, gated, outputs["hidden_states"]),
        "encoder_hidden_states": gated(outputs["encoder_hidden_states"], text_gate),
    }


def _feed_forward(block: Any, streams: Streams, conditioning: Conditioning) -> Streams:
    x = block.norm2(streams["hidden_states"])
    return {"hidden_states": block.ff(_by_frame(block, conditioning, _JOINT, _FF_SHIFT_SCALE, modulate, x))}


def _feed_forward_gate(block: Any, outputs: Streams, conditioning: Conditioning) -> Streams:
    return {"hidden_states": _by_frame(block, conditioning, _JOINT, _FF_GATE, gated, outputs["hidden_states"])}


_DOUBLE = (
    Branch("attn", BranchRole.ATTENTION, _attention, ("attn",), gate=_attention_gate),
    Branch("ff", BranchRole.FEED_FORWARD, _feed_forward, ("ff",), gate=_feed_forward_gate),
    FF_CONTEXT,
)


def _single_begin(
    block: nn.Module,
    hidden_states: torch.Tensor,
    encoder_hidden_states: torch.Tensor,
    temb: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    image_rotary_emb: Any = None,
    token_replace_emb: torch.Tensor | None = None,
    num_tokens: int | None = None,
    *args: Any,
    **kwargs: Any,
) -> tuple[Streams, Conditioning] | None:
    if not _has_its_embeddings(block, token_replace_emb):
        return None
    streams = {"hidden_states": torch.cat([hidden_states, encoder_hidden_states], dim=1)}
    return streams, Conditioning(
        streams,
        temb=temb,
        text_tokens=encoder_hidden_states.shape[1],
        attention_mask=attention_mask,
        image_rotary_emb=image_rotary_emb,
        token_replace_emb=token_replace_emb,
        num_tokens=num_tokens,
    )


def _single(block: Any, streams: Streams, conditioning: Conditioning) -> Streams:
    x = block.norm.norm(streams["hidden_states"])
    normed = _by_frame(block, conditioning, _ALONE, _SHIFT_SCALE, modulate, x)
    mlp = block.act_mlp(block.proj_mlp(normed))
    count = conditioning.text_tokens
    output, text_output = block.attn(
        hidden_states=normed[:, :-count, :],
        encoder_hidden_states=normed[:, -count:, :],
        attention_mask=conditioning.attention_mask,
        image_rotary_emb=conditioning.image_rotary_emb,
    )
    joined = torch.cat([torch.cat([output, text_output], dim=1), mlp], dim=2)
    return {"hidden_states": block.proj_out(joined)}


def _single_gate(block: Any, outputs: Streams, conditioning: Conditioning) -> Streams:
    return {"hidden_states": _by_frame(block, conditioning, _ALONE, _GATE, gated, outputs["hidden_states"])}


def _single_end(block: nn.Module, streams: Streams, conditioning: Conditioning) -> tuple[torch.Tensor, torch.Tensor]:
    x, count = streams["hidden_states"], conditioning.text_tokens
    return x[:, :-count, :], x[:, -count:, :]


_SINGLE = (Branch("whole", BranchRole.WHOLE, _single, ("attn", "proj_mlp", "proj_out"), gate=_single_gate),)


def _double_kind(class_name: str, fingerprint: str, *norms: str) -> BlockKind:
    return BlockKind(
        class_name=class_name,
        fingerprints=frozenset({fingerprint}),
        replaced=norms,
        begin=_begin,
        branches=lambda block: _DOUBLE,
        end=hidden_then_text,
        returns=lambda block: HIDDEN_THEN_TEXT,
        processors=frozenset({"HunyuanVideoAttnProcessor2_0"}),
        smoothing=joint_smoothing,
    )


def _single_kind(class_name: str, fingerprint: str, norm: str) -> BlockKind:
    return BlockKind(
        class_name=class_name,
        fingerprints=frozenset({fingerprint}),
        replaced=(norm,),
        begin=_single_begin,
        branches=lambda block: _SINGLE,
        end=_single_end,
        returns=lambda block: HIDDEN_THEN_TEXT,
        processors=frozenset({"HunyuanVideoAttnProcessor2_0"}),
        smoothing=single_smoothing,
    )


_NORMS = "diffusers.models.normalization:AdaLayerNormZero"
_REPLACE_NORMS = "diffusers.models.transformers.transformer_hunyuan_video:HunyuanVideoTokenReplaceAdaLayerNormZero"
_KINDS = (
    _double_kind("HunyuanVideoTransformerBlock", "79f739f9fdb67ab6", _NORMS),
    _double_kind("HunyuanVideoTokenReplaceTransformerBlock", "54b43de70332a901", _NORMS, _REPLACE_NORMS),
    _single_kind("HunyuanVideoSingleTransformerBlock", "46187932135030c0", f"{_NORMS}Single"),
    _single_kind("HunyuanVideoTokenReplaceSingleTransformerBlock", "23921b8a94d293e9", f"{_REPLACE_NORMS}Single"),
)

_MODULATIONS = (
    "transformer_blocks.*.norm1.linear",
    "transformer_blocks.*.norm1_context.linear",
    "single_transformer_blocks.*.norm.linear",
    r"re:norm_out\.linear",  # the text refiner has layers of that name too
)
_TOKENS = (
    # What the refiner adds to the text depends on the timestep from its first gate on.
    r"re:context_embedder\.token_refiner\.refiner_blocks\.\d+\.ff\..*",
    r"re:context_embedder\.token_refiner\.refiner_blocks\.[1-9]\d*\.attn\..*",
    "transformer_blocks.0.attn.add_q_proj",
    "transformer_blocks.0.attn.add_k_proj",
    "transformer_blocks.0.attn.add_v_proj",
)


def _temporal(model: Any) -> TemporalMap:
    # Where a given first frame has an embedding of its own, the modulations run twice in a call.
    twice = model.config.get("image_condition_type") == "token_replace"
    again = (*_MODULATIONS, r"re:time_text_embed\.timestep_embedder\..*") if twice else ()
    return TemporalMap(
        timestep=(
            "time_text_embed.timestep_embedder.*",
            "context_embedder.time_text_embed.timestep_embedder.*",
        ),
        timestep_and_condition=(
            *_MODULATIONS,
            "context_embedder.token_refiner.refiner_blocks.*.norm_out.linear",
            *_TOKENS,
        ),
        condition=(
            "time_text_embed.text_embedder.*",
            "time_text_embed.guidance_embedder.*",
            "context_embedder.time_text_embed.text_embedder.*",
            "context_embedder.proj_in",
            r"re:context_embedder\.token_refiner\.refiner_blocks\.0\.attn\..*",
        ),
        readers=() if twice else (modulations(*_MODULATIONS),),
        conditions=("encoder_hidden_states", "encoder_attention_mask", "pooled_projections", "guidance"),
        live=(*_TOKENS, *again),
    )


HUNYUAN_VIDEO = Family(
    name="hunyuan_video",
    classes=("HunyuanVideoTransformer3DModel",),
    blocks=in_lists("transformer_blocks", "single_transformer_blocks"),
    kinds={kind.class_name: kind for kind in _KINDS},
    temporal=_temporal,
    chained=frozenset({"dddb3b0361f531bc"}),
    sensitive=("x_embedder", "context_embedder", "proj_out"),
)

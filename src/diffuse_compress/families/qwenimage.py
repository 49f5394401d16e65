"""QwenImage: joint blocks with a modulation for each token kind that depends on the timestep alone."""

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
from diffuse_compress.families.flux import clipped, text_then_hidden

__all__ = ["QWENIMAGE"]


def _begin(
    block: nn.Module,
    hidden_states: torch.Tensor,
    encoder_hidden_states: torch.Tensor,
    encoder_hidden_states_mask: torch.Tensor | None,
    temb: torch.Tensor,
    image_rotary_emb: Any = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
    modulate_index: torch.Tensor | None = None,
) -> tuple[Streams, Conditioning]:
    streams = {"hidden_states": hidden_states, "encoder_hidden_states": encoder_hidden_states}
    return streams, Conditioning(
        streams,
        encoder_hidden_states_mask=encoder_hidden_states_mask,
        temb=temb,
        image_rotary_emb=image_rotary_emb,
        joint_attention_kwargs=joint_attention_kwargs or {},
        modulate_index=modulate_index,
    )


def _image_modulation(block: Any, conditioning: Conditioning) -> tuple[torch.Tensor, torch.Tensor]:
    """(shift, scale, gate) in one tensor [batch, 3 * width], for attention and for feed-forward."""
    halves: tuple[torch.Tensor, torch.Tensor] = conditioning.once(
        "img_mod", lambda: block.img_mod(conditioning.temb).chunk(2, dim=-1)
    )
    return halves


def _text_modulation(block: Any, conditioning: Conditioning) -> tuple[torch.Tensor, torch.Tensor]:
    def compute() -> Any:
        temb = conditioning.temb
        # With two timesteps in one batch (picture editing), text follows the first.
        temb = torch.chunk(temb, 2, dim=0)[0] if block.zero_cond_t else temb
        return block.txt_mod(temb).chunk(2, dim=-1)

    halves: tuple[torch.Tensor, torch.Tensor] = conditioning.once("txt_mod", compute)
    return halves


def _modulated(block: Any, norm: str, stream: str, streams: Streams, conditioning: Conditioning) -> torch.Tensor:
    """Normed and modulated tokens of a stream; their gate is kept for :func:`_gate`."""
    x, gate = block._modulate(getattr(block, norm)(streams[stream]), *_parameters(block, norm, conditioning))
    conditioning.preset(f"{norm} gate", gate)
    return x


def _parameters(block: Any, norm: str, conditioning: Conditioning) -> tuple[Any, ...]:
    """What ``_modulate`` is given beside the tokens behind a norm (img_norm1 to txt_norm2)."""
    half = int(norm[-1]) - 1
    if norm.startswith("txt"):
        return (_text_modulation(block, conditioning)[half],)
    return _image_modulation(block, conditioning)[half], conditioning.modulate_index


def _gate(block: Any, norm: str, output: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
    """An output times its gate, which also is there when the branch was not computed."""
    gate = conditioning.once(
        f"{norm} gate", lambda: block._modulate(output.new_zeros(()), *_parameters(block, norm, conditioning))[1]
    )
    gated: torch.Tensor = gate * output
    return gated


def _attention(block: Any, streams: Streams, conditioning: Conditioning) -> Streams:
    output, text_output = block.attn(
        hidden_states=_modulated(block, "img_norm1", "hidden_states", streams, conditioning),
        encoder_hidden_states=_modulated(block, "txt_norm1", "encoder_hidden_states", streams, conditioning),
        encoder_hidden_states_mask=conditioning.encoder_hidden_states_mask,
        image_rotary_emb=conditioning.image_rotary_emb,
        **conditioning.joint_attention_kwargs,
    )
    return {"hidden_states": output, "encoder_hidden_states": text_output}


def _attention_gate(block: nn.Module, outputs: Streams, conditioning: Conditioning) -> Streams:
    return {
        "hidden_states": _gate(block, "img_norm1", outputs["hidden_states"], conditioning),
        "encoder_hidden_states": _gate(block, "txt_norm1", outputs["encoder_hidden_states"], conditioning),
    }


def _image_mlp(block: Any, streams: Streams, conditioning: Conditioning) -> Streams:
    return {"hidden_states": block.img_mlp(_modulated(block, "img_norm2", "hidden_states", streams, conditioning))}


def _image_mlp_gate(block: nn.Module, outputs: Streams, conditioning: Conditioning) -> Streams:
    return {"hidden_states": _gate(block, "img_norm2", outputs["hidden_states"], conditioning)}


def _text_mlp(block: Any, streams: Streams, conditioning: Conditioning) -> Streams:
    text = _modulated(block, "txt_norm2", "encoder_hidden_states", streams, conditioning)
    return {"encoder_hidden_states": block.txt_mlp(text)}


def _text_mlp_gate(block: nn.Module, outputs: Streams, conditioning: Conditioning) -> Streams:
    return {"encoder_hidden_states": _gate(block, "txt_norm2", outputs["encoder_hidden_states"], conditioning)}


def _end(block: nn.Module, streams: Streams, conditioning: Conditioning) -> tuple[torch.Tensor, torch.Tensor]:
    return clipped(streams["encoder_hidden_states"]), clipped(streams["hidden_states"])


_BRANCHES = (
    Branch("attn", BranchRole.ATTENTION, _attention, ("attn",), gate=_attention_gate),
    Branch("img_mlp", BranchRole.FEED_FORWARD, _image_mlp, ("img_mlp",), gate=_image_mlp_gate),
    Branch("txt_mlp", BranchRole.FEED_FORWARD, _text_mlp, ("txt_mlp",), gate=_text_mlp_gate),
)

QWENIMAGE_TRANSFORMER_BLOCK = BlockKind(
    class_name="QwenImageTransformerBlock",
    fingerprints=frozenset({"8b2cee775f210afa"}),
    begin=_begin,
    branches=lambda block: _BRANCHES,
    end=_end,
    returns=text_then_hidden,
    processors=frozenset({"QwenDoubleStreamAttnProcessor2_0"}),
    smoothing=lambda block: (
        Smoothing(("attn.to_q", "attn.to_k", "attn.to_v"), modulation="img_mod.1"),
        Smoothing(("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"), modulation="txt_mod.1"),
        Smoothing(("img_mlp.net.0.proj",), modulation="img_mod.1", shift=3, scale=4),
        Smoothing(("txt_mlp.net.0.proj",), modulation="txt_mod.1", shift=3, scale=4),
        Smoothing(("img_mlp.net.2",)),
        Smoothing(("txt_mlp.net.2",)),
    ),
)


def _temporal(model: Any) -> TemporalMap:
    embedder = "time_text_embed.timestep_embedder.*"
    in_blocks = ("transformer_blocks.*.img_mod.1", "transformer_blocks.*.txt_mod.1")
    modulation = (*in_blocks, "norm_out.linear")
    text = tuple(f"transformer_blocks.0.attn.add_{part}_proj" for part in "qkv")
    known: dict[str, Any] = {
        "condition": ("txt_in",),
        "readers": (modulations(*in_blocks, by="0"), modulations("norm_out.linear")),
        "conditions": ("encoder_hidden_states", "additional_t_cond", "guidance"),
        "live": text,
    }
    # Layered generation adds a label to the timestep's embedding.
    if model.config.get("use_additional_t_cond"):
        return TemporalMap((embedder,), (*modulation, *text), **known)
    return TemporalMap((embedder, *modulation), text, **known)


QWENIMAGE = Family(
    name="qwenimage",
    classes=("QwenImageTransformer2DModel",),
    blocks=in_lists("transformer_blocks"),
    kinds={"QwenImageTransformerBlock": QWENIMAGE_TRANSFORMER_BLOCK},
    temporal=_temporal,
    chained=frozenset({"797a212d8a3d8a89"}),
    sensitive=("img_in", "txt_in", "proj_out"),
)

"""UNets: ``UNet2DModel`` (DDPM) and ``UNet2DConditionModel`` (Stable Diffusion 1, 2 and XL)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from diffuse_compress.families.base import (
    Below,
    BlockKind,
    Branch,
    BranchRole,
    Conditioning,
    Family,
    Streams,
    TemporalMap,
    single_stream,
)
from diffuse_compress.families.basic_block import BASIC_TRANSFORMER_BLOCK, PROCESSORS
from diffuse_compress.families.embedding import Entry, Reader, attended

__all__ = ["UNET_2D", "UNET_2D_CONDITION"]


def _resnet_begin(
    block: Any, input_tensor: torch.Tensor, temb: torch.Tensor | None, *args: Any, **kwargs: Any
) -> tuple[Streams, Conditioning] | None:
    # Deprecated arguments, and the missing embedding of which the class complains.
    if args or kwargs or (temb is None and block.time_embedding_norm == "scale_shift"):
        return None
    streams = {"hidden_states": input_tensor}
    return streams, Conditioning(streams, temb=temb)


def _time_projection(block: Any, conditioning: Conditioning) -> torch.Tensor | None:
    """[batch, channels, 1, 1]: what the timestep adds, or the scale and shift it makes."""

    def compute() -> torch.Tensor | None:
        temb: torch.Tensor | None = conditioning.temb
        if block.time_emb_proj is None:
            return temb
        temb = temb if block.skip_time_act else block.nonlinearity(temb)
        projected: torch.Tensor = block.time_emb_proj(temb)[:, :, None, None]
        return projected

    value: torch.Tensor | None = conditioning.once("time_emb_proj", compute)
    return value


def _resized(block: Any, x: torch.Tensor) -> torch.Tensor:
    if block.upsample is not None:
        # diffusers: nearest upsampling of channels-last tensors fails for large batches.
        resized: torch.Tensor = block.upsample(x.contiguous() if x.shape[0] >= 64 else x)
        return resized
    return x if block.downsample is None else block.downsample(x)


def _resnet(block: Any, streams: Streams, conditioning: Conditioning) -> Streams:
    x = block.nonlinearity(block.norm1(streams["hidden_states"]))
    x = block.conv1(_resized(block, x))
    temb = _time_projection(block, conditioning)
    if temb is not None and block.time_embedding_norm == "scale_shift":
        scale, shift = torch.chunk(temb, 2, dim=1)
        x = block.norm2(x) * (1 + scale) + shift
    else:
        x = block.norm2(x if temb is None else x + temb)
    return {"hidden_states": block.conv2(block.dropout(block.nonlinearity(x)))}


def _add_to_shortcut(block: Any, streams: Streams, deltas: Streams) -> Streams:
    x = _resized(block, streams["hidden_states"])
    if block.conv_shortcut is not None:
        x = block.conv_shortcut(x.contiguous() if block.training else x)
    return {"hidden_states": (x + deltas["hidden_states"]) / block.output_scale_factor}


_RESNET = (
    Branch(
        "resnet", BranchRole.RESNET, _resnet, ("norm1", "conv1", "norm2", "conv2"), _add_to_shortcut, residual=False
    ),
)

RESNET_BLOCK = BlockKind(
    class_name="ResnetBlock2D",
    fingerprints=frozenset({"007a9856a892847a"}),
    begin=_resnet_begin,
    branches=lambda block: _RESNET,
    end=single_stream,
    unsupported=lambda block: (
        None
        if block.time_embedding_norm in ("default", "scale_shift")
        else f"time_embedding_norm={block.time_embedding_norm!r}"
    ),
)


def _attention_begin(
    block: nn.Module,
    hidden_states: torch.Tensor,
    encoder_hidden_states: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    temb: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[Streams, Conditioning] | None:
    # Composed is self-attention over a picture; ``temb`` is for spatial norm only.
    if encoder_hidden_states is not None or attention_mask is not None or kwargs or hidden_states.ndim != 4:
        return None
    streams = {"hidden_states": hidden_states}
    return streams, Conditioning(streams)


def _spatial_attention(block: Any, streams: Streams, conditioning: Conditioning) -> Streams:
    """AttnProcessor2_0 on a picture [batch, channels, height, width], without its residual."""
    x = streams["hidden_states"]
    shape = x.shape
    tokens = x.view(shape[0], shape[1], -1).transpose(1, 2)
    if block.group_norm is not None:
        tokens = block.group_norm(tokens.transpose(1, 2)).transpose(1, 2)
    query, key, value = (
        layer(tokens).unflatten(2, (block.heads, -1)).transpose(1, 2) for layer in (block.to_q, block.to_k, block.to_v)
    )
    output = F.scaled_dot_product_attention(query, key, value, dropout_p=0.0, is_causal=False)
    output = output.transpose(1, 2).reshape(shape[0], -1, block.to_q.out_features).to(query.dtype)
    output = block.to_out[1](block.to_out[0](output))
    return {"hidden_states": output.transpose(-1, -2).reshape(shape)}


def _rescaled(block: Any, streams: Streams, deltas: Streams) -> Streams:
    x = deltas["hidden_states"] + streams["hidden_states"]
    return {"hidden_states": x / block.rescale_output_factor}


_ATTENTION = (
    Branch(
        "attention",
        BranchRole.ATTENTION,
        _spatial_attention,
        ("to_q", "to_k", "to_v", "to_out"),
        _rescaled,
        residual=False,
    ),
)


def _attention_unsupported(block: Any) -> str | None:
    if not block.residual_connection or block.spatial_norm is not None:
        return "attention without a residual of its own, or with spatial norm"
    plain = block.norm_q is None and block.norm_k is None and not block.only_cross_attention
    return None if plain and block.norm_cross is None else "attention with further norms"


SPATIAL_ATTENTION = BlockKind(
    class_name="Attention",
    fingerprints=frozenset({"561659c5ef44a963"}),
    replaced=("diffusers.models.attention_processor:AttnProcessor2_0.__call__",),
    begin=_attention_begin,
    branches=lambda block: _ATTENTION,
    end=single_stream,
    processors=frozenset({"AttnProcessor2_0"}),
    unsupported=_attention_unsupported,
)

_KINDS = {kind.class_name: kind for kind in (RESNET_BLOCK, BASIC_TRANSFORMER_BLOCK, SPATIAL_ATTENTION)}


def _blocks(model: Any, inner: bool = True) -> list[str]:
    """Residual units in the order of the forward pass: down, middle, up; each resnet before its attention.

    ``inner`` lists the blocks inside of each transformer, else the transformer as one.
    """
    down, up = (
        [f"{side}.{index}" for index in range(len(getattr(model, side)))] for side in ("down_blocks", "up_blocks")
    )
    middle = [] if model.mid_block is None else ["mid_block"]
    return [unit for name in (*down, *middle, *up) for unit in _stage(name, model.get_submodule(name), inner)]


def _stage(prefix: str, stage: Any, inner: bool) -> list[str]:
    resnets = getattr(stage, "resnets", None) or ()
    attentions = getattr(stage, "attentions", None) or ()
    # Attention follows the resnet of its index, and the middle ends with a further resnet; NCSN++ has one attention in
    # a stage on the way up, after the last resnet.
    first = 0 if prefix == "mid_block" else len(resnets) - len(attentions)
    names: list[str] = []
    for index in range(len(resnets)):
        names.append(f"{prefix}.resnets.{index}")
        if 0 <= index - first < len(attentions):
            names.extend(_units(f"{prefix}.attentions.{index - first}", attentions[index - first], inner))
    for name, module in stage.named_modules():
        resizes = name.startswith(("downsamplers.", "upsamplers.")) or name in ("resnet_down", "resnet_up")
        if resizes and type(module).__name__ == "ResnetBlock2D":
            names.append(f"{prefix}.{name}")
    return names


def _units(name: str, attention: Any, inner: bool) -> list[str]:
    blocks = getattr(attention, "transformer_blocks", None)
    if inner and blocks is not None:
        return [f"{name}.transformer_blocks.{index}" for index in range(len(blocks))]
    return [] if attention is None else [name]


_STAGES = {
    "down_blocks": ("DownBlock2D", "CrossAttnDownBlock2D", "AttnDownBlock2D"),
    "mid_block": ("UNetMidBlock2D", "UNetMidBlock2DCrossAttn"),
    "up_blocks": ("UpBlock2D", "CrossAttnUpBlock2D", "AttnUpBlock2D"),
}
"""Classes of stages that hand on their picture, and on the way down one for each resnet and one for the downsampler."""


def _below(model: Any) -> Below | None:
    """From the first downsampler to the last stage on the way up but one; None with stages of other classes."""
    down, up, middle = list(model.down_blocks), list(model.up_blocks), model.mid_block
    stages = [("down_blocks", stage) for stage in down] + [("up_blocks", stage) for stage in up]
    stages += [] if middle is None else [("mid_block", middle)]
    alike = all(type(stage).__name__ in _STAGES[side] for side, stage in stages)
    if not alike or len(down) < 2 or len(up) != len(down):
        return None
    samplers = [f"down_blocks.0.downsamplers.{index}" for index in range(len(down[0].downsamplers or ()))]
    return Below(
        (
            *samplers,
            *(f"down_blocks.{index}" for index in range(1, len(down))),
            *(() if middle is None else ("mid_block",)),
            *(f"up_blocks.{index}" for index in range(len(up) - 1)),
        ),
        _idle,
        ("down_block_additional_residuals", "mid_block_additional_residual", "down_intrablock_additional_residuals"),
        frozenset({"ac1a5fe67cc05a85", "270aaf58c4838d24"}),
    )


def _idle(module: Any, hidden_states: torch.Tensor) -> Any:
    if type(module).__name__ not in _STAGES["down_blocks"]:
        return hidden_states
    # Stages on the way up take their skips by number.
    return hidden_states, (hidden_states,) * (len(module.resnets) + (module.downsamplers is not None))


def _time_input(entry: Entry, layer: str) -> torch.Tensor:
    """What a resnet's ``time_emb_proj`` reads."""
    block = entry.parent(layer)
    temb: torch.Tensor = entry["temb"] if block.skip_time_act else block.nonlinearity(entry["temb"])
    return temb


def _temporal(model: Any) -> TemporalMap:
    projections, text = ("*.time_emb_proj",), ("*.attn2.to_k", "*.attn2.to_v")
    config = model.config
    readers = [Reader(projections, ("temb",), _time_input)]
    if config.get("encoder_hid_dim_type") is None:
        # Otherwise the text is projected after the model got it, and before the first block could be asked.
        readers.append(Reader(text, ("encoder_hidden_states",), attended, PROCESSORS))
    known: dict[str, Any] = {
        "condition": (*text, "class_embedding", "add_embedding.*", "encoder_hid_proj"),
        "readers": tuple(readers),
        "conditions": ("encoder_hidden_states", "class_labels", "timestep_cond", "added_cond_kwargs"),
    }
    if config.get("time_cond_proj_dim") is not None:
        # LCM feeds the guidance scale into the time embedding.
        known["condition"] += ("time_embedding.cond_proj",)
        return TemporalMap((), ("time_embedding.linear_*", *projections), **known)
    added = any(config.get(key) is not None for key in ("class_embed_type", "num_class_embeds", "addition_embed_type"))
    if added:
        return TemporalMap(("time_embedding.*",), projections, **known)
    return TemporalMap(("time_embedding.*", *projections), (), **known)


def _family(name: str, class_name: str) -> Family:
    return Family(
        name=name,
        classes=(class_name,),
        blocks=_blocks,
        wholes=lambda model: _blocks(model, inner=False),
        below=_below,
        kinds=_KINDS,
        temporal=_temporal,
        sensitive=("conv_in", "conv_out", "*.conv_shortcut", "*.upsamplers.*.conv"),
    )


UNET_2D = _family("unet2d", "UNet2DModel")
UNET_2D_CONDITION = _family("unet2d_condition", "UNet2DConditionModel")

"""Seeded arguments of a denoiser's forward, for every class of the families, from its configuration alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from diffuse_compress.errors import ConfigError

__all__ = ["denoiser_inputs", "timestep_as_given"]

# Latent frames of a video.
_FRAMES = 2
_FRACTIONS = ("FluxTransformer2DModel", "QwenImageTransformer2DModel")


def denoiser_inputs(
    model: nn.Module, batch: int = 2, seed: int = 0, side: int | None = None, tokens: int = 16
) -> dict[str, Any]:
    """Keyword arguments of ``model.forward``, in the model's dtype and on its device, from a seed.

    Every sample differs, in its timestep too; the last half of the text is masked in the second half of the batch where
    the model takes a mask.

    Args:
        model: a denoiser of diffusers.
        batch: samples.
        seed: of everything that is random.
        side: rows and columns of the latents, before packing; by default the model's ``sample_size``, or 8.
        tokens: of text, unless the model takes a fixed number of them.

    Raises:
        ConfigError: no family describes the class.
    """
    kind = type(model).__name__
    if kind not in _INPUTS:
        raise ConfigError(f"denoiser_inputs: {kind} is none of {', '.join(sorted(_INPUTS))}. Pass inputs of your own.")
    return _INPUTS[kind](_Maker(model, batch, seed, side, tokens))


def timestep_as_given(model: Any, t: torch.Tensor, batch: int) -> torch.Tensor:
    """An element of ``scheduler.timesteps``, [batch], as the pipeline of the class hands it to its model."""
    kind = type(model).__name__
    if kind in _FRACTIONS:
        return t.expand(batch).to(model.dtype) / 1000
    return t.to(model.dtype).expand(batch) if kind == "HunyuanVideoTransformer3DModel" else t.expand(batch)


class _Maker:
    """Seeded tensors in the dtype and on the device of a model."""

    def __init__(self, model: Any, batch: int, seed: int, side: int | None, tokens: int) -> None:
        self.model, self.config, self.batch, self.tokens = model, model.config, batch, tokens
        self.side: int = side or getattr(model.config, "sample_size", None) or 8
        self.dtype, self.device = model.dtype, model.device
        self.generator = torch.Generator("cpu").manual_seed(seed)

    def randn(self, *shape: int) -> torch.Tensor:
        return torch.randn(self.batch, *shape, generator=self.generator).to(self.device, self.dtype)

    def randint(self, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(0, high, (self.batch, *shape), generator=self.generator).to(self.device)

    def full(self, value: float, *shape: int) -> torch.Tensor:
        return torch.full((self.batch, *shape), value, device=self.device, dtype=self.dtype)

    def text(self, width: int) -> torch.Tensor:
        return self.randn(self.tokens, width)

    def timestep(self) -> torch.Tensor:
        return torch.linspace(900, 100, self.batch).round().long().to(self.device)

    def mask(self) -> torch.Tensor:
        mask = torch.ones(self.batch, self.tokens, dtype=torch.long, device=self.device)
        mask[self.batch // 2 :, -self.tokens // 2 :] = 0
        return mask

    def latents(self) -> torch.Tensor:
        return self.randn(self.config.in_channels, self.side, self.side)


def _unconditional(make: _Maker) -> dict[str, Any]:
    inputs = dict(sample=make.latents(), timestep=make.timestep())
    if make.config.num_class_embeds:
        inputs["class_labels"] = make.randint(make.config.num_class_embeds)
    return inputs


def _unet(make: _Maker) -> dict[str, Any]:
    config = make.config
    inputs: dict[str, Any] = dict(sample=make.latents(), timestep=make.timestep())
    inputs["encoder_hidden_states"] = make.text(config.cross_attention_dim)
    if config.addition_embed_type == "text_time":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        sizes = torch.tensor([32.0, 32.0, 0.0, 0.0, 32.0, 32.0], device=make.device, dtype=make.dtype)
        inputs["added_cond_kwargs"] = {"text_embeds": make.randn(pooled), "time_ids": sizes.repeat(make.batch, 1)}
    if config.time_cond_proj_dim:
        inputs["timestep_cond"] = make.randn(config.time_cond_proj_dim)
    return inputs


def _dit(make: _Maker) -> dict[str, Any]:
    labels = make.randint(make.config.num_embeds_ada_norm)
    return dict(hidden_states=make.latents(), timestep=make.timestep(), class_labels=labels)


def _pixart(make: _Maker) -> dict[str, Any]:
    sizes: dict[str, Any] = {"resolution": None, "aspect_ratio": None}
    if make.model.use_additional_conditions:
        sizes = {"resolution": make.full(32.0, 2), "aspect_ratio": make.full(1.0, 1)}
    return dict(
        hidden_states=make.latents(),
        encoder_hidden_states=make.text(make.config.caption_channels),
        timestep=make.timestep(),
        added_cond_kwargs=sizes,
        encoder_attention_mask=make.mask(),
    )


def _sd3(make: _Maker) -> dict[str, Any]:
    return dict(
        hidden_states=make.latents(),
        encoder_hidden_states=make.text(make.config.joint_attention_dim),
        pooled_projections=make.randn(make.config.pooled_projection_dim),
        timestep=make.timestep(),
    )


def _flux(make: _Maker) -> dict[str, Any]:
    side = make.side // 2
    image_ids = torch.zeros(side, side, 3, device=make.device, dtype=make.dtype)
    image_ids[..., 1] += torch.arange(side, device=make.device)[:, None]
    image_ids[..., 2] += torch.arange(side, device=make.device)[None, :]
    return dict(
        hidden_states=make.randn(side * side, make.config.in_channels),
        encoder_hidden_states=make.text(make.config.joint_attention_dim),
        pooled_projections=make.randn(make.config.pooled_projection_dim),
        timestep=(make.timestep() / 1000).to(make.dtype),
        img_ids=image_ids.reshape(-1, 3),
        txt_ids=torch.zeros(make.tokens, 3, device=make.device, dtype=make.dtype),
        guidance=make.full(3.5) if make.config.guidance_embeds else None,
    )


def _qwenimage(make: _Maker) -> dict[str, Any]:
    half = make.side // 2
    return dict(
        hidden_states=make.randn(half * half, make.config.in_channels),
        encoder_hidden_states=make.text(make.config.joint_attention_dim),
        encoder_hidden_states_mask=make.mask(),
        timestep=(make.timestep() / 1000).to(make.dtype),
        img_shapes=[[(1, half, half)]] * make.batch,
    )


def _wan(make: _Maker) -> dict[str, Any]:
    return dict(
        hidden_states=make.randn(make.config.in_channels, _FRAMES, make.side, make.side),
        timestep=make.timestep(),
        encoder_hidden_states=make.text(make.config.text_dim),
    )


def _cogvideox(make: _Maker) -> dict[str, Any]:
    config = make.config
    if not config.use_rotary_positional_embeddings:
        make.tokens = config.max_text_seq_length  # positions are added to so many
    inputs = dict(
        hidden_states=make.randn(_FRAMES, config.in_channels, make.side, make.side),
        encoder_hidden_states=make.text(config.text_embed_dim),
        timestep=make.timestep(),
    )
    if config.ofs_embed_dim:
        inputs["ofs"] = torch.full((1,), 2.0, device=make.device, dtype=make.dtype)
    return inputs


def _hunyuan_video(make: _Maker) -> dict[str, Any]:
    config = make.config
    return dict(
        hidden_states=make.randn(config.in_channels, _FRAMES, make.side, make.side),
        timestep=make.timestep(),
        encoder_hidden_states=make.text(config.text_embed_dim),
        encoder_attention_mask=make.mask(),
        pooled_projections=make.randn(config.pooled_projection_dim),
        guidance=make.full(6000.0) if config.guidance_embeds else None,
    )


_INPUTS: dict[str, Callable[[_Maker], dict[str, Any]]] = {
    "CogVideoXTransformer3DModel": _cogvideox,
    "DiTTransformer2DModel": _dit,
    "FluxTransformer2DModel": _flux,
    "HunyuanVideoTransformer3DModel": _hunyuan_video,
    "PixArtTransformer2DModel": _pixart,
    "QwenImageTransformer2DModel": _qwenimage,
    "SD3Transformer2DModel": _sd3,
    "UNet2DConditionModel": _unet,
    "UNet2DModel": _unconditional,
    "WanTransformer3DModel": _wan,
}

"""Small models of stock classes for which the package has no hand-written knowledge, with inputs for their forward.

`unknown_classes()` gives class and configuration by name, `forward_kwargs(name)` the keyword arguments of a forward
pass. Depth and widths are reduced, the structure is the real one: every kind of block, at least two of each in a row
where the class allows it. Inner widths are multiples of 128 where that is cheap, so that common group sizes fit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

TOKENS = 16


def unknown_classes() -> dict[str, tuple[type[nn.Module], dict[str, Any]]]:
    """Class and configuration by a short name."""
    import diffusers

    return {
        "sana": (
            diffusers.SanaTransformer2DModel,
            dict(
                in_channels=4,
                out_channels=4,
                num_attention_heads=4,
                attention_head_dim=32,
                num_layers=2,
                num_cross_attention_heads=4,
                cross_attention_head_dim=32,
                cross_attention_dim=128,
                caption_channels=64,
                sample_size=8,
            ),
        ),
        "lumina2": (
            diffusers.Lumina2Transformer2DModel,
            dict(
                sample_size=8,
                patch_size=2,
                in_channels=4,
                hidden_size=128,
                num_layers=2,
                num_refiner_layers=2,
                num_attention_heads=4,
                num_kv_heads=2,
                multiple_of=64,
                axes_dim_rope=(16, 8, 8),
                axes_lens=(64, 32, 32),
                cap_feat_dim=64,
            ),
        ),
        "auraflow": (
            diffusers.AuraFlowTransformer2DModel,
            dict(
                sample_size=8,
                patch_size=2,
                in_channels=4,
                out_channels=4,
                num_mmdit_layers=2,
                num_single_dit_layers=2,
                attention_head_dim=32,
                num_attention_heads=4,
                joint_attention_dim=64,
                caption_projection_dim=128,
                pos_embed_max_size=64,
            ),
        ),
        "ltx_video": (
            diffusers.LTXVideoTransformer3DModel,
            dict(
                in_channels=16,
                out_channels=16,
                num_attention_heads=4,
                attention_head_dim=32,
                cross_attention_dim=128,
                num_layers=2,
                caption_channels=64,
            ),
        ),
        "mochi": (
            diffusers.MochiTransformer3DModel,
            dict(
                patch_size=2,
                num_attention_heads=4,
                attention_head_dim=32,
                num_layers=2,
                pooled_projection_dim=64,
                in_channels=4,
                text_embed_dim=64,
                time_embed_dim=64,
                max_sequence_length=TOKENS,
            ),
        ),
        "hidream": (
            diffusers.HiDreamImageTransformer2DModel,
            dict(
                patch_size=2,
                in_channels=4,
                out_channels=4,
                num_layers=2,
                num_single_layers=2,
                attention_head_dim=32,
                num_attention_heads=4,
                caption_channels=[64, 32],
                text_emb_dim=64,
                num_routed_experts=2,
                num_activated_experts=2,
                axes_dims_rope=(16, 8, 8),
                max_resolution=(16, 16),
                llama_layers=[0, 1, 0, 1],
                force_inference_output=True,
            ),
        ),
        "z_image": (
            diffusers.ZImageTransformer2DModel,
            dict(
                in_channels=4,
                dim=128,
                n_layers=2,
                n_refiner_layers=2,
                n_heads=4,
                n_kv_heads=4,
                cap_feat_dim=64,
                axes_dims=[16, 8, 8],
                axes_lens=[256, 32, 32],
            ),
        ),
        "chroma": (
            diffusers.ChromaTransformer2DModel,
            dict(
                patch_size=1,
                in_channels=16,
                num_layers=2,
                num_single_layers=2,
                attention_head_dim=32,
                num_attention_heads=4,
                joint_attention_dim=64,
                axes_dims_rope=(8, 12, 12),
                approximator_num_channels=16,
                approximator_hidden_dim=64,
                approximator_layers=2,
            ),
        ),
        "stable_cascade": (
            diffusers.StableCascadeUNet,
            dict(
                in_channels=4,
                out_channels=4,
                timestep_ratio_embedding_dim=16,
                conditioning_dim=64,
                block_out_channels=(128, 128),
                num_attention_heads=(4, 4),
                down_num_layers_per_block=(1, 2),
                up_num_layers_per_block=(2, 1),
                clip_text_in_channels=64,
                clip_text_pooled_in_channels=64,
                clip_image_in_channels=64,
                switch_level=(False,),
            ),
        ),
        "kandinsky3": (
            diffusers.Kandinsky3UNet,
            dict(
                in_channels=4,
                time_embedding_dim=64,
                groups=8,
                attention_head_dim=16,
                layers_per_block=2,
                block_out_channels=(32, 64),
                cross_attention_dim=64,
                encoder_hid_dim=64,
            ),
        ),
    }


def build(name: str, seed: int = 0) -> nn.Module:
    """The model ``name`` of `unknown_classes` with random weights, in eval mode; the global random state is kept."""
    cls, config = unknown_classes()[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = cls(**config).eval()
        for parameter in model.parameters():
            if parameter.dim() < 2 or not parameter.any():
                parameter.data.add_(torch.randn_like(parameter) * 0.02)
    return model


def forward_kwargs(name: str, batch: int = 2, seed: int = 0) -> dict[str, Any]:
    """Keyword arguments of ``build(name).forward``; every sample has its own timestep."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    time = torch.linspace(50, 950, batch)
    latents, text, mask = randn(batch, 4, 8, 8), randn(batch, TOKENS, 64), torch.ones(batch, TOKENS, dtype=torch.bool)
    if name == "sana":
        return dict(hidden_states=latents, encoder_hidden_states=text, timestep=time)
    if name == "lumina2":
        return dict(
            hidden_states=latents, encoder_hidden_states=text, timestep=time / 1000, encoder_attention_mask=mask
        )
    if name == "auraflow":
        return dict(hidden_states=latents, encoder_hidden_states=text, timestep=time / 1000)
    if name == "ltx_video":
        frames, height, width = 2, 4, 4
        return dict(
            hidden_states=randn(batch, frames * height * width, 16),
            encoder_hidden_states=text,
            timestep=time,
            encoder_attention_mask=mask,
            num_frames=frames,
            height=height,
            width=width,
        )
    if name == "mochi":
        return dict(
            hidden_states=randn(batch, 4, 2, 8, 8),
            encoder_hidden_states=text,
            timestep=time,
            encoder_attention_mask=mask,
        )
    if name == "hidream":
        return dict(
            hidden_states=latents,
            timesteps=time,
            encoder_hidden_states_t5=text,
            encoder_hidden_states_llama3=randn(2, batch, TOKENS, 32),
            pooled_embeds=randn(batch, 64),
        )
    if name == "z_image":
        return dict(
            x=[randn(4, 1, 8, 8) for _ in range(batch)],
            cap_feats=[randn(TOKENS, 64) for _ in range(batch)],
            t=time / 1000,
        )
    if name == "chroma":
        grid = torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(4.0))
        return dict(
            hidden_states=randn(batch, 16, 16),
            encoder_hidden_states=text,
            timestep=time / 1000,
            img_ids=grid,
            txt_ids=torch.zeros(TOKENS, 3),
            attention_mask=torch.ones(batch, TOKENS + 16, dtype=torch.bool),
        )
    if name == "stable_cascade":
        return dict(
            sample=latents,
            timestep_ratio=time / 1000,
            clip_text_pooled=randn(batch, 1, 64),
            clip_text=text,
            clip_img=randn(batch, 1, 64),
        )
    if name == "kandinsky3":
        return dict(sample=latents, timestep=time, encoder_hidden_states=text, encoder_attention_mask=mask.long())
    raise KeyError(name)

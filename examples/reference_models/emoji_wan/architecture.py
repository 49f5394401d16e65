"""The untrained components of the pipeline. Every size that was chosen by hand stands in this file.

Budget: at 16 bits all components together must stay below 6 MiB, and every ``nn.Linear`` inside the
transformer blocks must have ``in_features`` divisible by 128 (one 4-bit group).
"""

from __future__ import annotations

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanTransformer3DModel
from training.diffusion import initialise_linears
from transformers import UMT5Config, UMT5EncoderModel

# Longest caption: 12 words and the end token. The cross-attention sees the padding too, as zeros.
MAX_TOKENS = 16
TEXT_WIDTH = 128
# Channels, frames, height and width of a clip's latents: 4 frames in one but for the first, 4 x 4 pixels.
# (Wan's own autoencoder takes 8 x 8 pixels together, which blurs glyphs as small as these.)
LATENT_SHAPE = (8, 3, 16, 16)
# Wan 2.1's for small frames: noise levels s u / (1 + (s - 1) u) of uniform u.
FLOW_SHIFT = 3.0


def build_text_encoder(vocab_size: int) -> UMT5EncoderModel:
    """Two UMT5 encoder layers of width 128, trained together with the transformer."""
    config = UMT5Config(
        vocab_size=vocab_size,
        d_model=TEXT_WIDTH,
        d_kv=32,
        d_ff=256,
        num_heads=4,
        num_layers=2,
        dropout_rate=0.0,
        relative_attention_num_buckets=16,
        relative_attention_max_distance=32,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )
    return UMT5EncoderModel(config)


def build_vae(latents_mean: list[float] | None = None, latents_std: list[float] | None = None) -> AutoencoderKLWan:
    """9 frames of 64 x 64 x 3 to 3 of 16 x 16 x 8, causal in time."""
    channels = LATENT_SHAPE[0]
    return AutoencoderKLWan(
        base_dim=16,
        z_dim=channels,
        dim_mult=[1, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        scale_factor_spatial=4,
        latents_mean=latents_mean or [0.0] * channels,
        latents_std=latents_std or [1.0] * channels,
    )


def build_transformer() -> WanTransformer3DModel:
    """Six layers of width 128 (4 heads of 32) on 3 x 8 x 8 tokens."""
    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=4,
        attention_head_dim=32,
        in_channels=LATENT_SHAPE[0],
        out_channels=LATENT_SHAPE[0],
        text_dim=TEXT_WIDTH,
        freq_dim=128,
        ffn_dim=512,
        num_layers=6,
        rope_max_seq_len=64,
    )


def initialise_transformer(transformer: WanTransformer3DModel) -> None:
    """Wan's initialisation (Wan team 2025, arXiv 2503.20314, official code), in place.

    Xavier linears, small embeddings, and a silent output.
    """
    initialise_linears(transformer)
    torch.nn.init.xavier_uniform_(transformer.patch_embedding.weight.flatten(1))
    embedders = (transformer.condition_embedder.text_embedder, transformer.condition_embedder.time_embedder)
    for embedder in embedders:
        torch.nn.init.normal_(embedder.linear_1.weight, std=0.02)
        torch.nn.init.normal_(embedder.linear_2.weight, std=0.02)
    torch.nn.init.zeros_(transformer.proj_out.weight)


def build_scheduler() -> UniPCMultistepScheduler:
    """The scheduler of Wan 2.1: flow matching, UniPC of order 2."""
    return UniPCMultistepScheduler(
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=FLOW_SHIFT,
        num_train_timesteps=1000,
    )

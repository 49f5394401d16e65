"""The untrained components of the pipeline. Every size that was chosen by hand stands in this file.

Budget: at 16 bits all components together must stay below 12 MiB, and every ``nn.Linear`` inside
the transformer blocks must have ``in_features`` divisible by 128 (one 4-bit group).
"""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, PixArtTransformer2DModel
from training.diffusion import initialise_linears
from transformers import T5Config, T5EncoderModel, T5Tokenizer

# Longest caption: 11 words and the end token.
MAX_TOKENS = 16
TEXT_WIDTH = 128
LATENT_CHANNELS, LATENT_SIZE = 4, 16


def build_tokenizer(captions: list[str]) -> T5Tokenizer:
    """A stock T5 tokenizer whose unigram pieces are the captions' words, whole.

    All pieces score the same, so that the shortest split, the whole word, always wins. Of a word
    outside of the vocabulary the known beginning is kept: "hearts" reads as "heart" + unknown.
    """
    words = sorted({word for caption in captions for word in caption.split()})
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [("▁" + word, -1.0) for word in words]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=120)


def build_text_encoder(vocab_size: int) -> T5EncoderModel:
    """Two T5 encoder layers of width 128, trained together with the transformer."""
    config = T5Config(
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
    return T5EncoderModel(config)


def build_vae() -> AutoencoderKL:
    """64 x 64 x 3 pictures to 16 x 16 x 4 latents."""
    return AutoencoderKL(
        block_out_channels=(32, 48, 48),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        norm_num_groups=16,
        latent_channels=LATENT_CHANNELS,
        sample_size=64,
        scaling_factor=1.0,
    )


def build_transformer() -> PixArtTransformer2DModel:
    """Width 256 (4 heads of 64), 64 tokens; learned sigma is predicted, never trained, as unused."""
    return PixArtTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=64,
        cross_attention_dim=256,
        caption_channels=TEXT_WIDTH,
        in_channels=LATENT_CHANNELS,
        out_channels=2 * LATENT_CHANNELS,
        num_layers=4,
        sample_size=LATENT_SIZE,
        patch_size=2,
        interpolation_scale=1,
    )


def initialise_transformer(transformer: PixArtTransformer2DModel) -> None:
    """PixArt's initialisation (Chen et al. 2023, arXiv 2310.00426, official code), in place.

    Xavier linears, small modulation, and zero where a branch meets the residual of the output.
    """
    initialise_linears(transformer)
    patches = transformer.pos_embed.proj
    torch.nn.init.xavier_uniform_(patches.weight.view(patches.out_channels, -1))
    embedder = transformer.adaln_single.emb.timestep_embedder
    for linear in (embedder.linear_1, embedder.linear_2, transformer.adaln_single.linear):
        torch.nn.init.normal_(linear.weight, std=0.02)
    for linear in (transformer.caption_projection.linear_1, transformer.caption_projection.linear_2):
        torch.nn.init.normal_(linear.weight, std=0.02)
    for block in transformer.transformer_blocks:
        torch.nn.init.zeros_(block.attn2.to_out[0].weight)
    torch.nn.init.zeros_(transformer.proj_out.weight)


def build_scheduler() -> DPMSolverMultistepScheduler:
    """The scheduler of PixArt-alpha: linear betas, epsilon prediction, DPM-Solver++ of order 2."""
    return DPMSolverMultistepScheduler(
        num_train_timesteps=1000,
        beta_start=0.0001,
        beta_end=0.02,
        beta_schedule="linear",
        prediction_type="epsilon",
        algorithm_type="dpmsolver++",
        solver_order=2,
    )

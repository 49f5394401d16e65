"""The untrained components of the pipeline. Every size that was chosen by hand stands in this file.

Budget: at 16 bits all components but the autoencoder, which is that of emoji_pixart, must stay below
5 MiB, and every ``nn.Linear`` inside the transformer blocks must have ``in_features`` divisible by
128 (one 4-bit group).
"""

from __future__ import annotations

import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel
from training.diffusion import initialise_linears

# ImageNet's, because `DiTPipeline` takes 1000 for the class of no class.
CLASSES = 1000
NULL_CLASS = 1000
LATENT_CHANNELS, LATENT_SIZE = 4, 16


def build_transformer() -> DiTTransformer2DModel:
    """Five layers of width 128 (4 heads of 32) on 64 tokens; no learned sigma."""
    return DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=32,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=5,
        sample_size=LATENT_SIZE,
        patch_size=2,
        num_embeds_ada_norm=CLASSES,
    )


def tie_embedders(transformer: DiTTransformer2DModel) -> None:
    """Let all blocks use the first one's timestep and class embedders, in place.

    DiT has one set of them; diffusers gives each block its own, and the published checkpoints
    repeat the one in all blocks. The embedder's own label dropout is turned off, because each block
    would draw its own: labels are dropped before.
    """
    embedder = transformer.transformer_blocks[0].norm1.emb
    embedder.class_embedder.dropout_prob = 0.0
    for block in transformer.transformer_blocks:
        block.norm1.emb = embedder


def untie_embedders(transformer: DiTTransformer2DModel) -> DiTTransformer2DModel:
    """The same weights in a stock transformer, whose blocks hold an embedder each."""
    stock = build_transformer()
    stock.load_state_dict(transformer.state_dict())
    return stock.eval()


def initialise_transformer(transformer: DiTTransformer2DModel) -> None:
    """DiT's initialisation (Peebles and Xie 2022, arXiv 2212.09748, official code), in place.

    Xavier linears, small embeddings, and zero where a block or the output meets the residual.
    """
    initialise_linears(transformer)
    torch.nn.init.xavier_uniform_(transformer.pos_embed.proj.weight.flatten(1))
    torch.nn.init.zeros_(transformer.pos_embed.proj.bias)
    for block in transformer.transformer_blocks:
        embedder = block.norm1.emb
        torch.nn.init.normal_(embedder.class_embedder.embedding_table.weight, std=0.02)
        torch.nn.init.normal_(embedder.timestep_embedder.linear_1.weight, std=0.02)
        torch.nn.init.normal_(embedder.timestep_embedder.linear_2.weight, std=0.02)
        torch.nn.init.zeros_(block.norm1.linear.weight)
    torch.nn.init.zeros_(transformer.proj_out_1.weight)
    torch.nn.init.zeros_(transformer.proj_out_2.weight)


def build_scheduler() -> DDIMScheduler:
    """The noise levels of DiT, sampled by DDIM from the last one down."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.0001,
        beta_end=0.02,
        beta_schedule="linear",
        prediction_type="epsilon",
        clip_sample=False,
        timestep_spacing="trailing",
    )

"""The untrained components of the pipeline. Every size that was chosen by hand stands in this file.

Budget: at 16 bits all components but the autoencoder, which is that of emoji_pixart, must stay below 5 MiB.
"""

from __future__ import annotations

import json

import torch
from diffusers import DPMSolverMultistepScheduler, UNet2DConditionModel
from tokenizers.trainers import BpeTrainer
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

# Longest caption, with its two end tokens. Stable Diffusion pads to the tokenizer's limit and lets
# the attentions see the padding, so that this length is part of the model.
MAX_TOKENS = 16
VOCABULARY = 1024
TEXT_WIDTH = 128
LATENT_CHANNELS, LATENT_SIZE = 4, 16
BEGIN, END = "<|startoftext|>", "<|endoftext|>"


def build_tokenizer(captions: list[str]) -> CLIPTokenizer:
    """A stock CLIP tokenizer whose merges were learned from the captions: rare words are split."""
    backend = CLIPTokenizer().backend_tokenizer
    trainer = BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[BEGIN, END],
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    backend.train_from_iterator(captions, trainer)
    model = json.loads(backend.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    return CLIPTokenizer(vocab=model["vocab"], merges=merges, model_max_length=MAX_TOKENS)


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Two CLIP layers of width 128, trained together with the UNet."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=2 * TEXT_WIDTH,
        projection_dim=TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def build_unet() -> UNet2DConditionModel:
    """Stable Diffusion 1's structure with two levels: attention at 16 x 16 and, in the middle, at 8 x 8."""
    unet = UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=(64, 96),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        # The number of heads, in spite of its name (in Stable Diffusion 1 too).
        attention_head_dim=4,
        cross_attention_dim=TEXT_WIDTH,
        time_embedding_dim=128,
        norm_num_groups=16,
    )
    torch.nn.init.zeros_(unet.conv_out.weight)
    return unet


def build_scheduler() -> DPMSolverMultistepScheduler:
    """Stable Diffusion 1's noise levels, and DPM-Solver++: PNDM breaks at 20 steps from guidance 2.5 on."""
    return DPMSolverMultistepScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="epsilon",
        timestep_spacing="leading",
        steps_offset=1,
    )

"""What models that predict noise train on: noisy latents of drawn emoji, captions, and a weighted squared error."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import nn
from training.common import mixed_precision
from training.glyphs import ALIASES, augment

EMPTY_CAPTION_SHARE = 0.1
# Weight of a timestep: min(SNR, gamma) / SNR for epsilon prediction (Hang et al. 2023,
# arXiv 2303.09556, eq. 8, gamma as published).
MIN_SNR_GAMMA = 5.0


class NoiseSchedule(nn.Module):
    """The noise levels of a scheduler, on the device of the model that holds them.

    Args: scheduler: any of diffusers with ``alphas_cumprod``, for epsilon prediction.
    """

    def __init__(self, scheduler):
        super().__init__()
        alphas = scheduler.alphas_cumprod
        snr = alphas / (1 - alphas)
        self.register_buffer("signal", alphas.sqrt(), persistent=False)
        self.register_buffer("noise", (1 - alphas).sqrt(), persistent=False)
        self.register_buffer("weight", snr.clamp(max=MIN_SNR_GAMMA) / snr, persistent=False)

    def add_noise(self, clean: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """clean, noise: [b, c, h, w]. timesteps: [b] int64."""
        shape = (-1, 1, 1, 1)
        return self.signal[timesteps].view(shape) * clean + self.noise[timesteps].view(shape) * noise

    def loss(self, prediction: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Weighted mean squared error of the predicted noise; both [b, c, h, w]."""
        error = (prediction.float() - noise).square().mean((1, 2, 3))
        return (error * self.weight[timesteps]).mean()


def draw_timesteps(count: int, device: torch.device) -> torch.Tensor:
    """One timestep, of 1,000, out of each of ``count`` equal intervals: a less noisy loss than free draws."""
    strata = torch.arange(count, device=device) + torch.rand(count, device=device)
    return (strata * (1000 / count)).long().clamp(max=999)


def initialise_linears(model: nn.Module) -> None:
    """Xavier weights and no bias in every linear, in place: where DiT's and PixArt's initialisations begin."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def shared_vae() -> AutoencoderKL:
    """Of emoji_pixart, ready for use by the models whose folders link to it."""
    vae = AutoencoderKL.from_pretrained(Path(__file__).resolve().parents[1] / "emoji_pixart" / "vae")
    return vae.eval().requires_grad_(False)


@torch.no_grad()
def encode_pictures(vae, pictures: torch.Tensor) -> torch.Tensor:
    """Posterior means times the scaling factor: what the denoiser learns to draw."""
    return vae.encode(pictures).latent_dist.mean.float() * vae.config.scaling_factor


@torch.no_grad()
def latent_cache(vae, glyphs: torch.Tensor, copies: int) -> torch.Tensor:
    """Scaled latents of ``copies`` augmentations of each glyph: [n, copies, c, h, w] bf16."""
    latents = []
    for glyph in glyphs:
        with mixed_precision(glyphs.device):
            pictures = augment(glyph.expand(copies, -1, -1, -1))
            latents.append(encode_pictures(vae, pictures).bfloat16())
    return torch.stack(latents)


def draw_cached(cache: torch.Tensor, batch_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random pictures of a cache [n, copies, ...], and their glyphs' rows: [b, ...] and [b] int64."""
    classes, copies = cache.shape[:2]
    labels = torch.randint(classes, (batch_size,), device=cache.device)
    return cache[labels, torch.randint(copies, (batch_size,), device=cache.device)], labels


@dataclass
class CaptionTable:
    """Token ids and masks of all captions; the last row is the empty caption.

    Attributes: ids, mask: [rows, tokens] int64. alias_row: [classes] int64, the row of the
    class's alias, or its own row if it has none.
    """

    ids: torch.Tensor
    mask: torch.Tensor
    alias_row: torch.Tensor

    @classmethod
    def build(cls, tokenizer, captions: list[str], max_tokens: int, device: torch.device) -> CaptionTable:
        """Padded to max_tokens as a pipeline does."""
        aliased = [caption for caption in captions if caption in ALIASES]
        texts = captions + [ALIASES[caption] for caption in aliased] + [""]
        tokens = tokenizer(texts, padding="max_length", max_length=max_tokens, truncation=True, return_tensors="pt")
        alias_row = torch.arange(len(captions))
        for offset, caption in enumerate(aliased):
            alias_row[captions.index(caption)] = len(captions) + offset
        parts = (tokens.input_ids, tokens.attention_mask, alias_row)
        return cls(*(part.to(device) for part in parts))

    def draw(self, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and masks [b, tokens] for class labels [b]: some aliased, some emptied."""
        alias, empty = torch.rand(2, len(labels), device=labels.device)
        rows = torch.where(alias < 0.5, self.alias_row[labels], labels)
        rows = torch.where(empty < EMPTY_CAPTION_SHARE, len(self.ids) - 1, rows)
        return self.ids[rows], self.mask[rows]

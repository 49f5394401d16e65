"""Stage 3: the transformer and its text encoder, together, on latents of augmented glyphs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from architecture import (
    MAX_TOKENS,
    build_scheduler,
    build_text_encoder,
    build_tokenizer,
    build_transformer,
    initialise_transformer,
)
from stages.vae import encode_pictures
from torch import nn
from training.common import mixed_precision
from training.glyphs import ALIASES, augment
from training.trainer import Trainer

STATE_NAME = "diffusion"
PEAK_LEARNING_RATE = 1e-3
EMPTY_CAPTION_SHARE = 0.1
UNKNOWN_WORD_SHARE = 0.03
# Weight of a timestep: min(SNR, gamma) / SNR for epsilon prediction (Hang et al. 2023,
# arXiv 2303.09556, eq. 8, gamma as published).
MIN_SNR_GAMMA = 5.0
UNKNOWN_TOKEN = 2


@dataclass
class CaptionTable:
    """Token ids and masks of all captions; the last row is the empty caption.

    Attributes: ids, mask: [rows, MAX_TOKENS] int64. alias_row: [classes] int64, the row of the
    class's alias, or its own row if it has none.
    """

    ids: torch.Tensor
    mask: torch.Tensor
    alias_row: torch.Tensor

    @classmethod
    def build(cls, tokenizer, captions: list[str], device: torch.device) -> CaptionTable:
        aliased = [caption for caption in captions if caption in ALIASES]
        texts = captions + [ALIASES[caption] for caption in aliased] + [""]
        tokens = tokenizer(texts, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt")
        alias_row = torch.arange(len(captions))
        for offset, caption in enumerate(aliased):
            alias_row[captions.index(caption)] = len(captions) + offset
        parts = (tokens.input_ids, tokens.attention_mask, alias_row)
        return cls(*(part.to(device) for part in parts))

    def draw(self, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and masks [b, MAX_TOKENS] for class labels [b]: aliased, dropped and blurred."""
        alias, empty = torch.rand(2, len(labels), device=labels.device)
        rows = torch.where(alias < 0.5, self.alias_row[labels], labels)
        rows = torch.where(empty < EMPTY_CAPTION_SHARE, len(self.ids) - 1, rows)
        ids = self.ids[rows]
        unknown = torch.rand(ids.shape, device=ids.device) < UNKNOWN_WORD_SHARE
        return torch.where(unknown & (ids > UNKNOWN_TOKEN), UNKNOWN_TOKEN, ids), self.mask[rows]


@torch.no_grad()
def latent_cache(vae, glyphs: torch.Tensor, copies: int) -> torch.Tensor:
    """Scaled latents of ``copies`` augmentations of each glyph: [n, copies, 4, 16, 16] bf16."""
    latents = []
    for glyph in glyphs:
        with mixed_precision(glyphs.device):
            pictures = augment(glyph.expand(copies, -1, -1, -1))
            latents.append(encode_pictures(vae, pictures).bfloat16())
    return torch.stack(latents)


class DiffusionModel(nn.Module):
    """Text encoder, transformer and noise schedule as one module, so that they compile as one."""

    def __init__(self, vocab_size: int):
        super().__init__()
        self.text_encoder = build_text_encoder(vocab_size)
        self.transformer = build_transformer()
        initialise_transformer(self.transformer)
        alphas = build_scheduler().alphas_cumprod
        snr = alphas / (1 - alphas)
        self.register_buffer("signal", alphas.sqrt(), persistent=False)
        self.register_buffer("noise", (1 - alphas).sqrt(), persistent=False)
        self.register_buffer("weight", snr.clamp(max=MIN_SNR_GAMMA) / snr, persistent=False)

    def forward(
        self,
        latents: torch.Tensor,
        noise: torch.Tensor,
        timesteps: torch.Tensor,
        ids: torch.Tensor,
        mask: torch.Tensor,
    ) -> torch.Tensor:
        """Weighted mean squared error of the predicted noise.

        Args: latents, noise: [b, 4, 16, 16]. timesteps: [b] int64. ids, mask: [b, MAX_TOKENS].
        """
        text = self.text_encoder(ids, attention_mask=mask)[0]
        shape = (-1, 1, 1, 1)
        noisy = self.signal[timesteps].view(shape) * latents
        noisy = noisy + self.noise[timesteps].view(shape) * noise
        prediction = self.transformer(
            noisy,
            encoder_hidden_states=text,
            encoder_attention_mask=mask,
            timestep=timesteps,
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
            return_dict=False,
        )[0]
        # The second half of the channels is the learned sigma, which the pipeline drops.
        error = (prediction[:, : latents.shape[1]].float() - noise).square().mean((1, 2, 3))
        return (error * self.weight[timesteps]).mean()


def draw_batch(cache: torch.Tensor, captions: CaptionTable, batch_size: int) -> tuple:
    """Arguments of `DiffusionModel.forward`: random pictures, noise and stratified timesteps."""
    classes, copies = cache.shape[:2]
    device = cache.device
    labels = torch.randint(classes, (batch_size,), device=device)
    latents = cache[labels, torch.randint(copies, (batch_size,), device=device)].float()
    # One timestep out of each of batch_size equal intervals: a less noisy loss.
    strata = torch.arange(batch_size, device=device) + torch.rand(batch_size, device=device)
    timesteps = (strata * (1000 / batch_size)).long().clamp(max=999)
    return latents, torch.randn_like(latents), timesteps, *captions.draw(labels)


class DiffusionTrainer(Trainer):
    """Stage 3: the model with the tokenizer and the captions it is trained on.

    Args: cache: [n, copies, 4, 16, 16] latents on the training device; None to load a state only.
    """

    def __init__(
        self,
        captions: list[str],
        device: torch.device,
        compiled: bool,
        cache: torch.Tensor | None = None,
        batch_size: int = 512,
    ):
        self.tokenizer = build_tokenizer(captions + list(ALIASES.values()))
        self.captions = CaptionTable.build(self.tokenizer, captions, device)
        model = DiffusionModel(len(self.tokenizer)).to(device)

        def draw() -> tuple:
            return draw_batch(cache, self.captions, batch_size)

        super().__init__(model, draw, name=STATE_NAME, peak_learning_rate=PEAK_LEARNING_RATE, compiled=compiled)

"""Stage 3: the transformer and its text encoder, together, on latents of augmented glyphs."""

from __future__ import annotations

import torch
from architecture import (
    MAX_TOKENS,
    build_scheduler,
    build_text_encoder,
    build_tokenizer,
    build_transformer,
    initialise_transformer,
)
from torch import nn
from training.diffusion import CaptionTable, NoiseSchedule, draw_cached, draw_timesteps
from training.glyphs import ALIASES
from training.trainer import Trainer

STATE_NAME = "diffusion"
PEAK_LEARNING_RATE = 1e-3
UNKNOWN_WORD_SHARE = 0.03
UNKNOWN_TOKEN = 2


class DiffusionModel(nn.Module):
    """Text encoder, transformer and noise schedule as one module, so that they compile as one."""

    def __init__(self, vocab_size: int):
        super().__init__()
        self.text_encoder = build_text_encoder(vocab_size)
        self.transformer = build_transformer()
        initialise_transformer(self.transformer)
        self.schedule = NoiseSchedule(build_scheduler())

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
        noisy = self.schedule.add_noise(latents, noise, timesteps)
        prediction = self.transformer(
            noisy,
            encoder_hidden_states=text,
            encoder_attention_mask=mask,
            timestep=timesteps,
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
            return_dict=False,
        )[0]
        # The second half of the channels is the learned sigma, which the pipeline drops.
        return self.schedule.loss(prediction[:, : latents.shape[1]], noise, timesteps)


def draw_batch(cache: torch.Tensor, captions: CaptionTable, batch_size: int) -> tuple:
    """Arguments of `DiffusionModel.forward`: random pictures, noise and stratified timesteps."""
    latents, labels = draw_cached(cache, batch_size)
    latents = latents.float()
    timesteps = draw_timesteps(batch_size, cache.device)
    ids, mask = captions.draw(labels)
    unknown = torch.rand(ids.shape, device=ids.device) < UNKNOWN_WORD_SHARE
    ids = torch.where(unknown & (ids > UNKNOWN_TOKEN), UNKNOWN_TOKEN, ids)
    return latents, torch.randn_like(latents), timesteps, ids, mask


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
        self.captions = CaptionTable.build(self.tokenizer, captions, MAX_TOKENS, device)
        model = DiffusionModel(len(self.tokenizer)).to(device)

        def draw() -> tuple:
            return draw_batch(cache, self.captions, batch_size)

        super().__init__(model, draw, name=STATE_NAME, peak_learning_rate=PEAK_LEARNING_RATE, compiled=compiled)

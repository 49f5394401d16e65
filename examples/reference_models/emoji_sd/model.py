"""UNet and text encoder with their loss, the latents and captions they learn from, and their pipeline."""

from __future__ import annotations

import torch
from architecture import MAX_TOKENS, build_scheduler, build_text_encoder, build_unet
from diffusers import AutoencoderKL, StableDiffusionPipeline
from torch import nn
from training.diffusion import CaptionTable, NoiseSchedule, draw_cached, draw_timesteps
from training.export import averaged
from training.trainer import Trainer
from transformers import CLIPTokenizer

STATE_NAME = "sd"
PEAK_LEARNING_RATE = 1e-3


class DiffusionModel(nn.Module):
    """Text encoder, UNet and noise schedule as one module, so that they compile as one."""

    def __init__(self, tokenizer: CLIPTokenizer):
        super().__init__()
        self.text_encoder = build_text_encoder(tokenizer)
        self.unet = build_unet()
        self.schedule = NoiseSchedule(build_scheduler())

    def forward(
        self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor, ids: torch.Tensor
    ) -> torch.Tensor:
        """Loss of the predicted noise.

        Args: latents, noise: [b, 4, 16, 16]. timesteps: [b] int64. ids: [b, MAX_TOKENS].
        """
        # Without a mask, as in the pipeline.
        text = self.text_encoder(ids)[0]
        noisy = self.schedule.add_noise(latents, noise, timesteps)
        prediction = self.unet(noisy, timesteps, encoder_hidden_states=text, return_dict=False)[0]
        return self.schedule.loss(prediction, noise, timesteps)


class DiffusionTrainer(Trainer):
    """The model with the tokenizer and the captions it is trained on.

    Args: cache: [n, copies, 4, 16, 16] latents on the training device; None to load a state only.
    """

    def __init__(
        self,
        tokenizer: CLIPTokenizer,
        captions: list[str],
        device: torch.device,
        compiled: bool,
        cache: torch.Tensor | None = None,
        batch_size: int = 256,
    ):
        self.tokenizer = tokenizer
        table = CaptionTable.build(tokenizer, captions, MAX_TOKENS, device)

        def draw() -> tuple:
            latents, labels = draw_cached(cache, batch_size)
            latents = latents.float()
            ids, _ = table.draw(labels)
            return latents, torch.randn_like(latents), draw_timesteps(batch_size, device), ids

        super().__init__(
            DiffusionModel(tokenizer).to(device, memory_format=torch.channels_last),
            draw,
            name=STATE_NAME,
            peak_learning_rate=PEAK_LEARNING_RATE,
            compiled=compiled,
            ema_decay=0.995,
        )

    def assemble(self, vae: AutoencoderKL) -> StableDiffusionPipeline:
        """The pipeline over copies of the averaged weights."""
        text_encoder, unet = averaged(self, "text_encoder", "unet")
        return StableDiffusionPipeline(
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=self.tokenizer,
            unet=unet,
            scheduler=build_scheduler(),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )

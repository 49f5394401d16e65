"""The transformer with its loss, the latents and classes it learns from, and its pipeline."""

from __future__ import annotations

import torch
from architecture import (
    CLASSES,
    NULL_CLASS,
    build_scheduler,
    build_transformer,
    initialise_transformer,
    tie_embedders,
    untie_embedders,
)
from diffusers import AutoencoderKL, DiTPipeline
from torch import nn
from training.diffusion import NoiseSchedule, draw_cached, draw_timesteps
from training.export import averaged
from training.trainer import Trainer

STATE_NAME = "dit"
PEAK_LEARNING_RATE = 1e-3
NULL_CLASS_SHARE = 0.1


def choose_classes(glyphs: torch.Tensor, captions: list[str]) -> tuple[torch.Tensor, list[str]]:
    """The thousand of the highest code points, from "cinema" on, of all glyphs and their captions."""
    return glyphs[-CLASSES:], captions[-CLASSES:]


class DiffusionModel(nn.Module):
    """Transformer and noise schedule as one module, so that they compile as one."""

    def __init__(self):
        super().__init__()
        self.transformer = build_transformer()
        tie_embedders(self.transformer)
        initialise_transformer(self.transformer)
        self.schedule = NoiseSchedule(build_scheduler())

    def forward(
        self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor, labels: torch.Tensor
    ) -> torch.Tensor:
        """Loss of the predicted noise. latents, noise: [b, 4, 16, 16]. timesteps, labels: [b] int64."""
        noisy = self.schedule.add_noise(latents, noise, timesteps)
        prediction = self.transformer(noisy, timesteps, labels, return_dict=False)[0]
        return self.schedule.loss(prediction, noise, timesteps)


class DiffusionTrainer(Trainer):
    """Args: cache: [n, copies, 4, 16, 16] latents on the training device; None to load a state only."""

    def __init__(self, device: torch.device, compiled: bool, cache: torch.Tensor | None = None, batch_size: int = 512):
        def draw() -> tuple:
            latents, labels = draw_cached(cache, batch_size)
            latents = latents.float()
            dropped = torch.rand(batch_size, device=device) < NULL_CLASS_SHARE
            labels = torch.where(dropped, NULL_CLASS, labels)
            return latents, torch.randn_like(latents), draw_timesteps(batch_size, device), labels

        super().__init__(
            DiffusionModel().to(device),
            draw,
            name=STATE_NAME,
            peak_learning_rate=PEAK_LEARNING_RATE,
            compiled=compiled,
            ema_decay=0.995,
        )

    def assemble(self, vae: AutoencoderKL, names: list[str]) -> DiTPipeline:
        """The pipeline over copies of the averaged weights. names: of the classes."""
        (transformer,) = averaged(self, "transformer")
        return DiTPipeline(
            transformer=untie_embedders(transformer).to(self.device),
            vae=vae,
            scheduler=build_scheduler(),
            id2label=dict(enumerate(names)),
        )

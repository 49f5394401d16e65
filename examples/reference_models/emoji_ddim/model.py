"""The UNet with its loss, the pictures it learns from, and its pipeline."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from architecture import build_scheduler, build_unet
from diffusers import DDIMPipeline
from torch import nn
from training.diffusion import NoiseSchedule, draw_cached, draw_timesteps
from training.export import averaged
from training.glyphs import augment
from training.trainer import Trainer

STATE_NAME = "ddim"
PEAK_LEARNING_RATE = 1e-3


def is_face(caption: str) -> bool:
    """The emoji that the model draws: 141 of those that Unicode calls faces, without the clock faces."""
    words = caption.split()
    return "face" in words and "clock" not in words


def draw_pictures(glyphs: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
    """Augmented glyphs at half size: [b, 3, 128, 128] uint8 to [b, 3, 32, 32] fp32 in [-1, 1]."""
    return F.avg_pool2d(augment(glyphs, generator), 2)


def picture_cache(glyphs: torch.Tensor, copies: int) -> torch.Tensor:
    """``copies`` augmentations of each glyph: [n, copies, 3, 32, 32] uint8."""
    pictures = [draw_pictures(glyph.expand(copies, -1, -1, -1)) for glyph in glyphs]
    return torch.stack([((part + 1) * 127.5).round().clamp(0, 255).byte() for part in pictures])


class DiffusionModel(nn.Module):
    """UNet and noise schedule as one module, so that they compile as one."""

    def __init__(self):
        super().__init__()
        self.unet = build_unet()
        self.schedule = NoiseSchedule(build_scheduler())

    def forward(self, pictures: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Loss of the predicted noise. pictures, noise: [b, 3, 32, 32]. timesteps: [b] int64."""
        noisy = self.schedule.add_noise(pictures, noise, timesteps)
        return self.schedule.loss(self.unet(noisy, timesteps, return_dict=False)[0], noise, timesteps)


class DiffusionTrainer(Trainer):
    """Args: cache: of `picture_cache`, on the training device; None to load a state only."""

    def __init__(self, device: torch.device, compiled: bool, cache: torch.Tensor | None = None, batch_size: int = 256):
        def draw() -> tuple:
            pictures = draw_cached(cache, batch_size)[0].float() / 127.5 - 1
            return pictures, torch.randn_like(pictures), draw_timesteps(batch_size, device)

        super().__init__(
            DiffusionModel().to(device, memory_format=torch.channels_last),
            draw,
            name=STATE_NAME,
            peak_learning_rate=PEAK_LEARNING_RATE,
            compiled=compiled,
            ema_decay=0.995,
        )

    def assemble(self) -> DDIMPipeline:
        """The pipeline over copies of the averaged weights."""
        (unet,) = averaged(self, "unet")
        return DDIMPipeline(unet=unet, scheduler=build_scheduler())

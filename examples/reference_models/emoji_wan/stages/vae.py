"""Stage 1: the causal video autoencoder, and the statistics of its latents."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from architecture import build_vae
from clips import MOTIONS, draw_clips
from diffusers import AutoencoderKLWan
from torch import nn
from training.common import mixed_precision
from training.trainer import Trainer

STATE_NAME = "vae"
PEAK_LEARNING_RATE = 2e-3
# Enough that the decoder forgives small latent errors, little enough to keep strokes sharp.
KL_WEIGHT = 1e-4


def reconstruction_loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Squared error, plus absolute error of pixels and of their differences in time, y and x."""
    loss = F.mse_loss(output, target) + 0.25 * F.l1_loss(output, target)
    for axis in (2, 3, 4):
        loss = loss + 0.25 * F.l1_loss(output.diff(dim=axis), target.diff(dim=axis))
    return loss


def decode_open(vae: AutoencoderKLWan, latents: torch.Tensor) -> torch.Tensor:
    """`vae.decode` without its clamp, which stops the gradient of what is too light or too dark."""
    cache: list = [None] * vae._cached_conv_counts["decoder"]
    chunks = []
    for index, frame in enumerate(vae.post_quant_conv(latents).split(1, dim=2)):
        chunks.append(vae.decoder(frame, feat_cache=cache, feat_idx=[0], first_chunk=index == 0))
    return torch.cat(chunks, dim=2)


class Autoencoding(nn.Module):
    """The autoencoder with its loss."""

    def __init__(self):
        super().__init__()
        self.vae = build_vae()

    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        """clips: [b, 3, 9, 64, 64] in [-1, 1]."""
        posterior = self.vae.encode(clips).latent_dist
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        latents = mean + torch.exp(0.5 * logvar) * torch.randn_like(mean)
        output = decode_open(self.vae, latents).float()
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        return reconstruction_loss(output, clips) + KL_WEIGHT * kl


def draw_batch(glyphs: torch.Tensor, batch_size: int) -> torch.Tensor:
    """Clips [b, 3, 9, 64, 64] of random emoji and motions."""
    rows = torch.randint(len(glyphs), (batch_size,), device=glyphs.device)
    return draw_clips(glyphs[rows], torch.randint(len(MOTIONS), (batch_size,), device=glyphs.device))


class VaeTrainer(Trainer):
    """Stage 1. The state's progress also holds the latents' mean and spread, of each channel.

    Args: glyphs: [n, 3, 128, 128] uint8 on the training device. Not compiled: three passes over
          every layer, with caches between them, make a graph that compiles for minutes.
    """

    def __init__(self, glyphs: torch.Tensor, batch_size: int = 16):
        self.glyphs = glyphs
        super().__init__(
            Autoencoding().to(glyphs.device),
            lambda: (draw_batch(glyphs, batch_size),),
            name=STATE_NAME,
            peak_learning_rate=PEAK_LEARNING_RATE,
            compiled=False,
            ema_decay=0.98,
            weight_decay=0.0,
            warmup_steps=100,
        )

    @torch.no_grad()
    def finish(self, out: Path, clips: int = 2048) -> None:
        """Measure the averaged weights' latents, note their statistics in the state, and report."""
        self.average.swap()
        vae = self.model.vae.eval()
        batch_size = min(64, clips)
        with mixed_precision(self.device):
            batches = [draw_batch(self.glyphs, batch_size) for _ in range(clips // batch_size)]
            latents = torch.cat([vae.encode(batch).latent_dist.mean.float() for batch in batches])
            output = vae.decode(latents[:batch_size]).sample.float()
        error = F.mse_loss(output, batches[0]).item()
        self.progress["latents_mean"] = [round(value, 5) for value in latents.mean((0, 2, 3, 4)).tolist()]
        self.progress["latents_std"] = [round(value, 5) for value in latents.std((0, 2, 3, 4)).tolist()]
        self.average.swap()
        self.save(out)
        print(f"{self.name} done: step {self.progress['step']}, squared error {error:.5f} on [-1, 1]", flush=True)
        print(f"{self.name} latents_std {self.progress['latents_std']}", flush=True)


def load_vae(folder: Path, device: torch.device | str = "cpu") -> AutoencoderKLWan:
    """The averaged autoencoder of a state, with its latents' statistics in the configuration."""
    trainer = VaeTrainer(torch.zeros(0, 3, 128, 128, dtype=torch.uint8))
    if not trainer.load(folder) or "latents_mean" not in trainer.progress:
        raise FileNotFoundError(f"load_vae: no finished state {STATE_NAME} in {folder}.")
    trainer.average.swap()
    vae = build_vae(trainer.progress["latents_mean"], trainer.progress["latents_std"])
    vae.load_state_dict(trainer.model.vae.state_dict())
    return vae.eval().requires_grad_(False).to(device)


@torch.no_grad()
def encode_clips(vae: AutoencoderKLWan, clips: torch.Tensor) -> torch.Tensor:
    """Posterior means, normalised as `WanPipeline` expects them: what the transformer learns to draw."""
    latents = vae.encode(clips).latent_dist.mean.float()
    shape = (1, -1, 1, 1, 1)
    mean = torch.tensor(vae.config.latents_mean, device=latents.device).view(shape)
    return (latents - mean) / torch.tensor(vae.config.latents_std, device=latents.device).view(shape)

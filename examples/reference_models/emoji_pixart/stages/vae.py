"""Stage 1: the autoencoder, and the folding of its latent statistics into its weights."""

from __future__ import annotations

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from architecture import build_vae
from diffusers import AutoencoderKL
from training.common import WallClock, mixed_precision, save_grid, set_learning_rate
from training.diffusion import encode_pictures
from training.glyphs import augment

# Enough that the decoder forgives small latent errors, little enough to keep strokes sharp.
KL_WEIGHT = 1e-4
PEAK_LEARNING_RATE = 2e-3
WARMUP_STEPS = 200


def edges(pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Differences of neighbouring pixels, along x and along y."""
    return pictures[..., 1:] - pictures[..., :-1], pictures[..., 1:, :] - pictures[..., :-1, :]


def reconstruction_loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Squared error, plus absolute error of pixels and edges: MSE alone blurs thin lines."""
    loss = F.mse_loss(output, target) + 0.25 * F.l1_loss(output, target)
    for output_edges, target_edges in zip(edges(output), edges(target), strict=True):
        loss = loss + 0.25 * F.l1_loss(output_edges, target_edges)
    return loss


def vae_loss(vae: AutoencoderKL, pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and, detached, the mean squared error. pictures: [b, 3, 64, 64] fp32 in [-1, 1]."""
    posterior = vae.encode(pictures).latent_dist
    mean, logvar = posterior.mean.float(), posterior.logvar.float()
    latents = mean + torch.exp(0.5 * logvar) * torch.randn_like(mean)
    output = vae.decode(latents).sample.float()
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    loss = reconstruction_loss(output, pictures) + KL_WEIGHT * kl
    return loss, F.mse_loss(output.detach(), pictures)


@torch.no_grad()
def fold_latent_statistics(vae: AutoencoderKL, glyphs: torch.Tensor, batches: int = 16) -> None:
    """Centre the latent channels, give all the same spread, and set ``scaling_factor`` to 1/spread.

    The pipeline knows one scaling factor only, so the per-channel part is folded into the 1 x 1
    convolutions on either side of the latents. Reconstructions do not change.
    """
    latents = torch.cat(
        [
            vae.encode(
                augment(glyphs[torch.randint(len(glyphs), (256,), device=glyphs.device)])
            ).latent_dist.mean.float()
            for _ in range(batches)
        ]
    )
    mean = latents.mean((0, 2, 3))
    std = latents.std((0, 2, 3))
    spread = std.square().mean().sqrt()
    gain = spread / std
    count = len(mean)
    encode, decode = vae.quant_conv, vae.post_quant_conv
    encode.weight[:count] *= gain[:, None, None, None]
    encode.bias[:count] = (encode.bias[:count] - mean) * gain
    encode.bias[count:] += 2 * gain.log()
    decode.bias += decode.weight[:, :, 0, 0] @ mean
    decode.weight /= gain[None, :, None, None]
    vae.register_to_config(scaling_factor=round(1 / spread.item(), 5))


def train_vae(glyphs: torch.Tensor, out: Path, budget_s: float, batch_size: int, compiled: bool):
    """Train from scratch within the budget and write ``out/vae`` (fp32) and a picture of it.

    Args: glyphs: [n, 3, 128, 128] uint8 on the training device.
    """
    device = glyphs.device
    clock = WallClock(budget_s)
    vae = build_vae().to(device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=0.0, betas=(0.9, 0.99), weight_decay=0.0)
    loss_function = torch.compile(vae_loss) if compiled else vae_loss
    step = 0
    while clock.share < 1:
        warmup = min(1.0, (step + 1) / WARMUP_STEPS)
        rate = PEAK_LEARNING_RATE * warmup * 0.5 * (1 + math.cos(math.pi * clock.share))
        set_learning_rate(optimizer, rate)
        pictures = augment(glyphs[torch.randint(len(glyphs), (batch_size,), device=device)])
        pictures = pictures.contiguous(memory_format=torch.channels_last)
        with mixed_precision(device):
            loss, error = loss_function(vae, pictures)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        # Reading a value waits for the device, which also keeps the clock honest.
        if step % 50 == 0:
            value = error.item()
            if step % 500 == 0:
                print(f"vae step {step} {clock.seconds:.0f} s mse {value:.5f}", flush=True)
        step += 1
    vae.eval()
    fold_latent_statistics(vae, glyphs)
    report_vae(vae, glyphs, out, step, clock.seconds)
    vae.to(memory_format=torch.contiguous_format).save_pretrained(out / "vae")


@torch.no_grad()
def report_vae(vae, glyphs: torch.Tensor, out: Path, steps: int, seconds: float) -> None:
    """Print the error on fresh augmentations and write rows of pictures over reconstructions."""
    pictures = augment(glyphs[torch.randint(len(glyphs), (512,), device=glyphs.device)])
    latents = encode_pictures(vae, pictures)
    output = vae.decode(latents / vae.config.scaling_factor).sample
    print(
        f"vae done: {steps} steps, {seconds:.0f} s, mse {F.mse_loss(output, pictures):.5f}, "
        f"latent mean {latents.mean().item():.3f} std {latents.std().item():.3f}, "
        f"scaling_factor {vae.config.scaling_factor}",
        flush=True,
    )
    rows = [part for pair in zip(pictures[:64].split(16), output[:64].split(16), strict=True) for part in pair]
    save_grid(torch.cat(rows), out / "vae.png")

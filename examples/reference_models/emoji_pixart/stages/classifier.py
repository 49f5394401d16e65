"""Stage 2: the classifier, on augmented glyphs only."""

from __future__ import annotations

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from classifier import EmojiClassifier, save_classifier
from training.common import WallClock, mixed_precision, set_learning_rate
from training.glyphs import augment

PEAK_LEARNING_RATE = 3e-3
WARMUP_STEPS = 200


def degrade(pictures: torch.Tensor) -> torch.Tensor:
    """Blur a third of the pictures, and add weak noise and colour changes to all.

    A judge of generated pictures must not lean on the last pixel of a drawn one.
    """
    batch, device = len(pictures), pictures.device
    shape = (batch, 1, 1, 1)
    blurred = F.avg_pool2d(F.pad(pictures, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    weight = torch.rand(shape, device=device) * (torch.rand(shape, device=device) < 0.33)
    pictures = pictures + weight * (blurred - pictures)
    gain = 1 + 0.06 * torch.randn(batch, 3, 1, 1, device=device)
    noise = 0.08 * torch.rand(shape, device=device) * torch.randn_like(pictures)
    return (1 - (1 - pictures) * gain + noise).clamp(-1, 1)


def train_classifier(
    glyphs: torch.Tensor,
    captions: list[str],
    out: Path,
    budget_s: float,
    batch_size: int,
    compiled: bool,
):
    """Train from scratch within the budget and write ``out/classifier.safetensors``.

    Args: glyphs: [n, 3, 128, 128] uint8 on the training device, one a class.
    """
    device = glyphs.device
    clock = WallClock(budget_s)
    model = EmojiClassifier(captions).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.02)
    forward = torch.compile(model) if compiled else model
    step = 0
    while clock.share < 1:
        warmup = min(1.0, (step + 1) / WARMUP_STEPS)
        rate = PEAK_LEARNING_RATE * warmup * 0.5 * (1 + math.cos(math.pi * clock.share))
        set_learning_rate(optimizer, rate)
        labels = torch.randint(len(glyphs), (batch_size,), device=device)
        with mixed_precision(device):
            logits = forward(degrade(augment(glyphs[labels])))
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=0.05)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 50 == 0:
            value = loss.item()
            if step % 500 == 0:
                print(f"classifier step {step} {clock.seconds:.0f} s loss {value:.3f}", flush=True)
        step += 1
    model.eval()
    top1, top5 = held_out_accuracy(model, glyphs)
    print(
        f"classifier done: {step} steps, {clock.seconds:.0f} s, fresh augmentations top-1 {top1:.4f} top-5 {top5:.4f}",
        flush=True,
    )
    save_classifier(model, out)


@torch.no_grad()
def held_out_accuracy(model, glyphs: torch.Tensor, repeats: int = 4) -> tuple[float, float]:
    """Top-1 and top-5 accuracy over fresh augmentations of every glyph."""
    labels = torch.arange(len(glyphs), device=glyphs.device).repeat(repeats)
    best = torch.cat([model(augment(glyphs[part])).topk(5).indices for part in labels.split(512)])
    hits = best == labels[:, None]
    return hits[:, 0].float().mean().item(), hits.any(1).float().mean().item()

"""Stage 2: the transformer and its text encoder, together, on latents of drawn clips."""

from __future__ import annotations

import torch
from architecture import (
    FLOW_SHIFT,
    LATENT_SHAPE,
    MAX_TOKENS,
    build_text_encoder,
    build_transformer,
    initialise_transformer,
)
from clips import MOTIONS, caption, draw_clips
from emoji_pixart.architecture import build_tokenizer
from stages.vae import encode_clips
from torch import nn
from training.common import mixed_precision
from training.trainer import Trainer

STATE_NAME = "wan"
PEAK_LEARNING_RATE = 1e-3
EMPTY_CAPTION_SHARE = 0.1


@torch.no_grad()
def latent_cache(vae, glyphs: torch.Tensor, copies: int) -> torch.Tensor:
    """Normalised latents of ``copies`` clips of each emoji and motion: [n, motions, copies, 8, 3, 16, 16] bf16."""
    motions = torch.arange(len(MOTIONS), device=glyphs.device).repeat_interleave(copies)
    latents = []
    for glyph in glyphs:
        with mixed_precision(glyphs.device):
            clips = draw_clips(glyph.expand(len(motions), -1, -1, -1), motions)
            latents.append(encode_clips(vae, clips).bfloat16())
    return torch.stack(latents).unflatten(1, (len(MOTIONS), copies))


class FlowMatching(nn.Module):
    """Text encoder and transformer as one module, so that they compile as one."""

    def __init__(self, vocab_size: int):
        super().__init__()
        self.text_encoder = build_text_encoder(vocab_size)
        self.transformer = build_transformer()
        initialise_transformer(self.transformer)

    def forward(
        self,
        latents: torch.Tensor,
        noise: torch.Tensor,
        sigmas: torch.Tensor,
        ids: torch.Tensor,
        mask: torch.Tensor,
    ) -> torch.Tensor:
        """Mean squared error of the predicted velocity, noise minus latents.

        Args: latents, noise: [b, 8, 3, 16, 16]. sigmas: [b] in [0, 1]. ids, mask: [b, MAX_TOKENS].
        """
        # WanPipeline cuts the padding off and puts zeros in its place.
        text = self.text_encoder(ids, attention_mask=mask)[0] * mask[:, :, None]
        level = sigmas.view(-1, 1, 1, 1, 1)
        noisy = (1 - level) * latents + level * noise
        # The scheduler of Wan hands the transformer whole timesteps, rounded down.
        timesteps = (sigmas * 1000).floor()
        prediction = self.transformer(noisy, timesteps, text, return_dict=False)[0]
        return (prediction.float() - (noise - latents)).square().mean()


def draw_sigmas(count: int, device: torch.device) -> torch.Tensor:
    """Noise levels [count] spread as the scheduler's, one of each of ``count`` equal shares."""
    strata = (torch.arange(count, device=device) + torch.rand(count, device=device)) / count
    return FLOW_SHIFT * strata / (1 + (FLOW_SHIFT - 1) * strata)


class FlowTrainer(Trainer):
    """Stage 2: the model with the tokenizer and the captions it is trained on.

    Args:
        names: of the emoji.
        cache: what `latent_cache` made, on the training device; None to load a state only.
    """

    def __init__(
        self,
        names: list[str],
        device: torch.device,
        compiled: bool,
        cache: torch.Tensor | None = None,
        batch_size: int = 256,
    ):
        captions = [caption(name, motion) for name in names for motion in MOTIONS]
        self.tokenizer = build_tokenizer(captions)
        # The last row is the empty caption.
        tokens = self.tokenizer([*captions, ""], padding="max_length", max_length=MAX_TOKENS, return_tensors="pt")
        if tokens.input_ids.shape[1] != MAX_TOKENS:
            raise ValueError(f"FlowTrainer: captions of up to {MAX_TOKENS} tokens, got {tokens.input_ids.shape[1]}.")
        ids, mask = tokens.input_ids.to(device), tokens.attention_mask.to(device)

        def draw() -> tuple:
            rows = torch.randint(len(captions), (batch_size,), device=device)
            copies = torch.randint(cache.shape[2], (batch_size,), device=device)
            latents = cache.flatten(0, 1)[rows, copies].float()
            empty = torch.rand(batch_size, device=device) < EMPTY_CAPTION_SHARE
            texts = torch.where(empty, len(captions), rows)
            return latents, torch.randn_like(latents), draw_sigmas(batch_size, device), ids[texts], mask[texts]

        super().__init__(
            FlowMatching(len(self.tokenizer)).to(device),
            draw,
            name=STATE_NAME,
            peak_learning_rate=PEAK_LEARNING_RATE,
            compiled=compiled,
            ema_decay=0.995,
        )
        assert cache is None or cache.shape[3:] == LATENT_SHAPE

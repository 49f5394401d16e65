"""Stage 3: the transformer and its text encoder, together, on latents of augmented glyphs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from architecture import (
    MAX_TOKENS,
    build_scheduler,
    build_text_encoder,
    build_tokenizer,
    build_transformer,
    initialise_transformer,
)
from data import ALIASES, augment
from stages.common import (
    MovingAverage,
    WallClock,
    load_state,
    mixed_precision,
    save_state,
    set_learning_rate,
)
from stages.vae import encode_pictures
from torch import nn

STATE_NAME = "diffusion"
PEAK_LEARNING_RATE = 1e-3
WARMUP_STEPS = 400
EMA_DECAY = 0.9995
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


class DiffusionTrainer:
    """Model, optimizer and moving average of stage 3, and their state on disk.

    The optimizer's moments are not kept: after a resumption they are built anew, under a short
    warm-up of the learning rate.
    """

    def __init__(self, captions: list[str], device: torch.device, compiled: bool):
        self.tokenizer = build_tokenizer(captions + list(ALIASES.values()))
        self.model = DiffusionModel(len(self.tokenizer)).to(device)
        self.captions = CaptionTable.build(self.tokenizer, captions, device)
        self.named = dict(self.model.named_parameters())
        decayed = [value for value in self.named.values() if value.ndim == 2]
        others = [value for value in self.named.values() if value.ndim != 2]
        groups = [{"params": decayed, "weight_decay": 0.01}, {"params": others}]
        on_gpu = device.type == "cuda"
        # The rate is a tensor on the device, so that a recorded step reads the current one.
        self.optimizer = torch.optim.AdamW(
            groups,
            lr=torch.tensor(0.0, device=device),
            betas=(0.9, 0.99),
            weight_decay=0.0,
            fused=on_gpu,
            capturable=on_gpu,
        )
        self.average = MovingAverage(list(self.named.values()), EMA_DECAY)
        self.progress = {"step": 0, "seconds": 0.0}
        self.loss = torch.compile(self.model) if compiled else self.model

    def save(self, folder: Path) -> None:
        """Weights in fp32, their averages in fp16."""
        averages = zip(self.named, self.average.averages, strict=True)
        tensors = {f"ema.{name}": average.half() for name, average in averages}
        tensors |= {f"model.{name}": value.detach() for name, value in self.named.items()}
        save_state(tensors, self.progress, folder, STATE_NAME)

    @torch.no_grad()
    def load(self, folder: Path) -> bool:
        """Take up the state in a folder; False if it holds none."""
        stored = load_state(folder, STATE_NAME)
        if stored is None:
            return False
        tensors, self.progress = stored
        for (name, value), average in zip(self.named.items(), self.average.averages, strict=True):
            value.copy_(tensors[f"model.{name}"])
            average.copy_(tensors[f"ema.{name}"])
        return True

    def step(self, cache: torch.Tensor, batch_size: int) -> torch.Tensor:
        """One update, of whatever learning rate is set; returns the loss, on the device."""
        with mixed_precision(cache.device):
            loss = self.loss(*draw_batch(cache, self.captions, batch_size))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.average.update(self.progress["step"])
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def recorded_step(self, cache: torch.Tensor, batch_size: int) -> Callable[[], torch.Tensor]:
        """`step` as one CUDA graph: this model's kernels are shorter than their launches.

        Needs a moving average past its start, because the graph repeats one decay for ever.
        """
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            # Compiles, tunes and allocates the optimizer's state, none of which may be recorded.
            for _ in range(5):
                self.step(cache, batch_size)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            loss = self.step(cache, batch_size)

        def replay() -> torch.Tensor:
            graph.replay()
            return loss.clone()

        return replay


def train_diffusion(
    trainer: DiffusionTrainer,
    cache: torch.Tensor,
    out: Path,
    budget_s: float,
    batch_size: int,
    decay: bool,
    record: bool,
    save_every_s: float = 120.0,
) -> None:
    """Train within the budget; the state goes to ``out`` every ``save_every_s`` and at the end.

    Args: cache: [n, copies, 4, 16, 16] latents on the training device. decay: let the learning
          rate fall linearly to zero over this budget, for the last call of a training. record:
          replay the step as a CUDA graph.
    """
    clock, before = WallClock(budget_s), trainer.progress["seconds"]
    saved_s, first, losses = 0.0, trainer.progress["step"], []
    advance = partial(trainer.step, cache, batch_size)
    if record:
        advance = trainer.recorded_step(cache, batch_size)
        print(f"step recorded after {clock.seconds:.0f} s", flush=True)
    while clock.share < 1:
        warmup = min(1.0, (trainer.progress["step"] - first + 1) / WARMUP_STEPS)
        rate = PEAK_LEARNING_RATE * warmup * (1 - clock.share if decay else 1.0)
        set_learning_rate(trainer.optimizer, rate)
        losses.append(advance())
        trainer.progress["step"] += 1
        trainer.progress["seconds"] = before + clock.seconds
        # Reading a value waits for the device, which also keeps the clock honest.
        if len(losses) % 50 == 0:
            losses[-1].item()
        if len(losses) == 1000:
            mean = torch.stack(losses).mean().item()
            step, seconds = trainer.progress["step"], trainer.progress["seconds"]
            print(f"diffusion step {step} {seconds:.0f} s loss {mean:.5f}", flush=True)
            losses.clear()
        if clock.seconds - saved_s > save_every_s:
            saved_s = clock.seconds
            trainer.save(out)
    trainer.save(out)
    step, seconds = trainer.progress["step"], trainer.progress["seconds"]
    print(f"diffusion stopped at step {step} after {seconds:.0f} s in all", flush=True)

"""Train a LoRA on a compressed pipeline: the base stays packed, the adapter learns to draw in inverted colours.

    python examples/train_lora_on_compressed.py                          # emoji_pixart, w4a16, two minutes on a CPU
    python examples/train_lora_on_compressed.py --preset w8a8 --steps 400 --out adapter.safetensors

Offline: the pipeline is the one of `examples/reference_models/emoji_pixart`, and draws its own training pictures, whose
colours are then inverted. Gradients reach the adapter through the packed layers (straight through the quantizer of
their inputs); packed weights take none and are, to the byte, the same afterwards. The script prints the loss on held
noise and timesteps before and after, and stops with status 1 if it has not fallen.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler, DiffusionPipeline
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from safetensors.torch import save_file

import diffuse_compress  # noqa: F401  (attaches pipe.compress)
from diffuse_compress.demo import CALL, PROMPTS, demo_model_path


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="w4a16", help="of compress")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--sampling-steps", type=int, default=20, help="of the pictures that are trained on")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="write the adapter here (safetensors)")
    return parser.parse_args(arguments)


@torch.no_grad()
def inverted_latents(pipe: Any, steps: int, device: str) -> torch.Tensor:
    """[prompts, 4, 16, 16] latents of the pipeline's own pictures with their colours inverted."""
    generator = torch.Generator("cpu").manual_seed(0)
    call = {**CALL, "num_inference_steps": steps}
    images = pipe(list(PROMPTS), **call, generator=generator, output_type="pt").images
    pixels = 2 * (1 - images.to(device, pipe.vae.dtype)) - 1
    latents: torch.Tensor = pipe.vae.encode(pixels).latent_dist.mean * pipe.vae.config.scaling_factor
    return latents


class Trainer:
    """Noise prediction on a handful of latents; everything but the adapter is fixed."""

    def __init__(self, pipe: Any, latents: torch.Tensor, batch: int) -> None:
        self.transformer, self.latents, self.batch = pipe.transformer, latents, batch
        self.schedule = DDPMScheduler.from_config(pipe.scheduler.config)
        with torch.no_grad():
            # Without guidance: an adapter is trained on the conditional prediction alone.
            self.text, self.mask, *_ = pipe.encode_prompt(
                list(PROMPTS), do_classifier_free_guidance=False, clean_caption=False, max_sequence_length=24
            )

    def loss(self, generator: torch.Generator) -> torch.Tensor:
        """Mean squared error of the noise predicted for a random batch."""
        rows = torch.randint(len(self.latents), (self.batch,), generator=generator)
        timesteps = torch.randint(1000, (self.batch,), generator=generator).to(self.latents.device)
        clean = self.latents[rows]
        noise = torch.randn(clean.shape, generator=generator).to(clean)
        prediction = self.transformer(
            self.schedule.add_noise(clean, noise, timesteps),
            encoder_hidden_states=self.text[rows],
            encoder_attention_mask=self.mask[rows],
            timestep=timesteps,
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
            return_dict=False,
        )[0]
        # The second half of the channels is the learned sigma, which the pipeline drops.
        return (prediction[:, : clean.shape[1]] - noise).square().mean()

    @torch.no_grad()
    def held_loss(self) -> float:
        """The loss on eight batches that are always the same."""
        generator = torch.Generator().manual_seed(1)
        return sum(self.loss(generator).item() for _ in range(8)) / 8


def main(arguments: list[str] | None = None) -> int:
    """Compress, train, compare; 0 if the loss fell."""
    options = parse_arguments(arguments)
    torch.manual_seed(0)
    pipe = DiffusionPipeline.from_pretrained(demo_model_path()).to(options.device)
    pipe.set_progress_bar_config(disable=True)
    latents = inverted_latents(pipe, options.sampling_steps, options.device)
    pipe.compress(options.preset, measure=False)
    # pipe.transformer.add_adapter(...) for the classes that have it; PixArt's does not.
    targets = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"]
    inject_adapter_in_model(
        LoraConfig(r=options.rank, lora_alpha=options.rank, target_modules=targets), pipe.transformer
    )
    trained = [parameter for parameter in pipe.transformer.parameters() if parameter.requires_grad]
    print(f"{options.preset}: training {sum(parameter.numel() for parameter in trained):,} parameters of the adapter")

    trainer = Trainer(pipe, latents, options.batch)
    before, generator = trainer.held_loss(), torch.Generator().manual_seed(2)
    optimizer = torch.optim.AdamW(trained, lr=options.learning_rate)
    for step in range(options.steps):
        loss = trainer.loss(generator)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 50 == 0:
            print(f"step {step + 1}: loss {loss.item():.4f}", flush=True)
    after = trainer.held_loss()
    print(f"held loss {before:.4f} -> {after:.4f}")
    if options.out is not None:
        state = get_peft_model_state_dict(pipe.transformer)
        save_file({f"transformer.{key}": value.contiguous() for key, value in state.items()}, options.out)
    return 0 if after < before else 1


if __name__ == "__main__":
    sys.exit(main())

"""What the score scripts of the picture models share: their options, starting noise and the classifier's verdict."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from emoji_pixart.classifier import EmojiClassifier, load_classifier
from training.common import save_grid

CLASSIFIER_FOLDER = Path(__file__).resolve().parents[1] / "emoji_pixart"


def score_parser(description: str, folder: Path, steps: int, guidance: float | None = None) -> argparse.ArgumentParser:
    """The options of every score script. guidance: its default; None for a model without."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", type=Path, default=folder)
    parser.add_argument("--count", type=int, default=None, help="draw the first COUNT pictures only")
    parser.add_argument("--steps", type=int, default=steps)
    if guidance is not None:
        parser.add_argument("--guidance", type=float, default=guidance)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--grid", type=Path, help="write the pictures there as one PNG")
    return parser


def load_for_score(args: argparse.Namespace) -> tuple[DiffusionPipeline, EmojiClassifier]:
    """The pipeline that the options name, without its progress bars, and the classifier."""
    pipe = DiffusionPipeline.from_pretrained(args.model, dtype=getattr(torch, args.dtype))
    pipe.to(args.device).set_progress_bar_config(disable=True)
    return pipe, load_classifier(CLASSIFIER_FOLDER)


def accuracy_text(classifier: EmojiClassifier, pictures: torch.Tensor, captions: list[str]) -> str:
    """How often the classifier names what was asked for, first or among its first five."""
    top1, top5 = (classifier.accuracy(pictures, captions, k) for k in (1, 5))
    return f"top-1 {top1:.4f} top-5 {top5:.4f}"


def report_score(args: argparse.Namespace, pictures: torch.Tensor, verdict: str, seconds: float) -> None:
    """Print one line, and write the pictures [n, 3, h, w] in [0, 1] if asked."""
    guidance = f", guidance {args.guidance}" if "guidance" in args else ""
    print(
        f"{len(pictures)} pictures, {args.steps} steps{guidance}, seed {args.seed}, "
        f"{args.dtype} on {args.device}: {verdict} ({seconds:.0f} s)"
    )
    if args.grid:
        save_grid(pictures * 2 - 1, args.grid)


def starting_noise(denoiser, count: int, seed: int) -> torch.Tensor:
    """Latents [n, c, h, w], fp32 on the CPU: independent of batch size and device."""
    size = denoiser.config.sample_size
    shape = (count, denoiser.config.in_channels, size, size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def draw_prompts(
    pipe: DiffusionPipeline, denoiser, prompts: list[str], options: dict, seed: int, batch_size: int
) -> torch.Tensor:
    """Pictures [n, 3, h, w] in [0, 1] on the CPU. denoiser: the pipeline's. options: of the pipeline's call."""
    latents = starting_noise(denoiser, len(prompts), seed)
    pictures = []
    for start in range(0, len(prompts), batch_size):
        part = slice(start, start + batch_size)
        noise = latents[part].to(pipe.device, denoiser.dtype)
        output = pipe(prompts[part], latents=noise, output_type="pt", **options)
        pictures.append(output.images.float().cpu())
    return torch.cat(pictures)


def picture_generators(seed: int, first: int, count: int) -> list[torch.Generator]:
    """One random generator for each picture, for pipelines that take no noise: independent of batch size and device."""
    return [torch.Generator().manual_seed(1_000_000 * seed + first + index) for index in range(count)]

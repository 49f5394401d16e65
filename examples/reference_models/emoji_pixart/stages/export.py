"""From a training state to a pipeline: assembled in memory for a score, or written as a folder."""

from __future__ import annotations

import shutil
from pathlib import Path

from architecture import build_scheduler
from classifier import FILE_NAME, load_classifier
from diffusers import AutoencoderKL, PixArtAlphaPipeline
from score import DEFAULTS, generate
from stages.diffusion import DiffusionTrainer
from training.common import save_grid
from training.export import averaged, save_in_half
from training.scoring import accuracy_text


def assemble(trainer: DiffusionTrainer, vae: AutoencoderKL) -> PixArtAlphaPipeline:
    """The pipeline over copies of the averaged weights."""
    text_encoder, transformer = averaged(trainer, "text_encoder", "transformer")
    return PixArtAlphaPipeline(
        tokenizer=trainer.tokenizer,
        text_encoder=text_encoder,
        vae=vae,
        transformer=transformer,
        scheduler=build_scheduler(),
    )


def report_pipeline(
    trainer: DiffusionTrainer,
    vae: AutoencoderKL,
    source: Path,
    grid: Path,
    captions: list[str],
    sweep: bool,
) -> None:
    """Print accuracies over all captions and write a grid of pictures.

    Args: source: folder with the classifier. sweep: try several guidance scales and step counts.
    """
    pipe = assemble(trainer, vae)
    pipe.set_progress_bar_config(disable=True)
    classifier = load_classifier(source)
    default = (DEFAULTS["num_inference_steps"], DEFAULTS["guidance_scale"])
    runs = [default, (20, 1.0), (20, 1.5), (20, 3.0), (20, 4.5), (10, 2.0), (50, 2.0)]
    runs = runs if sweep else runs[:1]
    for steps, guidance in runs:
        options = {"num_inference_steps": steps, "guidance_scale": guidance}
        pictures = generate(pipe, captions, batch_size=256, **options)
        print(f"steps {steps} guidance {guidance}: {accuracy_text(classifier, pictures, captions)}", flush=True)
        if (steps, guidance) == default:
            # Every fifth picture: a view over the whole code space.
            save_grid(pictures[:: max(1, len(pictures) // 256)][:256] * 2 - 1, grid)


def export_pipeline(trainer: DiffusionTrainer, vae: AutoencoderKL, source: Path, folder: Path) -> None:
    """Write the pipeline in fp16 with `save_pretrained`, and the classifier beside it."""
    save_in_half(assemble(trainer, vae.eval()), folder)
    if source.resolve() != folder.resolve():
        shutil.copy(source / FILE_NAME, folder / FILE_NAME)

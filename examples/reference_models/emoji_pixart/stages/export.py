"""From a training state to a pipeline: assembled in memory for a score, or written as a folder."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

from architecture import build_scheduler
from classifier import FILE_NAME, load_classifier
from diffusers import AutoencoderKL, PixArtAlphaPipeline
from score import DEFAULTS, generate
from stages.diffusion import DiffusionTrainer
from training.common import save_grid


def assemble(trainer: DiffusionTrainer, vae: AutoencoderKL) -> PixArtAlphaPipeline:
    """The pipeline over copies of the averaged weights."""
    trainer.average.swap()
    text_encoder = copy.deepcopy(trainer.model.text_encoder).eval()
    transformer = copy.deepcopy(trainer.model.transformer).eval()
    trainer.average.swap()
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
        top1, top5 = (classifier.accuracy(pictures, captions, k) for k in (1, 5))
        print(f"steps {steps} guidance {guidance}: top-1 {top1:.4f} top-5 {top5:.4f}", flush=True)
        if (steps, guidance) == default:
            # Every fifth picture: a view over the whole code space.
            save_grid(pictures[:: max(1, len(pictures) // 256)][:256] * 2 - 1, grid)


def export_pipeline(trainer: DiffusionTrainer, vae: AutoencoderKL, source: Path, folder: Path) -> None:
    """Write the pipeline in fp16 with `save_pretrained`, and the classifier beside it."""
    pipe = assemble(trainer, vae.eval())
    for module in (pipe.text_encoder, pipe.transformer, pipe.vae):
        module.half()
    pipe.save_pretrained(folder)
    # transformers loads the recorded dtype when asked for none, diffusers loads fp32: a text
    # encoder recorded as fp16 would meet an fp32 transformer in a plain from_pretrained.
    path = folder / "text_encoder" / "config.json"
    config = json.loads(path.read_text()) | {"dtype": "float32"}
    path.write_text(json.dumps(config, indent=2) + "\n")
    if source.resolve() != folder.resolve():
        shutil.copy(source / FILE_NAME, folder / FILE_NAME)
    compact(folder / "tokenizer" / "tokenizer.json")
    for file in folder.rglob("*.safetensors"):
        file.chmod(0o644)


def compact(path: Path) -> None:
    """Rewrite a JSON file without its indentation: half of a word list's bytes."""
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content, ensure_ascii=False, separators=(",", ":")) + "\n")

"""From a training state to a pipeline: assembled in memory for a score, or written as a folder."""

from __future__ import annotations

import random
from pathlib import Path

from architecture import build_scheduler
from clips import MOTIONS, caption
from diffusers import AutoencoderKLWan, WanPipeline
from emoji_pixart.classifier import load_classifier
from score import generate, judge
from stages.diffusion import FlowTrainer
from training.export import averaged, save_in_half
from training.scoring import CLASSIFIER_FOLDER


def evaluation_prompts(names: list[str]) -> list[str]:
    """Each emoji once, in an order by seed 0, with the motions in turn."""
    shuffled = list(names)
    random.Random(0).shuffle(shuffled)
    motions = list(MOTIONS)
    return [caption(name, motions[index % len(motions)]) for index, name in enumerate(shuffled)]


def assemble(trainer: FlowTrainer, vae: AutoencoderKLWan) -> WanPipeline:
    """The pipeline over copies of the averaged weights."""
    text_encoder, transformer = averaged(trainer, "text_encoder", "transformer")
    return WanPipeline(
        tokenizer=trainer.tokenizer,
        text_encoder=text_encoder,
        vae=vae,
        transformer=transformer,
        scheduler=build_scheduler(),
    )


def report_pipeline(trainer: FlowTrainer, vae: AutoencoderKLWan, names: list[str], count: int) -> None:
    """Print what `score.py` measures, of the first ``count`` evaluation prompts."""
    pipe = assemble(trainer, vae)
    pipe.set_progress_bar_config(disable=True)
    prompts = evaluation_prompts(names)[:count]
    clips = generate(pipe, prompts, batch_size=64)
    print(f"{trainer.name}: {judge(load_classifier(CLASSIFIER_FOLDER), clips, prompts)}", flush=True)


def export_pipeline(trainer: FlowTrainer, vae: AutoencoderKLWan, names: list[str], folder: Path) -> None:
    """Write the pipeline in fp16, and the prompt lists beside it."""
    save_in_half(assemble(trainer, vae), folder)
    (folder / "emoji.txt").write_text("\n".join(names) + "\n")
    (folder / "eval_prompts.txt").write_text("\n".join(evaluation_prompts(names)) + "\n")

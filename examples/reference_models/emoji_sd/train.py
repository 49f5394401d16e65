"""Train the Stable Diffusion model of emoji within a number of seconds, in one call or several.

    python train.py tokenizer --data glyphs.npz --folder .
    python train.py train     --data glyphs.npz --out run --budget 500 --record
    python train.py train     --data glyphs.npz --out run --resume run --budget 450 --decay --record
    python train.py export    --data glyphs.npz --resume run --folder .

``tokenizer`` comes first and stays: token ids are part of the model. ``--resume`` goes on from the
state in that folder; with ``--decay`` the learning rate falls to zero over the budget. ``export``
writes the pipeline folder. The autoencoder is that of emoji_pixart.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from transformers import CLIPTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from architecture import build_tokenizer
from emoji_pixart.classifier import load_classifier
from model import DiffusionTrainer
from score import DEFAULTS, PROMPTS, generate
from training.command import load_for_export, prepare, train, train_parser
from training.diffusion import latent_cache, shared_vae
from training.export import SHARED_VAE_LINK, compact, save_in_half
from training.glyphs import ALIASES
from training.scoring import CLASSIFIER_FOLDER, accuracy_text

FOLDER = Path(__file__).resolve().parent


def run_tokenizer(args, captions: list[str]) -> None:
    """Learn the merges from all captions and aliases, and write them."""
    build_tokenizer(captions + list(ALIASES.values())).save_pretrained(args.folder / "tokenizer")
    compact(args.folder / "tokenizer" / "tokenizer.json")


def load_parts() -> tuple[CLIPTokenizer, AutoencoderKL]:
    """What is there before the training."""
    return CLIPTokenizer.from_pretrained(FOLDER / "tokenizer"), shared_vae()


def run_training(args, glyphs: torch.Tensor, captions: list[str]) -> None:
    """Train, then score the averaged weights."""
    device = torch.device(args.device)
    tokenizer, vae = load_parts()
    cache = latent_cache(vae.to(device), glyphs[: args.limit].to(device), args.copies)
    trainer = DiffusionTrainer(tokenizer, captions[: args.limit], device, not args.eager, cache, args.batch)
    train(args, trainer)
    pipe = trainer.assemble(vae)
    pipe.set_progress_bar_config(disable=True)
    classifier = load_classifier(CLASSIFIER_FOLDER)
    prompts = PROMPTS.read_text().splitlines()[: args.score]
    for guidance in (DEFAULTS["guidance_scale"], 7.5):
        pictures = generate(pipe, prompts, batch_size=256, guidance_scale=guidance)
        print(f"{trainer.name} guidance {guidance}: {accuracy_text(classifier, pictures, prompts)}", flush=True)


def run_export(args, captions: list[str]) -> None:
    """Write the pipeline."""
    tokenizer, vae = load_parts()
    trainer = DiffusionTrainer(tokenizer, captions, torch.device("cpu"), compiled=False)
    load_for_export(args, trainer)
    save_in_half(trainer.assemble(vae), args.folder, SHARED_VAE_LINK)


def main() -> None:
    parser = train_parser(__doc__.split("\n")[0], stages=("tokenizer", "train", "export"), batch=256, copies=64)
    args = parser.parse_args()
    glyphs, captions = prepare(args)
    if args.stage == "tokenizer":
        run_tokenizer(args, captions)
    elif args.stage == "train":
        run_training(args, glyphs, captions)
    elif args.stage == "export":
        run_export(args, captions)


if __name__ == "__main__":
    main()

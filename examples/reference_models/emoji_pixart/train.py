"""Train the emoji model, in stages that each last a number of seconds and may run apart.

    python train.py glyphs     --data glyphs.npz                                # draw the font once
    python train.py vae        --data glyphs.npz --out run --batch 256 --budget 150
    python train.py classifier --data glyphs.npz --out run --budget 100
    python train.py diffusion  --data glyphs.npz --out run --budget 190
    python train.py diffusion  --data glyphs.npz --out run --resume run --copies 64 --budget 250 --decay --record
    python train.py export     --data glyphs.npz --out run --folder .

``diffusion`` with ``--resume`` goes on from the state in that folder; with ``--decay`` its
learning rate falls to zero over the budget. ``export`` writes the pipeline folder.
"""

from __future__ import annotations

import argparse
import random
import sys
from pathlib import Path

import torch
from diffusers import AutoencoderKL

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from stages.classifier import train_classifier
from stages.diffusion import DiffusionTrainer
from stages.export import export_pipeline, report_pipeline
from stages.vae import train_vae
from training.common import save_grid
from training.diffusion import latent_cache
from training.glyphs import centred, load_dataset

STAGES = ("glyphs", "vae", "classifier", "diffusion", "export")
EVALUATION_PROMPTS = 256
EXAMPLE_GLYPHS = ("heavy black heart", "teddy bear", "christmas tree", "rabbit", "police car", "green book")


def write_prompts(captions: list[str], folder: Path) -> None:
    """prompts.txt: all captions. eval_prompts.txt: the first 256 of a shuffle with seed 0."""
    shuffled = list(captions)
    random.Random(0).shuffle(shuffled)
    (folder / "prompts.txt").write_text("\n".join(captions) + "\n")
    (folder / "eval_prompts.txt").write_text("\n".join(shuffled[:EVALUATION_PROMPTS]) + "\n")


def write_examples(glyphs: torch.Tensor, captions: list[str], folder: Path) -> None:
    """example_glyphs.png: a row of drawn glyphs, to try the classifier without the font."""
    rows = [captions.index(name) for name in EXAMPLE_GLYPHS]
    save_grid(centred(glyphs[rows]), folder / "example_glyphs.png", columns=len(rows))


def run_diffusion(args, glyphs: torch.Tensor, captions: list[str]) -> None:
    """Stage 3, then a score of the averaged weights."""
    source = args.resume or args.out
    vae = AutoencoderKL.from_pretrained(source / "vae").to(args.device).eval()
    cache = latent_cache(vae, glyphs, args.copies)
    trainer = DiffusionTrainer(captions, torch.device(args.device), not args.eager, cache, args.batch)
    resumed = args.resume is not None and trainer.load(args.resume)
    print(f"diffusion {'resumed' if resumed else 'started'}: {trainer.progress}", flush=True)
    trainer.run(args.out, args.budget, decay=args.decay, record=args.record)
    report_pipeline(trainer, vae, source, args.out / "samples.png", captions, args.sweep)


def run_export(args, glyphs: torch.Tensor, captions: list[str]) -> None:
    """Write every component, the classifier and the prompt lists."""
    trainer = DiffusionTrainer(captions, torch.device("cpu"), compiled=False)
    if not trainer.load(args.resume or args.out):
        raise FileNotFoundError(f"export: no training state in {args.resume or args.out}.")
    vae = AutoencoderKL.from_pretrained((args.resume or args.out) / "vae")
    export_pipeline(trainer, vae, args.resume or args.out, args.folder)
    write_prompts(captions, args.folder)
    write_examples(glyphs, captions, args.folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--data", type=Path, required=True, help=".npz, drawn when missing")
    parser.add_argument("--out", type=Path, default=Path("run"))
    parser.add_argument("--resume", type=Path, help="folder of an earlier --out")
    parser.add_argument("--folder", type=Path, help="export: the pipeline folder")
    parser.add_argument("--budget", type=float, default=60.0, help="seconds")
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--copies", type=int, default=128, help="augmentations a glyph")
    parser.add_argument("--decay", action="store_true")
    parser.add_argument("--record", action="store_true", help="replay steps as a CUDA graph")
    parser.add_argument("--sweep", action="store_true", help="score several guidance scales")
    parser.add_argument("--eager", action="store_true", help="no torch.compile")
    parser.add_argument("--limit", type=int, help="use the first LIMIT glyphs, to try things out")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()

    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    glyphs, captions = load_dataset(args.data)
    glyphs, captions = glyphs[: args.limit].to(args.device), captions[: args.limit]
    if args.stage == "vae":
        train_vae(glyphs, args.out, args.budget, args.batch, not args.eager)
    elif args.stage == "classifier":
        train_classifier(glyphs, captions, args.out, args.budget, args.batch, not args.eager)
    elif args.stage == "diffusion":
        run_diffusion(args, glyphs, captions)
    elif args.stage == "export":
        run_export(args, glyphs, captions)


if __name__ == "__main__":
    main()

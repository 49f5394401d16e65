"""Train the class-conditional model of emoji within a number of seconds, in one call or several.

    python train.py train  --data glyphs.npz --out run --budget 500 --record
    python train.py train  --data glyphs.npz --out run --resume run --budget 450 --decay --record
    python train.py export --data glyphs.npz --resume run --folder .

``--resume`` goes on from the state in that folder; with ``--decay`` the learning rate falls to zero
over the budget. ``export`` writes the pipeline folder. The autoencoder is that of emoji_pixart.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from emoji_pixart.classifier import load_classifier
from model import DiffusionTrainer, choose_classes
from score import DEFAULTS, evaluation_labels, generate
from training.command import load_for_export, prepare, train, train_parser
from training.diffusion import latent_cache, shared_vae
from training.export import SHARED_VAE_LINK, compact, save_in_half
from training.scoring import CLASSIFIER_FOLDER, accuracy_text


def run_training(args, glyphs: torch.Tensor, names: list[str]) -> None:
    """Train, then score the averaged weights."""
    device = torch.device(args.device)
    vae = shared_vae().to(device)
    cache = latent_cache(vae, glyphs[: args.limit].to(device), args.copies)
    trainer = DiffusionTrainer(device, not args.eager, cache, args.batch)
    train(args, trainer)
    pipe = trainer.assemble(vae, names)
    pipe.set_progress_bar_config(disable=True)
    classifier = load_classifier(CLASSIFIER_FOLDER)
    asked = evaluation_labels(pipe, args.score)
    for guidance in (DEFAULTS["guidance_scale"], 1.0, 3.0):
        pictures = generate(pipe, asked, batch_size=256, guidance_scale=guidance)
        print(f"{trainer.name} guidance {guidance}: {accuracy_text(classifier, pictures, asked)}", flush=True)


def run_export(args, names: list[str]) -> None:
    """Write the pipeline."""
    trainer = DiffusionTrainer(torch.device("cpu"), compiled=False)
    load_for_export(args, trainer)
    save_in_half(trainer.assemble(shared_vae(), names), args.folder, SHARED_VAE_LINK)
    # `save_pretrained` leaves the names out; the published pipeline has them here too.
    index = args.folder / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"id2label": dict(enumerate(names))}))
    compact(index)


def main() -> None:
    parser = train_parser(__doc__.split("\n")[0], stages=("train", "export"), batch=512, copies=64)
    args = parser.parse_args()
    glyphs, names = choose_classes(*prepare(args))
    if args.stage == "train":
        run_training(args, glyphs, names)
    else:
        run_export(args, names)


if __name__ == "__main__":
    main()

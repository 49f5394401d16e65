"""Train the model of faces within a number of seconds, in one call or several.

    python train.py train  --data glyphs.npz --out run --budget 500 --record
    python train.py train  --data glyphs.npz --out run --resume run --budget 450 --decay --record
    python train.py export --data glyphs.npz --resume run --folder .

``--resume`` goes on from the state in that folder; with ``--decay`` the learning rate falls to zero
over the budget. ``export`` writes the pipeline folder.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from emoji_pixart.classifier import load_classifier
from model import DiffusionTrainer, is_face, picture_cache
from score import drawn_faces, feature_statistics, generate, judge, save_statistics
from training.command import load_for_export, prepare, train, train_parser
from training.export import save_in_half
from training.scoring import CLASSIFIER_FOLDER


def run_training(args, glyphs: torch.Tensor, faces: list[str]) -> None:
    """Train, then score the averaged weights."""
    device = torch.device(args.device)
    cache = picture_cache(glyphs.to(device), args.copies)
    trainer = DiffusionTrainer(device, not args.eager, cache, args.batch)
    train(args, trainer)
    pipe = trainer.assemble()
    pipe.set_progress_bar_config(disable=True)
    classifier = load_classifier(CLASSIFIER_FOLDER)
    statistics = feature_statistics(classifier, drawn_faces(glyphs, 2048, seed=1))
    pictures = generate(pipe, args.score, batch_size=256)
    print(f"{trainer.name} {len(pictures)} pictures: {judge(classifier, pictures, faces, statistics)}", flush=True)


def run_export(args, glyphs: torch.Tensor, faces: list[str]) -> None:
    """Write the pipeline, the list of faces and the statistics of their embeddings."""
    trainer = DiffusionTrainer(torch.device("cpu"), compiled=False)
    load_for_export(args, trainer)
    save_statistics(load_classifier(CLASSIFIER_FOLDER), glyphs, args.folder)
    save_in_half(trainer.assemble(), args.folder)
    (args.folder / "faces.txt").write_text("\n".join(faces) + "\n")


def main() -> None:
    parser = train_parser(__doc__.split("\n")[0], stages=("train", "export"), batch=256, copies=512)
    args = parser.parse_args()
    glyphs, captions = prepare(args)
    rows = [row for row, caption in enumerate(captions) if is_face(caption)][: args.limit]
    run = run_training if args.stage == "train" else run_export
    run(args, glyphs[rows], [captions[row] for row in rows])


if __name__ == "__main__":
    main()

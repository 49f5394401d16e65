"""Train the moving-emoji model, in stages that each last a number of seconds and may run apart.

    python train.py vae       --data glyphs.npz --out run --budget 220 --record
    python train.py diffusion --data glyphs.npz --out run --budget 180 --record
    python train.py diffusion --data glyphs.npz --out run --vae run --resume run --budget 190 --decay --record
    python train.py export    --data glyphs.npz --vae run --resume run --folder .

``diffusion`` with ``--resume`` goes on from the state in that folder; with ``--decay`` its learning
rate falls to zero over the budget. ``export`` writes the pipeline folder.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from clips import choose_emoji
from stages.diffusion import FlowTrainer, latent_cache
from stages.export import export_pipeline, report_pipeline
from stages.vae import VaeTrainer, load_vae
from training.command import load_for_export, prepare, train, train_parser


def run_vae(args, glyphs: torch.Tensor) -> None:
    """Stage 1, always to the end of its learning rate: the latents must not change any more."""
    trainer = VaeTrainer(glyphs)
    trainer.run(args.out, args.budget, decay=True, record=args.record, save_every_s=100.0)
    trainer.finish(args.out)


def run_diffusion(args, glyphs: torch.Tensor, names: list[str]) -> None:
    """Stage 2, then a score of the averaged weights."""
    vae = load_vae(args.vae or args.out, args.device)
    cache = latent_cache(vae, glyphs, args.copies)
    trainer = FlowTrainer(names, torch.device(args.device), not args.eager, cache, args.batch)
    train(args, trainer)
    report_pipeline(trainer, vae, names, args.score)


def run_export(args, names: list[str]) -> None:
    """Write every component and the prompt lists."""
    trainer = FlowTrainer(names, torch.device("cpu"), compiled=False)
    load_for_export(args, trainer)
    export_pipeline(trainer, load_vae(args.vae or args.resume), names, args.folder)


def main() -> None:
    stages = ("vae", "diffusion", "export")
    parser = train_parser(__doc__.split("\n")[0], stages=stages, batch=256, copies=32)
    parser.add_argument("--vae", type=Path, help="folder of the autoencoder's state, if not --out")
    args = parser.parse_args()
    glyphs, names = choose_emoji(*prepare(args))
    glyphs, names = glyphs[: args.limit].to(args.device), names[: args.limit]
    if args.stage == "vae":
        run_vae(args, glyphs)
    elif args.stage == "diffusion":
        run_diffusion(args, glyphs, names)
    elif args.stage == "export":
        run_export(args, names)


if __name__ == "__main__":
    main()

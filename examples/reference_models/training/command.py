"""The command line of a model that is trained in one stage: its options, and from a state through a budget."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from training.glyphs import load_dataset
from training.trainer import Trainer


def train_parser(description: str, *, stages: tuple[str, ...], batch: int, copies: int) -> argparse.ArgumentParser:
    """batch, copies: the model's defaults."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("stage", choices=stages)
    parser.add_argument("--data", type=Path, required=True, help="glyphs as .npz, drawn when missing")
    parser.add_argument("--out", type=Path, default=Path("run"), help="folder of the state")
    parser.add_argument("--resume", type=Path, help="folder of an earlier --out")
    parser.add_argument("--folder", type=Path, help="export: the pipeline folder")
    parser.add_argument("--budget", type=float, default=60.0, help="seconds")
    parser.add_argument("--batch", type=int, default=batch)
    parser.add_argument("--copies", type=int, default=copies, help="augmentations a glyph")
    parser.add_argument("--decay", action="store_true", help="learning rate to zero over the budget")
    parser.add_argument("--record", action="store_true", help="replay steps as a CUDA graph")
    parser.add_argument("--eager", action="store_true", help="no torch.compile")
    parser.add_argument("--limit", type=int, help="use the first LIMIT glyphs, to try things out")
    parser.add_argument("--score", type=int, default=256, help="pictures to draw and judge after the training")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser


def prepare(args: argparse.Namespace) -> tuple[torch.Tensor, list[str]]:
    """Seed and set up torch. Returns: all glyphs [n, 3, 128, 128] uint8, on the CPU, and their n captions."""
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    return load_dataset(args.data)


def train(args: argparse.Namespace, trainer: Trainer) -> None:
    """Take up the state in --resume, if any, and train within the budget."""
    resumed = args.resume is not None and trainer.load(args.resume)
    print(f"{trainer.name} {'resumed' if resumed else 'started'}: {trainer.progress}", flush=True)
    trainer.run(args.out, args.budget, decay=args.decay, record=args.record, save_every_s=100.0)


def load_for_export(args: argparse.Namespace, trainer: Trainer) -> None:
    """Take up the state in --resume, which must be there."""
    if args.resume is None or not trainer.load(args.resume):
        raise FileNotFoundError(f"export: needs the state {trainer.name} in --resume, got {args.resume}.")

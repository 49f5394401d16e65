"""Train the language model for a number of seconds, or export a trained state.

    python train.py train  --tokens tokens.npz --out run --budget 463 --record
    python train.py export --tokens tokens.npz --resume run --folder .

`data.py` writes the tokens. With ``--resume`` training goes on from the state in that folder; with
``--decay`` the learning rate falls to zero over the budget.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlamaForCausalLM

from diffuse_compress.evaluation.perplexity import score_tokens

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from architecture import build_model
from data import CONTEXT, load_tokens
from training.command import load_for_export, train
from training.trainer import Trainer

STATE_NAME = "llama"
PEAK_LEARNING_RATE = 2e-3
# At this many tokens a step the text is read some eighty times in all: weights need holding back.
WEIGHT_DECAY = 0.1


class LanguageModelling(nn.Module):
    """The model with its loss, as one module, so that they compile as one."""

    def __init__(self):
        super().__init__()
        self.model = build_model()

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Cross-entropy of each next token. tokens: [b, CONTEXT + 1] int64."""
        logits = self.model(tokens[:, :-1], use_cache=False).logits
        return F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())


class LanguageTrainer(Trainer):
    """The model with the text it is trained on.

    Args: tokens: uint16 of the training text; None to load a state only.
    """

    def __init__(self, tokens: np.ndarray | None, device: torch.device, compiled: bool, batch_size: int = 32):
        text = None if tokens is None else torch.from_numpy(tokens.astype(np.int16)).to(device)
        offsets = torch.arange(CONTEXT + 1, device=device)

        def draw() -> tuple:
            starts = torch.randint(len(text) - CONTEXT - 1, (batch_size, 1), device=device)
            return (text[starts + offsets].long(),)

        super().__init__(
            LanguageModelling().to(device),
            draw,
            name=STATE_NAME,
            peak_learning_rate=PEAK_LEARNING_RATE,
            compiled=compiled,
            ema_decay=0.995,
            weight_decay=WEIGHT_DECAY,
            betas=(0.9, 0.95),
        )

    def report(self, name: str, tokens: np.ndarray) -> None:
        """Print the perplexity of the averaged weights."""
        self.average.swap()
        text = torch.from_numpy(tokens.astype(np.int64))
        score = score_tokens(self.model.model, text, stride=CONTEXT // 2, batch_size=16)
        self.average.swap()
        print(f"{self.name} {name}, {score.count} tokens: perplexity {score.perplexity:.3f}", flush=True)


def export_model(trainer: LanguageTrainer, folder: Path) -> None:
    """Write the averaged weights in fp16."""
    trainer.average.swap()
    model: LlamaForCausalLM = trainer.model.model.half().eval()
    model.save_pretrained(folder)
    # transformers loads the recorded dtype when asked for none: fp32, as diffusers does.
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"dtype": "float32"}, indent=2) + "\n")
    (folder / "model.safetensors").chmod(0o644)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("stage", choices=("train", "export"))
    parser.add_argument("--tokens", type=Path, required=True, help=".npz that data.py wrote")
    parser.add_argument("--out", type=Path, default=Path("run"))
    parser.add_argument("--resume", type=Path, help="folder of an earlier --out")
    parser.add_argument("--folder", type=Path, help="export: the model's folder")
    parser.add_argument("--budget", type=float, default=60.0, help="seconds")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--decay", action="store_true")
    parser.add_argument("--record", action="store_true", help="replay steps as a CUDA graph")
    parser.add_argument("--eager", action="store_true", help="no torch.compile")
    parser.add_argument("--limit", type=int, default=600_000, help="score the first LIMIT tokens of either text")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()

    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    text, held_out = load_tokens(args.tokens)
    if args.stage == "export":
        trainer = LanguageTrainer(None, torch.device("cpu"), compiled=False)
        load_for_export(args, trainer)
        export_model(trainer, args.folder)
        return
    trainer = LanguageTrainer(text, torch.device(args.device), not args.eager, args.batch)
    train(args, trainer)
    trainer.report("training text", text[: args.limit])
    trainer.report("held-out text", held_out[: args.limit])


if __name__ == "__main__":
    main()

"""Perplexity of the model on its held-out text.

python score.py
python score.py --dtype bfloat16 --text some_other.py
"""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

FOLDER = Path(__file__).resolve().parent


@dataclass
class Score:
    """Sum of the negative log-likelihoods of the ``tokens`` after the first, in nats."""

    nats: float
    tokens: int

    @property
    def perplexity(self) -> float:
        return math.exp(self.nats / self.tokens)

    def bits_per_byte(self, size: int) -> float:
        """For a text of ``size`` bytes."""
        return self.nats / math.log(2) / size


@torch.no_grad()
def evaluate(model, tokens: torch.Tensor, batch_size: int = 16) -> Score:
    """Score one row of tokens, each with at least half a window of text before it, but for the first.

    Args: model: a causal language model with ``config.max_position_embeddings``, the window. tokens:
          [n] integers, any device.
    """
    device = next(model.parameters()).device
    window = model.config.max_position_embeddings
    overlap = window // 2
    starts = range(0, max(1, len(tokens) - 1 - overlap), window - overlap)
    windows = [(start, tokens[start : start + window + 1]) for start in starts]
    nats, count = 0.0, 0
    # All windows but the last are equally long: the last one goes alone.
    *full, last = windows
    for group in [*(full[i : i + batch_size] for i in range(0, len(full), batch_size)), [last]]:
        rows = torch.stack([row for _, row in group]).long().to(device)
        logits = model(rows[:, :-1], use_cache=False).logits.float()
        losses = F.cross_entropy(logits.transpose(1, 2), rows[:, 1:], reduction="none")
        for (start, _), row in zip(group, losses.double(), strict=True):
            fresh = row if start == 0 else row[overlap:]
            nats += fresh.sum().item()
            count += len(fresh)
    return Score(nats, count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, default=FOLDER)
    parser.add_argument("--text", type=Path, default=FOLDER / "heldout.txt")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    args = parser.parse_args()

    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype)).to(args.device).eval()
    text = args.text.read_text(encoding="utf-8")
    tokens = torch.tensor(AutoTokenizer.from_pretrained(args.model)(text, verbose=False).input_ids)
    start = time.monotonic()
    score = evaluate(model, tokens)
    print(
        f"{args.text.name}, {len(text.encode())} bytes, {score.tokens} tokens, {args.dtype} on {args.device}: "
        f"perplexity {score.perplexity:.3f} a token, {score.bits_per_byte(len(text.encode())):.4f} bits a byte "
        f"({time.monotonic() - start:.0f} s)"
    )


if __name__ == "__main__":
    main()

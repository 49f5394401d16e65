"""What the model is compared with: unigrams, and trigrams with interpolated Kneser-Ney smoothing.

python ngrams.py --tokens tokens.npz
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from data import VOCABULARY, load_tokens
from transformers import AutoTokenizer

from diffuse_compress.evaluation.perplexity import TextScore

FOLDER = Path(__file__).resolve().parent


class _Table:
    """Counts of integer keys, looked up by bisection; unknown keys count zero."""

    def __init__(self, keys: np.ndarray, weights: np.ndarray | None = None):
        self.keys, inverse, counts = np.unique(keys, return_inverse=True, return_counts=True)
        self.counts = counts if weights is None else np.bincount(inverse, weights, len(self.keys))

    def __call__(self, keys: np.ndarray) -> np.ndarray:
        rows = np.searchsorted(self.keys, keys).clip(max=len(self.keys) - 1)
        return np.where(self.keys[rows] == keys, self.counts[rows], 0)


def _discount(counts: np.ndarray) -> float:
    """Ney, Essen and Kneser's estimate: n1 / (n1 + 2 n2), of how many were counted once and twice."""
    once, twice = (counts == 1).sum(), (counts == 2).sum()
    return once / (once + 2 * twice)


class _Order:
    """One order of the interpolation: discounted counts of a history and a word.

    Args: keys: of the n-grams, history times VOCABULARY plus word. counts: of the keys, all distinct.
    """

    def __init__(self, keys: np.ndarray, counts: np.ndarray):
        self.discount = _discount(counts)
        self.counts = _Table(keys, counts)
        self.totals = _Table(keys // VOCABULARY, counts)
        self.kinds = _Table(keys // VOCABULARY)

    def probability(self, keys: np.ndarray, lower: np.ndarray) -> np.ndarray:
        """p(word | history) of the keys, given what the next lower order says."""
        history = keys // VOCABULARY
        total = self.totals(history)
        seen = total > 0
        total = np.where(seen, total, 1)
        direct = np.maximum(self.counts(keys) - self.discount, 0) / total
        return np.where(seen, direct + self.discount * self.kinds(history) / total * lower, lower)


class Trigrams:
    """Interpolated Kneser-Ney (Chen and Goodman 1998, section 2.7), one discount an order.

    Args: tokens: the training text.
    """

    def __init__(self, tokens: np.ndarray):
        words = tokens.astype(np.int64)
        trigrams = _Table((words[:-2] * VOCABULARY + words[1:-1]) * VOCABULARY + words[2:])
        # Below the highest order a word counts by how many different words came before it.
        bigrams = _Table(trigrams.keys % VOCABULARY**2)
        unigrams = _Table(bigrams.keys % VOCABULARY)
        self.orders = [_Order(table.keys, table.counts) for table in (unigrams, bigrams, trigrams)]

    def score(self, tokens: np.ndarray) -> TextScore:
        """Of the tokens after the first; the second has a history of one."""
        words = tokens.astype(np.int64)
        unigram, bigram, trigram = self.orders
        probability = unigram.probability(words[1:], np.full(len(words) - 1, 1 / VOCABULARY))
        probability = bigram.probability(words[:-1] * VOCABULARY + words[1:], probability)
        keys = (words[:-2] * VOCABULARY + words[1:-1]) * VOCABULARY + words[2:]
        probability[1:] = trigram.probability(keys, probability[1:])
        return _score(-np.log(probability))


def _score(nats: np.ndarray) -> TextScore:
    """The whole text as one window."""
    return TextScore(nats.sum(keepdims=True), np.array([len(nats)]))


def unigram_score(train: np.ndarray, tokens: np.ndarray) -> TextScore:
    """Frequencies of the training text, each count plus one."""
    counts = np.bincount(train, minlength=VOCABULARY) + 1
    return _score(-np.log(counts[tokens[1:]] / counts.sum()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=Path, required=True, help=".npz that data.py wrote")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="with the tokenizer and heldout.txt")
    args = parser.parse_args()

    train, held_out = load_tokens(args.tokens)
    text = (args.folder / "heldout.txt").read_text(encoding="utf-8")
    excerpt = np.array(AutoTokenizer.from_pretrained(args.folder)(text, verbose=False).input_ids)
    trigrams = Trigrams(train)
    for name, tokens in (("heldout.txt", excerpt), ("all held-out files", held_out)):
        for kind, score in (("unigrams", unigram_score(train, tokens)), ("trigrams", trigrams.score(tokens))):
            bits = f", {score.bits_per_byte(len(text.encode())):.4f} bits a byte" if tokens is excerpt else ""
            print(f"{name}, {score.count} tokens, {kind}: perplexity {score.perplexity:.2f} a token{bits}")


if __name__ == "__main__":
    main()

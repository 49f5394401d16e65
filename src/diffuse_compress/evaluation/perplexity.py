"""Perplexity of a causal language model on a text, token by token exact.

Two conventions:

* separate windows, the WikiText-2 convention of quantization papers (GPTQ 2210.17323 and what followed): the tokens of
  the whole text are cut into windows, each is scored on its own from its second token on, and what is left over at the
  end is not scored;
* sliding windows: each token after the first is scored once, with at least ``window - stride`` tokens before it (fewer
  at the beginning of the text). A text's perplexity falls with the stride, at the price of more windows.

Every scored token weighs the same. Perplexities compare under one tokenizer, window and stride only.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from diffuse_compress.errors import ConfigError, MissingDependencyError, ModelStateError
from diffuse_compress.evaluation.language_models import evaluating, load_tokenizer
from diffuse_compress.evaluation.records import Metric
from diffuse_compress.evaluation.statistics import Interval, bootstrap_ratio
from diffuse_compress.progress import track

__all__ = [
    "DEFAULT_WINDOW",
    "TextScore",
    "perplexity_metrics",
    "perplexity_ratio",
    "predicted_tokens",
    "read_text",
    "score_experiment",
    "score_text",
    "score_tokens",
]

DEFAULT_WINDOW = 2048
"""Of a model that can read as much: what papers on quantization use."""
_ROWS_END = "\n\n"
_POSITIONS = 256


@dataclass(frozen=True)
class TextScore:
    """Negative log-likelihoods of a text, by window.

    Attributes:
        nats: [w] float64, of the tokens that each window scores.
        tokens: [w] int64, how many these are.
        window: tokens that the model sees at once.
        stride: between sliding windows; None for separate ones.
        digest: of the tokens of the text; "" where unknown.
    """

    nats: np.ndarray
    tokens: np.ndarray
    window: int = 0
    stride: int | None = None
    digest: str = ""

    @property
    def count(self) -> int:
        """Number of scored tokens."""
        return int(self.tokens.sum())

    @property
    def perplexity(self) -> float:
        """exp of the mean over tokens."""
        return math.exp(float(self.nats.sum()) / self.count)

    @property
    def interval(self) -> Interval:
        """Perplexity with its 95 % bootstrap interval over windows; ``count`` is the number of scored tokens.

        Neighbouring windows are of one text and not quite independent: it is rather too narrow.
        """
        return _exp(bootstrap_ratio(self.nats, self.tokens), self.count)

    def bits_per_byte(self, size: int) -> float:
        """For a text of ``size`` bytes of which every token but the first was scored; compares across tokenizers."""
        return float(self.nats.sum()) / math.log(2) / size

    @property
    def convention(self) -> str:
        """How it was scored, for records."""
        how = "separate windows" if self.stride is None else f"sliding windows, stride {self.stride},"
        return f"token perplexity, {how} of {self.window} tokens"


def read_text(path: str | Path) -> str:
    """A text file as it is; of a ``.jsonl`` or ``.parquet`` file the ``text`` of its rows, joined by two newlines.

    The latter is how the rows of WikiText-2 become one text in the papers.

    Raises:
        MissingDependencyError: a ``.parquet`` file without pyarrow.
        ConfigError: not readable, or without text.
    """
    path = Path(path)
    text = _parquet_text(path) if path.suffix.lower() == ".parquet" else _plain_text(path)
    if not text.strip():
        raise ConfigError(f"{path}: has no text.")
    return text


def _plain_text(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix.lower() == ".jsonl":
            text = _ROWS_END.join(json.loads(line)["text"] for line in text.splitlines() if line.strip())
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path}: not a readable text, or not JSON lines with 'text' ({type(error).__name__}: {error})."
        ) from error
    return text


def _parquet_text(path: Path) -> str:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise MissingDependencyError(f"{path}: parquet files need pyarrow: pip install pyarrow") from error
    try:
        return _ROWS_END.join(parquet.read_table(path, columns=["text"])["text"].to_pylist())
    except (OSError, KeyError, TypeError, ArrowException) as error:
        raise ConfigError(f"{path}: not a readable parquet file with a column 'text' ({error}).") from error


def score_text(model: nn.Module, tokenizer: Any, text: str, **options: Any) -> TextScore:
    """:func:`score_tokens` of a text, with the special tokens that the tokenizer adds to any text."""
    if tokenizer is None:
        raise ConfigError("perplexity: need the model's tokenizer, got None.")
    return score_tokens(model, torch.tensor(tokenizer(text, verbose=False).input_ids), **options)


def score_tokens(
    model: nn.Module,
    tokens: torch.Tensor,
    *,
    window: int | None = None,
    stride: int | None = None,
    batch_size: int = 4,
) -> TextScore:
    """Score one row of tokens.

    Args:
        model: causal language model of transformers, on any device; dtype as it is, losses are taken in float32 and
            summed in float64.
        tokens: [n] integers, any device.
        window: tokens that the model sees at once; None takes the model's limit, at most ``DEFAULT_WINDOW``.
        stride: 1 to ``window`` for sliding windows; None for separate ones.
        batch_size: windows at a time.

    Raises:
        ConfigError: a text shorter than a window, a window longer than the model can read, another stride, tokens that
            the model does not have, or a model without a next-token distribution.
        ModelStateError: probabilities that are not finite.
    """
    window = _checked_window(model, window)
    if stride is not None and not 1 <= stride <= window:
        raise ConfigError(f"perplexity: stride must be 1 to window={window}, got {stride}.")
    if batch_size < 1:
        raise ConfigError(f"perplexity: need batch_size >= 1, got {batch_size}.")
    if tokens.dim() != 1 or len(tokens) < max(2, window):
        raise ConfigError(
            f"perplexity: need at least one window of {window} tokens, got {list(tokens.shape)}. "
            "Give a longer text or a smaller window."
        )
    embeddings = model.get_input_embeddings()  # type: ignore[operator]
    if int(tokens.max()) >= embeddings.num_embeddings or int(tokens.min()) < 0:
        raise ConfigError(
            f"perplexity: the model has {embeddings.num_embeddings} tokens, got token {int(tokens.max())}. "
            "The tokenizer belongs to another model."
        )
    device = next(model.parameters()).device
    spans = _spans(len(tokens), window, stride)
    nats, counts = np.zeros(len(spans)), np.zeros(len(spans), dtype=np.int64)
    with evaluating(model):
        for batch in track(_batches(spans, batch_size), "Scoring text", model, None, {}):
            rows = torch.stack([tokens[spans[i][0] : spans[i][1]] for i in batch]).long().to(device)
            losses = _next_token_losses(model, rows).cpu().numpy()
            for i, row in zip(batch, losses, strict=True):
                fresh = row[spans[i][2] :]
                _refuse_infinite(fresh, spans[i], model)
                nats[i], counts[i] = fresh.sum(), len(fresh)
    digest = hashlib.sha256(tokens.cpu().numpy().astype("<i8").tobytes()).hexdigest()[:16]
    return TextScore(nats, counts, window, stride, digest)


def predicted_tokens(
    model: nn.Module, tokens: torch.Tensor, *, window: int | None = None, batch_size: int = 4
) -> torch.Tensor:
    """The most probable next token after each position of separate windows: [w, window - 1] int64, on the CPU.

    How often two models agree on it is LLMC's "token accuracy". Arguments and errors as :func:`score_tokens`.
    """
    window = _checked_window(model, window)
    spans = _spans(len(tokens), window, None)
    device, found = next(model.parameters()).device, []
    with evaluating(model):
        for batch in track(_batches(spans, batch_size), "Predicting tokens", model, None, {}):
            rows = torch.stack([tokens[spans[i][0] : spans[i][1] - 1] for i in batch]).long().to(device)
            found.append(model(rows, use_cache=False).logits.argmax(dim=-1).cpu())
    return torch.cat(found)


def perplexity_ratio(reference: TextScore, score: TextScore) -> Interval:
    """``score``'s perplexity over ``reference``'s on the same tokens, with a paired bootstrap interval over windows.

    Raises:
        ConfigError: they are of other tokens or windows.
    """
    if (reference.digest, reference.window, reference.stride) != (score.digest, score.window, score.stride):
        raise ConfigError(
            "perplexity_ratio: need scores of the same tokens and windows, got "
            f"{reference.digest} by {reference.convention} and {score.digest} by {score.convention}."
        )
    return _exp(bootstrap_ratio(score.nats - reference.nats, score.tokens), score.count)


def perplexity_metrics(
    score: TextScore, name: str, *, size: int | None = None, reference: tuple[str, TextScore] | None = None
) -> list[Metric]:
    """Scores for a record.

    Args:
        score: of the model.
        name: of the text.
        size: bytes of the text, for bits a byte (sliding windows only).
        reference: name and score of the model to compare with on the same tokens.
    """
    details: dict[str, Any] = {"windows": len(score.tokens), "tokens_sha256": score.digest}
    if size is not None and score.stride is not None:
        details["bits_per_byte"] = score.bits_per_byte(size)
    found = [
        Metric.from_interval(
            f"perplexity, {name}", score.interval, score.convention, higher_is_better=False, details=details
        )
    ]
    if reference is not None:
        other, dense = reference
        found.append(
            Metric.from_interval(
                f"perplexity ratio, {name}",
                perplexity_ratio(dense, score),
                f"{score.convention}, paired by window",
                higher_is_better=False,
                reference={"name": other, "count": dense.count},
            )
        )
    return found


def score_experiment(
    model: nn.Module, folder: Path, data: Sequence[Path], settings: Mapping[str, Any]
) -> tuple[list[Metric], dict[str, str]]:
    """Perplexity on files of text, joined as rows are, as an experiment of ``eval reproduce`` takes it.

    Its settings are the ``name`` of the text, and where they are not the default :func:`score_tokens`' ``window``,
    ``stride`` and ``batch_size``; the rest is as :class:`diffuse_compress.reproduce.ModelScorer` says.
    """
    text = _ROWS_END.join(map(read_text, data))
    options = {key: value for key, value in settings.items() if key != "name"}
    score = score_text(model, load_tokenizer(folder), text, **options)
    return perplexity_metrics(score, settings["name"], size=len(text.encode())), {}


def _checked_window(model: nn.Module, window: int | None) -> int:
    config = model.config.get_text_config() if hasattr(model, "config") else None  # type: ignore[operator, union-attr]
    if config is None or getattr(config, "is_encoder_decoder", False):
        raise ConfigError(f"perplexity: needs a causal language model, got {type(model).__name__}.")
    limit = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    if window is None:
        return min(DEFAULT_WINDOW, limit or DEFAULT_WINDOW)
    if window < 2 or (limit is not None and window > limit):
        raise ConfigError(f"perplexity: window must be 2 to {limit or 'any length'} for this model, got {window}.")
    return window


def _spans(count: int, window: int, stride: int | None) -> list[tuple[int, int, int]]:
    """(first token, one past the last, predictions to skip) of every window; the last token is only predicted."""
    if stride is None:
        return [(start, start + window, 0) for start in range(0, count - window + 1, window)]
    overlap = window - stride
    starts = range(0, max(1, count - 1 - overlap), stride)
    return [(start, min(start + window + 1, count), overlap if start else 0) for start in starts]


def _batches(spans: Sequence[tuple[int, int, int]], batch_size: int) -> list[list[int]]:
    """Indices of windows, equally long ones together: only the last can be shorter."""
    lengths = [stop - start for start, stop, _ in spans]
    equal = [i for i, length in enumerate(lengths) if length == lengths[0]]
    groups = [equal[i : i + batch_size] for i in range(0, len(equal), batch_size)]
    return groups + [[i] for i in range(len(equal), len(spans))]


def _next_token_losses(model: nn.Module, rows: torch.Tensor) -> torch.Tensor:
    """[b, t] float64 nats of ``rows`` [b, t + 1] from their second token on."""
    output = model(rows[:, :-1], use_cache=False)
    logits = getattr(output, "logits", None)
    if logits is None or logits.shape[:2] != (len(rows), rows.shape[1] - 1):
        raise ConfigError(f"perplexity: needs a causal language model with logits, got {type(model).__name__}.")
    targets = rows[:, 1:].to(logits.device)
    losses = []
    # Some positions at a time: a float32 copy of all logits would be the largest tensor here.
    for part, wanted in zip(logits.split(_POSITIONS, dim=1), targets.split(_POSITIONS, dim=1), strict=True):
        part = part.float()
        losses.append(part.logsumexp(dim=-1) - part.gather(-1, wanted.unsqueeze(-1)).squeeze(-1))
    return torch.cat(losses, dim=1).double()


def _refuse_infinite(losses: np.ndarray, span: tuple[int, int, int], model: nn.Module) -> None:
    bad = ~np.isfinite(losses)
    if bad.any():
        where = span[0] + span[2] + 1 + int(bad.argmax())
        raise ModelStateError(
            f"perplexity: {int(bad.sum())} of {losses.size} probabilities are not finite, the first at token {where}, "
            f"in {getattr(model, 'dtype', 'unknown dtype')}. Float16 overflows: load in bfloat16 or float32."
        )


def _exp(interval: Interval, count: int) -> Interval:
    """The interval of exp; -inf and inf, an unknown interval, stay as they are."""
    low = math.exp(interval.low) if math.isfinite(interval.low) else interval.low
    high = math.exp(interval.high) if math.isfinite(interval.high) else interval.high
    return Interval(math.exp(interval.value), low, high, count)

"""Perplexity against a token-by-token float64 reference, windows by hand, refusals, and the reference Llama."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

import tiny
from diffuse_compress.errors import ConfigError, MissingDependencyError, ModelStateError
from diffuse_compress.evaluation.perplexity import (
    TextScore,
    perplexity_metrics,
    perplexity_ratio,
    read_text,
    score_text,
    score_tokens,
)
from diffuse_compress.evaluation.statistics import bootstrap_mean, bootstrap_ratio


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return tiny.build("llama")


def tokens_of(count: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, tiny.VOCABULARY, (count,), generator=torch.Generator().manual_seed(seed))


def one_by_one(model: torch.nn.Module, tokens: torch.Tensor, window: int, stride: int | None) -> list[float]:
    """NLL of each scored token, from a forward of exactly the tokens before it, in float64."""
    wide, found = tiny.build("llama", dtype=torch.float64), []
    for target in range(1, len(tokens)):
        if stride is None:
            start = target // window * window
            if start == target or start + window > len(tokens):
                continue
        else:
            # The first window that holds the target as one of its predictions.
            start = max(0, -(-(target - window) // stride) * stride)
        with torch.no_grad():
            logits = wide(tokens[start:target][None]).logits[0, -1]
        found.append(-float(logits.log_softmax(-1)[tokens[target]]))
    return found


@pytest.mark.parametrize(("window", "stride"), [(16, None), (16, 16), (16, 5), (16, 1)])
def test_score_is_that_of_every_token_on_its_own(model: torch.nn.Module, window: int, stride: int | None) -> None:
    tokens = tokens_of(39)
    expected = one_by_one(model, tokens, window, stride)
    score = score_tokens(model, tokens, window=window, stride=stride, batch_size=3)
    assert score.count == len(expected) == (30 if stride is None else 38)
    assert score.perplexity == pytest.approx(math.exp(np.mean(expected)), rel=1e-5)
    alone = score_tokens(model, tokens, window=window, stride=stride, batch_size=1)
    np.testing.assert_allclose(score.nats, alone.nats, rtol=1e-5)
    assert (score.tokens == alone.tokens).all()


def test_windows_of_a_text_that_ends_with_one(model: torch.nn.Module) -> None:
    assert score_tokens(model, tokens_of(32), window=16).tokens.tolist() == [15, 15]
    assert score_tokens(model, tokens_of(33), window=16, stride=8).tokens.tolist() == [16, 8, 8]
    assert score_tokens(model, tokens_of(34), window=16, stride=8).tokens.tolist() == [16, 8, 8, 1]
    assert score_tokens(model, tokens_of(16), window=16, stride=8).tokens.tolist() == [15]


def test_model_is_left_as_it_was(untouched_rng: None) -> None:
    model = tiny.build("llama").train()
    model.model.layers[0].eval()
    first, second = (score_tokens(model, tokens_of(64), window=32) for _ in range(2))
    assert (first.nats == second.nats).all()
    assert model.training
    assert not model.model.layers[0].training
    assert model.model.layers[1].training
    assert all(p.grad is None for p in model.parameters())


def test_refusals_say_what_to_do(model: torch.nn.Module) -> None:
    tokens = tokens_of(64)
    with pytest.raises(ConfigError, match=r"one window of 128 tokens, got \[64\]. Give a longer text or a smaller"):
        score_tokens(model, tokens)
    with pytest.raises(ConfigError, match="window must be 2 to 128 for this model, got 129"):
        score_tokens(model, tokens, window=129)
    with pytest.raises(ConfigError, match="stride must be 1 to window=32, got 33"):
        score_tokens(model, tokens, window=32, stride=33)
    with pytest.raises(ConfigError, match="the model has 128 tokens, got token 400"):
        score_tokens(model, torch.full((64,), 400), window=32)
    with pytest.raises(ConfigError, match="need the model's tokenizer, got None"):
        score_text(model, None, "text")
    with pytest.raises(ConfigError, match="causal language model with logits, got T5EncoderModel"):
        score_tokens(tiny.build("t5_encoder"), tokens, window=32)
    broken = tiny.build("llama")
    with torch.no_grad():
        broken.lm_head.weight[int(tokens[40])] = math.inf
    with pytest.raises(ModelStateError, match=r"not finite, the first at token \d+, in torch.float32"):
        score_tokens(broken, tokens, window=32)


def test_ratio_is_paired_and_intervals_are_exp_of_the_mean(model: torch.nn.Module) -> None:
    tokens = tokens_of(1024)
    dense = score_tokens(model, tokens, window=32, stride=16)
    small = score_tokens(tiny.build("llama").compress("w4a16", measure=False), tokens, window=32, stride=16)
    ratio = perplexity_ratio(dense, small)
    assert ratio.value == pytest.approx(small.perplexity / dense.perplexity)
    assert ratio.low < ratio.value < ratio.high
    alone = small.interval
    assert alone.value == pytest.approx(small.perplexity)
    assert alone.count == 1023
    assert ratio.high / ratio.low < alone.high / alone.low
    with pytest.raises(ConfigError, match="same tokens and windows"):
        perplexity_ratio(dense, score_tokens(model, tokens, window=32))
    absolute, relative = perplexity_metrics(small, "text", size=2000, reference=("dense", dense))
    assert absolute.details["bits_per_byte"] == pytest.approx(small.nats.sum() / math.log(2) / 2000)
    assert absolute.name == "perplexity, text"
    assert absolute.implementation == "token perplexity, sliding windows, stride 16, of 32 tokens"
    assert relative.reference == {"name": "dense", "count": 1023}
    one = TextScore(np.array([6.0]), np.array([3]))
    assert one.perplexity == pytest.approx(math.exp(2))
    assert perplexity_metrics(one, "text")[0].low is None


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gpu_scores_as_the_cpu_does(model: torch.nn.Module, dtype: torch.dtype) -> None:
    tokens = tokens_of(512)
    expected = score_tokens(model, tokens, window=32, stride=16)
    found = score_tokens(tiny.build("llama", dtype=dtype).cuda(), tokens, window=32, stride=16, batch_size=8)
    assert found.perplexity == pytest.approx(expected.perplexity, rel=1e-4 if dtype is torch.float32 else 0.01)


def test_bootstrap_ratio_weighs_units() -> None:
    generator = np.random.default_rng(0)
    values = generator.normal(2.0, 1.0, 100)
    equal = bootstrap_ratio(values * 4, np.full(100, 4))
    plain = bootstrap_mean(values)
    assert (equal.value, equal.low, equal.high) == pytest.approx((plain.value, plain.low, plain.high))
    assert bootstrap_ratio([1.0, 9.0], [1, 3]).value == 2.5
    with pytest.raises(ConfigError, match="2 sums and 1 weights"):
        bootstrap_ratio([1.0, 2.0], [1])
    with pytest.raises(ConfigError, match="positive weights"):
        bootstrap_ratio([1.0, 2.0], [1, 0])


def test_read_text(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("a\n", "", "b")))
    assert read_text(rows) == "a\n\n\n\n\nb"
    broken = tmp_path / "rows.parquet"
    broken.write_bytes(b"PAR1")
    with pytest.raises(
        (ConfigError, MissingDependencyError), match=r"rows\.parquet: (not a readable|parquet files need)"
    ):
        read_text(broken)
    rows.write_text('{"words": 1}\n')
    with pytest.raises(ConfigError, match="JSON lines with 'text'"):
        read_text(rows)
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(ConfigError, match="has no text"):
        read_text(tmp_path / "empty.txt")

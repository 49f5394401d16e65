"""The reference model of `examples/reference_models/python_llama`: it loads, predicts Python and beats trigrams."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from diffuse_compress.evaluation.perplexity import score_tokens

FOLDER = Path(__file__).parents[2] / "examples" / "reference_models" / "python_llama"
MIB = 2**20
# Tokens of heldout.txt, from its start, and the perplexity that `ngrams.py` gives its trigrams on them.
SLICE, TRIGRAM_PERPLEXITY = 4097, 28.32


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(FOLDER).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def text() -> str:
    return (FOLDER / "heldout.txt").read_text(encoding="utf-8")


def test_folder_fits_in_five_mib():
    assert sum(file.stat().st_size for file in FOLDER.rglob("*") if "__pycache__" not in file.parts) <= 5 * MIB


def test_from_pretrained_without_dtype_loads_fp32(model):
    assert type(model) is LlamaForCausalLM
    assert model.dtype == torch.float32


def test_layer_linears_hold_whole_groups_of_128(model):
    linears = [m for m in model.model.layers.modules() if isinstance(m, torch.nn.Linear)]
    assert len(linears) == 4 * 7
    assert all(linear.in_features % 128 == 0 for linear in linears)


def test_tokenizer_gives_any_text_back(tokenizer, text):
    for sample in (text[:5000], "żółw 🐢\tx\r\n  y"):
        assert tokenizer.decode(tokenizer(sample, verbose=False).input_ids) == sample
    assert tokenizer("<|endoftext|>").input_ids == [tokenizer.eos_token_id] == [0]


def test_heldout_text_is_predicted_far_better_than_by_trigrams(model, tokenizer, text):
    tokens = torch.tensor(tokenizer(text, verbose=False).input_ids[:SLICE])
    result = score_tokens(model, tokens, stride=256)
    assert result.window == 512
    assert result.count == SLICE - 1
    assert result.perplexity < TRIGRAM_PERPLEXITY / 4


def test_bf16_predicts_like_fp32(model, tokenizer, text):
    half = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.bfloat16).eval()
    tokens = torch.tensor(tokenizer(text, verbose=False).input_ids[:513])
    assert half.dtype == torch.bfloat16
    assert score_tokens(half, tokens).perplexity == pytest.approx(score_tokens(model, tokens).perplexity, rel=0.02)


def test_saved_again_the_model_generates_the_same(model, tokenizer, tmp_path):
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again, other = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    prompt = "<|endoftext|>import os\n\ndef "
    outputs = [
        m.generate(**t(prompt, return_tensors="pt"), max_new_tokens=8) for m, t in ((model, tokenizer), (again, other))
    ]
    assert torch.equal(*outputs)
    # The prompt of the card, as the card continues it.
    assert tokenizer.decode(outputs[0][0]).startswith("<|endoftext|>import os\n\ndef joinpath(path):")

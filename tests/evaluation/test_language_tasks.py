"""lm-evaluation-harness on the reference Llama, dense and compressed, with task files and data of this folder."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from diffuse_compress.errors import ConfigError, MissingDependencyError
from diffuse_compress.evaluation.language_tasks import compare_tasks, find_tasks, run_tasks

FOLDER = Path(__file__).parents[2] / "examples" / "reference_models" / "python_llama"
TASKS = Path(__file__).parent / "lm_tasks"
ITEMS = [json.loads(line) for line in (TASKS / "python_next.jsonl").read_text().splitlines()]

pytest.importorskip("lm_eval")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(autouse=True)
def data_folder(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Where the task files' paths begin, and a cache of its own for the datasets made of them."""
    import datasets

    monkeypatch.chdir(TASKS)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets")


def llama(recipe: str | None = None) -> torch.nn.Module:
    model = AutoModelForCausalLM.from_pretrained(FOLDER).eval()
    return model if recipe is None else model.compress(recipe, measure=False)


def likelihood(model: torch.nn.Module, tokenizer: Any, item: dict[str, Any]) -> list[float]:
    """log p(choice | prompt) by hand, one choice at a time."""
    prompt = tokenizer(item["prompt"]).input_ids
    found = []
    for choice in item["choices"]:
        ids = tokenizer(item["prompt"] + choice).input_ids
        with torch.no_grad():
            scores = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        found.append(sum(float(scores[i - 1, ids[i]]) for i in range(len(prompt), len(ids))))
    return found


def test_scores_are_those_of_the_model_at_hand_dense_and_compressed(tokenizer: Any, untouched_rng: None) -> None:
    padding, numpy_state = tokenizer.padding_side, np.random.get_state()[1].copy()
    random_state = random.getstate()
    names = ["python_next", "python_words", "python_write"]
    found = {}
    for recipe in (None, "w4a16"):
        model = llama(recipe).train()
        scores = run_tasks(model, tokenizer, names, include_path=TASKS, batch_size=4)
        assert model.training
        model.eval()
        right = [int(np.argmax(likelihood(model, tokenizer, item))) == item["answer"] for item in ITEMS]
        assert scores.items["python_next", "acc,none"] == {i: float(value) for i, value in enumerate(right)}
        found[recipe] = scores
    by_name = {metric.name: metric for metric in found[None].metrics}
    assert list(by_name) == [
        "acc, python_next",
        "acc_norm, python_next",
        "word_perplexity, python_words",
        "bits_per_byte, python_words",
        "exact_match, python_write",
    ]
    accuracy = by_name["acc, python_next"]
    assert accuracy.value > 0.6, "the model knows Python"
    assert accuracy.count == 10
    assert accuracy.low < accuracy.value
    assert "lm_eval 0." in accuracy.implementation
    assert "task version 1.0, 0 examples" in accuracy.implementation
    assert not by_name["bits_per_byte, python_words"].higher_is_better
    assert found[None].count == 30
    assert found[None].settings["num_fewshot"] == dict.fromkeys(names, 0)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(FOLDER))
    untrained = run_tasks(model, tokenizer, ["python_next"], include_path=TASKS)
    changes = {metric.name: metric for metric in compare_tasks(found[None], untrained, "dense")}
    change = changes["change of acc, python_next"]
    values = [np.mean(list(scores.items["python_next", "acc,none"].values())) for scores in (found[None], untrained)]
    assert values[1] < values[0], "or the sign of the change is not tested"
    assert change.value == pytest.approx(values[1] - values[0])
    assert change.reference == {"name": "dense", "count": 10}
    assert tokenizer.padding_side == padding
    assert (np.random.get_state()[1] == numpy_state).all()
    assert random.getstate() == random_state


def test_few_shots_and_limit_reach_the_harness(tokenizer: Any) -> None:
    scores = run_tasks(llama(), tokenizer, ["python_next"], include_path=TASKS, num_fewshot=2, limit=3)
    assert scores.count == 3
    assert scores.settings["num_fewshot"] == {"python_next": 2}
    assert "2 examples before each question" in scores.metrics[0].implementation
    with pytest.raises(ConfigError, match="the same items of python_next, got 3 and 10"):
        compare_tasks(scores, run_tasks(llama(), tokenizer, ["python_next"], include_path=TASKS), "dense")


@pytest.mark.slow  # reads the thousands of task files that come with the harness
def test_unknown_tasks_are_named() -> None:
    with pytest.raises(ConfigError, match="no task 'python_nxt'; did you mean 'python_next'"):
        find_tasks(["python_nxt"], TASKS)


def test_missing_folders_and_no_tasks_are_named() -> None:
    with pytest.raises(ConfigError, match="need a folder of task files"):
        find_tasks(["python_next"], TASKS / "nowhere")
    with pytest.raises(ConfigError, match="at least one task"):
        find_tasks([])


def test_a_missing_harness_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(MissingDependencyError, match=r'pip install "diffuse-compress\[lm-eval\]"'):
        find_tasks(["python_next"])

"""``eval perplexity``, ``lm`` and ``vqa`` through ``main``: what they write, one row a model, and how they fail."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from transformers import AutoModelForCausalLM, AutoTokenizer

import tiny
import tiny_vlm
from diffuse_compress.cli import main
from diffuse_compress.evaluation.perplexity import score_text
from diffuse_compress.evaluation.records import eval_results, load_record

LLAMA = Path(__file__).parents[2] / "examples" / "reference_models" / "python_llama"
TASKS = Path(__file__).parent / "lm_tasks"
CHARACTERS = 4000


def test_perplexity_and_tasks_of_a_model_share_a_row(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, text = tmp_path / "runs", LLAMA / "heldout.txt"
    common = [str(LLAMA), "--recipe", "dense", "w4a16", "--out", str(out)]
    options = ["--text", str(text), "--limit", str(CHARACTERS), "--stride", "256"]
    assert main(["eval", "perplexity", *common, *options]) == 0
    printed = capsys.readouterr().out
    assert "perplexity, heldout.txt: " in printed
    assert "perplexity ratio, heldout.txt: 1." in printed
    dense, small = (load_record(out / name) for name in ("dense", "w4a16"))
    (metric,) = dense.metrics
    sample = text.read_text()[:CHARACTERS]
    score = score_text(
        AutoModelForCausalLM.from_pretrained(LLAMA), AutoTokenizer.from_pretrained(LLAMA), sample, stride=256
    )
    assert metric.value == pytest.approx(score.perplexity, rel=1e-5)
    assert metric.details["bits_per_byte"] == pytest.approx(score.bits_per_byte(len(sample.encode())), rel=1e-5)
    assert dense.data["kind"] == "texts"
    assert dense.samples == metric.count == score.count
    assert small.recipe is not None
    assert small.cost["disk_bytes"] < dense.cost["disk_bytes"]
    assert small.metrics[1].reference == {"name": "dense", "count": score.count}
    assert small.metrics[1].value == pytest.approx(small.metrics[0].value / metric.value, rel=1e-5)

    pytest.importorskip("lm_eval")
    import datasets

    monkeypatch.chdir(TASKS)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    assert main(["eval", "lm", *common, "--tasks", "python_next", "--include-path", "."]) == 0
    assert "acc, python_next" in capsys.readouterr().out
    both = load_record(out / "w4a16")
    assert [m.name.partition(",")[0] for m in both.metrics] == [
        "perplexity",
        "perplexity ratio",
        "acc",
        "acc_norm",
        "change of acc",
        "change of acc_norm",
    ]
    assert both.metrics[2].details.keys() >= {"command", "date"}
    assert eval_results([both])[0].task_type == "text-generation"
    report = tmp_path / "report"
    assert main(["eval", "report", str(out / "dense"), str(out / "w4a16"), "--out", str(report)]) == 0
    header, _, first, second = (report / "report.md").read_text().splitlines()[2:6]
    assert "perplexity, heldout.txt | " in header
    assert first.startswith("| dense | ")
    assert second.startswith("| w4a16 | ")

    command = ["eval", "perplexity", str(LLAMA), "--text", str(text), "--recipe", "dense=w8a8", "--out", str(out)]
    assert main(command) != 0
    assert "holds the record of another recipe. Choose another --out" in capsys.readouterr().err


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llava")
    model, processor = tiny_vlm.build_llava()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def test_questions_are_answered_scored_and_kept(
    llava: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (30, 20), "red").save(tmp_path / "a.png")
    lines: list[dict[str, Any]] = [
        {"image": "a.png", "question": f"Question {i}?", "answers": ["1"], "kind": "exact"} for i in range(3)
    ]
    lines.append({"image": "a.png", "question": "Which?", "choices": ["x", "y"], "answer": "A"})
    data, out = tmp_path / "q.jsonl", tmp_path / "runs"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    recipes = ["--recipe", "dense", "w8a16"]
    command = ["eval", "vqa", str(llava), *recipes, "--data", str(data), "--batch-size", "2", "--out", str(out)]
    assert main([*command, "--max-new-tokens", "4", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed.keys() == {"dense", "w8a16"}
    small = load_record(out / "w8a16")
    names = [metric.name for metric in small.metrics]
    assert names[:2] == ["exact match, q.jsonl", "multiple choice accuracy, q.jsonl"]
    assert names[-1] == "same answers, q.jsonl"
    assert small.samples == 4
    assert small.cost["prefill_seconds"] > 0
    assert small.cost["decode_tokens_per_second"] > 0
    assert small.data["kind"] == "questions"
    kept = (out / "w8a16" / "answers.q.jsonl").read_text().splitlines()
    assert len(kept) == 5
    assert json.loads(kept[1])["turns"][0]["question"] == "Question 0?"
    assert main([*command, "--max-new-tokens", "5"]) != 0
    assert "holds answers of another run" in capsys.readouterr().err
    assert main(["eval", "report", str(out / "dense"), str(out / "w8a16"), "--out", str(tmp_path / "report")]) == 0
    assert "s until the first token | tokens a second |" in capsys.readouterr().out
    assert eval_results([small])[0].task_type == "visual-question-answering"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["perplexity", "{llama}", "--text", "{empty}"], "has no text"),
        (["perplexity", "{llama}", "--text", "{text}"], "need a tokenizer beside the model, found none"),
        (["perplexity", "{llama}", "--text", "{missing}"], "not a readable text"),
        (["vqa", "{llama}", "--data", "{missing}"], "not a readable file of questions"),
        (["vqa", "{llama}", "--data", "{questions}"], "processor beside the model"),
        (["lm", "{llama}", "--tasks", "x", "--include-path", "{missing}"], "need a folder of task files"),
    ],
)
def test_failures_name_what_is_missing(
    tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny.build("llama").save_pretrained(tmp_path / "llama")
    (tmp_path / "empty").write_text("")
    (tmp_path / "text").write_text("some words")
    (tmp_path / "questions").write_text('{"question": "?", "answer": "x"}')
    places = {name: str(tmp_path / name) for name in ("llama", "empty", "text", "missing", "questions")}
    assert main(["eval", *(argument.format(**places) for argument in arguments)]) != 0
    assert message in capsys.readouterr().err

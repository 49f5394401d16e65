"""The runner on tiny vision-language models: batches, turns, resume, timing, comparison; its answers mean nothing."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import tiny_vlm
from diffuse_compress.errors import CheckpointError, ConfigError
from diffuse_compress.evaluation import vqa
from diffuse_compress.evaluation.questions import Conversation, read_questions
from diffuse_compress.evaluation.vqa import Answers, answer_metrics, answer_questions, compare_answers

NEW_TOKENS = 5


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> list[Conversation]:
    folder = tmp_path_factory.mktemp("questions")
    generator = np.random.default_rng(0)
    for i, (height, width) in enumerate([(28, 28), (40, 70), (84, 30)]):
        Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    lines: list[dict[str, Any]] = [
        {"id": "short", "image": "0.png", "question": "What?", "answers": ["cat"]},
        {"id": "ocr", "image": "1.png", "question": "Which text is on the sign?", "answer": "stop", "kind": "contains"},
        {"id": "chat", "image": "2.png", "turns": [{"question": f"And {i}?", "answer": str(i)} for i in range(3)]},
        {"id": "two", "images": ["0.png", "1.png"], "question": "Same?", "choices": ["yes", "no"], "answer": "no"},
        {"id": "people", "image": "1.png", "question": "How many?", "answers": ["2"] * 10, "kind": "vqa"},
    ]
    (folder / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return read_questions(folder / "questions.jsonl")


def texts(answers: Answers) -> list[list[str]]:
    return [[answer.text for answer in found] for found in answers.answers]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("name", tiny_vlm.BUILDERS)
def test_batches_answer_as_one_by_one(
    name: str, device: str, questions: list[Conversation], untouched_rng: None
) -> None:
    model, processor = tiny_vlm.BUILDERS[name]()
    model.train().to(device)
    side = processor.tokenizer.padding_side = "right"
    one = answer_questions(model, processor, questions, batch_size=1, max_new_tokens=NEW_TOKENS)
    four = answer_questions(model, processor, questions, batch_size=4, max_new_tokens=NEW_TOKENS)
    assert texts(four) == texts(one)
    assert len({text for found in texts(one) for text in found}) > 3, "or the answers do not depend on what is asked"
    numbers = [[(a.prompt_tokens, a.image_tokens, a.new_tokens) for a in found] for found in one.answers]
    assert numbers == [[(a.prompt_tokens, a.image_tokens, a.new_tokens) for a in found] for found in four.answers]
    assert model.training
    assert processor.tokenizer.padding_side == side
    assert one.count == 7
    images = {c.id: found[0].image_tokens for c, found in zip(questions, one.answers, strict=True)}
    # LLaVA: four patches a picture. Qwen: one token for each square of 28 pixels of the resized picture.
    assert images["two"] == images["short"] + images["ocr"]
    assert images["short"] == (4 if name == "llava" else 1)
    assert images["chat"] == 4 if name == "llava" else images["chat"] >= 3


@pytest.mark.parametrize("name", tiny_vlm.BUILDERS)
def test_later_turns_are_asked_after_the_models_own_answers(name: str, questions: list[Conversation]) -> None:
    model, processor = tiny_vlm.BUILDERS[name]()
    chat = [c for c in questions if c.id == "chat"]
    (found,) = answer_questions(model, processor, chat, max_new_tokens=NEW_TOKENS, instructions={}).answers
    messages: list[dict[str, Any]] = []
    for turn, answer in zip(chat[0].turns, found, strict=True):
        content = [{"type": "image"}] * len(turn.images) + [{"type": "text", "text": turn.question}]
        messages.append({"role": "user", "content": content})
        prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
        picture = Image.open(chat[0].turns[0].images[0]).convert("RGB")
        inputs = processor(text=[prompt], images=[[picture]], return_tensors="pt")
        with torch.no_grad():
            output = model.generate(**inputs, do_sample=False, max_new_tokens=NEW_TOKENS)
        text = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        assert answer.text == text
        assert answer.prompt_tokens == inputs["input_ids"].shape[1]
        messages.append({"role": "assistant", "content": [{"type": "text", "text": text}]})


class Interrupted(Exception):
    """Stands for the loss of power."""


def test_a_run_goes_on_where_it_stopped(
    questions: list[Conversation], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = tiny_vlm.build_llava()
    whole = answer_questions(model, processor, questions, batch_size=2, max_new_tokens=NEW_TOKENS)
    out, original, calls = tmp_path / "answers.jsonl", vqa._Asker.ask, []

    def ask(self: Any, batch: Any) -> Any:
        calls.append([conversation.id for conversation in batch])
        if len(calls) == 2:
            raise Interrupted
        return original(self, batch)

    monkeypatch.setattr(vqa._Asker, "ask", ask)
    options: dict[str, Any] = {"out": out, "batch_size": 2, "max_new_tokens": NEW_TOKENS}
    with pytest.raises(Interrupted):
        answer_questions(model, processor, questions, **options)
    with out.open("a") as file:
        file.write('{"id": "chat", "batch": 1, "tu')  # a line that broke off
    again = answer_questions(model, processor, questions, **options)
    assert calls == [["short", "ocr"], ["chat", "two"], ["chat", "two"], ["people"]]
    assert texts(again) == texts(whole)
    assert again.warm_up == {0, 1}
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line.get("id") for line in lines] == [None, *(c.id for c in questions)]
    assert lines[3]["turns"][2]["question"] == "And 2?"
    assert lines[3]["turns"][2]["text"] == texts(whole)[2][2]
    assert texts(answer_questions(model, processor, questions, **options)) == texts(whole)
    assert len(calls) == 4, "nothing is asked twice"

    with pytest.raises(ConfigError, match=r"another run \(settings: .*'max_new_tokens': 5.*Choose another --out"):
        answer_questions(model, processor, questions, **{**options, "max_new_tokens": 6})
    with pytest.raises(ConfigError, match=r"another run \(questions: "):
        answer_questions(model, processor, questions[:3], **options)
    with pytest.raises(ConfigError, match=r"another run \(recipe: None there, w4a8 now"):
        answer_questions(model, processor, questions, **options, identity={"recipe": "w4a8"})
    out.write_text('{"id": 1}\n')
    with pytest.raises(CheckpointError, match="not a file of answers"):
        answer_questions(model, processor, questions, **options)


def test_around_sees_every_call_and_its_facts_are_kept(questions: list[Conversation], tmp_path: Path) -> None:
    """As a method that drops vision tokens would use it: on for the call, and telling how many it kept."""
    model, processor = tiny_vlm.build_llava()
    features: list[torch.Size] = []

    @contextlib.contextmanager
    def half_the_tokens(inputs: Any) -> Iterator[dict[str, Any]]:
        def drop(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
            features.append(output.shape)
            output = output.clone()
            output[:, 2:] = 0
            return output

        facts: dict[str, Any] = {}
        hook = model.model.multi_modal_projector.register_forward_hook(drop)
        try:
            yield facts
        finally:
            hook.remove()
            facts["kept"] = 2 * len(inputs["pixel_values"])

    out = tmp_path / "answers.jsonl"
    dense = answer_questions(model, processor, questions, max_new_tokens=NEW_TOKENS)
    fewer = answer_questions(model, processor, questions, max_new_tokens=NEW_TOKENS, out=out, around=half_the_tokens)
    assert len(features) == 7, "one prefill a question"
    assert [found[0].facts["kept"] for found in fewer.answers] == [2, 2, 2, 4, 2]
    assert json.loads(out.read_text().splitlines()[1])["turns"][0]["facts"] == {"kept": 2}
    *changes, same = compare_answers(dense, fewer, "dense", "questions")
    equal = [a == b for one, two in zip(texts(dense), texts(fewer), strict=True) for a, b in zip(one, two, strict=True)]
    assert same.value == pytest.approx(np.mean(equal))
    assert same.value < 1
    assert {metric.name.partition(",")[0] for metric in changes} == {
        "change of exact match",
        "change of OCR accuracy",
        "change of multiple choice accuracy",
        "change of VQA accuracy",
    }
    assert compare_answers(dense, dense, "dense", "questions")[-1].value == 1
    with pytest.raises(ConfigError, match="the same questions"):
        compare_answers(dense, answer_questions(model, processor, questions[:2], max_new_tokens=1), "dense", "q")


def test_scores_and_costs_are_means_over_questions(questions: list[Conversation]) -> None:
    def answer(text: str, prefill: float, decode: float, new: int) -> vqa.Answer:
        return vqa.Answer(text, 10, 4, new, prefill, decode)

    found = Answers(
        conversations=tuple(questions[:4]),
        answers=(
            (answer("The cat.", 9.0, 9.0, 2),),
            (answer("It says STOP!", 9.0, 9.0, 3),),
            (answer("0", 0.5, 1.0, 3), answer("two", 0.6, 1.2, 5), answer("2", 0.7, 1.0, 1)),
            (answer("(B) no", 0.5, 1.0, 4),),
        ),
        batches=(0, 0, 1, 1),
        warm_up=frozenset({0}),
        peak_memory=100,
        memory_kind="resident in memory",
    )
    by_name = {metric.name: metric for metric in answer_metrics(found, "q")}
    assert by_name["exact match, q"].value == 0.75  # cat, 0 and 2 of four questions in two conversations
    assert by_name["exact match, q"].count == 2
    assert by_name["exact match, q"].details["questions"] == 4
    assert by_name["exact match, q"].details["by_turn"] == [1.0, 0.0, 1.0]
    assert by_name["OCR accuracy, q"].value == 1
    assert by_name["OCR accuracy, q"].low is None, "of one conversation no interval is known"
    assert by_name["multiple choice accuracy, q"].value == 1
    cost = found.cost()
    assert cost["prefill_seconds"] == 0.6  # of a question: 0.5 / 2, 0.6, 0.7
    assert cost["seconds_per_sample"] == pytest.approx(1.7)  # 1.5 / 2, 1.8, 1.7
    assert cost["decode_tokens_per_second"] == pytest.approx((2 + 3 + 4 + 0) / 3.2)
    assert cost["wall_seconds"] == pytest.approx(18 + 1.5 + 1.8 + 1.7)


def test_an_experiment_is_scored_on_its_files(
    questions: list[Conversation], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = tiny_vlm.build_llava()
    processor.save_pretrained(tmp_path)
    pictures = [questions[i].turns[0].images[0] for i in range(2)]
    assert all(isinstance(picture, Path) for picture in pictures)
    for i, picture in enumerate(pictures):
        line = {"image": str(picture), "question": "How many?", "answers": ["2"] * 10}
        (tmp_path / f"{i}.jsonl").write_text("".join(json.dumps({"id": f"{i}{j}", **line}) + "\n" for j in range(2)))
    files = [tmp_path / "0.jsonl", tmp_path / "1.jsonl"]
    settings = {"name": "TextVQA", "count": 3, "max_new_tokens": 2, "batch_size": 2}
    (metric,), absent = vqa.score_experiment(model, tmp_path, files, settings)
    assert (metric.name, metric.count, absent) == ("VQA accuracy, TextVQA", 3, {})


def test_times_add_up_to_the_call(questions: list[Conversation]) -> None:
    import time

    model, processor = tiny_vlm.build_llava()
    started = time.perf_counter()
    found = answer_questions(model, processor, questions, batch_size=5, max_new_tokens=NEW_TOKENS)
    passed = time.perf_counter() - started
    first = found.answers[0][0]
    assert 0 < first.prefill_seconds
    assert 0 < first.decode_seconds
    assert found.cost()["wall_seconds"] < passed
    assert found.cost()["peak_memory_bytes"] > 0


def test_refusals(questions: list[Conversation]) -> None:
    model, processor = tiny_vlm.build_llava()
    with pytest.raises(ConfigError, match="batch_size >= 1"):
        answer_questions(model, processor, questions, batch_size=0)
    processor.chat_template = None
    with pytest.raises(ConfigError, match="LlavaProcessor: has no chat template"):
        answer_questions(model, processor, questions)

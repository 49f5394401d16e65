"""Scores of answers against values worked out by hand from the published rules, and files of questions."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from PIL import Image

from diffuse_compress.errors import ConfigError
from diffuse_compress.evaluation.answers import (
    anls,
    choice_letter,
    containment,
    exact_match,
    normalize_answer,
    relaxed_match,
    vqa_accuracy,
)
from diffuse_compress.evaluation.questions import questions_digest, read_questions, score_answer


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The  Cat.\n", "cat"),
        ("A dog, an apple and the ball", "dog apple and ball"),
        ("two", "2"),
        ("None", "0"),
        ("Ten o'clock", "10 o'clock"),
        ("dont", "don't"),
        ("its", "its"),
        ("black/white", "black white"),
        ("black / white", "black white"),
        ("2,000 people", "2000 people"),
        ("3.5 m.", "3.5 m"),
        ("(yes)", "yes"),
        ("St. John's", "st john's"),
        ("what?", "what"),
    ],
)
def test_normalize_answer(text: str, normal: str) -> None:
    assert normalize_answer(text) == normal
    assert normalize_answer(normal) == normal


def test_exact_match() -> None:
    assert exact_match("Two.", ["2"]) == 1
    assert exact_match("a red cat", ["cat", "the red cat"]) == 1
    assert exact_match("red cats", ["red cat"]) == 0


@pytest.mark.parametrize(("matches", "accuracy"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_vqa_accuracy_of_ten_people(matches: int, accuracy: float) -> None:
    # Leaving one of k matches out: k times min(1, (k - 1) / 3), and 10 - k times min(1, k / 3), over 10.
    answers = ["yes"] * matches + [f"other {i}" for i in range(10 - matches)]
    assert vqa_accuracy("Yes!", answers) == pytest.approx(accuracy)


def test_vqa_accuracy_needs_enough_people() -> None:
    with pytest.raises(ConfigError, match=r"at least 4 people's answers \(mostly 10\), got 3"):
        vqa_accuracy("yes", ["yes"] * 3)


@pytest.mark.parametrize(
    ("prediction", "answers", "score"),
    [
        ("stop", ["STOP"], 1.0),
        ("  New   York ", ["new york"], 1.0),
        ("kitten", ["sitting"], 1 - 3 / 7),
        ("kitten", ["sitting", "mitten"], 1 - 1 / 6),
        ("ab", ["ac"], 0.0),  # distance of just one half
        ("abc", ["abd"], 1 - 1 / 3),
        ("", ["text"], 0.0),
        ("", [""], 1.0),
    ],
)
def test_anls(prediction: str, answers: list[str], score: float) -> None:
    assert anls(prediction, answers) == pytest.approx(score)


def test_containment() -> None:
    assert containment("The sign says STOP\nHERE.", ["stop here"]) == 1
    assert containment("The sign says go.", ["stop", "halt"]) == 0


@pytest.mark.parametrize(
    ("prediction", "answer", "score"),
    [
        ("105", "100", 1),
        ("105.1", "100", 0),
        ("95", "100", 1),
        ("-95", "-100", 1),
        ("50%", "0.5", 1),
        ("52%", "50%", 1),
        ("53%", "50%", 0),
        ("0", "0", 1),
        ("0.01", "0", 0),
        ("Blue", "blue", 1),
        ("blue line", "blue", 0),
        ("nan", "NaN", 1),
        ("about 100", "100", 0),
    ],
)
def test_relaxed_match(prediction: str, answer: str, score: float) -> None:
    assert relaxed_match(prediction, [answer]) == score


@pytest.mark.parametrize(
    ("prediction", "letter"),
    [
        ("B", "B"),
        ("(c)", None),
        ("(C)", "C"),
        ("B. a cat", "B"),
        ("The answer is C", "C"),
        ("Answer: (B)", "B"),
        ("I would say B because it purrs", "B"),
        ("A dog", "A"),
        ("It is a cat.", "B"),
        ("a cat and a bird", None),
        ("B or C", None),
        ("D", None),
        ("", None),
    ],
)
def test_choice_letter(prediction: str, letter: str | None) -> None:
    assert choice_letter(prediction, ["a dog", "a cat", "the bird"]) == letter


def test_questions_are_read_as_they_are_asked(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    path = tmp_path / "q.jsonl"
    lines = [
        {"image": "a.png", "question": "What?", "answers": ["cat", 3], "source": "mine"},
        {"id": "c", "question": "Which?", "choices": ["left", "right"], "answer": "right"},
        {"id": "t", "image": "a.png", "turns": [{"question": "1?", "answer": "b", "kind": "anls"}] * 2},
    ]
    path.write_text("".join(json.dumps(line) + "\n\n" for line in lines))
    plain, choice, turns = read_questions(path)
    assert (plain.id, plain.turns[0].answers, plain.metadata) == ("1", ("cat", "3"), {"source": "mine"})
    assert plain.turns[0].images == (tmp_path / "a.png",)
    assert choice.turns[0].answers == ("B",)
    assert choice.turns[0].text("Choose.") == "Which?\nA. left\nB. right\nChoose."
    assert score_answer(choice.turns[0], "(B)") == 1
    assert score_answer(choice.turns[0], "none of them") == 0
    assert [len(turn.images) for turn in turns.turns] == [1, 0]
    digest = questions_digest([plain, turns])
    assert digest != questions_digest([plain])
    Image.new("RGB", (4, 5)).save(tmp_path / "a.png")
    assert digest != questions_digest([plain, turns]), "the picture is another one"
    assert [c.id for c in read_questions(path, limit=1)] == ["1"]


def test_rows_of_a_data_set_hold_their_pictures(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    content = io.BytesIO()
    Image.new("RGB", (4, 4)).save(content, "PNG")
    rows = [
        {
            "question_id": 7 + i,
            "question": "What?",
            "image": {"bytes": content.getvalue(), "path": None},
            "answers": ["nokia"] * 10,
            "ocr_tokens": ["NOKIA"],
        }
        for i in range(3)
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "q.parquet")
    first, second = read_questions(tmp_path / "q.parquet", limit=2)
    assert (first.id, second.id) == ("7", "8")
    (turn,) = first.turns
    assert (turn.kind, turn.answers) == ("vqa", ("nokia",) * 10)
    assert turn.images == (content.getvalue(),)
    assert first.metadata == {"ocr_tokens": ["NOKIA"]}
    assert len(questions_digest([first, second])) == 16
    (tmp_path / "bad.parquet").write_text("no")
    with pytest.raises(ConfigError, match="not a readable file of questions"):
        read_questions(tmp_path / "bad.parquet")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1: not readable as JSON"),
        ("[]", "line 1: need an object"),
        ('{"answers": ["x"]}', r"turn 1: needs a 'question', got None"),
        ('{"question": "?"}', "turn 1: needs 'answers'"),
        ('{"question": "?", "answers": [null]}', "'answers' must be texts"),
        ('{"question": "?", "answer": "x", "kind": "exat"}', "no kind 'exat'; did you mean 'exact'"),
        ('{"question": "?", "answer": "x", "image": "none.png"}', r"no picture .*none\.png"),
        ('{"question": "?", "answer": "E", "choices": ["x", "y"]}', "letter or text of one as answer, got 2 choices"),
        ('{"question": "?", "answers": ["x"], "kind": "vqa"}', "Use kind 'exact' for fewer"),
        ('{"turns": []}', "'turns' must be a list of objects"),
        ("", "at least one question, got 0"),
        ('{"id": 1, "question": "?", "answer": "x"}\n{"id": 1, "question": "?", "answer": "x"}', "got '1' twice"),
    ],
)
def test_bad_questions_are_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(ConfigError, match=message):
        read_questions(path)

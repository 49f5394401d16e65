"""Questions about pictures: conversations of one or more turns from a file, and how each answer is scored.

A line is a conversation. With one turn::

    {"id": "q1", "image": "a.png", "question": "What is this?", "answers": ["a cat"], "kind": "exact"}
    {"id": "q2", "images": ["a.png", "b.png"], "question": "Which?", "choices": ["left", "right"], "answer": "B"}

With several, each answered after the model's own answers to those before::

    {"id": "q3", "image": "a.png", "turns": [{"question": ..., "answers": [...]}, {"question": ..., "answers": [...]}]}

Paths are relative to the file. ``kind`` is one of ``KINDS``; without one it is ``choice`` where there are choices,
``vqa`` where there are ten answers, which are people's, else ``exact``. What a line says besides is kept as
``metadata``.

A ``.parquet`` file of a data set on the Hub has such lines as rows, with the pictures in it (``{"bytes": ...}``).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffuse_compress.errors import ConfigError, MissingDependencyError, nearest
from diffuse_compress.evaluation.answers import (
    anls,
    choice_letter,
    containment,
    exact_match,
    relaxed_match,
    vqa_accuracy,
)

__all__ = [
    "INSTRUCTIONS",
    "KINDS",
    "Conversation",
    "Kind",
    "Turn",
    "questions_digest",
    "read_questions",
    "score_answer",
]

_PEOPLE = 10
_SHORT = "Answer the question using a single word or phrase."
_LETTER = "Answer with the option's letter from the given choices directly."
INSTRUCTIONS: Mapping[str, str] = {
    "exact": _SHORT,
    "vqa": _SHORT,
    "anls": _SHORT,
    "contains": "",
    "relaxed": _SHORT,
    "choice": _LETTER,
}
"""What follows a question, by its kind: the sentences that LLaVA-1.5 was trained and is evaluated with (2310.03744)."""


@dataclass(frozen=True)
class Kind:
    """How answers are scored.

    Attributes:
        name: of the score.
        implementation: the rule, for records.
        score: of a prediction against the accepted answers, in [0, 1].
    """

    name: str
    implementation: str
    score: Callable[[str, Sequence[str]], float]


KINDS: Mapping[str, Kind] = {
    "exact": Kind("exact match", "answers normalized as in VQA v2", exact_match),
    "vqa": Kind("VQA accuracy", "min(1, matches / 3), leaving each of the people's answers out", vqa_accuracy),
    "anls": Kind("ANLS", "threshold 0.5, as DocVQA", anls),
    "contains": Kind("OCR accuracy", "the prediction contains an answer, as OCRBench", containment),
    "relaxed": Kind("relaxed accuracy", "numbers within 5 %, as ChartQA", relaxed_match),
    "choice": Kind("multiple choice accuracy", "letter of the option", lambda found, wanted: float(found in wanted)),
}


@dataclass(frozen=True)
class Turn:
    """One question.

    Attributes:
        question: text.
        answers: that count as right; of a choice, one letter.
        kind: key of ``KINDS``.
        choices: options of a choice, in the order of their letters.
        images: pictures that come with this question: files, or their content.
    """

    question: str
    answers: tuple[str, ...]
    kind: str = "exact"
    choices: tuple[str, ...] = ()
    images: tuple[Path | bytes, ...] = ()

    def text(self, instruction: str = "") -> str:
        """The question with its options and what to do, a line each."""
        options = [f"{_letter(i)}. {choice}" for i, choice in enumerate(self.choices)]
        return "\n".join([self.question, *options, *([instruction] if instruction else [])])


@dataclass(frozen=True)
class Conversation:
    """Questions in order, each asked after the model's answers to those before.

    Attributes:
        id: of the line, or its number.
        turns: at least one.
        metadata: what the line says besides.
    """

    id: str
    turns: tuple[Turn, ...]
    metadata: Mapping[str, Any] = field(default_factory=dict)


def score_answer(turn: Turn, prediction: str) -> float:
    """Score of a prediction in [0, 1], by the turn's kind."""
    found = (choice_letter(prediction, turn.choices) or "") if turn.kind == "choice" else prediction
    return KINDS[turn.kind].score(found, turn.answers)


def read_questions(path: str | Path, *, limit: int | None = None) -> list[Conversation]:
    """Conversations of a ``.jsonl`` or ``.parquet`` file; the form is in this module's docstring.

    Args:
        path: of the file.
        limit: the first so many lines.

    Raises:
        MissingDependencyError: a ``.parquet`` file without pyarrow.
        ConfigError: not readable, no questions, two lines of one id, a picture that is not there, an unknown kind, or
            answers that do not fit it; the message names the line.
    """
    path = Path(path)
    lines = _parquet_rows(path, limit) if path.suffix.lower() == ".parquet" else _json_lines(path)
    found = [_conversation(line, f"{path}: line {number}", path.parent, str(number)) for number, line in lines]
    if not found or (limit is not None and limit < 1):
        raise ConfigError(f"{path}: need at least one question, got {len(found)} with limit={limit}.")
    ids = [conversation.id for conversation in found]
    if len(set(ids)) < len(ids):
        twice = next(name for name in ids if ids.count(name) > 1)
        raise ConfigError(f"{path}: needs ids that differ, got {twice!r} twice.")
    return found[:limit]


def questions_digest(conversations: Sequence[Conversation]) -> str:
    """First 16 digits of a hash over questions, answers and the bytes of the pictures."""
    digest = hashlib.sha256()
    pictures: dict[Path | bytes, str] = {}
    for conversation in conversations:
        entry: list[Any] = [conversation.id]
        for turn in conversation.turns:
            for image in turn.images:
                if image not in pictures:
                    content = image if isinstance(image, bytes) else image.read_bytes()
                    pictures[image] = hashlib.sha256(content).hexdigest()
            images = [pictures[image] for image in turn.images]
            entry.append([turn.question, turn.answers, turn.kind, turn.choices, images])
        digest.update(json.dumps(entry).encode())
    return digest.hexdigest()[:16]


def _json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """(number, content) of lines that are not empty."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not a readable file of questions ({error}).") from error
    for number, text in enumerate(lines, start=1):
        if text.strip():
            try:
                yield number, json.loads(text)
            except ValueError as error:
                raise ConfigError(f"{path}: line {number}: not readable as JSON ({error}).") from error


def _parquet_rows(path: Path, limit: int | None) -> Iterator[tuple[int, Any]]:
    """(number, content) of rows; of a large file no more are read than wanted."""
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise MissingDependencyError(f"{path}: parquet files need pyarrow: pip install pyarrow") from error
    number = 0
    try:
        for batch in parquet.ParquetFile(path).iter_batches(batch_size=64):
            for row in batch.to_pylist():
                number += 1
                yield number, {key: value for key, value in row.items() if value is not None}
                if number == limit:
                    return
    except (OSError, ArrowException) as error:
        raise ConfigError(f"{path}: not a readable file of questions ({error}).") from error


def _conversation(line: Any, where: str, folder: Path, number: str) -> Conversation:
    if not isinstance(line, dict):
        raise ConfigError(f"{where}: need an object with 'question' or 'turns', got {line!r:.60}.")
    entries = line.get("turns", [line])
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise ConfigError(f"{where}: 'turns' must be a list of objects, got {entries!r:.60}.")
    turns = [_turn(entry, f"{where}, turn {i}", folder) for i, entry in enumerate(entries, start=1)]
    if "turns" in line:
        first = turns[0]
        shared = _images(line, where, folder)
        turns[0] = Turn(first.question, first.answers, first.kind, first.choices, (*shared, *first.images))
    known = {"id", "question_id", "turns", "image", "images", "question", "answers", "answer", "kind", "choices"}
    rest = {key: value for key, value in line.items() if key not in known}
    return Conversation(str(line.get("id", line.get("question_id", number))), tuple(turns), rest)


def _turn(entry: Mapping[str, Any], where: str, folder: Path) -> Turn:
    question, choices = entry.get("question"), _texts(entry.get("choices", []), f"{where}: 'choices'")
    if not isinstance(question, str) or not question.strip():
        raise ConfigError(f"{where}: needs a 'question', got {question!r}.")
    given = entry.get("answers", entry.get("answer"))
    answers = _texts([] if given is None else given, f"{where}: 'answers'")
    kind = entry.get("kind", "choice" if choices else "vqa" if len(answers) == _PEOPLE else "exact")
    if kind not in KINDS:
        raise ConfigError(f"{where}: no kind {kind!r}; {nearest(str(kind), KINDS)}.")
    if not answers:
        raise ConfigError(f"{where}: needs 'answers', a list of texts, or one 'answer'.")
    if kind == "choice":
        answers = _letters(answers, choices, where)
    if kind == "vqa":
        vqa_accuracy("", answers)  # says how many it needs
    return Turn(question, answers, str(kind), choices, _images(entry, where, folder))


def _letters(answers: Sequence[str], choices: Sequence[str], where: str) -> tuple[str, ...]:
    """Letters of answers that are given as letters, or as the texts of options."""
    known = [_letter(i) for i in range(len(choices))]
    found = [_letter(choices.index(answer)) if answer in choices else answer.strip().upper() for answer in answers]
    if not 2 <= len(choices) <= 26 or not set(found) <= set(known):
        raise ConfigError(
            f"{where}: a choice needs 2 to 26 'choices' and the letter or text of one as answer, got "
            f"{len(choices)} choices and {', '.join(map(repr, answers))}."
        )
    return tuple(found)


def _images(entry: Mapping[str, Any], where: str, folder: Path) -> tuple[Path | bytes, ...]:
    given = entry.get("images", entry.get("image", []))
    found: list[Path | bytes] = []
    for one in given if isinstance(given, list) else [given]:
        if isinstance(one, dict) and isinstance(one.get("bytes"), bytes):
            found.append(one["bytes"])
            continue
        (name,) = _texts(one, f"{where}: 'images'")
        if not (folder / name).is_file():
            raise ConfigError(f"{where}: no picture {folder / name}. Paths are relative to the file of questions.")
        found.append(folder / name)
    return tuple(found)


def _texts(value: Any, where: str) -> tuple[str, ...]:
    values = value if isinstance(value, list) else [value]
    # VQA v2 has each person's answer as an object.
    values = [one.get("answer") if isinstance(one, dict) else one for one in values]
    if not all(isinstance(one, str | int | float) and not isinstance(one, bool) for one in values):
        raise ConfigError(f"{where} must be texts, got {value!r:.80}.")
    return tuple(str(one) for one in values)


def _letter(index: int) -> str:
    return chr(ord("A") + index)

"""A vision-language model's answers to questions about pictures: greedy, in batches, resumable, timed.

Conversations are answered in batches of consecutive ones whose members never change, also not after an interruption. A
turn is asked with the model's own answers to the turns before. Each call is one ``generate``, timed in two parts:
prefill, which ends with the first new token and includes the vision encoder, and decoding.

A method that drops vision tokens is compared with the dense model by running both on the same questions:
:func:`compare_answers`. What it wants to do around every call, or to tell about it, goes through ``around``.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffuse_compress.errors import CheckpointError, ConfigError
from diffuse_compress.evaluation.environment import PeakMemory
from diffuse_compress.evaluation.language_models import evaluating, load_processor
from diffuse_compress.evaluation.questions import (
    INSTRUCTIONS,
    KINDS,
    Conversation,
    questions_digest,
    read_questions,
    score_answer,
)
from diffuse_compress.evaluation.records import Metric
from diffuse_compress.evaluation.samples import write_atomically
from diffuse_compress.evaluation.statistics import bootstrap_ratio
from diffuse_compress.progress import track

__all__ = [
    "DEFAULT_NEW_TOKENS",
    "Answer",
    "Answers",
    "Around",
    "answer_metrics",
    "answer_questions",
    "compare_answers",
    "decoding_text",
    "score_experiment",
]

Around = Callable[[Mapping[str, Any]], AbstractContextManager[dict[str, Any]]]
"""``around(inputs)`` is entered around each call of ``generate(**inputs)``. What stands in the dict that it yields when
the call is over is kept with each answer of the batch: JSON values, such as the number of vision tokens kept."""

DEFAULT_NEW_TOKENS = 32
"""Of one answer."""
_OPTIONS = ("batch_size", "max_new_tokens")


@dataclass(frozen=True)
class Answer:
    """What the model said to one question.

    Attributes:
        text: without special tokens and outer spaces.
        prompt_tokens: read, pictures included, padding not.
        image_tokens: of these, the places of pictures; 0 where the model does not say which they are.
        new_tokens: written, with the one that ends the answer.
        prefill_seconds: of the whole batch's call, until its first new token.
        decode_seconds: of the whole batch's call, from then on.
        facts: what ``around`` told.
    """

    text: str
    prompt_tokens: int
    image_tokens: int
    new_tokens: int
    prefill_seconds: float
    decode_seconds: float
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Answers:
    """All answers of one model.

    Attributes:
        conversations: as they were asked.
        answers: for each conversation, one a turn.
        batches: number of the batch of each conversation.
        warm_up: batches that were the first of a session.
        peak_memory: bytes.
        memory_kind: what is counted.
    """

    conversations: tuple[Conversation, ...]
    answers: tuple[tuple[Answer, ...], ...]
    batches: tuple[int, ...]
    warm_up: frozenset[int]
    peak_memory: int
    memory_kind: str

    @property
    def count(self) -> int:
        """Number of questions."""
        return sum(map(len, self.answers))

    def scores(self) -> list[list[float]]:
        """In [0, 1], for each conversation one a turn."""
        pairs = zip(self.conversations, self.answers, strict=True)
        return [[score_answer(t, a.text) for t, a in zip(c.turns, found, strict=True)] for c, found in pairs]

    def cost(self) -> dict[str, Any]:
        """The ``cost`` of a record: medians over calls, without each session's first batch where there are others."""
        calls: dict[tuple[int, int], list[Answer]] = {}
        for batch, answers in zip(self.batches, self.answers, strict=True):
            for turn, answer in enumerate(answers):
                calls.setdefault((batch, turn), []).append(answer)
        timed = [found for (batch, _), found in calls.items() if batch not in self.warm_up] or list(calls.values())
        decoding = [(found[0].decode_seconds, sum(a.new_tokens - 1 for a in found)) for found in timed]
        seconds, tokens = (sum(column) for column in zip(*decoding, strict=True))
        return {
            "seconds_per_sample": statistics.median(
                (found[0].prefill_seconds + found[0].decode_seconds) / len(found) for found in timed
            ),
            "prefill_seconds": statistics.median(found[0].prefill_seconds / len(found) for found in timed),
            "decode_tokens_per_second": tokens / seconds if tokens and seconds else None,
            "wall_seconds": sum(found[0].prefill_seconds + found[0].decode_seconds for found in calls.values()),
            "peak_memory_bytes": self.peak_memory or None,
            "peak_memory_kind": self.memory_kind,
        }


def answer_questions(
    model: nn.Module,
    processor: Any,
    conversations: Sequence[Conversation],
    *,
    out: str | Path | None = None,
    batch_size: int = 1,
    max_new_tokens: int = DEFAULT_NEW_TOKENS,
    instructions: Mapping[str, str] | None = None,
    around: Around | None = None,
    identity: Mapping[str, Any] | None = None,
) -> Answers:
    """Ask every question.

    Args:
        model: of transformers, with ``generate``, where it shall run.
        processor: of the model, with a chat template. Its padding side is as it was afterwards.
        conversations: from :func:`~diffuse_compress.evaluation.questions.read_questions`.
        out: file of the answers, one conversation a line; a run that broke off goes on from it. None keeps them in
            memory.
        batch_size: conversations at a time; part of a run's identity.
        max_new_tokens: of one answer.
        instructions: what follows a question, by its kind; None takes ``INSTRUCTIONS``.
        around: see :data:`Around`.
        identity: what else makes ``out`` another run, such as model and recipe; JSON values.

    Raises:
        ConfigError: no questions, bad numbers, a processor without a chat template, unreadable pictures, or ``out``
            holds another run.
        CheckpointError: ``out`` is no file of answers.
    """
    _check(processor, len(conversations), batch_size, max_new_tokens)
    chosen = dict(INSTRUCTIONS if instructions is None else instructions)
    settings = {"batch_size": batch_size, "max_new_tokens": max_new_tokens, "instructions": chosen}
    run = {"questions": questions_digest(conversations), "settings": settings, **(identity or {})}
    asker = _Asker(model, processor, chosen, max_new_tokens, around or (lambda _: contextlib.nullcontext({})))
    done = {} if out is None else _resume(Path(out), json.loads(json.dumps(run)))
    starts = range(0, len(conversations), batch_size)
    batches = [list(conversations[start : start + batch_size]) for start in starts]
    missing = [k for k, batch in enumerate(batches) if any(c.id not in done for c in batch)]
    memory = PeakMemory(next(model.parameters()).device)
    with contextlib.ExitStack() as stack:
        file = None if out is None else stack.enter_context(Path(out).open("a", encoding="utf-8"))
        stack.enter_context(evaluating(model))
        stack.enter_context(_left_padded(processor.tokenizer))
        for k in track(missing, "Answering questions", model, None, {}):
            answers = asker.ask(batches[k])
            about = {"batch": k, "first": k == missing[0], "memory": memory.read(), "memory_kind": memory.kind}
            lines = [_line(c, found, about) for c, found in zip(batches[k], answers, strict=True)]
            done.update({line["id"]: line for line in lines})
            if file is not None:
                file.write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
                file.flush()
                os.fsync(file.fileno())
    return _gathered(conversations, [done[conversation.id] for conversation in conversations])


def answer_metrics(
    answers: Answers, name: str, *, settings: str = "greedy", reference: tuple[str, Answers] | None = None
) -> list[Metric]:
    """Scores for a record: of each kind of question the mean over questions, bootstrap intervals over conversations.

    Args:
        answers: of the model.
        name: of the questions.
        settings: how was decoded, for the record.
        reference: name and answers of the model to compare with; adds :func:`compare_answers`.
    """
    found = []
    for kind, columns in _by_kind(answers).items():
        sums, counts, turns = columns
        interval = bootstrap_ratio(sums, counts)
        details: dict[str, Any] = {"kind": kind, "questions": int(sum(counts))}
        if len(turns) > 1:
            details["by_turn"] = [sum(scores) / len(scores) if scores else None for scores in turns]
        found.append(
            Metric.from_interval(
                f"{KINDS[kind].name}, {name}",
                interval,
                f"{KINDS[kind].implementation}; {settings}",
                higher_is_better=True,
                details=details,
            )
        )
    return found + ([] if reference is None else compare_answers(reference[1], answers, reference[0], name))


def compare_answers(reference: Answers, answers: Answers, reference_name: str, name: str) -> list[Metric]:
    """One model against another on the same questions: change of each score, and how many answers are the same.

    Intervals are paired bootstraps over conversations.

    Args:
        reference: of the model to compare with, mostly the dense one.
        answers: of the other one, mostly compressed or with fewer vision tokens.
        reference_name: of the former.
        name: of the questions.

    Raises:
        ConfigError: they were asked other questions.
    """
    if reference.conversations != answers.conversations:
        raise ConfigError("compare_answers: need answers to the same questions in the same order, got others.")
    against = {"name": reference_name, "count": answers.count}
    found, before = [], _by_kind(reference)
    for kind, (sums, counts, _) in _by_kind(answers).items():
        differences = [new - old for new, old in zip(sums, before[kind][0], strict=True)]
        found.append(
            Metric.from_interval(
                f"change of {KINDS[kind].name}, {name}",
                bootstrap_ratio(differences, counts),
                f"{KINDS[kind].implementation}; paired by conversation",
                higher_is_better=True,
                reference=against,
            )
        )
    pairs = list(zip(reference.answers, answers.answers, strict=True))
    same = [sum(a.text == b.text for a, b in zip(one, two, strict=True)) for one, two in pairs]
    found.append(
        Metric.from_interval(
            f"same answers, {name}",
            bootstrap_ratio(same, [len(one) for one, _ in pairs]),
            "equal texts",
            higher_is_better=True,
            reference=against,
        )
    )
    return found


def score_experiment(
    model: nn.Module, folder: Path, data: Sequence[Path], settings: Mapping[str, Any]
) -> tuple[list[Metric], dict[str, str]]:
    """Scores of a model on files of questions, as an experiment of ``eval reproduce`` takes them.

    Args:
        model: where it shall run.
        folder: of the model, with its processor.
        data: files of questions.
        settings: ``name`` of the data, and where they are not the default ``count`` (questions), ``max_new_tokens`` and
            ``batch_size``.

    Returns:
        The scores, and no reasons for absent ones.
    """
    count, options = settings.get("count"), {key: settings[key] for key in _OPTIONS if key in settings}
    conversations: list[Conversation] = []
    for path in data:
        if count is None or len(conversations) < count:
            conversations += read_questions(path, limit=None if count is None else count - len(conversations))
    answers = answer_questions(model, load_processor(folder), conversations, **options)
    return answer_metrics(answers, settings["name"], settings=decoding_text(options.get("max_new_tokens"))), {}


def decoding_text(max_new_tokens: int | None = None, *, instructions: bool = True) -> str:
    """How answers were made, for the ``implementation`` of their scores; arguments as :func:`answer_questions`."""
    bare = "" if instructions else ", bare questions"
    return f"greedy, at most {max_new_tokens or DEFAULT_NEW_TOKENS} tokens{bare}"


def _by_kind(answers: Answers) -> dict[str, tuple[list[float], list[int], list[list[float]]]]:
    """{kind: (sum of scores and number of questions of each conversation that has some, scores by turn)}."""
    found: dict[str, tuple[list[float], list[int], list[list[float]]]] = {}
    for conversation, scores in zip(answers.conversations, answers.scores(), strict=True):
        for kind in dict.fromkeys(turn.kind for turn in conversation.turns):
            sums, counts, turns = found.setdefault(kind, ([], [], []))
            own = [(i, scores[i]) for i, turn in enumerate(conversation.turns) if turn.kind == kind]
            sums.append(sum(score for _, score in own))
            counts.append(len(own))
            for i, score in own:
                turns.extend([] for _ in range(i + 1 - len(turns)))
                turns[i].append(score)
    return found


def _check(processor: Any, count: int, batch_size: int, max_new_tokens: int) -> None:
    if not count or batch_size < 1 or max_new_tokens < 1:
        raise ConfigError(
            "answer_questions: need questions, batch_size >= 1 and max_new_tokens >= 1, got "
            f"{count}, {batch_size} and {max_new_tokens}."
        )
    template = getattr(processor, "chat_template", None) or getattr(processor.tokenizer, "chat_template", None)
    if not template:
        raise ConfigError(
            f"{type(processor).__name__}: has no chat template, which says how pictures and turns are written. "
            "Set processor.chat_template, or give a folder with a chat_template.jinja."
        )


# --- asking -----------------------------------------------------------------------------------------------------


class _Asker:
    """One model with its processor."""

    def __init__(
        self, model: Any, processor: Any, instructions: Mapping[str, str], max_new_tokens: int, around: Around
    ) -> None:
        self.model, self.processor, self.instructions, self.around = model, processor, instructions, around
        self.device = next(model.parameters()).device
        text_config = getattr(model, "config", None)
        image_token = getattr(processor, "image_token_id", None) or getattr(text_config, "image_token_id", None)
        self.image_token: int | None = image_token
        self.generation = copy.deepcopy(model.generation_config)
        # Greedy: what a sampling default leaves behind would only warn.
        self.generation.update(
            do_sample=False, num_beams=1, temperature=None, top_p=None, top_k=None, max_new_tokens=max_new_tokens
        )
        self.generation.max_length = None
        ends = self.generation.eos_token_id
        ends = processor.tokenizer.eos_token_id if ends is None else ends
        self.ends = [] if ends is None else list(ends) if isinstance(ends, list | tuple) else [ends]
        if self.generation.pad_token_id is None:
            self.generation.pad_token_id = processor.tokenizer.pad_token_id

    def ask(self, batch: Sequence[Conversation]) -> list[list[Answer]]:
        """Answers of every conversation, turn by turn."""
        messages: list[list[dict[str, Any]]] = [[] for _ in batch]
        pictures: list[list[Any]] = [[] for _ in batch]
        answers: list[list[Answer]] = [[] for _ in batch]
        for number in range(max(len(conversation.turns) for conversation in batch)):
            asked = [i for i, conversation in enumerate(batch) if number < len(conversation.turns)]
            for i in asked:
                turn = batch[i].turns[number]
                text = turn.text(self.instructions.get(turn.kind, ""))
                content: list[dict[str, Any]] = [{"type": "image"} for _ in turn.images]
                messages[i].append({"role": "user", "content": [*content, {"type": "text", "text": text}]})
                pictures[i].extend(map(_open_picture, turn.images))
            found = self._generate([messages[i] for i in asked], [pictures[i] for i in asked])
            for i, answer in zip(asked, found, strict=True):
                answers[i].append(answer)
                content = [{"type": "text", "text": answer.text}]
                messages[i].append({"role": "assistant", "content": content})
        return answers

    def _generate(self, messages: list[list[dict[str, Any]]], pictures: list[list[Any]]) -> list[Answer]:
        inputs = self._inputs(messages, pictures)
        clock = _Clock(self.device)
        with self.around(inputs) as facts:
            clock.start()
            output = self.model.generate(**inputs, generation_config=self.generation, stopping_criteria=[clock])
            prefill, decode = clock.stop()
        width = inputs["input_ids"].shape[1]
        rows = output[:, width:].tolist()
        texts = self.processor.batch_decode(rows, skip_special_tokens=True)
        prompts = inputs["attention_mask"].sum(dim=1).tolist()
        images = [0] * len(rows)
        if self.image_token is not None:
            images = (inputs["input_ids"] == self.image_token).sum(dim=1).tolist()
        return [
            Answer(text.strip(), prompt, image, self._length(row), prefill, decode, dict(facts))
            for text, prompt, image, row in zip(texts, prompts, images, rows, strict=True)
        ]

    def _inputs(self, messages: list[list[dict[str, Any]]], pictures: list[list[Any]]) -> dict[str, Any]:
        prompts = self.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        first = self.processor.tokenizer.bos_token
        # A template that writes the first token itself must not get a second one.
        adds = not (first and prompts[0].startswith(first))
        given = pictures if any(pictures) else None
        inputs = self.processor(
            text=prompts, images=given, padding=True, return_tensors="pt", add_special_tokens=adds
        ).to(self.device)
        dtype = self.model.dtype
        return {
            key: value.to(dtype) if torch.is_tensor(value) and value.is_floating_point() else value
            for key, value in inputs.items()
        }

    def _length(self, row: Sequence[int]) -> int:
        """Tokens of an answer up to the one that ends it; what follows is padding."""
        ends = [row.index(end) for end in self.ends if end in row]
        return min(ends) + 1 if ends else len(row)


class _Clock:
    """A stopping criterion that never stops, and notes when the first token is there."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.started = self.first = 0.0

    def start(self) -> None:
        self.started, self.first = self._now(), 0.0

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        if not self.first:
            self.first = self._now()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    def stop(self) -> tuple[float, float]:
        """Seconds until the first token, and from then on."""
        return self.first - self.started, self._now() - self.first

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


@contextlib.contextmanager
def _left_padded(tokenizer: Any) -> Iterator[None]:
    """Inside, prompts of a batch end together; afterwards the tokenizer is as it was."""
    side, pad = tokenizer.padding_side, tokenizer.pad_token
    tokenizer.padding_side = "left"
    if pad is None:
        tokenizer.pad_token = tokenizer.eos_token  # masked: which one does not matter
    try:
        yield
    finally:
        tokenizer.padding_side = side
        if pad is None:
            tokenizer.pad_token = None


def _open_picture(picture: Path | bytes) -> Any:
    from PIL import Image

    try:
        with Image.open(io.BytesIO(picture) if isinstance(picture, bytes) else picture) as image:
            return image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        name = "a picture in the file of questions" if isinstance(picture, bytes) else picture
        raise ConfigError(f"{name}: not a readable picture ({error}).") from error


# --- the file of answers ----------------------------------------------------------------------------------------


def _line(conversation: Conversation, answers: Sequence[Answer], about: Mapping[str, Any]) -> dict[str, Any]:
    turns = [
        {
            "question": turn.question,
            "answers": list(turn.answers),
            "score": score_answer(turn, answer.text),
            **vars(answer),
        }
        for turn, answer in zip(conversation.turns, answers, strict=True)
    ]
    return {"id": conversation.id, **about, "turns": turns}


def _resume(path: Path, run: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """{id: line} of the answers that are there; afterwards the file holds whole lines of this run only."""
    lines: list[dict[str, Any]] = []
    if path.exists():
        for text in path.read_text(encoding="utf-8").splitlines():
            try:
                lines.append(json.loads(text))
            except ValueError:
                break  # the run was interrupted while it wrote
        if lines and "run" not in lines[0]:
            raise CheckpointError(f"{path}: not a file of answers: its first line does not say of which run.")
        there = lines[0]["run"] if lines else run
        different = [key for key in {**run, **there} if run.get(key) != there.get(key)]
        if different:
            details = "; ".join(f"{key}: {there.get(key)} there, {run.get(key)} now" for key in different)
            raise ConfigError(
                f"{path}: holds answers of another run ({details:.600}). Choose another --out, or delete the file."
            )
    kept = {line["id"]: line for line in lines[1:] if {"id", "batch", "turns"} <= line.keys()}
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in [{"run": run}, *kept.values()])
    write_atomically(path, text)
    return kept


def _gathered(conversations: Sequence[Conversation], lines: Sequence[Mapping[str, Any]]) -> Answers:
    names = Answer.__dataclass_fields__
    answers = [tuple(Answer(**{key: turn[key] for key in names}) for turn in line["turns"]) for line in lines]
    return Answers(
        conversations=tuple(conversations),
        answers=tuple(answers),
        batches=tuple(line["batch"] for line in lines),
        warm_up=frozenset(line["batch"] for line in lines if line["first"]),
        peak_memory=max(line["memory"] for line in lines),
        memory_kind=lines[0]["memory_kind"],
    )

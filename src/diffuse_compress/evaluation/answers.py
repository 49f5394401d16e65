"""Scores in [0, 1] of short answers: exact match, VQA accuracy, ANLS, containment, relaxed accuracy, multiple choice.

Each is the rule that its benchmark published, named in its docstring.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from diffuse_compress.errors import ConfigError

__all__ = [
    "anls",
    "choice_letter",
    "containment",
    "exact_match",
    "normalize_answer",
    "relaxed_match",
    "vqa_accuracy",
]

_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS = {word: str(value) for value, word in enumerate(_NUMBERS)} | {"none": "0"}
_ARTICLES = frozenset({"a", "an", "the"})
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
# Without their apostrophe these are no words of their own.
_CONTRACTIONS = {
    word.replace("'", ""): word
    for word in (
        "ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he's how's i'm i've isn't "
        "it'll mightn't might've mustn't must've needn't o'clock oughtn't shan't she's should've shouldn't that's "
        "there's they'll they're they've wasn't we've weren't what's where's who's who've why's won't would've "
        "wouldn't y'all you'd you'll you're you've"
    ).split()
}
_ANLS_THRESHOLD = 0.5
_RELAXED_TOLERANCE = 0.05
_VOTES = 3
_FEWEST_ANSWERS = _VOTES + 1


def normalize_answer(text: str) -> str:
    """As VQA v2 and TextVQA compare answers: lower case, without punctuation and articles, number words as digits.

    Source: Goyal et al. 2017 (1612.00837), the evaluation of visualqa.org. A punctuation mark goes where it stands
    beside a space somewhere in the text, or where the text has a number with a comma; elsewhere it parts words. A
    period goes unless a digit follows. Differs: of the contractions that get their apostrophe back, those that are
    words without it ("were", "its") are left alone.
    """
    text = re.sub(r"\s+", " ", text).strip().lower()
    kept = text
    for mark in _PUNCTUATION:
        parts_nothing = f"{mark} " in text or f" {mark}" in text or re.search(r"\d,\d", text) is not None
        kept = kept.replace(mark, "" if parts_nothing else " ")
    kept = re.sub(r"\.(?!\d)", "", kept)
    words = [_DIGITS.get(word, word) for word in kept.split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1 where the normalized prediction is one of the normalized answers."""
    found = normalize_answer(prediction)
    return float(any(found == normalize_answer(answer) for answer in answers))


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Agreement with several people's answers, mostly ten: min(1, matches / 3), averaged over leaving one of them out.

    Source: Antol et al. 2015 (1505.00468), as visualqa.org and TextVQA evaluate.

    Raises:
        ConfigError: fewer than four answers, with which a right one could not score 1.
    """
    if len(answers) < _FEWEST_ANSWERS:
        raise ConfigError(
            f"vqa_accuracy: need at least {_FEWEST_ANSWERS} people's answers (mostly 10), got {len(answers)}. "
            "Use kind 'exact' for fewer."
        )
    found = normalize_answer(prediction)
    same = [found == normalize_answer(answer) for answer in answers]
    matches = sum(same)
    return sum(min(1.0, (matches - one) / _VOTES) for one in same) / len(same)


def anls(prediction: str, answers: Sequence[str]) -> float:
    """Average normalized Levenshtein similarity of one item: the best 1 - distance / length, 0 below one half.

    Source: Biten et al. 2019 (1905.13648), threshold 0.5, as DocVQA evaluates: any case, runs of spaces as one.
    """
    found = " ".join(prediction.lower().split())
    best = 0.0
    for answer in answers:
        wanted = " ".join(answer.lower().split())
        length = max(len(found), len(wanted))
        distance = _levenshtein(found, wanted) / length if length else 0.0
        best = max(best, 1.0 - distance if distance < _ANLS_THRESHOLD else 0.0)
    return best


def containment(prediction: str, answers: Sequence[str]) -> float:
    """1 where the prediction holds an answer, in any case.

    Source: Liu et al. 2023, OCRBench (2305.07895).
    """
    found = prediction.lower().strip().replace("\n", " ")
    return float(any(answer.lower().strip().replace("\n", " ") in found for answer in answers))


def relaxed_match(prediction: str, answers: Sequence[str]) -> float:
    """1 where a number is within 5 % of an answer, or a text equals it in any case.

    Source: Masry et al. 2022, ChartQA (2203.10244); percentages as fractions as in Lee et al. 2022, Pix2Struct
    (2210.03347). An answer of 0 is compared as text.
    """
    return float(any(_relaxed(prediction.strip(), answer.strip()) for answer in answers))


def choice_letter(prediction: str, choices: Sequence[str]) -> str | None:
    """The letter of the option that an answer names, or None.

    Tried in turn: a letter at the beginning ("B", "(B)", "B.", "B: a cat"), one after "answer is" or "answer:", the
    only capital letter that stands alone, the only option whose text occurs.
    """
    letters = "".join(chr(ord("A") + i) for i in range(len(choices)))
    text = prediction.strip()
    some = f"[{letters}]"
    for pattern in (
        rf"\(?({some})(?:[).:,]|\s*$)",
        rf"(?i:.*?\banswer(?: is)?:?)\s*\(?({some})\b",
    ):
        found = re.match(pattern, text, re.DOTALL)
        if found:
            return found.group(1)
    # "A" is also an article.
    alone = {letter for letter in re.findall(rf"(?<![\w'])({some})(?![\w'])", text) if letter != "A"}
    if len(alone) == 1:
        return alone.pop()
    whole = f" {normalize_answer(text)} "
    named = [
        letter for letter, choice in zip(letters, choices, strict=True) if f" {normalize_answer(choice)} " in whole
    ]
    return named[0] if len(named) == 1 else None


def _relaxed(prediction: str, answer: str) -> bool:
    found, wanted = _number(prediction), _number(answer)
    if found is not None and wanted:
        return abs(found - wanted) / abs(wanted) <= _RELAXED_TOLERANCE
    return prediction.lower() == answer.lower()


def _number(text: str) -> float | None:
    try:
        value = float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None  # "nan" and "infinity" are words


def _levenshtein(first: str, second: str) -> int:
    """Least number of insertions, deletions and replacements."""
    row = list(range(len(second) + 1))
    for i, one in enumerate(first, start=1):
        diagonal, row[0] = row[0], i
        for j, two in enumerate(second, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (one != two))
    return row[-1]

"""``diffuse-compress eval`` of language and vision-language models: perplexity, lm, vqa."""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffuse_compress.arms import make_arms
from diffuse_compress.errors import ConfigError
from diffuse_compress.evaluation.environment import PeakMemory
from diffuse_compress.evaluation.generation import Arm
from diffuse_compress.evaluation.language_models import (
    add_to_record,
    language_record,
    load_processor,
    load_tokenizer,
    refuse_other_record,
)
from diffuse_compress.evaluation.language_tasks import TaskScores, compare_tasks, find_tasks, run_tasks
from diffuse_compress.evaluation.perplexity import TextScore, perplexity_metrics, read_text, score_text
from diffuse_compress.evaluation.questions import KINDS, questions_digest, read_questions
from diffuse_compress.evaluation.records import Metric
from diffuse_compress.evaluation.vqa import (
    DEFAULT_NEW_TOKENS,
    Answers,
    answer_metrics,
    answer_questions,
    decoding_text,
)

__all__ = ["add_language"]

_PERPLEXITY_EXAMPLES = """examples:
  # the convention of quantization papers: WikiText-2 as one text, separate windows of 2048 tokens
  diffuse-compress eval perplexity ./llama --recipe dense w8a8 w4a16 --text wikitext2_test.jsonl --out runs

  # every token with at least 1536 tokens before it; also gives bits a byte
  diffuse-compress eval perplexity ./llama dense=./llama small=./llama-w4a16 --text book.txt --stride 512

the first model and recipe is what the others are compared with, window by window.
"""
_LM_EXAMPLES = """examples:
  diffuse-compress eval lm ./llama --recipe dense w4a16 --tasks hellaswag arc_easy --fewshot 5 --out runs
  diffuse-compress eval lm ./llama --tasks my_task --include-path ./my_tasks

needs pip install "diffuse-compress[lm-eval]". Paths of data in a task file are relative to the working directory.
"""
_VQA_EXAMPLES = """examples:
  diffuse-compress eval vqa ./qwen2.5-vl --recipe dense w8a8 --data questions.jsonl --batch-size 8 --out runs

a line of questions.jsonl:
  {"image": "a.png", "question": "What is this?", "answers": ["a cat"], "kind": "exact"}
  {"image": "a.png", "question": "Which?", "choices": ["left", "right"], "answer": "A"}
  {"image": "a.png", "turns": [{"question": "...", "answers": ["..."]}, {"question": "...", "answers": ["..."]}]}

with --out, an interrupted run goes on with the same command.
"""


@dataclass(frozen=True)
class _Result:
    """What one evaluation of one model gives to its record."""

    metrics: Sequence[Metric]
    data: dict[str, Any]
    samples: int
    settings: dict[str, Any]
    cost: dict[str, Any]


_Evaluate = Callable[[Arm, nn.Module], _Result]


def add_language(parts: Any, parser_of: Callable[..., argparse.ArgumentParser], command: Callable[[], str]) -> None:
    """Add the verbs to those of ``eval``.

    Args:
        parts: of argparse.
        parser_of: makes a verb's parser from ``parts``, its name, a summary and examples.
        command: tells what was typed.
    """
    verb = parser_of(parts, "perplexity", "perplexity of language models on a text", _PERPLEXITY_EXAMPLES)
    verb.add_argument(
        "--text", required=True, metavar="FILE", help="text, or .jsonl or .parquet with 'text' in each row"
    )
    verb.add_argument(
        "--window", type=int, metavar="N", help="tokens read at once (default: the model's, at most 2048)"
    )
    verb.add_argument("--stride", type=int, metavar="N", help="of sliding windows (default: separate ones)")
    verb.add_argument("--limit", type=int, metavar="N", help="the first N characters of the text")
    verb.add_argument("--tokenizer", metavar="DIR", help="where none lies with the model")
    _add_common(verb, batch_size=4, of="windows")
    verb.set_defaults(run=partial(_run, command=command, prepare=_perplexity))

    verb = parser_of(parts, "lm", "tasks of lm-evaluation-harness on language models", _LM_EXAMPLES)
    verb.add_argument("--tasks", required=True, nargs="+", metavar="TASK", help="tasks, groups or tags")
    verb.add_argument("--include-path", metavar="DIR", help="of task files of your own")
    verb.add_argument("--fewshot", type=int, metavar="N", help="examples before each question (default: the task's)")
    verb.add_argument("--limit", type=int, metavar="N", help="the first N items of each task")
    verb.add_argument("--max-length", type=int, metavar="N", help="tokens that the model reads (default: its limit)")
    verb.add_argument("--chat-template", action="store_true", help="ask through the tokenizer's chat template")
    verb.add_argument("--seed", type=int, default=1234, help="of few-shot examples (default: 1234)")
    verb.add_argument("--tokenizer", metavar="DIR", help="where none lies with the model")
    _add_common(verb, batch_size=8, of="requests")
    verb.set_defaults(run=partial(_run, command=command, prepare=_tasks))

    verb = parser_of(parts, "vqa", "questions about pictures to vision-language models", _VQA_EXAMPLES)
    verb.add_argument("--data", required=True, metavar="FILE", help="questions, .jsonl; kinds: " + ", ".join(KINDS))
    verb.add_argument("--limit", type=int, metavar="N", help="the first N lines")
    verb.add_argument(
        "--max-new-tokens",
        type=int,
        default=DEFAULT_NEW_TOKENS,
        metavar="N",
        help=f"of an answer (default: {DEFAULT_NEW_TOKENS})",
    )
    verb.add_argument(
        "--no-instructions", action="store_true", help="ask the bare question: no 'single word or phrase'"
    )
    verb.add_argument("--processor", metavar="DIR", help="where none lies with the model")
    _add_common(verb, batch_size=1, of="conversations")
    verb.set_defaults(run=partial(_run, command=command, prepare=_questions))


def _add_common(verb: argparse.ArgumentParser, batch_size: int, of: str) -> None:
    verb.add_argument("models", nargs="+", metavar="[NAME=]PATH_OR_REPO", help="folders or Hub ids")
    verb.add_argument(
        "--recipe",
        nargs="+",
        default=[],
        metavar="[NAME=]RECIPE",
        help="dense, presets (w4a16:hqq names the algorithm) or recipe files (default: dense)",
    )
    verb.add_argument("--batch-size", type=int, default=batch_size, help=f"{of} at a time (default: {batch_size})")
    verb.add_argument("--dtype", default="auto", choices=["auto", "float32", "float16", "bfloat16"])
    verb.add_argument("--device", help="default: cuda if there is one")
    verb.add_argument("--out", metavar="DIR", help="each model with each recipe gets DIR/NAME/record.json")


def _run(
    args: argparse.Namespace,
    command: Callable[[], str],
    prepare: Callable[[argparse.Namespace], _Evaluate],
) -> None:
    """Load one model after the other, evaluate, write its record, and print."""
    evaluate = prepare(args)
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    arms = make_arms(args.models, args.recipe, dtype=args.dtype, device=device)
    for arm in arms if args.out else ():
        refuse_other_record(Path(args.out) / arm.name, arm, device)
    records = {}
    for arm in arms:
        model = arm.load()
        if not isinstance(model, nn.Module):
            raise ConfigError(f"{arm.folder}: need a model of transformers, got a {type(model).__name__}.")
        result = evaluate(arm, model)
        record = language_record(
            arm,
            model,
            result.metrics,
            data=result.data,
            samples=result.samples,
            settings=result.settings,
            cost=result.cost,
            command=command(),
        )
        records[arm.name] = add_to_record(Path(args.out) / arm.name, record) if args.out else record
        del model
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        if not args.json:
            print("\n".join([arm.name, *(f"  {metric}" for metric in record.metrics)]))
    if args.json:
        print(json.dumps({name: record.to_dict() for name, record in records.items()}, indent=1))


def _perplexity(args: argparse.Namespace) -> _Evaluate:
    if args.limit is not None and args.limit < 1:
        raise ConfigError(f"eval perplexity: need --limit >= 1, got {args.limit}.")
    text = read_text(args.text)[: args.limit]
    name, digest = Path(args.text).name, hashlib.sha256(text.encode()).hexdigest()[:16]
    reference: list[tuple[str, TextScore]] = []

    def evaluate(arm: Arm, model: nn.Module) -> _Result:
        memory, started = PeakMemory(next(model.parameters()).device), time.perf_counter()
        tokenizer = load_tokenizer(_beside(arm, args.tokenizer))
        score = score_text(model, tokenizer, text, window=args.window, stride=args.stride, batch_size=args.batch_size)
        # Another tokenizer, or the first model itself, has nothing to be compared with.
        against = reference[0] if reference and reference[0][1].digest == score.digest else None
        reference.append((arm.name, score))
        return _Result(
            perplexity_metrics(score, name, size=len(text.encode()), reference=against),
            {"kind": "texts", "name": name, "sha256": digest},
            score.count,
            {"window": score.window, "stride": score.stride, "batch_size": args.batch_size},
            _cost(memory, started),
        )

    return evaluate


def _tasks(args: argparse.Namespace) -> _Evaluate:
    find_tasks(args.tasks, args.include_path)
    reference: list[tuple[str, TaskScores]] = []

    def evaluate(arm: Arm, model: nn.Module) -> _Result:
        memory, started = PeakMemory(next(model.parameters()).device), time.perf_counter()
        scores = run_tasks(
            model,
            load_tokenizer(_beside(arm, args.tokenizer)),
            args.tasks,
            include_path=args.include_path,
            num_fewshot=args.fewshot,
            limit=args.limit,
            batch_size=args.batch_size,
            max_length=args.max_length,
            apply_chat_template=args.chat_template,
            seed=args.seed,
        )
        changes = compare_tasks(reference[0][1], scores, reference[0][0]) if reference else []
        reference.append((arm.name, scores))
        data = {"kind": "tasks", "name": " ".join(args.tasks), "sha256": None}
        return _Result([*scores.metrics, *changes], data, scores.count, dict(scores.settings), _cost(memory, started))

    return evaluate


def _questions(args: argparse.Namespace) -> _Evaluate:
    conversations = read_questions(args.data, limit=args.limit)
    name, digest = Path(args.data).name, questions_digest(conversations)
    reference: list[tuple[str, Answers]] = []

    def evaluate(arm: Arm, model: nn.Module) -> _Result:
        file = None
        if args.out:
            file = Path(args.out) / arm.name / f"answers.{Path(args.data).stem}.jsonl"
            file.parent.mkdir(parents=True, exist_ok=True)
        known = {key: value for key, value in arm.model.items() if key != "id"}
        answers = answer_questions(
            model,
            load_processor(_beside(arm, args.processor)),
            conversations,
            out=file,
            batch_size=args.batch_size,
            max_new_tokens=args.max_new_tokens,
            instructions={} if args.no_instructions else None,
            identity={"model": known, "recipe": arm.recipe, "device": next(model.parameters()).device.type},
        )
        settings = {"max_new_tokens": args.max_new_tokens, "instructions": not args.no_instructions}
        how = decoding_text(args.max_new_tokens, instructions=not args.no_instructions)
        metrics = answer_metrics(answers, name, settings=how, reference=reference[0] if reference else None)
        reference.append((arm.name, answers))
        data = {"kind": "questions", "name": name, "sha256": digest}
        return _Result(metrics, data, answers.count, {**settings, "batch_size": args.batch_size}, answers.cost())

    return evaluate


def _beside(arm: Arm, given: str | None) -> str | Path:
    """Folder of an arm's tokenizer or processor."""
    assert arm.folder is not None
    return given or arm.folder


def _cost(memory: PeakMemory, started: float) -> dict[str, Any]:
    return {
        "wall_seconds": time.perf_counter() - started,
        "peak_memory_bytes": memory.read() or None,
        "peak_memory_kind": memory.kind,
    }

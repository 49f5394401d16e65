"""Tasks of lm-evaluation-harness on a model in memory, so on a compressed one, with their scores as ours.

The harness asks, scores and counts (``lm_eval``, an optional dependency); from here come the model, the intervals, and
the comparison with another model item by item.
"""

from __future__ import annotations

import copy
import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from diffuse_compress.errors import ConfigError, MissingDependencyError
from diffuse_compress.evaluation.language_models import evaluating, restored_random_states
from diffuse_compress.evaluation.records import Metric
from diffuse_compress.evaluation.statistics import Interval, bootstrap_mean, paired_bootstrap, wilson_interval

__all__ = ["TaskScores", "compare_tasks", "find_tasks", "run_tasks"]

_RESAMPLES = 1000
"""Of the harness' own bootstrap, for scores that are no means over items (BLEU, F1)."""
_Z = 1.959964


@dataclass(frozen=True)
class TaskScores:
    """What one model scored.

    Attributes:
        metrics: of every task and group of tasks, in the harness' order.
        items: {(task, score): {item: value}} for scores that each item has one of.
        count: items of all tasks.
        settings: few-shot examples of each task, and how they were asked.
    """

    metrics: tuple[Metric, ...]
    items: Mapping[tuple[str, str], Mapping[Any, float]]
    count: int
    settings: Mapping[str, Any]


def find_tasks(names: Sequence[str], include_path: str | Path | None = None) -> Any:
    """The harness' ``TaskManager`` that knows these tasks; reads no data and no model.

    Args:
        names: of tasks, groups or tags.
        include_path: folder of task files of one's own. Paths of data in them are relative to the working directory.

    Raises:
        ConfigError: no such folder, or no such task.
        MissingDependencyError: lm_eval is not installed.
    """
    manager_class = _harness()[2]
    if not names:
        raise ConfigError("eval lm: need at least one task, got none.")
    if include_path is not None and not Path(include_path).is_dir():
        raise ConfigError(f"{include_path}: need a folder of task files (.yaml), got nothing there.")
    own = [] if include_path is None else [str(include_path)]
    if own:
        # The harness' own thousands are read only where a name is among them.
        manager = manager_class(include_path=own, include_defaults=False)
        if set(names) <= set(manager.all_tasks):
            return manager
    manager = manager_class(include_path=own or None)
    missing = [name for name in names if name not in manager.all_tasks]
    if missing:
        close = difflib.get_close_matches(missing[0], manager.all_tasks, n=3)
        hint = f"did you mean {' or '.join(map(repr, close))}? " if close else ""
        raise ConfigError(
            f"eval lm: lm_eval has no task {missing[0]!r}; {hint}`lm_eval ls tasks` lists all, --include-path adds a "
            "folder of your own."
        )
    return manager


def run_tasks(
    model: nn.Module,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    include_path: str | Path | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    max_length: int | None = None,
    apply_chat_template: bool = False,
    seed: int = 1234,
) -> TaskScores:
    """Score a causal language model on tasks of lm-evaluation-harness.

    Args:
        model: of transformers, where it shall run; its weights and training flags stay as they are.
        tokenizer: of the model; a copy is used.
        tasks: names of tasks, groups or tags.
        include_path: folder of task files of one's own.
        num_fewshot: examples before each question; None takes the task's.
        limit: the first so many items of each task.
        batch_size: requests at a time.
        max_length: tokens that the model reads; None takes its limit.
        apply_chat_template: ask through the tokenizer's chat template.
        seed: of few-shot examples, and of what tasks draw. Global random states are given back.

    Raises:
        ConfigError: no such task, or no tokenizer.
        MissingDependencyError: lm_eval is not installed.
    """
    evaluate, wrapper, _ = _harness()
    manager = find_tasks(tasks, include_path)
    if tokenizer is None:
        raise ConfigError("eval lm: need the model's tokenizer, got None.")
    with restored_random_states(), evaluating(model):
        # The harness sets padding and tokens of the tokenizer that it is given.
        wrapped = wrapper(
            pretrained=model,
            tokenizer=copy.deepcopy(tokenizer),
            backend="causal",
            batch_size=batch_size,
            max_length=max_length,
        )
        results = evaluate(
            model=wrapped,
            tasks=list(tasks),
            task_manager=manager,
            num_fewshot=num_fewshot,
            limit=limit,
            apply_chat_template=apply_chat_template,
            bootstrap_iters=_RESAMPLES,
            **{f"{which}_seed": seed for which in ("random", "numpy_random", "torch_random", "fewshot_random")},
        )
    items = _items(results["samples"])
    counts = {name: entry["effective"] for name, entry in results["n-samples"].items()}
    shots = {name: results["n-shot"].get(name) for name in counts}
    settings = {"num_fewshot": shots, "limit": limit, "batch_size": batch_size, "max_length": wrapped.max_length}
    settings |= {"apply_chat_template": apply_chat_template, "seed": seed}
    return TaskScores(tuple(_metrics(results, items, counts)), items, sum(counts.values()), settings)


def compare_tasks(reference: TaskScores, scores: TaskScores, name: str) -> list[Metric]:
    """Differences of two models on the same items, ``scores - reference``, with paired bootstrap intervals.

    Args:
        reference: of the model to compare with.
        scores: of the other one.
        name: of the reference.

    Raises:
        ConfigError: they answered other items.
    """
    found = []
    for metric in scores.metrics:
        key = metric.details["task"], metric.details["score"]
        if key not in scores.items or len(scores.items[key]) < 2:
            continue
        here, there = scores.items[key], reference.items.get(key, {})
        if here.keys() != there.keys():
            raise ConfigError(f"compare_tasks: need the same items of {key[0]}, got {len(there)} and {len(here)}.")
        interval = paired_bootstrap([there[item] for item in here], list(here.values()))
        found.append(
            Metric.from_interval(
                f"change of {metric.name}",
                interval,
                f"{metric.implementation}, paired by item",
                higher_is_better=metric.higher_is_better,
                reference={"name": name, "count": interval.count},
            )
        )
    return found


def _harness() -> tuple[Any, Any, Any]:
    """(simple_evaluate, HFLM, TaskManager)."""
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise MissingDependencyError(
            f'Tasks need lm-evaluation-harness: pip install "diffuse-compress[lm-eval]" ({error}).'
        ) from error
    return simple_evaluate, HFLM, TaskManager


def _items(samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[tuple[str, str], dict[Any, float]]:
    """Values by item, where an item has one number."""
    found: dict[tuple[str, str], dict[Any, float]] = {}
    for task, entries in samples.items():
        for entry in entries:
            for name in entry["metrics"]:
                value = entry.get(name)
                if isinstance(value, bool | int | float | np.number) and math.isfinite(value):
                    found.setdefault((task, f"{name},{entry['filter']}"), {})[entry["doc_id"]] = float(value)
    return found


def _metrics(
    results: Mapping[str, Any], items: Mapping[tuple[str, str], Mapping[Any, float]], counts: Mapping[str, int]
) -> list[Metric]:
    version, found = metadata.version("lm_eval"), []
    for task, entry in results["results"].items():
        count = counts.get(task) or sum(counts.get(part, 0) for part in results["group_subtasks"].get(task, ()))
        for key, value in entry.items():
            score, separator, answer_filter = key.partition(",")
            if not separator or score.endswith("_stderr") or not isinstance(value, int | float):
                continue
            values = list(items.get((task, key), {}).values())
            error = entry.get(f"{score}_stderr,{answer_filter}")
            shots = results["n-shot"].get(task)
            revision = results["versions"].get(task)
            numbered = f", task version {revision}" if isinstance(revision, int | float) else ""
            filtered = "" if answer_filter == "none" else f", filter {answer_filter}"
            found.append(
                Metric.from_interval(
                    f"{score}, {task}{filtered}",
                    _interval(float(value), values, error, count),
                    f"lm_eval {version}{numbered}, {shots} examples before each question",
                    higher_is_better=bool(results["higher_is_better"].get(task, {}).get(score, True)),
                    details={"task": task, "score": key},
                )
            )
    return found


def _interval(value: float, values: Sequence[float], error: Any, count: int) -> Interval:
    """95 %: of a share by its score, of a mean by the bootstrap over items, else from the harness' standard error."""
    is_mean = len(values) == count > 0 and math.isclose(value, float(np.mean(values)), rel_tol=1e-6, abs_tol=1e-9)
    if is_mean and set(values) <= {0.0, 1.0}:
        return wilson_interval(round(sum(values)), count)
    if is_mean and count > 1:
        return bootstrap_mean(values)
    half = _Z * float(error) if isinstance(error, int | float) else math.inf
    return Interval(value, value - half, value + half, count)

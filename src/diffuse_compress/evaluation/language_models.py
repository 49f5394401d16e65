"""What evaluations of language models share: eval mode, tokenizers, and records that several of them write into."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from diffuse_compress.errors import ConfigError
from diffuse_compress.evaluation.environment import describe_device
from diffuse_compress.evaluation.generation import Arm
from diffuse_compress.evaluation.records import Metric, Record, load_record
from diffuse_compress.evaluation.samples import RECORD
from diffuse_compress.plan import stored_bytes
from diffuse_compress.versions import installed_versions

__all__ = [
    "add_to_record",
    "evaluating",
    "language_record",
    "load_processor",
    "load_tokenizer",
    "refuse_other_record",
    "restored_random_states",
]


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, the model is in eval mode and records no gradients; afterwards its training flags are as they were."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


@contextlib.contextmanager
def restored_random_states() -> Iterator[None]:
    """Inside, code of others may seed ``random``, NumPy and torch; afterwards their states are as they were."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def load_tokenizer(folder: str | Path) -> Any:
    """The tokenizer that lies with a model.

    Raises:
        ConfigError: there is none.
    """
    return _from_folder("AutoTokenizer", "tokenizer", folder)


def load_processor(folder: str | Path) -> Any:
    """The processor of texts and pictures that lies with a model.

    Raises:
        ConfigError: there is none, or one of texts only.
    """
    found = _from_folder("AutoProcessor", "processor", folder)
    if not hasattr(found, "image_processor"):
        raise ConfigError(f"{folder}: need a processor of texts and pictures, found a {type(found).__name__} only.")
    return found


def _from_folder(auto_class: str, what: str, folder: str | Path) -> Any:
    import transformers

    try:
        return getattr(transformers, auto_class).from_pretrained(folder)
    except Exception as error:  # no file, no class for the config, a broken file: transformers has an error for each
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(
            f"{folder}: need a {what} beside the model, found none ({reason}). Copy its files there, or name their "
            f"folder with --{what}."
        ) from error


def language_record(
    arm: Arm,
    model: nn.Module,
    metrics: Sequence[Metric],
    *,
    data: Mapping[str, Any],
    samples: int,
    settings: Mapping[str, Any],
    cost: Mapping[str, Any],
    command: str = "",
) -> Record:
    """The record of one evaluation of a model; its scores keep date and command of their own."""
    date = datetime.date.today().isoformat()
    dated = [
        dataclasses.replace(metric, details={**metric.details, "date": date, "command": command}) for metric in metrics
    ]
    return Record(
        name=arm.name,
        model={**arm.model, "class": type(model).__name__},
        recipe=arm.recipe,
        device=describe_device(next(model.parameters()).device),
        versions=installed_versions(),
        date=date,
        command=command,
        data=data,
        seeds={"base": settings.get("seed"), "rule": "few-shot examples" if "seed" in settings else "nothing is drawn"},
        samples=samples,
        settings=settings,
        cost={"disk_bytes": stored_bytes(model), **cost},
        metrics=tuple(dated),
    )


def refuse_other_record(folder: str | Path, arm: Arm, device: str | torch.device) -> None:
    """Raise ConfigError where a folder holds the record of another model, recipe or kind of device."""
    path = Path(folder) / RECORD
    if not path.exists():
        return
    there = load_record(path).to_dict()
    model = {key: arm.model.get(key) for key in ("revision", "dtype", "weights_sha256")}
    here = {"model": model, "recipe": arm.recipe, "device": torch.device(device).type}
    found = {
        "model": {key: there["model"].get(key) for key in model},
        "recipe": there["recipe"],
        "device": there["device"]["type"],
    }
    different = [key for key in here if json.loads(json.dumps(here[key])) != found[key]]
    if different:
        raise ConfigError(f"{path}: holds the record of another {' and '.join(different)}. Choose another --out.")


def add_to_record(folder: str | Path, record: Record) -> Record:
    """Write a record into a folder, or its scores into the record of the same model and recipe that is there.

    So perplexity, tasks and questions of a model share one row of a report. What the first evaluation said of its data
    and settings stays, and cost that only the new one has is added; each score's ``details`` have its own date and
    command. That it is the same model is for :func:`refuse_other_record` to say, before anything is computed.

    Returns:
        What was written.
    """
    path = Path(folder) / RECORD
    if path.exists():
        there = load_record(path)
        known = {key: value for key, value in there.cost.items() if value is not None}
        record = dataclasses.replace(there.with_metrics(record.metrics), cost={**record.cost, **known})
    record.save(path)
    return record

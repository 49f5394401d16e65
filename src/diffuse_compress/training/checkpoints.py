"""Checkpoints of a training: folders that appear under their name when they are whole.

checkpoint-<step>/training.safetensors   the layers' state, averages, and moments of the optimizer
checkpoint-<step>/state.json             where the training was, and what it is a training of
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from diffuse_compress.calibration.trees import flatten, unflatten
from diffuse_compress.errors import CheckpointError, ConfigError, ModelStateError
from diffuse_compress.logging import get_logger

__all__ = ["Checkpoint", "find_checkpoint", "load_checkpoint", "save_checkpoint"]

_logger = get_logger(__name__)
_NAME = re.compile(r"checkpoint-(\d+)\Z")
_TENSORS, _STATE = "training.safetensors", "state.json"
_SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Checkpoint:
    """A training that was saved.

    Attributes:
        step: optimizer steps that are done.
        fingerprint: of what is trained, on what, and how.
        content: trees of tensors and JSON values: "layers", "optimizer", "average", "scaler", "losses".
    """

    step: int
    fingerprint: Mapping[str, Any]
    content: Mapping[str, Any]


def _all(folder: Path) -> list[tuple[int, Path]]:
    found = [(int(m[1]), path) for path in folder.glob("checkpoint-*") if (m := _NAME.match(path.name))]
    return sorted((step, path) for step, path in found if (path / _STATE).is_file())


def find_checkpoint(folder: Path, asked: str | Path) -> Path | None:
    """The folder of a checkpoint: "latest" of ``folder`` (None without any), or by name or path.

    Raises:
        CheckpointError: a name under which there is none.
    """
    if asked == "latest":
        known = _all(folder)
        return known[-1][1] if known else None
    path = Path(asked) if (Path(asked) / _STATE).is_file() else folder / asked
    if not (path / _STATE).is_file():
        names = ", ".join(known.name for _, known in _all(folder)) or "none"
        raise CheckpointError(f"resume_from_checkpoint={str(asked)!r}: no checkpoint there; {folder} holds {names}.")
    return path


def save_checkpoint(folder: Path, checkpoint: Checkpoint, limit: int | None) -> Path:
    """Write it, the oldest of more than ``limit`` going before it comes.

    Raises:
        ModelStateError: the disk is full or cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    place = folder / f"checkpoint-{checkpoint.step}"
    temporary = folder / f".{place.name}.tmp"
    tensors: dict[str, torch.Tensor] = {}
    tree = flatten(dict(checkpoint.content), "content", tensors)
    state = {"schema_version": _SCHEMA_VERSION, "step": checkpoint.step, "content": tree}
    state["fingerprint"] = dict(checkpoint.fingerprint)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if limit is not None:
            for _, old in _all(folder)[: -(limit - 1) or None]:
                shutil.rmtree(old)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        # Copies: tied parameters share memory, which safetensors refuses.
        save_file({key: t.detach().cpu().clone().contiguous() for key, t in tensors.items()}, temporary / _TENSORS)
        (temporary / _STATE).write_text(json.dumps(state))
        for file in temporary.iterdir():
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())
        shutil.rmtree(place, ignore_errors=True)
        os.replace(temporary, place)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise ModelStateError(
            f"training: {place} cannot be written ({error}). Free space there, or set checkpoints_total_limit."
        ) from error
    _logger.info("Checkpoint of step %d: %s", checkpoint.step, place)
    return place


def load_checkpoint(path: Path, fingerprint: Mapping[str, Any]) -> Checkpoint:
    """Read one.

    Args:
        path: its folder.
        fingerprint: of the training that is to go on.

    Raises:
        CheckpointError: it cannot be read.
        ConfigError: it is of another training; the message says what differs.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        state = json.loads((path / _STATE).read_text())
        if int(state["schema_version"]) > _SCHEMA_VERSION:
            raise CheckpointError(f"{path}: written by a newer release: pip install -U diffuse-compress.")
        tensors = load_file(path / _TENSORS)
        found = Checkpoint(int(state["step"]), state["fingerprint"], unflatten(state["content"], tensors))
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: damaged ({type(error).__name__}: {error}). Delete it.") from error
    now = json.loads(json.dumps(dict(fingerprint)))
    differing = [key for key, value in now.items() if found.fingerprint.get(key) != value]
    if differing:
        parts = [f"{key} {_brief(found.fingerprint.get(key), now[key])}" for key in differing]
        raise ConfigError(
            f"{path} is of another training, from which this one differs in {'; '.join(parts)}. Make these equal, or "
            "train anew in another output_dir."
        )
    return found


def _brief(before: Any, now: Any) -> str:
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        keys = [key for key in {**before, **now} if before.get(key) != now.get(key)]
        return ", ".join(f"{key} ({before.get(key)} -> {now.get(key)})" for key in keys[:3])
    return f"({before} -> {now})"

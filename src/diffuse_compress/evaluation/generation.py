"""Pictures and clips of one or more pipelines for the same prompts and seeds, on any number of processes, resumable.

Sample i has the seed ``seed + i`` and a generator of its own. Samples are made in batches of consecutive ones whose
members never change: not with the number of processes, and not after an interruption. So the files are bit for bit the
same, where the pipeline itself is deterministic on the device.

A run's folder holds ``record.json``, ``progress.jsonl`` (a line for each batch, with its time and memory; while several
processes run, one file for each) and, once it is complete, ``manifest.jsonl``. A sample is renamed into place when it
is whole, and counts when its progress line is written.
"""

from __future__ import annotations

import datetime
import gc
import json
import os
import re
import shutil
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from diffuse_compress.components import GROUPS, model_components
from diffuse_compress.errors import CheckpointError, ConfigError
from diffuse_compress.evaluation.conditions import Condition, conditions_digest
from diffuse_compress.evaluation.environment import PeakMemory, describe_device
from diffuse_compress.evaluation.images import RESERVED, draw_batch
from diffuse_compress.evaluation.records import Record, load_record
from diffuse_compress.evaluation.samples import MANIFEST, RECORD, Sample, sample_hash, write_atomically
from diffuse_compress.plan import stored_bytes
from diffuse_compress.progress import track
from diffuse_compress.versions import installed_versions

__all__ = ["SEED_RULE", "Arm", "generate"]

SEED_RULE = "sample i: seed + i, a CPU generator of its own"
_PROGRESS = "progress"
_NAME = re.compile(r"[\w.+-]{1,100}")


@dataclass(frozen=True)
class Arm:
    """One pipeline of a comparison.

    Attributes:
        name: of its folder, and in tables; letters, digits and ``._+-``.
        load: makes the pipeline, on the device where it shall run; called only if samples are missing.
        model: ``id`` (Hub id or folder name) and what else is known before loading: ``revision``, ``dtype``,
            ``weights_sha256``.
        recipe: what ``load`` does to the stored pipeline, ``Recipe.to_dict()``; None for nothing.
        folder: where its weights lie, with tokenizers and processors; None where there is no such folder.
    """

    name: str
    load: Callable[[], Any]
    model: Mapping[str, Any] = field(default_factory=lambda: {"id": "unknown"})
    recipe: Mapping[str, Any] | None = None
    folder: Path | None = None


def generate(
    arms: Sequence[Arm],
    conditions: Sequence[Condition],
    out: str | Path,
    *,
    seed: int = 0,
    batch_size: int = 4,
    repetitions: int = 1,
    options: Mapping[str, Any] | None = None,
    data_name: str = "prompts",
    command: str = "",
    device: str | torch.device = "cpu",
    state: Any = None,
) -> dict[str, Path]:
    """Make what is missing of every arm's samples.

    Args:
        arms: pipelines, loaded one after the other.
        conditions: n prompts, class labels or nothings, of one kind.
        out: folder; each arm gets ``out/name``.
        seed: of sample 0.
        batch_size: samples a call. Pipelines may move last bits with it, so it is part of a run's identity.
        repetitions: samples for each condition; sample i belongs to condition ``i // repetitions``.
        options: further arguments of the pipelines' calls, JSON values.
        data_name: of the prompt set or classes, for the record.
        command: that made the run, for the record.
        device: that the loaders put pipelines on, for the record and the measurement of memory.
        state: accelerate's ``PartialState`` of a run on several processes, which share the folder.

    Returns:
        {arm name: its folder}, complete.

    Raises:
        ConfigError: bad arguments, or a folder that holds another run; the message names what differs.
    """
    options = dict(options or {})
    _check(arms, conditions, batch_size, repetitions, options)
    expanded = [condition for condition in conditions for _ in range(repetitions)]
    folders = {}
    for arm in arms:
        folder = Path(out) / arm.name
        record = Record(
            name=arm.name,
            model={"class": None, **arm.model},
            recipe=arm.recipe,
            device=describe_device(device, 1 if state is None else state.num_processes),
            versions=installed_versions(),
            date=datetime.date.today().isoformat(),
            command=command,
            data={"kind": conditions[0].kind, "name": data_name, "sha256": conditions_digest(conditions)},
            seeds={"base": seed, "rule": SEED_RULE},
            samples=len(expanded),
            settings={**options, "batch_size": batch_size, "repetitions": repetitions},
        )
        _Run(folder, record, expanded, batch_size, options, torch.device(device), state).complete(arm)
        folders[arm.name] = folder
    return folders


def _check(
    arms: Sequence[Arm], conditions: Sequence[Condition], batch_size: int, repetitions: int, options: Mapping[str, Any]
) -> None:
    names = [arm.name for arm in arms]
    if not names or len(set(names)) < len(names) or not all(_NAME.fullmatch(name) for name in names):
        got = ", ".join(map(repr, names)) or "none"
        raise ConfigError(f"generate: arms need different names of letters, digits and ._+-, got {got}.")
    kinds = {condition.kind for condition in conditions}
    if len(kinds) != 1:
        raise ConfigError(f"generate: need conditions of one kind, got {' and '.join(sorted(kinds)) or 'none'}.")
    if batch_size < 1 or repetitions < 1:
        raise ConfigError(f"generate: need batch_size >= 1 and repetitions >= 1, got {batch_size} and {repetitions}.")
    reserved = sorted({*RESERVED, "batch_size", "repetitions"} & set(options))
    if reserved:
        raise ConfigError(f"generate: {', '.join(reserved)} are set here and cannot be options of the pipeline's call.")
    try:
        json.dumps(dict(options))
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"generate: options must be JSON values, since they are part of the record ({error})."
        ) from error


class _Run:
    """One arm's folder."""

    def __init__(
        self,
        folder: Path,
        record: Record,
        conditions: Sequence[Condition],
        batch_size: int,
        options: Mapping[str, Any],
        device: torch.device,
        state: Any,
    ) -> None:
        self.folder, self.record, self.conditions, self.options = folder, record, conditions, options
        self.device, self.state = device, state
        self.rank: int = 0 if state is None else state.process_index
        self.world: int = 1 if state is None else state.num_processes
        starts = range(0, len(conditions), batch_size)
        self.batches = [range(start, min(start + batch_size, len(conditions))) for start in starts]

    def complete(self, arm: Arm) -> None:
        self._refuse_other_run()
        self._wait()
        if self.rank == 0:
            self._collect()
        self._wait()
        lines = _read_lines(self.folder / f"{_PROGRESS}.jsonl")
        done = {line["batch"] for line in lines}
        missing = [k for k in range(len(self.batches)) if k not in done]
        if missing:
            if self.rank == 0:
                (self.folder / MANIFEST).unlink(missing_ok=True)
            session = 1 + max((line["session"] for line in lines), default=-1)
            self._make(arm, missing[self.rank :: self.world], session)
            self._wait()
        if self.rank == 0:
            if missing:
                self._collect()
            self._finish(arm)
        self._wait()

    def _wait(self) -> None:
        if self.state is not None:
            self.state.wait_for_everyone()

    # --- identity -----------------------------------------------------------------------------------------------

    def _identity(self, record: Record) -> dict[str, Any]:
        """What fixes the files, but for versions and the device's name."""
        whole = record.to_dict()
        found = {key: whole[key] for key in ("recipe", "data", "seeds", "samples", "settings")}
        found["settings"] = {key: value for key, value in found["settings"].items() if key != "frames"}
        model = {key: value for key, value in whole["model"].items() if key not in ("class", "id")}
        return found | {"model": model, "device type": whole["device"]["type"]}

    def _refuse_other_run(self) -> None:
        path = self.folder / RECORD
        if not path.exists():
            if (
                self.folder.exists()
                and any(self.folder.iterdir())
                and not list(self.folder.glob(f"{_PROGRESS}*.jsonl"))
            ):
                raise ConfigError(f"{self.folder}: is not empty and holds no run. Choose another --out.")
            return
        here, there = self._identity(self.record), self._identity(load_record(path))
        different = [key for key in here if here[key] != there[key]]
        if different and not self._is_bare():
            details = "; ".join(f"{key}: {there[key]} there, {here[key]} now" for key in different)
            raise ConfigError(
                f"{self.folder}: holds a run of other {', '.join(different)} ({details:.600}). Choose another --out, "
                "or delete the folder."
            )

    def _is_bare(self) -> bool:
        """A run that failed before its first sample: nothing in the folder is lost to another one."""
        path = self.folder / RECORD
        record = load_record(path) if path.exists() else None
        if record is not None and (record.metrics or record.cost):
            return False
        lines = [line for path in self.folder.glob(f"{_PROGRESS}*.jsonl") for line in _read_lines(path)]
        return not (lines or (self.folder / MANIFEST).exists() or (self.folder / "samples").exists())

    # --- progress -----------------------------------------------------------------------------------------------

    def _collect(self) -> None:
        """Join all progress into one file, without lines that broke off and samples that are not what they were."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / RECORD).exists() or self._is_bare():
            self.record.save(self.folder / RECORD)
        found: dict[int, dict[str, Any]] = {}
        files = sorted(self.folder.glob(f"{_PROGRESS}*.jsonl"))
        for path in files:
            for line in _read_lines(path):
                found[line["batch"]] = line
        whole = [found[k] for k in sorted(found) if self._is_whole(found[k])]
        write_atomically(self.folder / f"{_PROGRESS}.jsonl", "".join(json.dumps(line) + "\n" for line in whole))
        for path in files:
            if path.name != f"{_PROGRESS}.jsonl":
                path.unlink()

    def _is_whole(self, line: Mapping[str, Any]) -> bool:
        if not 0 <= line["batch"] < len(self.batches) or len(line["samples"]) != len(self.batches[line["batch"]]):
            return False
        for entry in line["samples"]:
            path = self.folder / entry["file"]
            if not path.exists() or sample_hash(path) != entry["sha256"]:
                return False
        return True

    # --- making -------------------------------------------------------------------------------------------------

    def _make(self, arm: Arm, own: Sequence[int], session: int) -> None:
        if not own:
            return
        pipe = arm.load()
        if hasattr(pipe, "set_progress_bar_config"):
            pipe.set_progress_bar_config(disable=True)
        about = {"session": session, "rank": self.rank, "class": type(pipe).__name__, **_sizes(pipe)}
        memory = PeakMemory(self.device)
        bar = SimpleNamespace(_progress_bar_config={"disable": self.rank != 0})
        with (self.folder / f"{_PROGRESS}.{self.rank}.jsonl").open("a", encoding="utf-8") as file:
            for k in track(list(own), f"{arm.name}: batches", bar, None, {}):
                started = time.perf_counter()
                indices = self.batches[k]
                seeds = [self.record.seeds["base"] + i for i in indices]
                pictures = draw_batch(pipe, [self.conditions[i] for i in indices], seeds, self.options)
                seconds = time.perf_counter() - started
                samples = [self._save(i, seed, one) for i, seed, one in zip(indices, seeds, pictures, strict=True)]
                line = {
                    "batch": k,
                    "seconds": seconds,
                    "first": k == own[0],
                    "memory": memory.read(),
                    "memory_kind": memory.kind,
                    **about,
                    "samples": samples,
                }
                file.write(json.dumps(line) + "\n")
                file.flush()
                os.fsync(file.fileno())
        del pipe
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _save(self, index: int, seed: int, values: torch.Tensor) -> dict[str, Any]:
        """Write one picture [C, H, W] or clip [F, C, H, W] in [0, 1], and return its manifest entry."""
        folder = self.folder / "samples"
        folder.mkdir(exist_ok=True)
        name = f"{index:08d}"
        is_clip = values.dim() == 4
        target = folder / (name if is_clip else f"{name}.png")
        temporary = folder / f".{name}.{self.rank}.tmp"
        _remove(temporary)
        if is_clip:
            temporary.mkdir()
            for number, frame in enumerate(values):
                _write_png(frame, temporary / f"{number:04d}.png")
            _remove(target)
        else:
            _write_png(values, temporary)
        temporary.replace(target)
        condition = self.conditions[index]
        sample = Sample(
            index=index,
            file=target.relative_to(self.folder).as_posix(),
            seed=seed,
            prompt=condition.prompt,
            class_label=condition.class_label,
            sha256=sample_hash(target),
            frames=len(values) if is_clip else 0,
            metadata=condition.metadata,
        )
        return vars(sample)

    # --- the end ------------------------------------------------------------------------------------------------

    def _finish(self, arm: Arm) -> None:
        lines = _read_lines(self.folder / f"{_PROGRESS}.jsonl")
        samples = sorted((Sample(**entry) for line in lines for entry in line["samples"]), key=lambda s: s.index)
        if len(samples) != len(self.conditions):
            lost = len(self.conditions) - len(samples)
            raise CheckpointError(f"{self.folder}: {lost} samples changed while the run was on. Run it again.")
        manifest = "".join(sample.to_json() + "\n" for sample in samples)
        path = self.folder / MANIFEST
        if path.exists() and path.read_text(encoding="utf-8") == manifest:
            return
        cost = _cost(lines)
        settings = {**self.record.settings, "frames": samples[0].frames}
        model = {**self.record.model, "class": lines[0]["class"]}
        record = Record(**{**vars(self.record), "cost": cost, "settings": settings, "model": model})
        # The manifest comes last: a folder that has one is complete.
        record.save(self.folder / RECORD)
        write_atomically(path, manifest)


def _cost(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    # The first batch of a process warms up; it counts only where there is no other.
    timed = [line for line in lines if not line["first"]] or lines
    by_process: dict[tuple[int, int], float] = {}
    for line in lines:
        key = line["session"], line["rank"]
        by_process[key] = by_process.get(key, 0.0) + line["seconds"]
    sessions = {session for session, _ in by_process}
    wall = sum(max(s for (session, _), s in by_process.items() if session == one) for one in sessions)
    return {
        "disk_bytes": lines[0]["disk_bytes"],
        "denoiser_disk_bytes": lines[0]["denoiser_disk_bytes"],
        "seconds_per_sample": statistics.median(line["seconds"] / len(line["samples"]) for line in timed),
        "wall_seconds": wall,
        "peak_memory_bytes": max(line["memory"] for line in lines) or None,
        "peak_memory_kind": lines[0]["memory_kind"],
    }


def _sizes(pipe: Any) -> dict[str, Any]:
    sizes = {name: stored_bytes(model) for name, model in model_components(pipe).items()}
    denoisers = [size for name, size in sizes.items() if GROUPS["denoisers"].match(name)]
    return {"disk_bytes": sum(sizes.values()), "denoiser_disk_bytes": sum(denoisers) if denoisers else None}


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """Whole lines of a progress file; one that broke off is no line."""
    if not path.exists():
        return []
    found = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and {"batch", "samples", "session"} <= line.keys():
            found.append(line)
    return found


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _write_png(picture: torch.Tensor, path: Path) -> None:
    """[C, H, W] in [0, 1], rounded to 8 bits as pipelines round."""
    from PIL import Image

    values = (picture * 255).round().to(torch.uint8)
    values = values.expand(3, -1, -1) if len(values) == 1 else values
    Image.fromarray(values.permute(1, 2, 0).contiguous().numpy()).save(path, format="PNG")

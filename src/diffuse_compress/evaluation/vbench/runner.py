"""Evaluates videos dimension by dimension, keeps each result, and turns them into scores of a record."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from diffuse_compress.errors import ConfigError
from diffuse_compress.evaluation.metrics import flicker
from diffuse_compress.evaluation.samples import write_atomically
from diffuse_compress.evaluation.vbench.dimensions import (
    DIMENSIONS,
    FLICKERING,
    FLICKERING_SAMPLES,
    SAMPLES,
    Dimension,
    resolve_dimensions,
)
from diffuse_compress.evaluation.vbench.isolated import IsolatedEnvironment
from diffuse_compress.evaluation.vbench.jobs import VBenchError, import_failure, in_process, in_python
from diffuse_compress.evaluation.vbench.results import ANY_PROMPTS, COMPATIBLE, DimensionResult
from diffuse_compress.evaluation.vbench.suite import PromptSuite, missing_videos, samples_of
from diffuse_compress.evaluation.vbench.videos import VideoSet
from diffuse_compress.evaluation.vbench.weights import default_folder, ensure_weights, weights_identity, weights_of
from diffuse_compress.progress import track

__all__ = ["ENVIRONMENTS", "STATIC_FILTER", "evaluate_videos", "flickering_score"]

logger = logging.getLogger(__name__)

ENVIRONMENTS = ("auto", "here", "isolated", "compatible")
STATIC_FILTER = ("run", "done", "skip")
_FRAME_RATE = 8.0
_NAMED = 3
Key = tuple[str, int]


def evaluate_videos(
    videos: VideoSet,
    suite: PromptSuite,
    dimensions: Sequence[str] = ("all",),
    *,
    device: str | torch.device = "cpu",
    environment: str = "auto",
    isolated: IsolatedEnvironment | None = None,
    weights: str | Path | None = None,
    download: bool = True,
    static_filter: str = "run",
    partial: bool = False,
    fps: float | None = None,
) -> list[DimensionResult]:
    """Score videos. Each dimension's result is kept in ``videos.results`` and not computed again while nothing changes.

    Args:
        videos: of one pipeline.
        suite: prompts that the dimensions ask for.
        dimensions: names, ``quality``, ``semantic`` or ``all``.
        device: for the networks.
        environment: "here": the vbench package of this process; "isolated": that of an environment of its own, made on
            first use; "auto": here where the dimension's module imports, else isolated, and temporal_flickering without
            either by "compatible": the formula in this package (temporal_flickering only).
        isolated: the environment of its own.
        weights: folder of weight files; by default vbench's.
        download: fetch weight files that are missing.
        static_filter: of temporal_flickering. "run": 25 videos of each prompt, of which at most five still ones count
            (needs RAFT's weights); "done": the videos are what the filter left; "skip": five of each prompt, whether
            still or not, and the score says so.
        partial: take the videos that are there; the scores say so.
        fps: of clips that are written as mp4; dynamic_degree depends on it.

    Returns:
        One result for each dimension, in the leaderboard's order.

    Raises:
        ConfigError: bad arguments, missing videos (named) or weights (with where to get them).
        VBenchError: the package failed.
    """
    if environment not in ENVIRONMENTS or static_filter not in STATIC_FILTER:
        raise ConfigError(
            f"VBench: environment is one of {', '.join(ENVIRONMENTS)} and static_filter of {', '.join(STATIC_FILTER)}, "
            f"got {environment!r} and {static_filter!r}."
        )
    wanted = resolve_dimensions(dimensions)
    own = isolated or IsolatedEnvironment()
    folder = Path(weights) if weights is not None else default_folder()
    rate = _FRAME_RATE if fps is None else fps
    run = _Run(videos, suite, torch.device(device), environment, own, folder, download, static_filter, partial, rate)
    run.check(wanted, fps)
    places = run.places(wanted)
    return [run.result(dimension, places[dimension.name]) for dimension in wanted]


def flickering_score(clip: torch.Tensor) -> float:
    """VBench's temporal_flickering of one clip: 1 - mean absolute difference of neighbouring frames / 255.

    Args:
        clip: [F, 3, H, W] uint8, F >= 2.
    """
    if len(clip) < 2:
        raise ConfigError(f"{FLICKERING}: need at least 2 frames, got {len(clip)}.")
    # Two frames at a time: long clips in float64 would take gigabytes.
    pairs = [flicker(clip[None, i : i + 2]).item() for i in range(len(clip) - 1)]
    return 1 - math.fsum(pairs) / len(pairs) / 255


@dataclass
class _Run:
    videos: VideoSet
    suite: PromptSuite
    device: torch.device
    environment: str
    isolated: IsolatedEnvironment
    weights: Path
    download: bool
    static_filter: str
    partial: bool
    fps: float

    # --- before anything is computed ----------------------------------------------------------------------------

    def check(self, wanted: Sequence[Dimension], fps: float | None) -> None:
        """Everything that can be refused at once."""
        others = [dimension.name for dimension in wanted if dimension.name != FLICKERING]
        if self.environment == "compatible" and others:
            raise ConfigError(f"VBench: only {FLICKERING} has a compatible form, got {', '.join(others)}.")
        if self.suite.sha256 is None:
            wrong = [d.name for d in wanted if not (d.any_prompt or d.name == FLICKERING)]
            if wrong:
                raise ConfigError(f"VBench: {', '.join(wrong)} need the prompt suite; they cannot take any prompts.")
        self._check_complete(wanted)
        if any(dimension.name == "dynamic_degree" for dimension in wanted) and self.videos.has_frames and fps is None:
            raise ConfigError(
                "dynamic_degree depends on the frames per second, which a run does not know: give --fps (Wan 16, "
                "HunyuanVideo 24, CogVideoX 8)."
            )
        filtered = self.static_filter == "run" and any(dimension.name == FLICKERING for dimension in wanted)
        try:
            ensure_weights(weights_of(wanted, filtered), self.weights, download=self.download)
        except ConfigError as error:
            hint = f"\n{FLICKERING} needs RAFT for the static filter only: --static-filter skip goes without."
            raise ConfigError(f"{error}{hint if filtered else ''}") from error

    def _check_complete(self, wanted: Sequence[Dimension]) -> None:
        if self.suite.sha256 is None:
            return
        missing = missing_videos(self.suite, wanted, self.videos.paths, self.static_filter)
        if self.partial:
            empty = [name for name in missing if not self._keys(DIMENSIONS[name])]
            if empty:
                raise ConfigError(f"{self.videos.folder}: has no video at all for {', '.join(empty)}.")
            return
        path = self.videos.results / "missing.txt"
        if not missing:
            path.unlink(missing_ok=True)
            return
        write_atomically(path, "".join(f"{name}\n" for names in missing.values() for name in names))
        lines = []
        for dimension, names in missing.items():
            total = len(self.suite.of(dimension)) * samples_of(dimension, self.static_filter)
            shown = ", ".join(map(repr, names[:_NAMED])) + (", ..." if len(names) > _NAMED else "")
            lines.append(f"  {dimension}: {len(names)} of {total} videos are missing: {shown}")
        more = f", and {FLICKERING_SAMPLES} before the static filter" if FLICKERING in missing else ""
        raise ConfigError(
            f"{self.videos.folder}: VBench needs {SAMPLES} videos of every prompt of a dimension{more}. All that are "
            f"missing are listed in {path}. Generate them, choose other --dimensions, or give --partial for scores "
            "that compare with no others:\n" + "\n".join(lines)
        )

    def _keys(self, dimension: Dimension) -> list[Key]:
        """The dimension's videos that are there, in the order of the suite."""
        prompts = dict.fromkeys(entry.prompt for entry in self.suite.of(dimension.name))
        if self.suite.sha256 is None:
            return [key for key in self.videos.paths if key[0] in prompts]
        count = samples_of(dimension.name, self.static_filter)
        keys = [(prompt, index) for prompt in prompts for index in range(count)]
        return [key for key in keys if key in self.videos.paths]

    # --- one dimension ------------------------------------------------------------------------------------------

    def places(self, wanted: Sequence[Dimension]) -> dict[str, str]:
        """Where each dimension is computed. An environment that any of them needs is made now, not hours later."""
        found = {dimension.name: self._place(dimension) for dimension in wanted}
        isolated = [name for name, place in found.items() if place == "isolated"]
        if isolated:
            self.isolated.ensure()
        if any(DIMENSIONS[name].needs_detectron2 for name in isolated):
            self.isolated.ensure_detectron2()
        return found

    def result(self, dimension: Dimension, place: str) -> DimensionResult:
        """The kept result, or a new one."""
        keys = self._keys(dimension)
        identity = self._identity(dimension, keys, place)
        path = self.videos.results / f"{dimension.name}.json"
        key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        kept = DimensionResult.load(path, key)
        if kept is not None:
            logger.info("%s: kept from %s", dimension.name, path)
            return kept
        details: dict[str, Any] = {"environment": place, "device": str(self.device)}
        if dimension.name == FLICKERING and self.static_filter == "run":
            keys = self._still(keys, place)
            details |= self._filter_details(keys)
        score, values, more = self._compute(dimension, keys, place)
        if not math.isfinite(score) or len(values) != len(keys):
            lost = [f"{prompt}-{i}" for prompt, i in keys if f"{prompt}-{i}" not in values]
            raise VBenchError(
                f"vbench, {dimension.name}: need a number and a value of each of {len(keys)} videos, got {score} and "
                f"{len(values)}; without one: {', '.join(map(repr, lost[:_NAMED])) or 'none'}. Are they readable?",
                "ValueError",
            )
        result = DimensionResult(
            dimension.name,
            score,
            values,
            COMPATIBLE if place == "compatible" else f"vbench {more['versions'].get('vbench', 'unknown')}",
            self._qualifiers(dimension, keys),
            {**details, **more, "weights": identity["weights"]},
            key,
        )
        write_atomically(path, json.dumps(result.to_dict(), indent=1, ensure_ascii=False))
        return result

    def _place(self, dimension: Dimension) -> str:
        """Where a dimension is computed; in doubt, whether its module imports here is tried out."""
        if self.environment != "auto":
            return self.environment
        if self._imports_here(dimension.name):
            return "here"
        filtered = self.static_filter == "run"
        if dimension.name == FLICKERING and not filtered and not self.isolated.is_ready:
            return "compatible"
        return "isolated"

    def _filter_place(self, place: str) -> str:
        """Where the static filter runs: it needs more packages than the dimension."""
        if place == "isolated" or self.environment == "here":
            return place
        return (
            "here" if self._imports_here("cli.static_filter") and self._imports_here("dynamic_degree") else "isolated"
        )

    def _imports_here(self, module: str) -> bool:
        reason = import_failure(module, self.weights)
        if reason is not None:
            logger.info("vbench.%s does not import here (%s)", module, reason)
        return reason is None

    def _identity(self, dimension: Dimension, keys: Sequence[Key], place: str) -> dict[str, Any]:
        """Everything that decides about the score, but for the device."""
        filtered = dimension.name == FLICKERING and self.static_filter == "run"
        auxiliary = {e.prompt: e.auxiliary.get(dimension.name) for e in self.suite.of(dimension.name)}
        return {
            "dimension": dimension.name,
            "implementation": COMPATIBLE if place == "compatible" else f"vbench {self._version(place)}",
            "videos": [[*key, self.videos.digest(key)] for key in keys],
            "auxiliary": [auxiliary[prompt] for prompt in dict.fromkeys(prompt for prompt, _ in keys)],
            "static_filter": self.static_filter if dimension.name == FLICKERING else None,
            "fps": self.fps if self.videos.has_frames and place != "compatible" else None,
            "suite": self.suite.sha256,
            "weights": weights_identity(weights_of([dimension], filtered), self.weights),
        }

    def _version(self, place: str) -> str:
        if place == "here":
            try:
                return importlib.metadata.version("vbench")
            except importlib.metadata.PackageNotFoundError as error:
                raise ConfigError(
                    "VBench: the package is not installed here. `pip install --no-deps vbench==0.1.5` and what its "
                    "dimension imports (eval/vbench_runner/README.md), or --environment isolated."
                ) from error
        found = sorted(self.isolated.ensure().parents[1].glob("lib/python3.*/site-packages/vbench-*.dist-info"))
        return found[0].name.removeprefix("vbench-").removesuffix(".dist-info") if found else "unknown"

    def _qualifiers(self, dimension: Dimension, keys: Sequence[Key]) -> tuple[str, ...]:
        found = []
        if dimension.name == FLICKERING and self.static_filter == "skip":
            found.append("no static filter")
        if self.suite.sha256 is None:
            found.append(ANY_PROMPTS)
        elif not self.suite.is_published:
            found.append(f"prompts of {self.suite.name}")
        if (
            self.partial
            and self.suite.sha256 is not None
            and missing_videos(self.suite, [dimension], self.videos.paths, self.static_filter)
        ):
            found.append(f"partial, {len(keys)} videos")
        return tuple(found)

    # --- computing ----------------------------------------------------------------------------------------------

    def _compute(
        self, dimension: Dimension, keys: Sequence[Key], place: str
    ) -> tuple[float, dict[str, float], dict[str, Any]]:
        """Score, values by video, and details."""
        if place == "compatible":
            values = {
                f"{key[0]}-{key[1]}": flickering_score(self.videos.read(key))
                for key in track(list(keys), FLICKERING, None, None, {})
            }
            return math.fsum(values.values()) / len(values), values, {"versions": {}}
        files = self.videos.files(keys, self.fps)
        names = {_text(files[key]): f"{key[0]}-{key[1]}" for key in keys}
        found = self._do(
            {"task": "evaluate", "dimension": dimension.name, "entries": self._entries(dimension, files)}, place
        )
        values = {names[entry["path"]]: entry["score"] for entry in found["videos"]}
        return found["score"], values, {"versions": found["versions"], "seconds": found["seconds"]}

    def _entries(self, dimension: Dimension, files: Mapping[Key, Path]) -> list[dict[str, Any]]:
        """The videos in vbench's own form."""
        entries, seen = [], set()
        for entry in self.suite.of(dimension.name):
            paths = [_text(path) for (prompt, _), path in files.items() if prompt == entry.prompt]
            if not paths or entry.prompt in seen:
                continue
            seen.add(entry.prompt)
            found: dict[str, Any] = {"prompt_en": entry.prompt, "dimension": [dimension.name], "video_list": paths}
            if dimension.name in entry.auxiliary:
                found["auxiliary_info"] = {dimension.name: entry.auxiliary[dimension.name]}
            entries.append(found)
        return entries

    def _do(self, job: dict[str, Any], place: str) -> dict[str, Any]:
        whole = {**job, "device": str(self.device), "weights": str(self.weights.absolute())}
        label = job.get("dimension", "static filter")
        if place == "here":
            return in_process(whole, label)
        return in_python(self.isolated.ensure(), whole, label)

    def _still(self, keys: Sequence[Key], place: str) -> list[Key]:
        """The videos that the static filter leaves: of each prompt the first five still ones."""
        files = self.videos.files(keys, self.fps)
        entries = self._entries(DIMENSIONS[FLICKERING], files)
        static = self._do({"task": "static_filter", "entries": entries}, self._filter_place(place))
        kept = [key for key in keys if static["static"].get(_text(files[key]))]
        if not kept:
            raise ConfigError(f"{FLICKERING}: the static filter left no video, so there is nothing to score.")
        return kept

    def _filter_details(self, kept: Sequence[Key]) -> dict[str, Any]:
        counts = dict.fromkeys((entry.prompt for entry in self.suite.of(FLICKERING)), 0)
        for prompt, _ in kept:
            counts[prompt] += 1
        few = [prompt for prompt, count in counts.items() if count < SAMPLES]
        if few:
            logger.warning("%s: %d of %d prompts have fewer than 5 still videos", FLICKERING, len(few), len(counts))
        return {"still_videos": len(kept), "prompts_with_fewer_than_5": len(few)}


def _text(path: Path) -> str:
    return str(path.absolute())  # not resolved: links to one file are videos of their own

"""Videos of one pipeline by prompt and index: mp4 files of VBench's names, or the clips of runs of ``eval generate``.

A run keeps clips as PNG frames. Where the vbench package shall read them they are written as mp4 files with the codec
FFV1, which loses nothing: OpenCV and decord give back every byte, so no encoder stands between pipeline and score.
"""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffuse_compress.errors import CheckpointError, ConfigError, MissingDependencyError
from diffuse_compress.evaluation.records import Record, load_record
from diffuse_compress.evaluation.samples import (
    MANIFEST,
    RECORD,
    read_clip,
    read_manifest,
    sample_hash,
    write_atomically,
)
from diffuse_compress.evaluation.vbench.suite import video_name
from diffuse_compress.progress import track

__all__ = ["VideoSet", "open_videos", "read_video", "write_video"]

_NUMBERED = re.compile(r"(?P<prompt>.*)-(?P<index>\d+)", re.DOTALL)
_VIEWS = "videos"


@dataclass(frozen=True)
class VideoSet:
    """Videos of one pipeline.

    Attributes:
        folder: the first that was given: its record gets the scores.
        results: folder for what evaluation writes.
        paths: {(prompt, index): an mp4 file, or a folder of frames}.
        record: of the run, or None for a plain folder.
    """

    folder: Path
    results: Path
    paths: Mapping[tuple[str, int], Path]
    record: Record | None

    @property
    def has_frames(self) -> bool:
        """Some clips are folders of frames."""
        return any(path.is_dir() for path in self.paths.values())

    @functools.cached_property
    def _hashes(self) -> dict[tuple[str, int], str]:
        return {}

    def digest(self, key: tuple[str, int]) -> str:
        """First 16 digits of the SHA-256 of a video's bytes; read once."""
        if key not in self._hashes:
            self._hashes[key] = sample_hash(self.paths[key])
        return self._hashes[key]

    def files(self, keys: Sequence[tuple[str, int]], fps: float) -> dict[tuple[str, int], Path]:
        """{key: mp4 file} of some videos; clips of frames are written as such first, those of last time kept.

        Raises:
            MissingDependencyError: opencv is not installed and clips must be written.
            ConfigError: clips that cannot be read, or names that cannot be files.
        """
        found, views = {}, self.results / _VIEWS
        index_path = views / "index.json"
        index: dict[str, Any] = json.loads(index_path.read_text()) if index_path.is_file() else {}
        todo = []
        for key in keys:
            source = self.paths[key]
            target = views / video_name(*key) if source.is_dir() else source
            found[key] = target
            if source.is_dir() and not (target.is_file() and index.get(target.name) == [self.digest(key), fps]):
                todo.append((key, source, target))
        if todo:
            views.mkdir(parents=True, exist_ok=True)
            try:
                for key, source, target in track(todo, "clips as mp4", None, None, {}):
                    write_video(read_clip(source), target, fps)
                    index[target.name] = [self.digest(key), fps]
            finally:
                write_atomically(index_path, json.dumps(index, ensure_ascii=False))
        return found

    def read(self, key: tuple[str, int]) -> torch.Tensor:
        """[F, 3, H, W] uint8 of one video."""
        path = self.paths[key]
        return read_clip(path) if path.is_dir() else read_video(path)


def open_videos(folder: str | Path, also: Sequence[str | Path] = (), out: str | Path | None = None) -> VideoSet:
    """Videos of a folder of ``{prompt}-{index}.mp4`` or of a run of clips, and of further ones of the same pipeline.

    Args:
        folder: the run or folder.
        also: more of them; a video that several have is taken from the first.
        out: where results go; by default ``vbench`` in a run, and beside a plain folder its name with ``.vbench``.

    Raises:
        ConfigError: no such folder, no videos in it, or runs of different pipelines.
        CheckpointError: an unfinished run, or one whose clips are gone.
    """
    first = Path(folder)
    paths: dict[tuple[str, int], Path] = {}
    record: Record | None = None
    for number, path in enumerate([first, *map(Path, also)]):
        if not path.is_dir():
            raise ConfigError(
                f"{path}: need a folder of videos or a run, got {'a file' if path.exists() else 'nothing'}."
            )
        is_run = (path / MANIFEST).is_file() or (path / RECORD).is_file()
        found = _run_videos(path) if is_run else _named_videos(path)
        own = load_record(path) if (path / RECORD).is_file() else None
        if number == 0:
            record = own
        elif record is not None and own is not None and _pipeline(record) != _pipeline(own):
            raise ConfigError(f"{path}: is a run of another pipeline than {first}; --also is for more of the same.")
        paths = {**found, **paths}
    default = first / "vbench" if record is not None else first.resolve().with_name(f"{first.resolve().name}.vbench")
    return VideoSet(first, Path(out) if out is not None else default, paths, record)


def _pipeline(record: Record) -> tuple[Any, Any]:
    return {key: value for key, value in record.model.items() if key != "class"}, record.recipe


def _run_videos(folder: Path) -> dict[tuple[str, int], Path]:
    found: dict[tuple[str, int], Path] = {}
    counts: dict[str, int] = {}
    for sample in read_manifest(folder):
        path = folder / sample.file
        if not sample.frames or sample.prompt is None:
            raise ConfigError(f"{folder}: VBench needs clips of prompts, got pictures or no prompts.")
        if not path.is_dir():
            raise CheckpointError(f"{path}: the manifest lists it, but it is gone. Generate the run again.")
        index = counts.get(sample.prompt, 0)
        counts[sample.prompt] = index + 1
        found[sample.prompt, index] = path
    return found


def _named_videos(folder: Path) -> dict[tuple[str, int], Path]:
    found = {}
    for path in sorted(folder.glob("*.mp4")):
        match = _NUMBERED.fullmatch(path.stem)
        found[(match["prompt"], int(match["index"])) if match else (path.stem, 0)] = path
    if not found:
        others = sorted({path.suffix for path in folder.iterdir() if path.is_file()})
        got = f"files ending with {', '.join(others)}" if others else "none"
        raise ConfigError(f"{folder}: need videos named {{prompt}}-{{index}}.mp4, got {got}.")
    return found


def read_video(path: Path) -> torch.Tensor:
    """[F, 3, H, W] uint8 of a video file, as OpenCV decodes it.

    Raises:
        MissingDependencyError: opencv is not installed.
        ConfigError: not a readable video.
    """
    cv2 = _opencv("reads mp4 files")
    video = cv2.VideoCapture(str(path))
    frames = []
    try:
        while True:
            there, frame = video.read()
            if not there:
                break
            frames.append(frame[..., ::-1])
    finally:
        video.release()
    if not frames:
        raise ConfigError(f"{path}: not a readable video. Remove it or generate it again.")
    return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)


def write_video(clip: torch.Tensor, path: Path, fps: float) -> None:
    """Write [F, 3, H, W] uint8 as an mp4 file of the codec FFV1, without loss; it appears when it is whole.

    Raises:
        MissingDependencyError: opencv is not installed.
        ConfigError: this build of it cannot write such files.
    """
    cv2 = _opencv("writes mp4 files")
    height, width = clip.shape[-2:]
    temporary = path.with_name(f".{os.getpid()}.tmp.mp4")
    writer = cv2.VideoWriter(str(temporary), cv2.VideoWriter_fourcc(*"FFV1"), fps, (width, height))
    try:
        if not writer.isOpened():
            raise ConfigError(f"{path}: this build of OpenCV cannot write FFV1. Install opencv-python-headless.")
        for frame in clip.permute(0, 2, 3, 1).flip(-1).contiguous().numpy():
            writer.write(frame)
    finally:
        writer.release()
    temporary.replace(path)


def _opencv(what: str) -> Any:
    try:
        import cv2
    except ImportError as error:
        raise MissingDependencyError(
            f'OpenCV {what}, and is not installed. Install it: pip install "diffuse-compress[eval]"'
        ) from error
    return cv2


def prompts_of(keys: Iterable[tuple[str, int]]) -> list[str]:
    """Prompts in order, each once."""
    return list(dict.fromkeys(prompt for prompt, _ in keys))

"""Folders of pictures and clips: what generation writes, and what metrics read.

A run's folder holds ``manifest.jsonl``, a line for each sample in index order, ``record.json`` and ``samples/``: a PNG
for a picture, a folder of PNG frames for a clip. Any other folder of picture files is read in the order of its names.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffuse_compress.errors import CheckpointError, ConfigError

__all__ = [
    "MANIFEST",
    "PICTURE_SUFFIXES",
    "RECORD",
    "PictureSet",
    "Sample",
    "open_pictures",
    "read_clip",
    "read_manifest",
    "read_picture",
    "sample_hash",
    "write_atomically",
]

MANIFEST, RECORD = "manifest.jsonl", "record.json"
PICTURE_SUFFIXES = frozenset({".bmp", ".jpg", ".jpeg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})
"""What pytorch-fid reads, in any case."""


@dataclass(frozen=True)
class Sample:
    """One line of a manifest.

    Attributes:
        index: place in the run.
        file: path below the run's folder; of a clip, the folder of its frames.
        seed: of the sample's own generator.
        prompt: text, or None.
        class_label: or None.
        sha256: of the file, of a clip of all its frames; first 16 digits.
        frames: 0 for a picture.
        metadata: what the prompt file says about the prompt besides its text.
    """

    index: int
    file: str
    seed: int
    prompt: str | None
    class_label: int | None
    sha256: str
    frames: int = 0
    metadata: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        """The line."""
        return json.dumps(dataclasses.asdict(self), ensure_ascii=False, sort_keys=True)

    @classmethod
    def from_json(cls, line: str) -> Sample:
        """Read :meth:`to_json`'s output. Raises ValueError, TypeError or KeyError for anything else."""
        return cls(**json.loads(line))


def read_manifest(folder: str | Path) -> list[Sample]:
    """Samples of a finished run, in index order.

    Raises:
        CheckpointError: no manifest (the run is not finished), or one that cannot be read.
    """
    path = Path(folder) / MANIFEST
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        samples = [Sample.from_json(line) for line in lines]
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{folder}: has no {MANIFEST}: not a finished run. Run the same eval generate command again to go on."
        ) from error
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{path}: not a readable manifest ({error}).") from error
    return sorted(samples, key=lambda sample: sample.index)


def write_atomically(path: str | Path, text: str) -> None:
    """Replace a text file by one that is complete whenever it is seen, also after a loss of power."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        Path(temporary).chmod(0o666 & ~umask)  # mkstemp's own mode shuts out other users
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def sample_hash(path: Path) -> str:
    """First 16 digits of the SHA-256 of a file, or of the frames of a folder in the order of their names."""
    digest = hashlib.sha256()
    for file in sorted(path.iterdir()) if path.is_dir() else [path]:
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def read_picture(path: Path) -> torch.Tensor:
    """[3, H, W] uint8 of a picture file; grey and transparent ones become RGB as PIL converts them.

    Raises:
        ConfigError: not a readable picture.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            array = np.array(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ConfigError(f"{path}: not a readable picture ({error}). Remove it or generate it again.") from error
    return torch.from_numpy(array).permute(2, 0, 1).contiguous()


def read_clip(folder: Path) -> torch.Tensor:
    """[F, 3, H, W] uint8 of a folder of frames, in the order of their names.

    Raises:
        ConfigError: no frames, unreadable ones, or frames of several sizes.
    """
    files = _picture_files(folder)
    if not files:
        raise ConfigError(f"{folder}: a clip needs frames, got an empty folder.")
    frames = [read_picture(file) for file in files]
    if len({frame.shape for frame in frames}) > 1:
        raise ConfigError(f"{folder}: frames of a clip must have one size, got several.")
    return torch.stack(frames)


@dataclass(frozen=True)
class PictureSet:
    """Picture files in a fixed order.

    Attributes:
        name: of the folder; of a run, of its arm.
        files: n paths; of a clip, its middle frame.
        folder: that they are in.
        samples: the manifest's entries of a run; None for a plain folder.
    """

    name: str
    files: tuple[Path, ...]
    folder: Path
    samples: tuple[Sample, ...] | None = None

    def __len__(self) -> int:
        return len(self.files)

    @property
    def conditions(self) -> tuple[tuple[str | None, int | None, int], ...] | None:
        """(prompt, class label, seed) of each picture, or None where that is not known."""
        if self.samples is None:
            return None
        return tuple((sample.prompt, sample.class_label, sample.seed) for sample in self.samples)

    def mismatch(self, other: PictureSet) -> str | None:
        """The first difference in what the two sets were asked for, as text; None if they were asked alike."""
        if self.conditions is None or other.conditions is None:
            return None
        for index, (one, two) in enumerate(zip(self.conditions, other.conditions, strict=False)):
            if one[:2] != two[:2]:
                asked = [_condition_text(condition) for condition in (one, two)]
                return f"sample {index} is {asked[0]} in {self.name} and {asked[1]} in {other.name}"
        return None

    def is_paired_with(self, other: PictureSet) -> bool:
        """The same prompts or classes and the same seeds, sample by sample."""
        return self.conditions is not None and self.conditions == other.conditions


def open_pictures(path: str | Path, *, recursive: bool = False, limit: int | None = None) -> PictureSet:
    """The pictures of a run or of a folder.

    Args:
        path: folder.
        recursive: go into subfolders (one a class, say); not for runs.
        limit: the first so many only.

    Raises:
        ConfigError: no such folder, no pictures in it, or a limit under 1.
        CheckpointError: an unfinished run, or one whose files are gone or were changed.
    """
    folder = Path(path)
    if limit is not None and limit < 1:
        raise ConfigError(f"{folder}: need limit >= 1, got {limit}.")
    if not folder.is_dir():
        raise ConfigError(
            f"{folder}: need a folder of pictures, got {'a file' if folder.exists() else 'nothing there'}."
        )
    if (folder / MANIFEST).is_file() or (folder / RECORD).is_file():
        return _open_run(folder, limit)
    files = _picture_files(folder, recursive=recursive)
    if not files:
        below = "" if recursive else _hint_below(folder)
        raise ConfigError(f"{folder}: need pictures ({' '.join(sorted(PICTURE_SUFFIXES))}), got none.{below}")
    return PictureSet(folder.resolve().name, tuple(files[:limit]), folder)


def _open_run(folder: Path, limit: int | None) -> PictureSet:
    samples = read_manifest(folder)[:limit]
    files = []
    for sample in samples:
        path = folder / sample.file
        if sample.frames:
            frames = _picture_files(path) if path.is_dir() else []
            path = frames[len(frames) // 2] if frames else path
        if not path.is_file():
            raise CheckpointError(f"{path}: the manifest lists it, but it is gone. Generate the run again.")
        if sample_hash(folder / sample.file) != sample.sha256:
            raise CheckpointError(
                f"{folder / sample.file}: is not the sample that the manifest lists, its hash is another. Run the same "
                "eval generate command again, which makes it anew."
            )
        files.append(path)
    if not files:
        raise ConfigError(f"{folder}: the run has no samples.")
    return PictureSet(folder.resolve().name, tuple(files), folder, tuple(samples))


def _picture_files(folder: Path, *, recursive: bool = False) -> list[Path]:
    found: Iterable[Path] = folder.rglob("*") if recursive else folder.iterdir()
    return sorted(path for path in found if path.suffix.lower() in PICTURE_SUFFIXES and path.is_file())


def _hint_below(folder: Path) -> str:
    runs = sorted(path.parent.name for path in folder.glob(f"*/{RECORD}"))
    if runs:
        return f" It holds runs: give one of {', '.join(runs)}."
    deeper = any(path.suffix.lower() in PICTURE_SUFFIXES for path in folder.rglob("*"))
    return " There are some in its subfolders: give --recursive, or one of the subfolders." if deeper else ""


def _condition_text(condition: Sequence[Any]) -> str:
    prompt, label = condition[:2]
    return repr(prompt) if prompt is not None else f"class {label}" if label is not None else "unconditional"

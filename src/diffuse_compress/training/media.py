"""Pictures and clips with captions: read from folders and files, and made latents by a pipeline's VAE."""

from __future__ import annotations

import csv
import hashlib
import inspect
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from diffuse_compress.calibration.trees import hash_tensor
from diffuse_compress.errors import ConfigError, MissingDependencyError, ModelStateError

__all__ = ["Media", "digest_of_media", "encoded", "fitted", "is_media", "media_in", "read_media"]

_PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_CLIPS = (".mp4", ".mov", ".avi", ".mkv", ".webm", ".gif")
_KEYS = ("video", "image", "frames")
_CAPTIONS = ("caption", "prompt", "text")
_FILES = ("file_name", "video", "image", "path")


@dataclass(frozen=True)
class Media:
    """A picture or clip, not read yet where it is a file, and its caption."""

    content: Any
    caption: str


def is_media(item: Any) -> bool:
    """Whether an item of data is a dict with a picture or clip in it."""
    return isinstance(item, Mapping) and any(key in item for key in _KEYS)


def read_media(item: Mapping[str, Any]) -> Media:
    """A dict ``{"video" | "image": ..., "caption" | "prompt" | "text": ...}`` as an item."""
    content = next(item[key] for key in _KEYS if key in item)
    return Media(content, str(next((item[key] for key in _CAPTIONS if item.get(key) is not None), "")))


def digest_of_media(items: Sequence[Media], asked: str) -> str:
    """Hash of items and of what is asked for: of files their names, sizes and times, of pixels their bytes."""
    digest = hashlib.sha256(asked.encode())
    for item in items:
        digest.update(item.caption.encode())
        _add_content(digest, item.content)
    return digest.hexdigest()[:32]


def _add_content(digest: Any, content: Any) -> None:
    if isinstance(content, str | Path):
        path = Path(content)
        for file in sorted(path.iterdir()) if path.is_dir() else [path]:
            known = file.stat()
            digest.update(f"{file.resolve()} {known.st_size} {known.st_mtime_ns}".encode())
    else:
        hash_tensor(digest, "", frames_of(content))


def media_in(folder: str | Path, caption_column: str | None = None, media_column: str | None = None) -> list[Media]:
    """What a folder holds: by ``metadata.csv``, ``.jsonl`` or ``.json``, by ``prompts.txt`` and ``videos.txt``, or as
    pairs ``x.mp4`` and ``x.txt``.

    Args:
        folder: with pictures, clips, or folders of frames.
        caption_column: of the metadata; the usual names by default.
        media_column: of the metadata, likewise.

    Raises:
        ConfigError: nothing there, or a file that the metadata names is missing.
    """
    folder = Path(folder)
    rows = [
        (_column(row, media_column, _FILES, folder), str(_column(row, caption_column, _CAPTIONS, folder)))
        for row in _metadata(folder)
    ] or _lists(folder)
    if not rows:
        rows = [(path.name, _caption(path)) for path in sorted(folder.glob("*")) if _is_item(path)]
    if not rows:
        raise ConfigError(
            f"{folder}: no pictures or clips found. It needs metadata.csv (file_name, caption), metadata.jsonl, "
            "prompts.txt with videos.txt, or pairs like 1.mp4 and 1.txt."
        )
    missing = next((name for name, _ in rows if not (folder / name).exists()), None)
    if missing is not None:
        raise ConfigError(f"{folder}: {missing} is named there and does not exist.")
    return [Media(folder / name, caption) for name, caption in rows]


def _metadata(folder: Path) -> list[dict[str, Any]]:
    table, lines, whole = (folder / f"metadata.{kind}" for kind in ("csv", "jsonl", "json"))
    if table.is_file():
        with open(table, newline="", encoding="utf-8") as handle:
            return list(csv.DictReader(handle))
    if lines.is_file():
        return [json.loads(line) for line in lines.read_text(encoding="utf-8").splitlines() if line.strip()]
    return list(json.loads(whole.read_text(encoding="utf-8"))) if whole.is_file() else []


def _lists(folder: Path) -> list[tuple[str, str]]:
    captions = next((folder / name for name in ("prompts.txt", "prompt.txt") if (folder / name).is_file()), None)
    files = folder / "videos.txt"
    if captions is None or not files.is_file():
        return []
    texts, names = (path.read_text(encoding="utf-8").splitlines() for path in (captions, files))
    if len(texts) != len(names):
        raise ConfigError(f"{folder}: {captions.name} has {len(texts)} lines and videos.txt {len(names)}.")
    return list(zip(names, texts, strict=True))


def _column(row: Mapping[str, Any], asked: str | None, names: Sequence[str], folder: Path) -> Any:
    found = next((name for name in ([asked] if asked else names) if row.get(name) is not None), None)
    if found is None:
        raise ConfigError(f"{folder}: its metadata needs a column {asked or ' or '.join(names)}, got {sorted(row)}.")
    return row[found]


def _is_item(path: Path) -> bool:
    return path.suffix.lower() in (*_PICTURES, *_CLIPS) or (path.is_dir() and any(map(_is_picture, path.iterdir())))


def _is_picture(path: Path) -> bool:
    return path.suffix.lower() in _PICTURES


def _caption(path: Path) -> str:
    text = path.with_suffix(".txt")
    return text.read_text(encoding="utf-8").strip() if text.is_file() else ""


# --- pixels -------------------------------------------------------------------------------------------------------


def frames_of(content: Any) -> torch.Tensor:
    """Float32 [frames, 3, height, width] in [0, 1] of a file, a folder of frames, PIL images, arrays or a tensor.

    Raises:
        ConfigError: none of these.
        MissingDependencyError: a clip in a file without OpenCV.
    """
    if isinstance(content, str | Path):
        return torch.cat(list(_frames_in(Path(content))))
    if isinstance(content, torch.Tensor):
        pixels = content.float() / 255 if content.dtype == torch.uint8 else content.float()
        if pixels.ndim in (3, 4) and pixels.shape[-3] == 3 and bool((pixels >= 0).all() and (pixels <= 1).all()):
            return pixels if pixels.ndim == 4 else pixels[None]
        raise ConfigError(
            "training: a tensor of pixels is [3, height, width] or [frames, 3, height, width], uint8 or in [0, 1], "
            f"got {tuple(content.shape)} {content.dtype}."
        )
    if isinstance(content, list | tuple) and content:
        return torch.cat([frames_of(frame) for frame in content])
    if hasattr(content, "convert") or hasattr(content, "__array__"):
        import numpy as np

        array = np.array(content.convert("RGB") if hasattr(content, "convert") else content)
        array = array if array.ndim == 4 else array[None]
        return frames_of(torch.from_numpy(array).movedim(-1, -3).contiguous())
    raise ConfigError(f"training: a picture or clip is a file, PIL images or a tensor, got a {type(content).__name__}.")


def _frames_in(path: Path) -> Iterator[torch.Tensor]:
    from PIL import Image, ImageSequence

    if path.is_dir():
        for frame in sorted(filter(_is_picture, path.iterdir())):
            yield from _frames_in(frame)
    elif path.suffix.lower() in (*_PICTURES, ".gif"):
        with Image.open(path) as image:
            for frame in ImageSequence.Iterator(image) if path.suffix.lower() == ".gif" else [image]:
                yield frames_of(frame)
    else:
        yield from _decoded(path)


def _decoded(path: Path) -> Iterator[torch.Tensor]:
    try:
        import cv2
    except ImportError as error:
        raise MissingDependencyError(
            f"{path}: reading clips needs OpenCV: pip install opencv-python-headless. Folders of frames need nothing."
        ) from error
    reader, count = cv2.VideoCapture(str(path)), 0
    try:
        while True:
            more, frame = reader.read()
            if not more:
                break
            count += 1
            yield frames_of(torch.from_numpy(frame[..., ::-1].copy()).movedim(-1, 0))
    finally:
        reader.release()
    if not count:
        raise ConfigError(f"{path}: no frame of it can be read.")


# --- latents ------------------------------------------------------------------------------------------------------


def encoded(
    pipe: Any, content: Any, height: int | None, width: int | None, num_frames: int | None
) -> tuple[dict[str, torch.Tensor], dict[str, int]]:
    """(mean and standard deviation of the latents in the scale that the denoiser knows, size as the call takes it).

    Args:
        pipe: with a ``vae``.
        content: of a :class:`Media`.
        height: pixels are resized and cut to it; by default what there is, down to what the VAE divides.
        width: likewise.
        num_frames: at most so many; of a clip as many as the VAE takes.

    Raises:
        ConfigError: no VAE, or pixels of another kind.
    """
    vae = getattr(pipe, "vae", None)
    if vae is None:
        raise ConfigError(
            f"training: {type(pipe).__name__} has no vae to encode pictures with. Give latents or prompts."
        )
    frames = frames_of(content)
    is_video = "num_frames" in inspect.signature(type(pipe).__call__).parameters
    processor = getattr(pipe, "video_processor", None) or getattr(pipe, "image_processor", None)
    step = int(getattr(processor, "config", {}).get("vae_scale_factor", 8)) * 2
    size = [
        asked or max(step, int(have) // step * step)
        for asked, have in zip((height, width), frames.shape[-2:], strict=True)
    ]
    pixels = _resized(frames, size[0], size[1]) * 2 - 1
    call_size = {"height": size[0], "width": size[1]}
    if is_video:
        every = int(getattr(pipe, "vae_scale_factor_temporal", None) or 4)
        count = min(len(pixels), num_frames or len(pixels))
        count = (count - 1) // every * every + 1
        pixels, call_size["num_frames"] = pixels[:count].movedim(0, 1)[None], count
    else:
        pixels = pixels[:1]
    parameter = next(vae.parameters())
    with torch.no_grad():
        found = vae.encode(pixels.to(parameter.device, parameter.dtype))
    posterior = getattr(found, "latent_dist", None)
    mean = found.latent if posterior is None else posterior.mean
    std = torch.zeros_like(mean) if posterior is None else posterior.std
    shift, scale = _normalization(vae, mean)
    return {"mean": ((mean - shift) * scale).float().cpu(), "std": (std * scale).float().cpu()}, call_size


def _resized(frames: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """The middle of the frames in this size, their aspect ratio kept."""
    scale = max(height / frames.shape[-2], width / frames.shape[-1])
    if scale != 1:
        inner = [max(side, round(have * scale)) for side, have in zip((height, width), frames.shape[-2:], strict=True)]
        frames = torch.nn.functional.interpolate(frames, inner, mode="bicubic", antialias=True).clamp(0, 1)
    top, left = (frames.shape[-2] - height) // 2, (frames.shape[-1] - width) // 2
    return frames[..., top : top + height, left : left + width]


def _normalization(vae: Any, latents: torch.Tensor) -> tuple[torch.Tensor | float, torch.Tensor | float]:
    """(shift, scale): a denoiser knows ``(latents - shift) * scale``."""
    config = vae.config
    scaling = float(config.get("scaling_factor") or 1.0)
    buffers = dict(vae.named_buffers(recurse=False))  # where LTX has them
    found = [config.get(name) for name in ("latents_mean", "latents_std")]
    mean, std = found if None not in found else [buffers.get(name) for name in ("latents_mean", "latents_std")]
    if mean is None or std is None:
        return float(config.get("shift_factor") or 0.0), scaling
    shape = (1, -1, *[1] * (latents.ndim - 2))
    mean, std = (torch.as_tensor(value).to(latents).reshape(shape) for value in (mean, std))
    return mean, scaling / std


def fitted(pipe: Any, latents: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
    """Latents [1, channels, (frames,) height, width] in the form that the denoiser takes them in.

    Raises:
        ModelStateError: the model takes another one, with a condition beside the latents above all.
    """
    if latents.shape == sample.shape:
        return latents
    found = latents
    if latents.ndim == 5 and latents.shape[2] == 1 and sample.ndim < 5:  # a picture by a VAE for clips
        found = latents[:, :, 0]
    if sample.ndim == 5 and found.ndim == 5 and found.transpose(1, 2).shape == sample.shape:  # CogVideoX
        return found.transpose(1, 2).contiguous()
    pack = getattr(pipe, "_pack_latents", None)
    if sample.ndim == 3 and pack is not None:
        if len(inspect.signature(pack).parameters) == 5:
            found = pack(found.contiguous(), found.shape[0], found.shape[1], found.shape[-2], found.shape[-1])
        else:  # LTX's
            sizes = (getattr(pipe, f"transformer_{n}patch_size", 1) for n in ("spatial_", "temporal_"))
            found = pack(found, *sizes)
    if found.shape != sample.shape:
        raise ModelStateError(
            f"training: the latents of a picture are {tuple(latents.shape)}, and the model is given "
            f"{tuple(sample.shape)} for its size: with conditions in them, or packed in a way that is not known here. "
            "Train on the pipeline's own trajectories: data= prompts, or dicts of its arguments."
        )
    return found

"""Full-reference picture metrics: PSNR and SSIM, on whole pictures and on the box around what is drawn.

Pictures are [B, 3, H, W] tensors with values in [0, 1] (``data_range`` 1) unless stated otherwise;
:func:`as_pictures` makes them from what pipelines return. All arithmetic is float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from diffuse_compress.errors import IncompatibleShapeError

__all__ = [
    "PSNR_CAP_DB",
    "SSIM_SIGMA",
    "SSIM_WINDOW",
    "as_clips",
    "as_pictures",
    "bounding_box",
    "flicker",
    "psnr",
    "ssim",
]

SSIM_WINDOW, SSIM_SIGMA = 11, 1.5
PSNR_CAP_DB = 100.0
"""Stands for the infinite PSNR of equal pictures where a mean is taken."""


def as_pictures(images: Any) -> torch.Tensor:
    """Pictures as [B, 3, H, W] float32 in [0, 1], on the CPU.

    Args:
        images: a float tensor [B, 3, H, W] in [0, 1], a uint8 one, or a sequence of PIL pictures or of arrays
            [H, W, 3] (uint8, or float in [0, 1]).
    """
    if isinstance(images, torch.Tensor):
        pictures = images.detach().cpu()
        return pictures.float() / 255 if pictures.dtype == torch.uint8 else pictures.float()
    import numpy as np

    arrays = [np.asarray(image.convert("RGB") if hasattr(image, "convert") else image) for image in images]
    stacked = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()
    return as_pictures(stacked)


def as_clips(clips: Any) -> torch.Tensor:
    """Clips as [B, F, 3, H, W] float32 in [0, 1], on the CPU.

    Args:
        clips: a tensor [B, F, 3, H, W] as of :func:`as_pictures`, or a sequence of clips, each a tensor [F, 3, H, W] or
            a sequence of PIL pictures or of arrays [H, W, 3].
    """
    if isinstance(clips, torch.Tensor):
        return as_pictures(clips)
    return torch.stack([as_pictures(clip) for clip in clips])


def flicker(clips: torch.Tensor) -> torch.Tensor:
    """Mean absolute difference of neighbouring frames, of each clip: [B] float64, in the units of the values.

    Args:
        clips: [B, F, C, H, W] with F >= 2.
    """
    if clips.dim() != 5 or clips.shape[1] < 2:
        raise IncompatibleShapeError(f"flicker: need clips [B, F, C, H, W] with F >= 2, got {list(clips.shape)}.")
    frames = clips.double()
    return (frames[:, 1:] - frames[:, :-1]).abs().mean(dim=(1, 2, 3, 4))


def bounding_box(
    pictures: torch.Tensor, background: float | Sequence[float] = 1.0, threshold: float = 0.06
) -> torch.Tensor:
    """Where a picture differs from its plain background.

    Args:
        pictures: [B, 3, H, W] in [0, 1].
        background: its value, one number or one per channel; white is 1.
        threshold: least difference, in any channel, that counts as drawn.

    Returns:
        [B, 4] int64: top, left, bottom, right, the last two exclusive. An empty picture gets its whole frame, so
        that a metric on the box is always defined.
    """
    level = torch.as_tensor(background, dtype=pictures.dtype, device=pictures.device).reshape(-1, 1, 1)
    drawn = (pictures - level).abs().amax(dim=1) > threshold
    height, width = drawn.shape[-2:]
    boxes = []
    for mask in drawn:
        rows, columns = mask.any(1).nonzero().flatten().tolist(), mask.any(0).nonzero().flatten().tolist()
        boxes.append([rows[0], columns[0], rows[-1] + 1, columns[-1] + 1] if rows else [0, 0, height, width])
    return torch.tensor(boxes, dtype=torch.int64).reshape(-1, 4)


def psnr(
    reference: torch.Tensor, pictures: torch.Tensor, data_range: float = 1.0, boxes: torch.Tensor | None = None
) -> torch.Tensor:
    """Peak signal to noise ratio of each picture: ``20 log10(data_range) - 10 log10(mean squared error)``.

    Args:
        reference: [B, C, H, W].
        pictures: [B, C, H, W].
        data_range: largest minus smallest possible value.
        boxes: [B, 4] of :func:`bounding_box`; the error is averaged inside. None for the whole picture.

    Returns:
        [B] float64, in dB; inf for equal pictures. For means, clamp to ``PSNR_CAP_DB``.
    """
    squared = (_checked(reference, pictures)[0] - pictures.double()).square()
    if boxes is None:
        error = squared.mean(dim=(1, 2, 3))
    else:
        error = torch.stack([_crop(one, box).mean() for one, box in zip(squared, boxes.tolist(), strict=True)])
    return 10 * torch.log10(data_range**2 / error)


def ssim(
    reference: torch.Tensor, pictures: torch.Tensor, data_range: float = 1.0, boxes: torch.Tensor | None = None
) -> torch.Tensor:
    """Mean structural similarity of each picture, averaged over channels.

    Source: Wang, Bovik, Sheikh & Simoncelli 2004 (IEEE TIP 13(4), equations 13 to 17): an 11 x 11 circular Gaussian
    window with sigma 1.5, K1 = 0.01, K2 = 0.03, weighted moments without sample correction, and only windows that lie
    inside the picture. Differs: per colour channel instead of on luminance, and never downsampled.

    Args:
        reference: [B, C, H, W], at least 11 pixels in height and width.
        pictures: [B, C, H, W].
        data_range: largest minus smallest possible value.
        boxes: [B, 4] of :func:`bounding_box`: windows inside the box count. A box under 11 pixels is widened to 11.

    Returns:
        [B] float64, at most 1.

    Raises:
        IncompatibleShapeError: shapes differ, or are smaller than the window.
    """
    x, y = _checked(reference, pictures)
    if min(x.shape[-2:]) < SSIM_WINDOW:
        raise IncompatibleShapeError(
            f"ssim: pictures must be at least {SSIM_WINDOW} pixels high and wide, got {list(x.shape[-2:])}. "
            "Use larger pictures, or psnr."
        )
    similarity = _ssim_map(x, y, data_range)
    if boxes is None:
        return similarity.mean(dim=(1, 2, 3))
    values = []
    for one, (top, left, bottom, right) in zip(similarity, boxes.tolist(), strict=True):
        top, bottom = _window_span(top, bottom, x.shape[-2])
        left, right = _window_span(left, right, x.shape[-1])
        values.append(one[:, top:bottom, left:right].mean())
    return torch.stack(values)


def _ssim_map(x: torch.Tensor, y: torch.Tensor, data_range: float) -> torch.Tensor:
    """[B, C, H - 10, W - 10]: entry (i, j) belongs to the window whose corner is pixel (i, j)."""
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    mean_x, mean_y = _blur(x), _blur(y)
    var_x, var_y = _blur(x * x) - mean_x**2, _blur(y * y) - mean_y**2
    covariance = _blur(x * y) - mean_x * mean_y
    return ((2 * mean_x * mean_y + c1) * (2 * covariance + c2)) / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))


def _blur(x: torch.Tensor) -> torch.Tensor:
    """Gaussian weighted mean of every window; the 2-D Gaussian is the product of two 1-D ones."""
    offsets = torch.arange(SSIM_WINDOW, dtype=x.dtype, device=x.device) - SSIM_WINDOW // 2
    weights = torch.exp(-(offsets**2) / (2 * SSIM_SIGMA**2))
    weights = weights / weights.sum()
    flat = x.reshape(-1, 1, *x.shape[-2:])
    flat = F.conv2d(F.conv2d(flat, weights.view(1, 1, -1, 1)), weights.view(1, 1, 1, -1))
    return flat.reshape(*x.shape[:-2], *flat.shape[-2:])


def _window_span(start: int, stop: int, size: int) -> tuple[int, int]:
    """Corners of the windows inside [start, stop), at least one of them."""
    last = max(stop - SSIM_WINDOW, start)
    last = min(last, size - SSIM_WINDOW)
    return min(start, last), last + 1


def _crop(picture: torch.Tensor, box: Sequence[int]) -> torch.Tensor:
    top, left, bottom, right = box
    return picture[:, top:bottom, left:right]


def _checked(reference: torch.Tensor, pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if reference.shape != pictures.shape or reference.dim() != 4:
        raise IncompatibleShapeError(
            f"metrics: need two [B, C, H, W] tensors of one shape, got {list(reference.shape)} and "
            f"{list(pictures.shape)}."
        )
    return reference.double(), pictures.double()

"""The clips: an emoji on white that moves, grows or shrinks at a constant speed, and how to tell which.

Needs torch and `training.glyphs` only; drawing runs on any device.
"""

from __future__ import annotations

import unicodedata
from functools import lru_cache

import torch
from training.glyphs import place

FRAMES, FRAME_SIZE = 9, 64
# Each motion as the change of x, of y (down is positive) and of the scale, over a whole clip.
MOTIONS = {
    "moving left": (-1, 0, 0),
    "moving right": (1, 0, 0),
    "moving up": (0, -1, 0),
    "moving down": (0, 1, 0),
    "growing": (0, 0, 1),
    "shrinking": (0, 0, -1),
}
# First and last code points: food, animals, faces, vehicles; 256 emoji in all.
EMOJI_RANGES = ((0x1F32D, 0x1F37F), (0x1F400, 0x1F43E), (0x1F600, 0x1F644), (0x1F680, 0x1F6A8))

# Glyph edge over frame edge, of a clip whose emoji keeps its size and in the middle of one whose
# emoji does not. The classifier was trained on 0.72 to 1.
MOVING_SCALE, GROWING_SCALE = (0.70, 0.76), (0.77, 0.81)
# In half frames: how far an emoji moves in a clip. And by how much of the frame edge one grows.
TRAVEL, GROWTH = (0.44, 0.52), (0.26, 0.34)
MAXIMUM_ANGLE = 6 * torch.pi / 180
# Of log ink: more than this between the first and the last frame is growth. Growing clips reach 0.6.
GROWTH_THRESHOLD = 0.3


def choose_emoji(glyphs: torch.Tensor, names: list[str]) -> tuple[torch.Tensor, list[str]]:
    """The glyphs and names of `EMOJI_RANGES`, out of what `training.glyphs.load_dataset` gives."""
    points = (point for first, last in EMOJI_RANGES for point in range(first, last + 1))
    chosen = {unicodedata.name(chr(point), "").lower() for point in points}
    rows = [row for row, name in enumerate(names) if name in chosen]
    return glyphs[rows], [names[row] for row in rows]


def caption(name: str, motion: str) -> str:
    """The prompt of a clip: "grinning face moving left"."""
    return f"{name} {motion}"


def split_caption(text: str) -> tuple[str, str]:
    """Name and motion of a prompt that `caption` made."""
    for motion in MOTIONS:
        if text.endswith(" " + motion):
            return text.removesuffix(" " + motion), motion
    raise ValueError(f"split_caption: expects a prompt that ends in one of {list(MOTIONS)}, got {text!r}.")


def _uniform(bounds: tuple[float, float], draws: torch.Tensor) -> torch.Tensor:
    low, high = bounds
    return low + (high - low) * draws


@lru_cache
def _changes(device: torch.device) -> torch.Tensor:
    """`MOTIONS` as a tensor, made once: a CUDA graph cannot record a copy from the host."""
    return torch.tensor(list(MOTIONS.values()), dtype=torch.float32, device=device)


def draw_clips(glyphs: torch.Tensor, motions: torch.Tensor) -> torch.Tensor:
    """Clips of random angle, size, place and speed.

    Args:    glyphs: [b, 3, 128, 128] uint8. motions: [b] int64, rows of `MOTIONS`, same device.
    Returns: [b, 3, FRAMES, 64, 64] fp32 in [-1, 1].
    """
    batch, device = len(glyphs), glyphs.device
    change = _changes(device)[motions]
    draws = torch.rand(6, batch, device=device)
    grows = change[:, 2] != 0
    scale = torch.where(grows, _uniform(GROWING_SCALE, draws[0]), _uniform(MOVING_SCALE, draws[0]))
    change = change * torch.stack([_uniform(TRAVEL, draws[1])] * 2 + [_uniform(GROWTH, draws[1])], dim=1)
    # The clip's middle may lie as far off the frame's as keeps its ends inside.
    room = 1.02 - scale[:, None] - (change[:, :2].abs() + change[:, 2:].abs()) / 2
    centre = (draws[2:4].T * 2 - 1) * room.clamp(min=0)
    angle = (draws[4] * 2 - 1) * MAXIMUM_ANGLE
    time = torch.linspace(-0.5, 0.5, FRAMES, device=device)
    # [b, FRAMES] and [b, FRAMES, 2], then all frames as one batch.
    scales = scale[:, None] + time * change[:, 2:]
    shifts = centre[:, None] + time[:, None] * change[:, None, :2]
    frames = place(
        glyphs.repeat_interleave(FRAMES, dim=0),
        angle.repeat_interleave(FRAMES),
        scales.flatten(),
        shifts.flatten(0, 1).T,
    )
    return frames.unflatten(0, (batch, FRAMES)).transpose(1, 2)


def find_motions(clips: torch.Tensor) -> list[str]:
    """The motion of each clip, by the path of the ink's centre and the amount of ink.

    Args: clips: [n, frames, 3, h, w] in [0, 1].
    """
    ink = (1 - clips.float()).clamp(min=0).mean(dim=2)
    # What is nearly white is the decoder's noise.
    ink = torch.where(ink > 0.04, ink, 0)
    mass = ink.sum((2, 3)) + 1e-6
    axis = torch.linspace(-1, 1, ink.shape[-1], device=ink.device)
    x = (ink.sum(2) * axis).sum(2) / mass
    y = (ink.sum(3) * axis).sum(2) / mass
    names = list(MOTIONS)
    change = torch.stack([_slope(x), _slope(y), _slope(mass.log())], dim=1)
    found = []
    for dx, dy, growth in change.tolist():
        if abs(growth) > GROWTH_THRESHOLD:
            found.append(names[4] if growth > 0 else names[5])
        elif abs(dx) > abs(dy):
            found.append(names[1] if dx > 0 else names[0])
        else:
            found.append(names[3] if dy > 0 else names[2])
    return found


def _slope(values: torch.Tensor) -> torch.Tensor:
    """Change over a clip of the straight line through [n, frames] values."""
    time = torch.linspace(-0.5, 0.5, values.shape[1], device=values.device)
    return (values * time).sum(1) / time.square().sum()

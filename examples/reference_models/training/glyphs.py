"""The emoji data set: glyphs of the Noto Color Emoji font with their Unicode names as captions.

Nothing here is downloaded: the font comes from the Debian package ``fonts-noto-color-emoji`` (SIL
Open Font License 1.1) and the names from Python's ``unicodedata``. Drawing needs Pillow and
fontTools; augmentation needs torch only and runs on any device.
"""

from __future__ import annotations

import unicodedata
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

FONT_PATH = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
IMAGE_SIZE = 64
# The font holds one bitmap strike, 128 pixels high, which Pillow opens at this size only.
STRIKE_SIZE, GLYPH_SIZE = 109, 128

# Unicode names some glyphs after their black-and-white ancestors. These extra captions name what
# the font really shows, and are used beside the Unicode name in training.
ALIASES = {
    "heavy black heart": "red heart",
    "white medium star": "star",
    "black sun with rays": "sun",
    "slice of pizza": "pizza",
    "aubergine": "eggplant",
    "reversed hand with middle finger extended": "middle finger",
    "white smiling face": "smiling face",
    "hot beverage": "coffee",
    "black telephone": "telephone",
    "white heavy check mark": "green check mark",
    "black heart suit": "heart suit",
    "black spade suit": "spade suit",
    "black club suit": "club suit",
    "black diamond suit": "diamond suit",
}


def list_emoji(font_path: Path = FONT_PATH) -> list[tuple[int, str]]:
    """The (code point, caption) pairs of every single-code-point emoji the font can draw.

    Returns: 1,386 pairs in code point order with Python 3.11's ``unicodedata`` (Unicode 14) and
             version 2.042 of the font. ASCII and Latin-1 characters, which are emoji only with a
             variation selector, and the bare skin tone modifiers are left out.
    """
    from fontTools.ttLib import TTFont

    pairs = []
    for code_point in sorted(TTFont(font_path).getBestCmap()):
        name = unicodedata.name(chr(code_point), None)
        if name is None or code_point <= 0xFF or "FITZPATRICK" in name:
            continue
        pairs.append((code_point, name.lower()))
    return [pair for pair in pairs if _draw(chr(pair[0]), font_path).getbbox() is not None]


def _draw(character: str, font_path: Path):
    """One glyph as a transparent RGBA picture of 128 x 128 pixels."""
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.truetype(str(font_path), STRIKE_SIZE)
    canvas = Image.new("RGBA", (160, 160), (255, 255, 255, 0))
    ImageDraw.Draw(canvas).text((10, 10), character, font=font, embedded_color=True)
    # The strike's 136 x 128 bitmaps have 4 empty columns on either side.
    return canvas.crop((14, 10, 14 + GLYPH_SIZE, 10 + GLYPH_SIZE))


def render(emoji: list[tuple[int, str]], font_path: Path = FONT_PATH) -> np.ndarray:
    """Draw every emoji on white. Returns: [n, 128, 128, 3] uint8."""
    from PIL import Image

    glyphs = []
    for code_point, _ in emoji:
        glyph = _draw(chr(code_point), font_path)
        white = Image.new("RGBA", glyph.size, (255, 255, 255, 255))
        glyphs.append(np.asarray(Image.alpha_composite(white, glyph).convert("RGB")))
    return np.stack(glyphs)


def load_dataset(cache: Path, font_path: Path = FONT_PATH) -> tuple[torch.Tensor, list[str]]:
    """Glyphs and captions, drawn once and kept in ``cache`` (an .npz file).

    Returns: glyphs [n, 3, 128, 128] uint8, and n captions.
    """
    cache = Path(cache)
    if not cache.exists():
        if not Path(font_path).exists():
            raise FileNotFoundError(
                f"load_dataset: needs {cache} or the font {font_path}, got neither. "
                "Install the font: apt-get install fonts-noto-color-emoji."
            )
        emoji = list_emoji(font_path)
        cache.parent.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(cache, glyphs=render(emoji, font_path), captions=np.array([name for _, name in emoji]))
    stored = np.load(cache)
    glyphs = torch.from_numpy(stored["glyphs"]).permute(0, 3, 1, 2).contiguous()
    return glyphs, [str(caption) for caption in stored["captions"]]


def augment(glyphs: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
    """Random rotation (within 10 degrees), scale (0.72 to 1) and shift, on white.

    Args:    glyphs: [b, 3, 128, 128] uint8, any device. generator: of the same device.
    Returns: [b, 3, 64, 64] fp32 in [-1, 1]; twice supersampled, so that edges stay smooth.
    """
    batch, device = len(glyphs), glyphs.device
    draws = torch.rand(4, batch, device=device, generator=generator)
    angle = (draws[0] * 2 - 1) * (10 * torch.pi / 180)
    scale = 0.72 + 0.28 * draws[1]
    # A smaller glyph may move further before it leaves the frame.
    shift = (draws[2:] * 2 - 1) * (1.02 - scale)
    return place(glyphs, angle, scale, shift)


def place(glyphs: torch.Tensor, angle: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """Draw glyphs rotated, scaled and shifted on a white frame.

    Args:    glyphs: [b, 3, 128, 128] uint8. angle: [b] radians. scale: [b] glyph edge over frame
             edge. shift: [2, b] x and y of the centre, in half frames.
    Returns: [b, 3, 64, 64] fp32 in [-1, 1].
    """
    cos, sin = torch.cos(angle) / scale, torch.sin(angle) / scale
    row_x = torch.stack([cos, sin, -(cos * shift[0] + sin * shift[1])], dim=1)
    row_y = torch.stack([-sin, cos, sin * shift[0] - cos * shift[1]], dim=1)
    # Autocast would round the coordinates to bf16, by up to a quarter of a pixel.
    with torch.autocast(glyphs.device.type, enabled=False):
        grid = F.affine_grid(
            torch.stack([row_x, row_y], dim=1),
            [len(glyphs), 3, 2 * IMAGE_SIZE, 2 * IMAGE_SIZE],
            align_corners=False,
        )
    # Sampled as ink (1 - picture): what lies outside of the glyph is zero ink, that is white.
    ink = 1 - glyphs.float() / 255
    return 1 - 2 * F.avg_pool2d(F.grid_sample(ink, grid, align_corners=False), 2)


def centred(glyphs: torch.Tensor, scale: float = 0.9) -> torch.Tensor:
    """Upright glyphs in the middle of the frame. [b, 3, 128, 128] uint8 to [b, 3, 64, 64] fp32."""
    zeros = torch.zeros(len(glyphs), device=glyphs.device)
    return place(glyphs, zeros, zeros + scale, torch.stack([zeros, zeros]))

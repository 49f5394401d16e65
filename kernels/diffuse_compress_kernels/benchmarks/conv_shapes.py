"""Convolutions of published UNets.

(samples, in_channels, height and width, out_channels, kernel, stride, layers of that shape)
"""

from __future__ import annotations

__all__ = ["SD15_CONVOLUTIONS", "SDXL_CONVOLUTIONS"]

Convolution = tuple[int, int, int, int, int, int, int]

# Stable Diffusion XL at 1024 x 1024 with guidance; the last number counts the layers of that shape.
SDXL_CONVOLUTIONS: dict[str, Convolution] = {
    "320@128": (2, 320, 128, 320, 3, 1, 7),
    "640@64": (2, 640, 64, 640, 3, 1, 6),
    "1280@32": (2, 1280, 32, 1280, 3, 1, 10),
    "2560@32 > 1280": (2, 2560, 32, 1280, 3, 1, 2),
    "960@128 > 320": (2, 960, 128, 320, 3, 1, 1),
    "640@128 > 320": (2, 640, 128, 320, 3, 1, 2),
    "1280@64 up": (2, 1280, 64, 1280, 3, 1, 1),
    "640@128 up": (2, 640, 128, 640, 3, 1, 1),
    "1920@64 > 640": (2, 1920, 64, 640, 3, 1, 1),
    "1280@64 > 640": (2, 1280, 64, 640, 3, 1, 1),
    "320@128 down": (2, 320, 128, 320, 3, 2, 1),
    "640@64 down": (2, 640, 64, 640, 3, 2, 1),
    "2560@32 > 1280 shortcut": (2, 2560, 32, 1280, 1, 1, 2),
    "960@128 > 320 shortcut": (2, 960, 128, 320, 1, 1, 1),
    "1920@32 > 1280": (2, 1920, 32, 1280, 3, 1, 1),
    "960@64 > 640": (2, 960, 64, 640, 3, 1, 1),
    "320@64 > 640": (2, 320, 64, 640, 3, 1, 1),
    "640@32 > 1280": (2, 640, 32, 1280, 3, 1, 1),
    "1920@64 > 640 shortcut": (2, 1920, 64, 640, 1, 1, 1),
    "640@128 > 320 shortcut": (2, 640, 128, 320, 1, 1, 2),
}

# Stable Diffusion 1.5 at 512 x 512 with guidance.
SD15_CONVOLUTIONS: dict[str, Convolution] = {
    "sd1.5 320@64": (2, 320, 64, 320, 3, 1, 7),
    "sd1.5 640@32": (2, 640, 32, 640, 3, 1, 6),
    "sd1.5 1280@16": (2, 1280, 16, 1280, 3, 1, 6),
    "sd1.5 2560@16 > 1280": (2, 2560, 16, 1280, 3, 1, 2),
    "sd1.5 1280@8": (2, 1280, 8, 1280, 3, 1, 11),
}

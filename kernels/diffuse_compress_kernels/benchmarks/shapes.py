"""Linear layers of published models by name: (out_features, in_features)."""

from __future__ import annotations

__all__ = ["LINEAR_SHAPES"]

LINEAR_SHAPES: dict[str, dict[str, tuple[int, int]]] = {
    # PixArt-XL-2: 28 blocks of width 1152.
    "pixart_xl": {
        "attn.to_q": (1152, 1152),
        "attn.to_qkv fused": (3456, 1152),
        "ff.net.0.proj": (4608, 1152),
        "ff.net.2": (1152, 4608),
    },
    # Stable Diffusion XL base: widths 640 and 1280, GEGLU, text width 2048.
    "sdxl": {
        "640.attn1.to_q": (640, 640),
        "640.ff.net.0.proj": (5120, 640),
        "640.ff.net.2": (640, 2560),
        "1280.attn1.to_q": (1280, 1280),
        "1280.attn2.to_k": (1280, 2048),
        "1280.ff.net.0.proj": (10240, 1280),
        "1280.ff.net.2": (1280, 5120),
    },
}

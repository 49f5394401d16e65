"""Linear layers of published models by name: (out_features, in_features)."""

from __future__ import annotations

__all__ = ["GPU_DECODE_SHAPES", "GPU_SHAPES", "LINEAR_SHAPES"]

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

# (tokens, out_features, in_features) of whole layers on a GPU, the most telling ones first.
GPU_SHAPES: dict[str, tuple[int, int, int]] = {
    "flux single qkv": (4608, 9216, 3072),
    "flux single proj_mlp": (4608, 12288, 3072),
    "flux ff down": (4608, 3072, 12288),
    "wan14b ff up": (32768, 13824, 5120),
    "flux attn out": (4096, 3072, 3072),
    "wan1.3b ff up": (32768, 8960, 1536),
    "pixart attn": (8192, 1152, 1152),
    "sdxl geglu 32": (2048, 10240, 1280),
    "flux single proj_out": (4608, 3072, 15360),
    "wan14b attn": (32768, 5120, 5120),
    "wan14b ff down": (32768, 5120, 13824),
    "pixart ff up": (8192, 4608, 1152),
    "pixart ff down": (8192, 1152, 4608),
    "wan1.3b attn": (32768, 1536, 1536),
    "wan1.3b ff down": (32768, 1536, 8960),
    "flux txt qkv": (512, 9216, 3072),
    "cogvideox5b ff up": (17776, 12288, 3072),
    "cogvideox5b attn": (17776, 3072, 3072),
    "cogvideox2b ff up": (17776, 7680, 1920),
    "sdxl geglu 64": (8192, 5120, 640),
    "sdxl attn 32": (2048, 1280, 1280),
    "sdxl ff down 32": (2048, 1280, 5120),
    "llama prefill gate_up": (2048, 28672, 4096),
    "llama prefill down": (2048, 4096, 14336),
}

# (out_features, in_features) of Llama-3.1-8B, and a modulation layer of Flux, which see few rows.
GPU_DECODE_SHAPES: dict[str, tuple[int, int]] = {
    "llama gate_up": (28672, 4096),
    "llama down": (4096, 14336),
    "llama o": (4096, 4096),
    "llama qkv": (6144, 4096),
    "flux adaln": (18432, 3072),
}

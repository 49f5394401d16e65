"""Tile shapes worth trying, by kind of product and number of tokens: what ``tune`` and the benchmark choose from."""

from __future__ import annotations

from dataclasses import replace

from diffuse_compress_kernels.triton_kernels.tiles import GemvConfig, TileConfig

__all__ = ["FEW_TOKENS", "KINDS", "candidates", "gemv_candidates"]

KINDS = ("w8a8-int8", "w8a8-fp8", "w4a8", "w4a8-two-level", "w4a16")
# Up to this many tokens reading the weight costs more than multiplying it.
FEW_TOKENS = 64

_LARGE_8_BIT = (
    TileConfig(128, 256, 128, 8, 3, tma=True, weight_left=False),
    TileConfig(128, 256, 128, 8, 4, tma=True, weight_left=False),
    TileConfig(128, 256, 128, 8, 3, tma=True, weight_left=False, programs_per_sm=1),
    TileConfig(128, 256, 128, 8, 3, tma=True, weight_left=True),
    TileConfig(256, 128, 128, 8, 3, tma=True, weight_left=True),
    TileConfig(256, 128, 128, 8, 4, tma=True, weight_left=True),
    TileConfig(256, 128, 128, 8, 3, tma=True, weight_left=True, programs_per_sm=1),
    TileConfig(256, 128, 128, 8, 3, tma=True, weight_left=False),
    TileConfig(128, 128, 128, 4, 3, tma=True, weight_left=True),
    TileConfig(128, 128, 128, 4, 3, tma=True, weight_left=False),
    TileConfig(128, 128, 128, 4, 3, tma=True, weight_left=True, programs_per_sm=2),
    TileConfig(128, 256, 128, 8, 3, weight_left=False),
    TileConfig(256, 128, 128, 8, 3, weight_left=True),
    TileConfig(128, 128, 128, 4, 3, weight_left=True),
    TileConfig(128, 256, 64, 8, 4, tma=True, weight_left=False),
)
_LARGE_W4A8 = (
    TileConfig(128, 128, 128, 4, 3),
    TileConfig(128, 128, 128, 4, 4),
    TileConfig(128, 128, 128, 4, 3, tma=True),
    TileConfig(128, 128, 128, 4, 4, tma=True),
    TileConfig(128, 128, 128, 4, 3, tma=True, programs_per_sm=2),
    TileConfig(256, 128, 128, 8, 3),
    TileConfig(256, 128, 128, 8, 3, tma=True),
    TileConfig(256, 128, 128, 8, 4, tma=True),
    TileConfig(256, 128, 128, 8, 3, tma=True, programs_per_sm=1),
    TileConfig(128, 256, 128, 8, 3),
    TileConfig(128, 256, 128, 8, 4, tma=True),
    TileConfig(256, 64, 128, 4, 3),
    TileConfig(256, 64, 128, 4, 3, tma=True),
)
_LARGE_W4A16 = (
    TileConfig(256, 128, 128, 8, 2),
    TileConfig(256, 128, 128, 8, 3),
    TileConfig(256, 128, 128, 8, 2, tma=True),
    TileConfig(256, 128, 128, 8, 3, tma=True),
    TileConfig(256, 128, 128, 8, 2, tma=True, programs_per_sm=1),
    TileConfig(128, 128, 128, 4, 2),
    TileConfig(128, 128, 128, 4, 3),
    TileConfig(128, 128, 128, 4, 2, tma=True),
    TileConfig(256, 64, 128, 4, 2),
    TileConfig(128, 256, 128, 8, 3, tma=True),
    TileConfig(128, 128, 128, 8, 4, tma=True),
)


def candidates(kind: str, tokens: int) -> list[TileConfig]:
    """Configurations of a product with this many tokens; those a device cannot hold fail when they are launched."""
    if tokens <= FEW_TOKENS:
        block_m = max(16, 1 << (tokens - 1).bit_length())
        few = [TileConfig(block_m, 64, 128, 4, 5, split_k=split) for split in (1, 2, 4, 8, 16)]
        few += [TileConfig(block_m, 128, 128, 4, 4, split_k=split) for split in (1, 2, 4, 8)]
        few.append(TileConfig(block_m, 64, 128, 4, 5, tma=True))
        return few
    large = {"w8a8-int8": _LARGE_8_BIT, "w8a8-fp8": _LARGE_8_BIT, "w4a16": _LARGE_W4A16}.get(kind, _LARGE_W4A8)
    if tokens <= 512:
        large = (*large, *(replace(config, split_k=2) for config in large[:3] if not config.tma))
    return list(large)


def gemv_candidates() -> list[GemvConfig]:
    """Configurations of a product of one token without tensor cores."""
    return [GemvConfig(rows, threads) for threads in (32, 64, 128) for rows in (4, 8, 16)]

"""Tile shapes of the convolution worth trying: what the benchmark sweeps."""

from __future__ import annotations

from dataclasses import replace

from diffuse_compress_kernels.triton_kernels.conv_geometry import ConvConfig, ConvShape

__all__ = ["conv_candidates"]

# Few pixels: fewer tiles of 128 by 128 than there are places for them on a large GPU.
FEW_PIXELS = 4096

_LARGE = (
    ConvConfig("box", 128, 128, 128, 4, 3, weight_left=True),
    ConvConfig("box", 128, 128, 128, 4, 3, group_m=16, weight_left=True),
    ConvConfig("box", 128, 128, 128, 8, 3, weight_left=True),
    ConvConfig("box", 128, 128, 64, 4, 5, weight_left=True),
    ConvConfig("box", 256, 64, 64, 4, 4, weight_left=True),
    ConvConfig("box", 256, 128, 128, 8, 3, weight_left=True),
    ConvConfig("box", 256, 128, 128, 8, 4, weight_left=True),
    ConvConfig("box", 256, 128, 64, 8, 5, weight_left=True),
    ConvConfig("box", 128, 64, 128, 4, 3, weight_left=True),
    ConvConfig("box", 64, 128, 128, 4, 3, weight_left=True),
    ConvConfig("shift", 128, 128, 128, 4, 3, weight_left=True),
    ConvConfig("gather", 128, 128, 128, 4, 3, weight_left=True),
    ConvConfig("gather", 128, 128, 128, 8, 3, weight_left=True),
    ConvConfig("gather", 256, 64, 64, 4, 4, weight_left=True),
    ConvConfig("gather", 256, 128, 128, 8, 3, weight_left=True),
    ConvConfig("gather", 128, 64, 128, 4, 3, weight_left=True),
    ConvConfig("gather", 64, 64, 128, 4, 4, weight_left=True),
)


def conv_candidates(shape: ConvShape) -> list[ConvConfig]:
    """Configurations that can load this shape; those a device cannot hold fail when they are launched."""
    configs = [config for config in _LARGE if shape.fits(config.mode)]
    pixels = shape.samples * shape.out[0] * shape.out[1]
    if pixels <= FEW_PIXELS:
        # Few tiles, many steps: several programs per tile.
        splittable = [
            config for config in configs if config.num_warps == 4 and config.block_k == 128 and config.group_m == 8
        ]
        splittable = [config for config in splittable if config.mode == "box" or not shape.fits("box")][:4]
        configs += [replace(config, split_k=parts) for config in splittable for parts in (2, 3, 4)]
    return configs

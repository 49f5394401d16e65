"""Which configuration a convolution gets: measured ones as data, and the rule that reads them. No triton, no device."""

from __future__ import annotations

import math
from functools import lru_cache

from diffuse_compress_kernels.triton_kernels.conv_geometry import ConvConfig, ConvShape, tiles_of_pixels

__all__ = ["Measured", "choose_conv"]

# (output pixels of the batch, output channels, input channels, taps, stride), and configurations with their time
# relative to the fastest.
Measured = tuple[tuple[int, int, int, int, int], tuple[tuple[ConvConfig, float], ...]]


def _c(mode: str, m: int, n: int, k: int, warps: int, stages: int, split_k: int = 1, left: bool = True) -> ConvConfig:
    return ConvConfig(mode, m, n, k, warps, stages, split_k=split_k, weight_left=left)


# `python -m diffuse_compress_kernels.benchmarks.gpu_conv2d` on an H200, torch 2.11, triton 3.6, 2026-11: the fastest,
# and the fastest that loads by pointers, which any stride, picture and zero point can take.
_HOPPER: tuple[Measured, ...] = (
    ((32768, 320, 320, 9, 1), ((_c("box", 256, 128, 64, 8, 5), 1.00), (_c("gather", 256, 64, 64, 4, 4), 1.05))),
    ((8192, 640, 640, 9, 1), ((_c("box", 128, 128, 128, 8, 3), 1.00), (_c("gather", 128, 128, 128, 4, 3), 1.05))),
    ((2048, 1280, 1280, 9, 1), ((_c("box", 128, 128, 128, 4, 3), 1.00), (_c("gather", 128, 128, 128, 4, 3), 1.03))),
    ((2048, 1280, 2560, 9, 1), ((_c("box", 128, 128, 128, 4, 3, 3), 1.00), (_c("gather", 128, 128, 128, 4, 3), 1.11))),
    ((32768, 320, 960, 9, 1), ((_c("box", 256, 128, 128, 8, 4), 1.00), (_c("gather", 256, 64, 64, 4, 4), 1.20))),
    ((32768, 320, 640, 9, 1), ((_c("box", 256, 128, 128, 8, 4), 1.00), (_c("gather", 128, 64, 128, 4, 3), 1.19))),
    ((8192, 1280, 1280, 9, 1), ((_c("gather", 128, 128, 128, 4, 3), 1.00), (_c("box", 128, 128, 128, 8, 3), 1.02))),
    ((32768, 640, 640, 9, 1), ((_c("box", 128, 128, 128, 8, 3), 1.00), (_c("gather", 128, 128, 128, 4, 3), 1.02))),
    ((8192, 640, 1920, 9, 1), ((_c("gather", 128, 128, 128, 8, 3), 1.00), (_c("box", 128, 128, 128, 8, 3), 1.02))),
    ((8192, 640, 1280, 9, 1), ((_c("box", 128, 128, 128, 8, 3), 1.00), (_c("gather", 128, 128, 128, 8, 3), 1.04))),
    ((8192, 320, 320, 9, 2), ((_c("gather", 128, 64, 128, 4, 3), 1.00),)),
    ((2048, 640, 640, 9, 2), ((_c("gather", 64, 64, 128, 4, 4), 1.00),)),
    ((2048, 1280, 2560, 1, 1), ((_c("box", 64, 128, 128, 4, 3), 1.00), (_c("gather", 128, 64, 128, 4, 3), 1.04))),
    ((32768, 320, 960, 1, 1), ((_c("box", 256, 64, 64, 4, 4), 1.00), (_c("gather", 256, 64, 64, 4, 4), 1.09))),
    ((2048, 1280, 1920, 9, 1), ((_c("box", 128, 128, 128, 4, 3, 3), 1.00), (_c("gather", 128, 128, 128, 4, 3), 1.06))),
    ((8192, 640, 960, 9, 1), ((_c("gather", 128, 128, 128, 8, 3), 1.00), (_c("box", 128, 128, 128, 8, 3), 1.01))),
    ((8192, 640, 320, 9, 1), ((_c("box", 128, 128, 64, 4, 5), 1.00), (_c("gather", 128, 128, 64, 4, 5), 1.05))),
    ((2048, 1280, 640, 9, 1), ((_c("box", 64, 128, 128, 4, 3), 1.00), (_c("gather", 128, 64, 128, 4, 3), 1.02))),
    ((8192, 640, 1920, 1, 1), ((_c("box", 64, 128, 128, 4, 3), 1.00), (_c("gather", 128, 64, 128, 4, 3), 1.02))),
    ((32768, 320, 640, 1, 1), ((_c("box", 128, 64, 128, 4, 3), 1.00), (_c("gather", 128, 64, 128, 4, 3), 1.02))),
    ((8192, 320, 320, 9, 1), ((_c("box", 256, 64, 64, 4, 4), 1.00), (_c("gather", 128, 64, 128, 4, 3), 1.06))),
    ((2048, 640, 640, 9, 1), ((_c("gather", 64, 64, 128, 4, 4), 1.00), (_c("box", 64, 128, 128, 4, 3, 2), 1.03))),
    ((512, 1280, 1280, 9, 1), ((_c("box", 64, 128, 128, 4, 3, 4), 1.00), (_c("gather", 64, 64, 128, 4, 4), 1.34))),
)

# Not measured: small enough in shared memory and registers for every architecture from 8.0 on.
_DEFAULT: tuple[Measured, ...] = (
    ((8192, 640, 640, 9, 1), ((_c("gather", 128, 128, 64, 8, 3, left=False), 1.0),)),
    ((512, 1280, 1280, 9, 1), ((_c("gather", 64, 64, 64, 4, 3, left=False), 1.0),)),
)

_TABLES = {(9, 0): _HOPPER}


@lru_cache(maxsize=4096)
def choose_conv(shape: ConvShape, outputs: int, capability: tuple[int, int], *, zero_point: bool) -> ConvConfig:
    """The configuration of a convolution: of the nearest one that was measured, the one that wastes least here.

    Args:
        shape: with gaps.
        outputs: N.
        capability: of the device.
        zero_point: the input has one, so that what is outside of a picture is not 0.
    """
    pixels = shape.samples * shape.out[0] * shape.out[1]
    here = (pixels, outputs, shape.channels, shape.taps, max(shape.stride))
    usable = [
        (distance(here, there), configs)
        for there, configs in _TABLES.get(capability, _DEFAULT)
        if any(_runs(shape, config, zero_point) for config, _ in configs)
    ]
    configs = min(usable, key=lambda item: item[0])[1]
    return min(
        (item for item in configs if _runs(shape, item[0], zero_point)),
        key=lambda item: item[1] * tiles_of_pixels(shape, item[0]) * item[0].block_m / pixels,
    )[0]


def distance(here: tuple[int, ...], there: tuple[int, ...]) -> float:
    """Between two shapes: ratios of their sizes, and another kind of window only where there is nothing else."""
    sizes = sum(abs(math.log(a / b)) for a, b in zip(here[:3], there[:3], strict=True))
    return sizes + 10 * ((here[3] == 1) != (there[3] == 1)) + 10 * (here[4] != there[4])


def _runs(shape: ConvShape, config: ConvConfig, zero_point: bool) -> bool:
    return shape.fits(config.mode) and not (config.mode == "box" and zero_point and any(shape.padding))

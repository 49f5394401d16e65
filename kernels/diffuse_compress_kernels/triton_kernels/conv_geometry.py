"""Shapes of a convolution's integer codes and tiles: plain data, no triton, no device.

Codes stand channels-last with one gap between neighbours in place of two halos: every row of pixels is followed by
``gap_w`` pixels that stand for 0, every sample by ``gap_h`` such rows, and a lead comes before the first sample::

    lead | row 0 of sample 0, gap | row 1, gap | ... | gap rows | row 0 of sample 1, gap | ...

The gap on the right of a row is the left border of the next one, and the rows below a sample are those above the next.
So a tap (i, j) of the window of any output pixel of stride 1 is ``i * row + j`` pixels further on in memory, whatever
the pixel: a convolution is a sum of matrix products over the same codes, shifted.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from typing import Any

__all__ = ["ConvConfig", "ConvShape", "box_width", "tiles_of_pixels"]

CHANNEL_ALIGNMENT = 16


@dataclass(frozen=True)
class ConvConfig:
    """One way to run the convolution.

    Attributes:
        mode: how a tile of codes is loaded. "gather": pointers, any stride. "shift": a descriptor of the codes as a
            matrix, stride 1; the outputs that fall on gaps are computed and dropped. "box": a descriptor of the codes
            as pictures, stride 1 and no zero point, because what lies outside of a picture is read as 0.
        block_m: output pixels per tile.
        block_n: output channels per tile.
        block_k: input channels per step of the inner loop.
        num_warps: warps per program.
        num_stages: depth of the software pipeline.
        group_m: rows of tiles that run one after the other, so that they share weights in L2.
        split_k: programs that share a tile, each with a part of the steps; their sums are added in a fixed order.
        weight_left: the weight is the left operand of the dot.
    """

    mode: str
    block_m: int
    block_n: int
    block_k: int = 128
    num_warps: int = 4
    num_stages: int = 3
    group_m: int = 8
    split_k: int = 1
    weight_left: bool = False

    @property
    def name(self) -> str:
        """Short and unique, for tables of measurements."""
        tile = f"{self.mode}-{self.block_m}x{self.block_n}x{self.block_k}-w{self.num_warps}s{self.num_stages}"
        parts = f"-k{self.split_k}" if self.split_k > 1 else ""
        return f"{tile}-g{self.group_m}{parts}-{'wl' if self.weight_left else 'xl'}"

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; ``ConvConfig(**data)`` is the inverse."""
        return asdict(self)


@dataclass(frozen=True)
class ConvShape:
    """A convolution of stored codes.

    Attributes:
        samples: B.
        height: of the input.
        width: of the input.
        channels: C, before padding.
        kernel: (kh, kw).
        stride: (vertical, horizontal).
        padding: (left, right, top, bottom).
        dilation: (vertical, horizontal).
        gaps: False leaves no room for borders: for "box" loads, which need none.
    """

    samples: int
    height: int
    width: int
    channels: int
    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)
    gaps: bool = True

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        """Shapes are keys of what is decided by them, at every call."""
        return hash((self.samples, self.height, self.width, self.channels, self.kernel, self.stride, self.padding,
                     self.dilation, self.gaps))  # fmt: skip

    @cached_property
    def out(self) -> tuple[int, int]:
        """(Ho, Wo)."""
        left, right, top, bottom = self.padding
        height = (self.height + top + bottom - self.dilation[0] * (self.kernel[0] - 1) - 1) // self.stride[0] + 1
        width = (self.width + left + right - self.dilation[1] * (self.kernel[1] - 1) - 1) // self.stride[1] + 1
        return height, width

    @cached_property
    def stored_channels(self) -> int:
        """C in memory: rows of a multiple of 16 bytes."""
        return -(-self.channels // CHANNEL_ALIGNMENT) * CHANNEL_ALIGNMENT

    @cached_property
    def taps(self) -> int:
        """Positions of the window."""
        return self.kernel[0] * self.kernel[1]

    @cached_property
    def gap(self) -> tuple[int, int]:
        """(rows between samples, pixels between rows)."""
        left, right, top, bottom = self.padding
        return (max(top, bottom), max(left, right)) if self.gaps else (0, 0)

    @cached_property
    def pitch(self) -> tuple[int, int]:
        """(rows of a sample, pixels of a row), gaps included."""
        return self.height + self.gap[0], self.width + self.gap[1]

    @cached_property
    def lead(self) -> int:
        """Pixels before the first sample."""
        return self.gap[0] * self.pitch[1] + self.gap[1]

    @cached_property
    def pixels(self) -> int:
        """Pixels in memory."""
        return self.lead + self.samples * self.pitch[0] * self.pitch[1]

    @cached_property
    def first(self) -> int:
        """Where the window of the first output begins, in pixels; negative if that is outside of the memory."""
        left, _, top, _ = self.padding
        return self.lead - top * self.pitch[1] - left

    def fits(self, mode: str) -> bool:
        """Whether the loads of ``mode`` reach every output of this shape, if the device has them."""
        if mode == "gather":
            return self.gaps or not any(self.padding)
        if self.stride != (1, 1):
            return False
        if mode == "box":
            return True
        gaps_reach = self.gaps or not any(self.padding)
        return gaps_reach and self.out[0] <= self.pitch[0] and self.out[1] <= self.pitch[1]


@lru_cache(maxsize=4096)
def box_width(out: tuple[int, int], block_m: int) -> int:
    """Width of the rectangle of ``block_m`` output pixels that covers pictures of this size with the least waste."""
    widths = [1 << power for power in range(block_m.bit_length()) if 1 << power <= 256]

    def covered(width: int) -> int:
        height = block_m // width
        return -(-out[0] // height) * -(-out[1] // width)

    # Long rows are fetched faster than short ones.
    return min(widths, key=lambda width: (covered(width), -width))


def tiles_of_pixels(shape: ConvShape, config: ConvConfig) -> int:
    """Tiles that cover all output pixels."""
    height, width = shape.out
    if config.mode == "box":
        block_w = box_width(shape.out, config.block_m)
        return shape.samples * -(-height // (config.block_m // block_w)) * -(-width // block_w)
    if config.mode == "shift":
        return -(-shape.samples * shape.pitch[0] * shape.pitch[1] // config.block_m)
    return -(-shape.samples * height * width // config.block_m)

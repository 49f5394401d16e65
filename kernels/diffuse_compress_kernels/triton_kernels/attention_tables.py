"""How the attention kernel is cut into tiles, by device: data, and the rule that reads it. No triton, no device."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

__all__ = [
    "ATTENTION_TABLES",
    "DEFAULT_TILES",
    "KEY_BLOCK",
    "MAX_HEAD_DIM",
    "MEASURED",
    "AttentionTile",
    "attention_candidates",
    "choose_attention",
    "columns_of",
    "is_measured",
]

KEY_BLOCK = 128
"""Keys that share a scale; tiles divide it, so that codes do not depend on them."""

MAX_HEAD_DIM = 128


@dataclass(frozen=True)
class AttentionTile:
    """One way to run the kernel.

    Attributes:
        block_m: queries per program.
        block_n: keys per step; divides ``KEY_BLOCK``.
        num_warps: warps per program.
        num_stages: depth of the software pipeline.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int

    @property
    def name(self) -> str:
        """Short and unique, for tables of measurements."""
        return f"{self.block_m}x{self.block_n}-w{self.num_warps}s{self.num_stages}"

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; ``AttentionTile(**data)`` is the inverse."""
        return asdict(self)


# (wide heads: more than 64 channels, float8 values) to the tile of many queries. Small enough in shared memory and
# registers for every architecture from 8.0 on: more keys a step of wide float8 heads spill on 12.0.
Tiles = dict[tuple[bool, bool], AttentionTile]
DEFAULT_TILES: Tiles = {
    (False, False): AttentionTile(128, 64, 4, 3),
    (False, True): AttentionTile(128, 64, 4, 3),
    (True, False): AttentionTile(128, 64, 8, 3),
    (True, True): AttentionTile(128, 32, 8, 3),
}
# Chosen from machine code, by registers and instructions per logit; nobody has timed them.
_HOPPER: Tiles = {
    (False, False): AttentionTile(128, 128, 8, 3),
    (False, True): AttentionTile(128, 128, 8, 3),
    (True, False): AttentionTile(128, 128, 8, 3),
    (True, True): AttentionTile(128, 128, 8, 3),
}

# By compute capability; what is not here gets DEFAULT_TILES.
ATTENTION_TABLES: dict[tuple[int, int], Tiles] = {(9, 0): _HOPPER}

# Compute capabilities whose tiles were timed against torch's own attention.
MEASURED: frozenset[tuple[int, int]] = frozenset()


def is_measured(capability: tuple[int, int]) -> bool:
    """False where nobody has compared the kernel's speed with the stock product's."""
    return capability in MEASURED


@lru_cache(maxsize=1024)
def choose_attention(queries: int, head_dim: int, capability: tuple[int, int], *, fp8_values: bool) -> AttentionTile:
    """The tile of an attention: that of the device's table, with fewer queries where there are few.

    Args:
        queries: of one head.
        head_dim: channels of a head.
        capability: of the device.
        fp8_values: the second product is of float8.
    """
    tile = ATTENTION_TABLES.get(capability, DEFAULT_TILES)[head_dim > 64, fp8_values]
    if queries <= 64:
        return AttentionTile(64, min(tile.block_n, 64), 4, 3 if capability == (9, 0) else 2)
    return tile


def attention_candidates() -> list[AttentionTile]:
    """Tiles worth trying; those a device cannot hold fail when they are launched."""
    return [
        AttentionTile(128, 128, 8, 2),
        AttentionTile(128, 128, 8, 3),
        AttentionTile(128, 64, 4, 2),
        AttentionTile(128, 64, 4, 3),
        AttentionTile(128, 64, 8, 3),
        AttentionTile(128, 64, 8, 4),
        AttentionTile(256, 64, 8, 3),
        AttentionTile(64, 128, 4, 2),
        AttentionTile(64, 64, 4, 3),
    ]


@lru_cache(maxsize=256)
def columns_of(head_dim: int) -> tuple[int, int, int]:
    """(first, second of queries and keys, second of values): blocks of channels that hold a head.

    Blocks are powers of two; one of 64 with a small one beside it wastes less on heads of 72, 80 and 96 channels than
    one of 128. int8 products take 32 channels at a time, those of values 16.
    """
    if head_dim <= 32:
        return 32, 0, 0
    if head_dim <= 64:
        return 64, 0, 0
    if head_dim <= 96:
        return 64, 32, 16 if head_dim <= 80 else 32
    return MAX_HEAD_DIM, 0, 0

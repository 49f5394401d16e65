"""Which tile shape a product gets, by device and shape: data, and the rule that reads it.

A table lists choices per kind of product. A choice serves up to ``tokens`` tokens; among those of the smallest such
number the one wins whose speed on full waves, times the part of its waves that is full for this product, is highest.
``split_k`` of a choice is an upper bound: no more programs share a tile than it takes to fill the device.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from diffuse_compress_kernels.triton_kernels.tiles import TileConfig

__all__ = ["DEFAULT", "TABLES", "Choice", "Table", "choose", "for_groups", "load_table", "save_table", "table_for"]

MANY = 1 << 40


@dataclass(frozen=True)
class Choice:
    """A tile shape for products of at most ``tokens`` tokens and at least ``outputs`` out_features.

    ``speed`` on full waves is relative to its neighbours. K is split until there are ``programs`` per multiprocessor,
    enough to keep loads in flight, but not into parts of fewer than ``least_steps`` steps: adding up costs, too.
    """

    tokens: int
    config: TileConfig
    speed: float = 1.0
    outputs: int = 0
    least_steps: int = 4
    programs: float = 1.9


Table = Mapping[str, tuple[Choice, ...]]

# Small enough in shared memory for every architecture from 8.0 on (99 KiB per block on 8.6, 8.9 and 12.0).
DEFAULT: Table = {
    "w8a8-int8": (
        Choice(16, TileConfig(16, 64, 128, 4, 4, split_k=8)),
        Choice(32, TileConfig(32, 64, 128, 4, 4, split_k=8)),
        Choice(64, TileConfig(64, 64, 128, 4, 4, split_k=4)),
        Choice(MANY, TileConfig(128, 128, 64, 8, 3)),
    ),
    "w8a8-fp8": (
        Choice(16, TileConfig(16, 64, 128, 4, 4, split_k=8)),
        Choice(32, TileConfig(32, 64, 128, 4, 4, split_k=8)),
        Choice(64, TileConfig(64, 64, 128, 4, 4, split_k=4)),
        Choice(MANY, TileConfig(128, 128, 64, 8, 3)),
    ),
    "w4a8": (
        Choice(16, TileConfig(16, 64, 128, 4, 5, split_k=8)),
        Choice(32, TileConfig(32, 64, 128, 4, 5, split_k=8)),
        Choice(64, TileConfig(64, 64, 128, 4, 4, split_k=4)),
        Choice(MANY, TileConfig(128, 128, 128, 8, 3)),
    ),
    "w4a16": (
        Choice(16, TileConfig(16, 64, 128, 4, 5, split_k=8)),
        Choice(32, TileConfig(32, 64, 128, 4, 4, split_k=8)),
        Choice(64, TileConfig(64, 64, 128, 4, 3, split_k=4)),
        Choice(MANY, TileConfig(64, 128, 128, 8, 3)),
    ),
}

# Measured on an H200 (torch 2.11, triton 3.6, 2026-11) by
# `python -m diffuse_compress_kernels.benchmarks.gpu_linear`, from the shapes in benchmarks/shapes.py.
_HOPPER: Table = {
    "w8a8-int8": (
        *DEFAULT["w8a8-int8"][:2],
        Choice(64, TileConfig(64, 64, 128, 4, 5, split_k=4), 0.5, least_steps=16),
        Choice(64, TileConfig(64, 128, 128, 4, 4), 1.0, outputs=16384),
        Choice(MANY, TileConfig(128, 128, 128, 4, 3, tma=True)),
    ),
    "w8a8-fp8": (
        *DEFAULT["w8a8-fp8"][:3],
        Choice(MANY, TileConfig(128, 256, 128, 8, 3, tma=True, programs_per_sm=1, weight_left=False)),
        Choice(MANY, TileConfig(128, 128, 128, 4, 3, tma=True), 0.92),
    ),
    "w4a8": (
        *DEFAULT["w4a8"][:2],
        Choice(64, TileConfig(64, 64, 128, 4, 5, split_k=4), 0.5, least_steps=16),
        Choice(64, TileConfig(64, 128, 128, 4, 4), 1.0, outputs=16384),
        Choice(MANY, TileConfig(128, 128, 128, 4, 3, tma=True, programs_per_sm=2)),
    ),
    "w4a16": (
        Choice(16, TileConfig(16, 64, 128, 4, 5, split_k=8), programs=3.5),
        Choice(32, TileConfig(32, 64, 128, 4, 5, split_k=8), programs=3.5),
        Choice(64, TileConfig(64, 64, 128, 4, 5, split_k=4), least_steps=8),
        Choice(MANY, TileConfig(256, 128, 128, 8, 3, tma=True)),
    ),
}

# By compute capability. What is not here gets DEFAULT.
TABLES: dict[tuple[int, int], Table] = {(9, 0): _HOPPER}


def table_for(capability: tuple[int, int]) -> Table:
    """The table of a compute capability."""
    return TABLES.get(capability, DEFAULT)


def choose(
    table: Table,
    kind: str,
    shape: tuple[int, int, int],
    multiprocessors: int,
    *,
    aligned: bool = True,
) -> TileConfig:
    """The tile shape of a product.

    Args:
        table: of the device.
        kind: "w8a8-int8", "w8a8-fp8", "w4a8" (two-level weights too) or "w4a16".
        shape: (M, N, K).
        multiprocessors: of the device.
        aligned: rows are multiples of 16 bytes, as descriptors need.
    """
    shape = (max(shape[0], 1), max(shape[1], 1), shape[2])
    tokens, outputs, _ = shape
    fitting = [choice for choice in table[kind] if choice.tokens >= tokens and choice.outputs <= outputs]
    least = min(choice.tokens for choice in fitting)
    best = max(
        (choice for choice in fitting if choice.tokens == least),
        key=lambda choice: choice.speed * _wave_efficiency(choice.config, tokens, outputs, multiprocessors),
    )
    config = best.config
    # With descriptors, no more steps of K than stages gave wrong sums, on an H200 with triton 3.6.
    short = shape[2] < (config.num_stages + 1) * config.block_k
    if config.tma and (short or not aligned):
        config = replace(config, tma=False, programs_per_sm=0)
    if config.split_k > 1:
        config = replace(config, split_k=_parts(best, shape, multiprocessors))
    return config


def for_groups(config: TileConfig, group_size: int) -> TileConfig:
    """A w4a16 tile for groups smaller than 128: their scales need shared memory, for which fewer stages make room."""
    if group_size in (0, 128):
        return config
    return replace(config, num_stages=min(config.num_stages, 2))


def _tiles(config: TileConfig, tokens: int, outputs: int) -> int:
    return -(-tokens // config.block_m) * -(-outputs // config.block_n)


def _wave_efficiency(config: TileConfig, tokens: int, outputs: int, multiprocessors: int) -> float:
    """Useful part of the tiles that the device works through at a time, one per multiprocessor or two small ones."""
    slots = multiprocessors * (2 if config.num_warps <= 4 else 1)
    tiles = _tiles(config, tokens, outputs)
    useful = tokens * outputs / (config.block_m * config.block_n)
    return useful / (-(-tiles // slots) * slots)


def _parts(choice: Choice, shape: tuple[int, int, int], multiprocessors: int) -> int:
    """The power of two that fills the device, within the choice's bound and with a few steps of K per program."""
    tokens, outputs, depth = shape
    config = choice.config
    tiles = max(1, _tiles(config, tokens, outputs))
    most = min(config.split_k, depth // (config.block_k * choice.least_steps))
    parts = 1
    while parts * 2 <= most and parts * tiles < choice.programs * multiprocessors:
        parts *= 2
    return parts


def save_table(table: Table, path: Path, about: dict[str, Any]) -> None:
    """Write a table as JSON; ``about`` says what it was measured on."""
    data = {kind: [asdict(choice) for choice in choices] for kind, choices in table.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"about": about, "table": data}, indent=1))


def load_table(path: Path) -> Table:
    """The inverse of :func:`save_table`."""
    data = json.loads(path.read_text())["table"]
    return {
        kind: tuple(Choice(**{**item, "config": TileConfig(**item["config"])}) for item in choices)
        for kind, choices in data.items()
    }

"""How a product is cut into tiles: plain data, no triton, no device."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["GemvConfig", "TileConfig"]


@dataclass(frozen=True)
class TileConfig:
    """One way to run a kernel.

    Attributes:
        block_m: tokens per tile.
        block_n: output features per tile.
        block_k: in_features per step of the inner loop; packed weights always take 128.
        num_warps: warps per program.
        num_stages: depth of the software pipeline.
        group_m: rows of tiles that run one after the other, so that they share weights in L2.
        split_k: programs that share a tile, each with a part of K; their partial sums are added in a fixed order.
        tma: load tiles through descriptors (compute capability 9.0 or more; rows of a multiple of 16 bytes).
        programs_per_sm: 0 starts a program per tile; otherwise that many per multiprocessor walk over the tiles.
        weight_left: the weight is the left operand of the dot; packed weights always are.
    """

    block_m: int
    block_n: int
    block_k: int = 128
    num_warps: int = 4
    num_stages: int = 3
    group_m: int = 8
    split_k: int = 1
    tma: bool = False
    programs_per_sm: int = 0
    weight_left: bool = True

    @property
    def name(self) -> str:
        """Short and unique, for tables of measurements."""
        parts = [f"{self.block_m}x{self.block_n}x{self.block_k}", f"w{self.num_warps}s{self.num_stages}"]
        parts.append(f"g{self.group_m}")
        if self.split_k > 1:
            parts.append(f"k{self.split_k}")
        if self.tma:
            parts.append("tma")
        if self.programs_per_sm:
            parts.append(f"p{self.programs_per_sm}")
        parts.append("wl" if self.weight_left else "xl")
        return "-".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; ``TileConfig(**data)`` is the inverse."""
        return asdict(self)


@dataclass(frozen=True)
class GemvConfig:
    """One way to multiply few tokens without tensor cores.

    Attributes:
        block_n: output features per program.
        threads: threads of a program, each with 32 in_features per step.
    """

    block_n: int
    threads: int

    @property
    def name(self) -> str:
        """Short and unique, for tables of measurements."""
        return f"n{self.block_n}-t{self.threads}"

    @property
    def num_warps(self) -> int:
        """Warps of a program."""
        return self.threads // 32

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; ``GemvConfig(**data)`` is the inverse."""
        return asdict(self)

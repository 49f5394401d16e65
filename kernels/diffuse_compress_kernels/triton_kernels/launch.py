"""What the launchers of the products share: descriptors, grids, scratch memory, the names of arguments."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from diffuse_compress_kernels.triton_kernels.tiles import TileConfig

__all__ = ["INTERPRETED", "Operands", "Unsuitable", "forget_counters", "launch", "multiprocessors", "on_device_of"]

# Read when triton is imported, as triton does.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
TMA_ALIGNMENT = 16
COUNTERS = 1 << 20


def on_device_of(x: torch.Tensor) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device, which need not be that of x."""
    if x.device.type != "cuda" or x.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(x.device)


class Unsuitable(ValueError):
    """A tile shape that cannot run these operands."""


@dataclass
class Operands:
    """Tensors of one product; ``weight`` may be packed, ``depth`` is K."""

    codes: torch.Tensor
    weight: torch.Tensor
    depth: int
    x_scale: torch.Tensor | None
    w_scale: torch.Tensor | None
    offset: torch.Tensor | None
    bias: torch.Tensor | None
    out: torch.Tensor | None
    dtype: torch.dtype

    def result(self) -> torch.Tensor:
        """``out``, or a new one."""
        if self.out is None:
            shape = (self.codes.shape[0], self.weight.shape[0])
            self.out = torch.empty(shape, dtype=self.dtype, device=self.codes.device)
        return self.out


def launch(
    kernel: Any,
    operands: Operands,
    config: TileConfig,
    constants: dict[str, Any],
    parts_dtype: torch.dtype,
    x_columns: int | None = None,
    weight_columns: int | None = None,
) -> torch.Tensor:
    """Run a product's kernel.

    Args:
        kernel: with the parameters of ``w8a8_kernel``, and those of ``constants``.
        operands: of the product.
        config: tile shape.
        constants: further arguments of the kernel by name.
        parts_dtype: of partial sums over parts of K.
        x_columns: columns of a tile of x; default ``block_k``.
        weight_columns: bytes of a tile of the weight; default ``block_k``.
    """
    x, weight, y = operands.codes, operands.weight, operands.result()
    rows, outputs = y.shape
    if rows == 0 or outputs == 0:
        return y
    tiles = -(-rows // config.block_m) * -(-outputs // config.block_n)
    persistent = config.programs_per_sm > 0
    programs = min(tiles, config.programs_per_sm * multiprocessors(x.device)) if persistent else tiles
    with on_device_of(x):
        kernel[(programs, config.split_k)](
            *_matrices(operands, y, config, x_columns or config.block_k, weight_columns or config.block_k),
            operands.x_scale,
            operands.w_scale,
            operands.offset,
            operands.bias,
            *_scratch(config, tiles, parts_dtype, x.device),
            rows,
            outputs,
            operands.depth,
            x.stride(0),
            weight.stride(0),
            y.stride(0),
            programs,
            X_SCALES=_kind_of_scale(operands.x_scale, rows),
            W_SCALES=_kind_of_scale(operands.w_scale, outputs),
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            GROUP_M=config.group_m,
            SPLIT_K=config.split_k,
            TMA=config.tma,
            PERSISTENT=persistent,
            EVEN_K=operands.depth % config.block_k == 0,
            **constants,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            # Triton's default is about to change, and results would with it.
            enable_fp_fusion=True,
        )
    return y


def _matrices(
    operands: Operands, y: torch.Tensor, config: TileConfig, x_columns: int, weight_columns: int
) -> tuple[Any, Any, torch.Tensor, Any]:
    """x and the weight as the kernel reads them, y, and the descriptor of y or None."""
    if not config.tma:
        return operands.codes, operands.weight, y, None
    if config.split_k > 1:
        # Compiled by Triton 3.6, such a kernel raced on a GPU: parts of tiles were sometimes lost.
        raise Unsuitable(f"descriptors and split_k={config.split_k} do not go together.")
    y_desc = None
    if y.dtype != torch.int32 and _fits_descriptor(y):
        y_desc = _descriptor(y, config.block_m, config.block_n)
    x_desc = _descriptor(operands.codes, config.block_m, x_columns)
    return x_desc, _descriptor(operands.weight, config.block_n, weight_columns), y, y_desc


def _scratch(
    config: TileConfig, tiles: int, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Room for partial sums, and the counters of their arrival, where several programs share a tile."""
    if config.split_k == 1:
        return None, None
    count = tiles * config.split_k * config.block_m * config.block_n
    return torch.empty(count, dtype=dtype, device=device), _counters(tiles, device)


def _kind_of_scale(scale: torch.Tensor | None, rows: int) -> str:
    if scale is None:
        return "none"
    return "rows" if scale.numel() == rows else "one"


def _fits_descriptor(tensor: torch.Tensor) -> bool:
    """Rows of a multiple of 16 bytes from an address that is one."""
    size = tensor.element_size()
    aligned = tensor.data_ptr() % TMA_ALIGNMENT == 0 and tensor.stride(0) * size % TMA_ALIGNMENT == 0
    return aligned and tensor.stride(1) == 1


def _descriptor(tensor: torch.Tensor, rows: int, columns: int) -> TensorDescriptor:
    if not _fits_descriptor(tensor):
        raise Unsuitable(
            f"descriptors need rows of a multiple of {TMA_ALIGNMENT} bytes, got {list(tensor.shape)} {tensor.dtype} "
            f"with strides {list(tensor.stride())}."
        )
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), [rows, columns])


@cache
def multiprocessors(device: torch.device) -> int:
    """Of a GPU; 2 for the interpreter."""
    if device.type != "cuda":
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count


class _Counters:
    """Zeroed arrival counters. A kernel leaves them at zero, so a slice is zeroed once in its life.

    Calls on one stream run one after the other and share a slice. Every call inside a graph capture gets a slice of
    its own, for good: replays may then run beside anything else.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.arena = torch.zeros(COUNTERS, dtype=torch.int32, device=device)
        self.used = 0
        self.by_stream: dict[int, torch.Tensor] = {}

    def take(self, count: int) -> torch.Tensor:
        if self.device.type != "cuda":
            return torch.zeros(count, dtype=torch.int32, device=self.device)
        if torch.cuda.is_current_stream_capturing():
            return self._slice(count)
        stream = torch.cuda.current_stream(self.device).cuda_stream
        kept = self.by_stream.get(stream)
        if kept is None or kept.numel() < count:
            kept = self.by_stream[stream] = self._slice(max(count, 1024))
        return kept

    def _slice(self, count: int) -> torch.Tensor:
        if self.used + count > self.arena.numel():
            # Inside a capture this records the zeroing, which replays then repeat: slower, and as right.
            return torch.zeros(count, dtype=torch.int32, device=self.device)
        self.used += count
        return self.arena[self.used - count : self.used]


@cache
def _counters_of(device: torch.device) -> _Counters:
    return _Counters(device)


def forget_counters() -> None:
    """Start again with fresh counters: for benchmarks, which capture thousands of graphs and drop them."""
    _counters_of.cache_clear()


def _counters(count: int, device: torch.device) -> torch.Tensor:
    return _counters_of(device).take(count)

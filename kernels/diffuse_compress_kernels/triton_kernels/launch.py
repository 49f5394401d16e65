"""What the launchers of the products share: descriptors, grids, scratch memory, the names of arguments."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch

from diffuse_compress_kernels.triton_kernels.conv_geometry import ConvConfig
from diffuse_compress_kernels.triton_kernels.plans import plan_for, start_and_keep
from diffuse_compress_kernels.triton_kernels.start import Matrix, Pointer, Variant, variant
from diffuse_compress_kernels.triton_kernels.tiles import TileConfig

__all__ = ["Operands", "Unsuitable", "forget_counters", "key_of", "launch", "multiprocessors", "planned", "scratch_for"]

TMA_ALIGNMENT = 16
COUNTERS = 1 << 20
# x, the weight and y; y is not described if its rows are unaligned.
DESCRIPTORS = 3
SCRATCH_PLACE = 8


class Unsuitable(ValueError):
    """A tile shape that cannot run these operands."""


@dataclass(slots=True)
class Operands:
    """Tensors of one product; ``weight`` may be packed, ``depth`` is K. Under ``key`` the call leaves a plan."""

    codes: torch.Tensor
    weight: torch.Tensor
    depth: int
    x_scale: torch.Tensor | None
    w_scale: torch.Tensor | None
    offset: torch.Tensor | None
    bias: torch.Tensor | None
    out: torch.Tensor | None
    dtype: torch.dtype
    key: tuple[Any, ...] | None = None

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
    constants: tuple[tuple[str, Any], ...],
    parts_dtype: torch.dtype,
    pointers: tuple[Pointer, ...] = (),
    numbers: tuple[int, ...] = (),
    x_columns: int | None = None,
    weight_columns: int | None = None,
) -> torch.Tensor:
    """Run a product's kernel.

    Args:
        kernel: with the parameters of ``w8a8_kernel``, besides ``pointers``, ``numbers`` and ``constants``.
        operands: of the product.
        config: tile shape.
        constants: (name, value) of the compile-time arguments that are this kernel's alone.
        parts_dtype: of partial sums over parts of K.
        pointers: further tensors.
        numbers: further numbers.
        x_columns: columns of a tile of x; default ``block_k``.
        weight_columns: bytes of a tile of the weight; default ``block_k``.
    """
    x, weight, y = operands.codes, operands.weight, operands.result()
    (rows, outputs), depth, device = y.shape, operands.depth, x.device
    if rows == 0 or outputs == 0:
        return y
    tiles = -(-rows // config.block_m) * -(-outputs // config.block_n)
    programs = min(tiles, config.programs_per_sm * multiprocessors(device)) if config.programs_per_sm else tiles
    scales = (_kind_of_scale(operands.x_scale, rows), _kind_of_scale(operands.w_scale, outputs))
    # By identity: kernels live as long as their modules, and are slow to hash.
    chosen = _VARIANTS.get(key := (id(kernel), config, scales, depth % config.block_k == 0, constants))
    if chosen is None:
        chosen = _VARIANTS[key] = _variant(kernel, config, scales, depth, constants)
    if config.tma:
        matrices = _described(operands, y, config, x_columns or config.block_k, weight_columns or config.block_k)
    else:
        matrices = (x, weight, y, None)
    scratch = scratch_for(config, tiles, parts_dtype, device) if config.split_k > 1 else (None, None)
    grid = (programs, config.split_k, 1)
    numbers = (rows, outputs, depth, x.stride(0), weight.stride(0), y.stride(0), programs, *numbers)
    scales_and_bias = (operands.x_scale, operands.w_scale, operands.offset, operands.bias)
    pointers = (*matrices, *scales_and_bias, *scratch, *pointers)
    room = (SCRATCH_PLACE, partial(scratch_for, config, tiles, parts_dtype, device)) if config.split_k > 1 else None
    start_and_keep(operands.key, chosen, device, grid, pointers, numbers, room)
    return y


def key_of(
    kind: str,
    x: torch.Tensor,
    x_scale: torch.Tensor | None,
    weight: torch.Tensor,
    w_scale: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
    *more: Any,
) -> tuple[Any, ...]:
    """All that a product is decided by, besides that addresses are multiples of 16."""
    described = (x.shape, x.stride(), x.dtype, weight.shape, weight.stride(), weight.dtype, x.device.index)
    scales = (None if x_scale is None else x_scale.shape, w_scale.shape, None if bias is None else bias.dtype)
    return (kind, dtype, described, scales, w_scale.dtype, more)


def planned(
    key: tuple[Any, ...],
    x: torch.Tensor,
    x_scale: torch.Tensor | None,
    weight: torch.Tensor,
    w_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
    *pointers: torch.Tensor | None,
) -> torch.Tensor | None:
    """y by the plan of an earlier :func:`launch` with this key; None if there is none, or it does not fit."""
    plan = plan_for(key, x.device)
    if plan is None:
        return None
    y = torch.empty((x.shape[0], weight.shape[0]), dtype=dtype, device=x.device)
    y_described = y if len(plan.matrices) == DESCRIPTORS else None
    tensors = (x, weight, y, y_described, x_scale, w_scale, None, bias, None, None, *pointers)
    return y if plan.run(x.device.index, tensors) else None


_VARIANTS: dict[tuple[Any, ...], Variant] = {}


def _variant(
    kernel: Any, config: TileConfig, scales: tuple[str, str], depth: int, constants: tuple[tuple[str, Any], ...]
) -> Variant:
    return variant(
        kernel,
        X_SCALES=scales[0],
        W_SCALES=scales[1],
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        GROUP_M=config.group_m,
        SPLIT_K=config.split_k,
        TMA=config.tma,
        PERSISTENT=config.programs_per_sm > 0,
        EVEN_K=depth % config.block_k == 0,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        # Triton's default is about to change, and results would with it.
        enable_fp_fusion=True,
        **dict(constants),
    )


def _described(
    operands: Operands, y: torch.Tensor, config: TileConfig, x_columns: int, weight_columns: int
) -> tuple[Pointer, ...]:
    """x and the weight through descriptors, y, and the descriptor of y or None."""
    if config.split_k > 1:
        # Compiled by Triton 3.6, such a kernel raced on a GPU: parts of tiles were sometimes lost.
        raise Unsuitable(f"descriptors and split_k={config.split_k} do not go together.")
    y_desc = None
    if y.dtype != torch.int32 and _fits_descriptor(y):
        y_desc = Matrix(y, y.shape, y.stride(), (config.block_m, config.block_n))
    x_desc = _descriptor(operands.codes, config.block_m, x_columns)
    return x_desc, _descriptor(operands.weight, config.block_n, weight_columns), y, y_desc


def scratch_for(
    config: TileConfig | ConvConfig, tiles: int, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Room for partial sums, and the counters of their arrival, where several programs share a tile."""
    count = tiles * config.split_k * config.block_m * config.block_n
    return torch.empty(count, dtype=dtype, device=device), _counters(tiles, device)


def _kind_of_scale(scale: torch.Tensor | None, rows: int) -> str:
    if scale is None:
        return "none"
    return "rows" if scale.shape[0] == rows or scale.numel() == rows else "one"


def _fits_descriptor(tensor: torch.Tensor) -> bool:
    """Rows of a multiple of 16 bytes from an address that is one."""
    row, column = tensor.stride()
    return column == 1 and (tensor.data_ptr() | row * tensor.element_size()) % TMA_ALIGNMENT == 0


def _descriptor(tensor: torch.Tensor, rows: int, columns: int) -> Matrix:
    if not _fits_descriptor(tensor):
        raise Unsuitable(
            f"descriptors need rows of a multiple of {TMA_ALIGNMENT} bytes, got {list(tensor.shape)} {tensor.dtype} "
            f"with strides {list(tensor.stride())}."
        )
    return Matrix(tensor, tensor.shape, tensor.stride(), (rows, columns))


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
        stream = torch._C._cuda_getCurrentRawStream(self.device.index)
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

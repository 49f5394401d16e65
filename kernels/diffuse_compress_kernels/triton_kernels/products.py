"""The products as the operators call them: the tile shape is chosen here, by device and shape."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import torch

from diffuse_compress_kernels.triton_kernels import capability
from diffuse_compress_kernels.triton_kernels.expand import expand_codes, expand_to_float, expand_to_int8
from diffuse_compress_kernels.triton_kernels.gemv import w4a16_gemv
from diffuse_compress_kernels.triton_kernels.launch import key_of, multiprocessors, planned
from diffuse_compress_kernels.triton_kernels.rows import quantize_rows
from diffuse_compress_kernels.triton_kernels.tables import Table, choose, for_groups, load_table, table_for
from diffuse_compress_kernels.triton_kernels.tiles import GemvConfig, TileConfig
from diffuse_compress_kernels.triton_kernels.w4a8 import w4a8
from diffuse_compress_kernels.triton_kernels.w4a16 import w4a16
from diffuse_compress_kernels.triton_kernels.w8a8 import w8a8

__all__ = [
    "config_for",
    "fp8_linear_codes",
    "int8_linear_codes",
    "int_matmul",
    "quantize_rows",
    "table_path",
    "w4a8_expanded",
    "w4a8_linear_codes",
    "w4a16_expanded",
    "w4a16_linear",
    "w8a16_linear",
]

ALIGNMENT = 16
# From so many tokens on, writing the weight out once costs less than unpacking it in front of every instruction. For
# int8 products that holds for two-level weights only, and also depends on what else reading a row of x costs: from so
# many elements of x on.
EXPAND_TWO_LEVEL_ELEMENTS = 8 << 20
EXPAND_WEIGHT_ONLY_TOKENS = 65
# Up to so many tokens, reading the weight for each of them costs less than idle rows of tensor-core instructions.
GEMV_TOKENS = 1
GEMV_CONFIG = GemvConfig(16, 64)
GEMV_CONFIG_MANY_OUTPUTS = GemvConfig(16, 32)
MANY_OUTPUTS = 16384
# Near the size of the L2 cache: part of what is written out is read back from there.
WORKSPACE_BYTES = 64 << 20
ROWS_PER_CHUNK = 128


def table_path(device: torch.device) -> Path:
    """Where what was measured on this kind of device is kept: ``$DIFFUSE_COMPRESS_CACHE/tiles/<name>.json``."""
    root = os.environ.get("DIFFUSE_COMPRESS_CACHE")
    folder = Path(root) if root else Path.home() / ".cache" / "diffuse_compress"
    return folder / "tiles" / f"{torch.cuda.get_device_name(device).replace(' ', '_')}.json"


@cache
def _table(device: torch.device) -> Table:
    """The shipped table, with what was measured on this device in its place."""
    shipped = table_for(capability(device))
    path = table_path(device)
    try:
        return {**shipped, **load_table(path)}
    except FileNotFoundError:
        return shipped
    except (OSError, KeyError, TypeError, json.JSONDecodeError):
        # Written by another version: measured again by `tune`, no reason to fail here.
        return shipped


@cache
def _choose(kind: str, shape: tuple[int, int, int], device: torch.device, aligned: bool) -> TileConfig:
    return choose(_table(device), kind, shape, multiprocessors(device), aligned=aligned)


def _aligned(tensor: torch.Tensor) -> bool:
    return tensor.data_ptr() % ALIGNMENT == 0 and tensor.stride(0) * tensor.element_size() % ALIGNMENT == 0


def config_for(kind: str, x: torch.Tensor, weight: torch.Tensor) -> TileConfig:
    """The tile shape of x [M, K] times a weight of N rows."""
    shape = (x.shape[0], weight.shape[0], x.shape[1])
    return _choose(kind, shape, x.device, _aligned(x) and _aligned(weight))


def int_matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """int32 [M, N] of int8 a [M, K] and b [N, K]."""
    out = torch.empty(a.shape[0], b.shape[0], dtype=torch.int32, device=a.device)
    return w8a8(a, None, b, None, config_for("w8a8-int8", a, b), out=out)


def int8_linear_codes(
    codes: torch.Tensor,
    scale: torch.Tensor,
    offset: torch.Tensor | None,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """As the operator of that name; ``offset`` int32 [N] is subtracted from the sums."""
    key = None
    if offset is None:
        key = key_of("w8a8", codes, scale, weight, weight_scale, bias, dtype)
        y = planned(key, codes, scale, weight, weight_scale, bias, dtype)
        if y is not None:
            return y
    config = config_for("w8a8-int8", codes, weight)
    return w8a8(codes, scale, weight, weight_scale, config, offset=offset, bias=bias, dtype=dtype, key=key)


def fp8_linear_codes(
    codes: torch.Tensor,
    scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """y [M, N] of float8_e4m3fn codes [M, K] and weight [N, K]."""
    config = config_for("w8a8-fp8", codes, weight)
    return w8a8(codes, scale, weight, weight_scale, config, bias=bias, dtype=dtype)


def _chunks(outputs: int, row_bytes: int) -> Iterator[slice]:
    """Equal parts of the rows of a weight whose expanded form takes ``WORKSPACE_BYTES`` at most, in whole tiles."""
    count = max(1, -(-outputs * row_bytes // WORKSPACE_BYTES))
    step = -(-outputs // count)
    step = -(-step // ROWS_PER_CHUNK) * ROWS_PER_CHUNK
    for start in range(0, outputs, step):
        yield slice(start, min(start + step, outputs))


def _rows(tensor: torch.Tensor | None, part: slice) -> torch.Tensor | None:
    """Rows of a tensor that has one per output; a single number serves all of them."""
    return tensor if tensor is None or tensor.shape[0] == 1 else tensor[part]


def w4a8_expanded(
    codes: torch.Tensor,
    scale: torch.Tensor,
    offset: torch.Tensor | None,
    packed: torch.Tensor,
    weight_scale: torch.Tensor,
    group_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The weight is written out as int8, then multiplied as such: same int32 sums."""
    outputs, depth = packed.shape[0], codes.shape[1]
    y = torch.empty(codes.shape[0], outputs, dtype=dtype, device=codes.device)
    for part in _chunks(outputs, depth):
        weight = torch.empty(part.stop - part.start, depth, dtype=torch.int8, device=codes.device)
        expand_to_int8(packed[part], _rows(group_scale, part), weight)
        config = config_for("w8a8-int8", codes, weight)
        some = [_rows(tensor, part) for tensor in (weight_scale, offset, bias)]
        w8a8(codes, scale, weight, some[0], config, offset=some[1], bias=some[2], out=y[:, part])
    return y


def _expanded(
    x: torch.Tensor,
    qweight: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    group_size: int,
    bias: torch.Tensor | None,
    expand: Callable[..., torch.Tensor],
) -> torch.Tensor:
    """The weight is written out in the dtype of x, then multiplied by the vendor's dense product."""
    outputs, depth = qweight.shape[0], x.shape[1]
    y = torch.empty(x.shape[0], outputs, dtype=x.dtype, device=x.device)
    for part in _chunks(outputs, depth * x.element_size()):
        weight = torch.empty(part.stop - part.start, depth, dtype=x.dtype, device=x.device)
        expand(qweight[part], _rows(scale, part), _rows(zero_point, part), group_size, weight)
        if bias is None:
            torch.mm(x, weight.t(), out=y[:, part])
        else:
            torch.addmm(bias[part].to(x.dtype), x, weight.t(), out=y[:, part])
    return y


def w4a16_expanded(
    x: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    group_size: int,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """:func:`w4a16_linear` for many tokens."""
    return _expanded(x, packed, scale, zero_point, group_size, bias, expand_to_float)


def w4a8_linear_codes(
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    packed: torch.Tensor,
    weight_scale: torch.Tensor,
    group_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """As the operator of that name."""
    offset = None
    if zero_point is not None:
        ones = torch.ones(1, codes.shape[1], dtype=torch.int8, device=codes.device)
        sums = torch.empty(1, packed.shape[0], dtype=torch.int32, device=codes.device)
        w4a8(ones, None, packed, None, config_for("w4a8", ones, packed), group_scale=group_scale, out=sums)
        offset = sums.view(-1) * zero_point.to(torch.int32)
    expand = group_scale is not None and codes.numel() >= EXPAND_TWO_LEVEL_ELEMENTS
    if expand and codes.shape[1] % ALIGNMENT == 0:
        return w4a8_expanded(codes, scale, offset, packed, weight_scale, group_scale, bias, dtype)
    key = None
    if offset is None:
        groups = None if group_scale is None else group_scale.stride()
        key = key_of("w4a8", codes, scale, packed, weight_scale, bias, dtype, groups)
        y = planned(key, codes, scale, packed, weight_scale, bias, dtype, group_scale)
        if y is not None:
            return y
    config = config_for("w4a8", codes, packed)
    return w4a8(
        codes,
        scale,
        packed,
        weight_scale,
        config,
        group_scale=group_scale,
        offset=offset,
        bias=bias,
        dtype=dtype,
        key=key,
    )


def w4a16_linear(
    x: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    group_size: int,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """As the operator of that name, for bf16 and fp16."""
    if x.shape[0] >= EXPAND_WEIGHT_ONLY_TOKENS:
        return w4a16_expanded(x, packed, scale, zero_point, group_size, bias)
    if x.shape[0] <= GEMV_TOKENS and group_size == 128:
        config = GEMV_CONFIG_MANY_OUTPUTS if packed.shape[0] >= MANY_OUTPUTS else GEMV_CONFIG
        return w4a16_gemv(x, packed, scale, zero_point, config, bias=bias)
    key = None
    if group_size:
        zero = None if zero_point is None else (zero_point.dtype, zero_point.stride())
        key = key_of("w4a16", x, None, packed, scale, bias, x.dtype, group_size, scale.stride(), zero)
        y = planned(key, x, None, packed, None, bias, x.dtype, scale, zero_point)
        if y is not None:
            return y
    tile = for_groups(config_for("w4a16", x, packed), group_size)
    return w4a16(x, packed, scale, zero_point, group_size, tile, bias=bias, key=key)


def w8a16_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    group_size: int,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """As the operator of that name, for bf16 and fp16."""
    if x.shape[0] >= EXPAND_WEIGHT_ONLY_TOKENS or zero_point is not None or group_size:
        return _expanded(x, weight, scale, zero_point, group_size, bias, expand_codes)
    key = key_of("w8a16", x, None, weight, scale, bias, x.dtype)
    y = planned(key, x, None, weight, scale, bias, x.dtype)
    if y is not None:
        return y
    # Tiles as for int4 weights, which differ in nothing that decides here.
    return w8a8(x, None, weight, scale, config_for("w4a16", x, weight), bias=bias, dtype=x.dtype, key=key)

"""Torch operators of the products with packed int4 weights: validate, choose the implementation of the device, run.

Storage: ``packed`` int8 [N, ceil(K / 128) * 64], the layout in ``fallback.py``. As for the int8 operators, eager calls
on ordinary tensors skip the dispatcher.
"""

from __future__ import annotations

from typing import cast

import torch

from diffuse_compress_kernels import triton_kernels
from diffuse_compress_kernels.int4_linear import fallback
from diffuse_compress_kernels.int8_linear.op import contiguous_rows, is_plain, quantize_rows
from diffuse_compress_kernels.registration import linear_flops, operator

__all__ = ["has_fast_int4", "w4a8_linear", "w4a8_linear_codes", "w4a16_linear"]

GROUP_SIZES = (0, 32, 64, 128)


def has_fast_int4(device: torch.device) -> bool:
    """True if packed int4 weights are multiplied there without being unpacked in memory first."""
    return triton_kernels.usable(device)


def _check_packed(name: str, x: torch.Tensor, packed: torch.Tensor) -> None:
    wanted = -(-x.shape[-1] // 128) * 64
    if x.dim() != 2 or packed.dim() != 2 or packed.dtype != torch.int8 or packed.shape[1] != wanted:
        raise ValueError(
            f"{name}: need x [M, K] and packed int8 [N, ceil(K / 128) * 64], got {list(x.shape)} and "
            f"{packed.dtype} {list(packed.shape)}."
        )


# --- int8 activations -------------------------------------------------------------------------------------------


def _run_w4a8(
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    packed: torch.Tensor,
    weight_scale: torch.Tensor,
    group_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    fast = has_fast_int4(codes.device)
    run = triton_kernels.module("products").w4a8_linear_codes if fast else fallback.w4a8_linear_codes
    codes = contiguous_rows(codes)
    return cast(torch.Tensor, run(codes, scale, zero_point, packed, weight_scale, group_scale, bias, dtype))


def _w4a8_linear_codes_now(
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    packed: torch.Tensor,
    weight_scale: torch.Tensor,
    group_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    return _run_w4a8(codes, scale, zero_point, packed, weight_scale, group_scale, bias, dtype)


def _w4a8_linear_codes_fake(
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    packed: torch.Tensor,
    weight_scale: torch.Tensor,
    group_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    return codes.new_empty((codes.shape[0], packed.shape[0]), dtype=dtype)


_w4a8_linear_codes = operator("w4a8_linear_codes", _w4a8_linear_codes_now, _w4a8_linear_codes_fake, flops=linear_flops)


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
    """:func:`w4a8_linear` for an input that ``quantize_rows`` has quantized already; result in ``dtype``.

    Args:
        codes: int8 [M, K].
        scale: fp32 [M, 1] or [1, 1].
        zero_point: one int8 number, or None.
        packed: int8 [N, ceil(K / 128) * 64].
        weight_scale: fp32 [N, 1] or [1, 1].
        group_scale: int8 [N, ceil(K / 128)] in 1..16, codes in -7..7 then; None: one scale per row.
        bias: [N], any float dtype.
        dtype: of the result.
    """
    _check_packed("w4a8_linear_codes", codes, packed)
    bias = None if bias is None else bias.detach()
    if is_plain(codes):
        return _run_w4a8(codes, scale, zero_point, packed, weight_scale, group_scale, bias, dtype)
    y = _w4a8_linear_codes(codes, scale, zero_point, packed, weight_scale, group_scale, bias, dtype)
    return cast(torch.Tensor, y)


def w4a8_linear(
    x: torch.Tensor,
    packed: torch.Tensor,
    weight_scale: torch.Tensor,
    group_scale: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    qmin: int = -127,
    qmax: int = 127,
    input_scale: torch.Tensor | None = None,
    input_zero_point: torch.Tensor | None = None,
    pre_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """y [M, N] = dequantized(quantize_rows(x)) @ (weight_scale * group_scale * codes).T + bias, exact int32 sums.

    Args:
        x: [M, K] fp32, bf16 or fp16.
        packed: int8 [N, ceil(K / 128) * 64], codes of the weight.
        weight_scale: fp32 [N, 1] or [1, 1].
        group_scale: int8 [N, ceil(K / 128)] in 1..16 (two-level weights); None is 1.
        bias: [N], any float dtype.
        qmin: lowest input code.
        qmax: highest input code: 127, or 7 for int4 activations.
        input_scale: one fp32 number for static activations; None measures a scale per row.
        input_zero_point: one int8 number, static only.
        pre_scale: fp32 [K] that multiplies x before it is quantized.

    Returns:
        [M, N] in the dtype of x; the epilogue is fp32 and rounds once.

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    _check_packed("w4a8_linear", x, packed)
    codes, scale = quantize_rows(x, qmin, qmax, input_scale, input_zero_point, pre_scale)
    return w4a8_linear_codes(codes, scale, input_zero_point, packed, weight_scale, group_scale, bias, x.dtype)


# --- 16-bit activations -----------------------------------------------------------------------------------------


def _run_w4a16(
    x: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    group_size: int,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    # The kernel multiplies 16-bit operands and takes integer zero points.
    fits = x.dtype != torch.float32 and (zero_point is None or zero_point.dtype == torch.int8)
    if fits and has_fast_int4(x.device):
        run = triton_kernels.module("products").w4a16_linear
        return cast(torch.Tensor, run(contiguous_rows(x), packed, scale, zero_point, group_size, bias))
    return fallback.w4a16_linear(x, packed, scale, zero_point, group_size, bias)


def _w4a16_linear_now(
    x: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    group_size: int,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    return _run_w4a16(x, packed, scale, zero_point, group_size, bias)


def _w4a16_linear_fake(
    x: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    group_size: int,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    return x.new_empty(x.shape[0], packed.shape[0])


_w4a16_linear = operator("w4a16_linear", _w4a16_linear_now, _w4a16_linear_fake, flops=linear_flops)


def w4a16_linear(
    x: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None = None,
    group_size: int = 128,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """y [M, N] = x @ (scale * (codes - zero_point)).T + bias, summed in fp32.

    Args:
        x: [M, K] bf16, fp16 or fp32; the weight is rounded to its dtype.
        packed: int8 [N, ceil(K / 128) * 64], codes of the weight.
        scale: fp32 [N, ceil(K / group_size)]; with ``group_size`` 0 [N, 1] or [1, 1].
        zero_point: int8 or fp32 of ``scale``'s shape; None is 0.
        group_size: columns that share a scale: 32, 64, 128, or 0 for a whole row.
        bias: [N], any float dtype.

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    _check_packed("w4a16_linear", x, packed)
    groups = 1 if group_size == 0 else -(-x.shape[1] // max(group_size, 1))
    if group_size not in GROUP_SIZES or scale.dim() != 2 or scale.shape[1] != groups:
        raise ValueError(
            f"w4a16_linear: need group_size in {GROUP_SIZES} and scale [N, {groups}], got {group_size} and "
            f"{list(scale.shape)}."
        )
    x, bias = x.detach(), None if bias is None else bias.detach()
    if is_plain(x):
        return _run_w4a16(x, packed, scale, zero_point, group_size, bias)
    return cast(torch.Tensor, _w4a16_linear(x, packed, scale, zero_point, group_size, bias))

"""Torch operators of the integer product: validate, choose the implementation of the device, run.

Each operator works under ``torch.compile(fullgraph=True)`` and on meta tensors. Eager calls on ordinary tensors skip
the dispatcher, whose Python wrappers would cost more than a product of one row.
"""

from __future__ import annotations

from types import ModuleType
from typing import cast

import torch

from diffuse_compress_kernels.int8_linear import cpu, cuda
from diffuse_compress_kernels.registration import count_no_flops, linear_flops, operator

__all__ = ["int8_linear", "int8_linear_codes", "int_matmul", "is_plain", "is_traced_for_cuda", "quantize_rows"]


def contiguous_rows(x: torch.Tensor) -> torch.Tensor:
    """x, or a copy of it if its rows are not contiguous."""
    return x if x.stride(-1) == 1 else x.contiguous()


def is_plain(x: torch.Tensor) -> bool:
    """True for an ordinary tensor outside any tracing: an operator may be called directly."""
    return (
        not torch.compiler.is_compiling()
        and type(x) in (torch.Tensor, torch.nn.Parameter)
        and x.device.type in ("cpu", "cuda")
        and torch._C._len_torch_dispatch_stack() == 0
        and not torch._C._are_functorch_transforms_active()
    )


def is_traced_for_cuda(x: torch.Tensor) -> bool:
    """True while a compiler for CUDA looks: it gets plain operations, and fuses them into what computes x."""
    return torch.compiler.is_compiling() and x.device.type == "cuda"


def _detached(x: torch.Tensor) -> torch.Tensor:
    """Operations with ``out=`` refuse operands that require a gradient."""
    return x.detach() if x.requires_grad else x


def _implementation(x: torch.Tensor) -> ModuleType:
    return cuda if x.device.type == "cuda" else cpu


# --- int32 accumulators -----------------------------------------------------------------------------------------


def _int_matmul_now(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return cast(torch.Tensor, _implementation(a).int_matmul(a, b.t()).contiguous())


def _int_matmul_fake(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return a.new_empty(a.shape[0], b.shape[0], dtype=torch.int32)


_int_matmul = operator("int_matmul", _int_matmul_now, _int_matmul_fake, flops=linear_flops)


def int_matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Exact int32 [M, N] of int8 codes a [M, K] and b [N, K]: the accumulators of every integer path.

    Raises:
        ValueError: operands that are not int8 matrices with the same K, or K over 131072 (int32 could overflow).
    """
    if a.dtype != torch.int8 or b.dtype != torch.int8 or a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(
            f"int_matmul: need int8 [M, K] and int8 [N, K], got {a.dtype} {list(a.shape)} and "
            f"{b.dtype} {list(b.shape)}."
        )
    _check_depth("int_matmul", a.shape[1])
    return cast(torch.Tensor, _int_matmul(a, b))


# --- quantization of rows ---------------------------------------------------------------------------------------


def _quantize_rows_now(
    x: torch.Tensor,
    qmin: int,
    qmax: int,
    scale: torch.Tensor | None,
    zero_point: torch.Tensor | None,
    pre_scale: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    codes, row_scale = _implementation(x).quantize_rows(x, qmin, qmax, scale, zero_point, pre_scale)
    return codes, row_scale.clone() if scale is not None else row_scale


def _quantize_rows_fake(
    x: torch.Tensor,
    qmin: int,
    qmax: int,
    scale: torch.Tensor | None,
    zero_point: torch.Tensor | None,
    pre_scale: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    rows = x.shape[0] if scale is None else 1
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty((rows, 1), dtype=torch.float32)


_quantize_rows = operator("quantize_rows", _quantize_rows_now, _quantize_rows_fake, flops=count_no_flops)


def quantize_rows(
    x: torch.Tensor,
    qmin: int,
    qmax: int,
    scale: torch.Tensor | None = None,
    zero_point: torch.Tensor | None = None,
    pre_scale: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes round(x * pre_scale / scale) + zero_point of a matrix, and the fp32 scale.

    Args:
        x: [M, K] fp32, bf16 or fp16; arithmetic is fp32.
        qmin: lowest code; used with a given scale only, a measured one clips nothing.
        qmax: highest code; a measured scale is the largest magnitude of the row divided by it.
        scale: one fp32 number (static); None measures one per row.
        zero_point: one int8 number, with ``scale`` only.
        pre_scale: fp32 [K] that multiplies x first.

    Returns:
        int8 [M, K]; fp32 [M, 1] measured or [1, 1] given.
    """
    if is_plain(x):
        codes, row_scale = _implementation(x).quantize_rows(_detached(x), qmin, qmax, scale, zero_point, pre_scale)
    elif is_traced_for_cuda(x):
        codes, row_scale = cuda.quantize_rows_in_torch(x.detach(), qmin, qmax, scale, zero_point, pre_scale)
    else:
        codes, row_scale = _quantize_rows(x.detach(), qmin, qmax, scale, zero_point, pre_scale)
    return codes, row_scale


# --- linear -----------------------------------------------------------------------------------------------------


def _int8_linear_now(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    qmin: int,
    qmax: int,
    input_scale: torch.Tensor | None,
    input_zero_point: torch.Tensor | None,
    pre_scale: torch.Tensor | None,
) -> torch.Tensor:
    run = _implementation(x).linear
    return cast(torch.Tensor, run(x, weight, weight_scale, bias, qmin, qmax, input_scale, input_zero_point, pre_scale))


def _int8_linear_fake(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    qmin: int,
    qmax: int,
    input_scale: torch.Tensor | None,
    input_zero_point: torch.Tensor | None,
    pre_scale: torch.Tensor | None,
) -> torch.Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


_int8_linear = operator("int8_linear", _int8_linear_now, _int8_linear_fake, flops=linear_flops)


def int8_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    qmin: int = -127,
    qmax: int = 127,
    input_scale: torch.Tensor | None = None,
    input_zero_point: torch.Tensor | None = None,
    pre_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """y [M, N] = dequantized(quantize_rows(x)) @ (weight_scale * weight).T + bias, summed exactly in int32.

    Args:
        x: [M, K] fp32, bf16 or fp16.
        weight: int8 [N, K], K-contiguous.
        weight_scale: fp32 [N, 1] or [1, 1].
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
    if weight.dtype != torch.int8 or weight.dim() != 2 or x.dim() != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(
            f"int8_linear: need x [M, K] and int8 weight [N, K], got {list(x.shape)} and "
            f"{weight.dtype} {list(weight.shape)}."
        )
    x, bias = _detached(x), None if bias is None else _detached(bias)
    if is_plain(x):
        run = _implementation(x).linear
        return cast(
            torch.Tensor, run(x, weight, weight_scale, bias, qmin, qmax, input_scale, input_zero_point, pre_scale)
        )
    if is_traced_for_cuda(x):
        codes, scale = quantize_rows(x, qmin, qmax, input_scale, input_zero_point, pre_scale)
        return int8_linear_codes(codes, scale, input_zero_point, weight, weight_scale, bias, x.dtype)
    y = _int8_linear(x, weight, weight_scale, bias, qmin, qmax, input_scale, input_zero_point, pre_scale)
    return cast(torch.Tensor, y)


def _int8_linear_codes_now(
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    run = _implementation(codes).linear_codes
    return cast(torch.Tensor, run(codes, scale, zero_point, weight, weight_scale, bias, dtype))


def _int8_linear_codes_fake(
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    return codes.new_empty((codes.shape[0], weight.shape[0]), dtype=dtype)


_int8_linear_codes = operator("int8_linear_codes", _int8_linear_codes_now, _int8_linear_codes_fake, flops=linear_flops)


def int8_linear_codes(
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """:func:`int8_linear` for an input that :func:`quantize_rows` has quantized already; result in ``dtype``."""
    bias = None if bias is None else _detached(bias)
    if is_plain(codes):
        run = _implementation(codes).linear_codes
        return cast(torch.Tensor, run(codes, scale, zero_point, weight, weight_scale, bias, dtype))
    return cast(torch.Tensor, _int8_linear_codes(codes, scale, zero_point, weight, weight_scale, bias, dtype))


def _check_depth(name: str, depth: int) -> None:
    if depth > 1 << 17:
        raise ValueError(f"{name}: K must be at most 131072 so that int32 sums cannot overflow, got {depth}.")

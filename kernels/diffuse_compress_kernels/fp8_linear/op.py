"""float8 linear layer over ``torch._scaled_mm``: e4m3fn codes, one scale per row of x and per output channel.

    x_scale[m] = max_k |x[m, k]| / 448,   y = (sum_k code(x / x_scale) * weight) * x_scale[m] * weight_scale[n] + bias

bf16 outputs take the row-wise kernel. That kernel writes bf16 only, so other dtypes multiply unscaled codes into
float32 and apply the scales afterwards. Tensor cores before Blackwell sum float8 products with about 14 bits.
"""

from __future__ import annotations

from functools import cache
from typing import cast

import torch

from diffuse_compress_kernels import triton_kernels
from diffuse_compress_kernels.int8_linear.op import is_plain, is_traced_for_cuda
from diffuse_compress_kernels.registration import linear_flops, operator

__all__ = ["fp8_linear", "fp8_linear_codes", "has_fp8_matmul", "quantize_rows_fp8"]

FLOAT8 = torch.float8_e4m3fn
FLOAT8_MAX = 448.0
MIN_SCALE = torch.finfo(torch.float32).tiny
ALIGNMENT = 16


def has_fp8_matmul(device: torch.device) -> bool:
    """True if ``torch._scaled_mm`` multiplies e4m3fn there: CUDA capability 8.9 or more, or AMD gfx950 and gfx12."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return False
    return _has_fp8_matmul(torch.cuda.current_device() if device.index is None else device.index)


@cache
def _has_fp8_matmul(index: int) -> bool:
    if torch.version.hip is not None:
        # MI300 (gfx942) multiplies e4m3fnuz, another format.
        architecture = torch.cuda.get_device_properties(index).gcnArchName
        return architecture.startswith(("gfx950", "gfx12"))
    return torch.cuda.get_device_capability(index) >= (8, 9)


def _fp8_linear_now(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    input_scale: torch.Tensor | None,
    pre_scale: torch.Tensor | None,
) -> torch.Tensor:
    return _run(x, weight, weight_scale, bias, input_scale, pre_scale)


def _fp8_linear_fake(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    input_scale: torch.Tensor | None,
    pre_scale: torch.Tensor | None,
) -> torch.Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


_fp8_linear = operator("fp8_linear", _fp8_linear_now, _fp8_linear_fake, flops=linear_flops)


def fp8_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    input_scale: torch.Tensor | None = None,
    pre_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """y [M, N] in the dtype of x; equation in the module docstring.

    Args:
        x: [M, K] bf16, fp16 or fp32, on a device with :func:`has_fp8_matmul`.
        weight: float8_e4m3fn [N, K].
        weight_scale: fp32 [N, 1] or [1, 1].
        bias: [N], any float dtype.
        input_scale: one fp32 number (static); None measures one per row.
        pre_scale: fp32 [K] that multiplies x before it is quantized.

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    if weight.dtype != FLOAT8 or weight.dim() != 2 or x.dim() != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(
            f"fp8_linear: need x [M, K] and float8_e4m3fn weight [N, K], got {list(x.shape)} and "
            f"{weight.dtype} {list(weight.shape)}."
        )
    x, bias = x.detach(), None if bias is None else bias.detach()
    # Traced for CUDA, the plain operations of _run are fused into what computes x.
    if is_plain(x) or is_traced_for_cuda(x):
        return _run(x, weight, weight_scale, bias, input_scale, pre_scale)
    return cast(torch.Tensor, _fp8_linear(x, weight, weight_scale, bias, input_scale, pre_scale))


def _run(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    input_scale: torch.Tensor | None,
    pre_scale: torch.Tensor | None,
) -> torch.Tensor:
    codes, scale = quantize_rows_fp8(x, input_scale, pre_scale)
    return fp8_linear_codes(codes, scale, weight, weight_scale, bias, x.dtype)


def fp8_linear_codes(
    codes: torch.Tensor,
    scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """:func:`fp8_linear` for an input that :func:`quantize_rows_fp8` has quantized already; result in ``dtype``."""
    rows, outputs = codes.shape[0], weight.shape[0]
    if rows == 0 or outputs == 0:
        return torch.zeros(rows, outputs, dtype=dtype, device=codes.device)
    pad_depth, pad_outputs = -codes.shape[1] % ALIGNMENT, -outputs % ALIGNMENT
    if pad_depth or pad_outputs:
        codes = _pad(codes, pad_depth, 0)
        weight = _pad(weight, pad_depth, pad_outputs)
    weight_row = weight_scale.reshape(1, -1)
    if weight_row.shape[1] != outputs:
        weight_row = weight_row.expand(1, outputs)
    if dtype == torch.bfloat16:
        if pad_outputs:
            weight_row = torch.nn.functional.pad(weight_row, (0, pad_outputs))
        y = torch._scaled_mm(
            codes,
            weight.t(),
            scale_a=scale if scale.shape[0] == rows else scale.expand(rows, 1).contiguous(),
            scale_b=weight_row.contiguous(),
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )
        if pad_outputs:
            y = y[:, :outputs]
        return y if bias is None else y + bias.to(y.dtype)
    one = torch.ones((), dtype=torch.float32, device=codes.device)
    acc = torch._scaled_mm(codes, weight.t(), scale_a=one, scale_b=one, out_dtype=torch.float32)[:, :outputs]
    y = acc * scale * weight_row
    return (y if bias is None else y + bias).to(dtype)


def quantize_rows_fp8(
    x: torch.Tensor, scale: torch.Tensor | None = None, pre_scale: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """float8_e4m3fn codes [M, K] and fp32 scale, [M, 1] measured or [1, 1] given; arguments as :func:`fp8_linear`."""
    x = x.detach()
    if is_plain(x) and triton_kernels.usable(x.device):
        run = triton_kernels.module("products").quantize_rows
        return cast(
            tuple[torch.Tensor, torch.Tensor], run(x, -int(FLOAT8_MAX), int(FLOAT8_MAX), scale, None, pre_scale)
        )
    return quantize_rows_in_torch(x, scale, pre_scale)


def quantize_rows_in_torch(
    x: torch.Tensor, scale: torch.Tensor | None, pre_scale: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [M, K] and fp32 scale, [M, 1] measured or [1, 1] given, from plain operations."""
    values = x.float() if pre_scale is None else x.float() * pre_scale
    if scale is None:
        amax = values.abs().amax(dim=1, keepdim=True) if values.shape[1] else values.new_zeros(len(values), 1)
        # By a tensor: CUDA divides by a Python number through its reciprocal, which is not the CPU's quotient.
        scale = amax.div_(torch.full_like(amax, FLOAT8_MAX)).clamp_(min=MIN_SCALE)
    scale = scale.reshape(-1, 1)
    return torch.div(values, scale).clamp_(-FLOAT8_MAX, FLOAT8_MAX).to(FLOAT8), scale


def _pad(codes: torch.Tensor, columns: int, rows: int) -> torch.Tensor:
    """Zeros on the right and below; the byte 0 is the float8 zero."""
    return torch.nn.functional.pad(codes.view(torch.uint8), (0, columns, 0, rows)).view(FLOAT8)

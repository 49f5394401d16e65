"""What makes a layer's input, fused with its quantization: the 16-bit tensor between them is never written.

    norm:        y = LayerNorm(x) or RMSNorm(x), then y * (1 + scale[b]) + shift[b] where a block modulates
    activation:  y = gelu(x), silu(x), or act(gate) * up with [gate | up] = x

y is rounded to the dtype of x wherever the separate operations would round it, then quantized as in ``rows.py``.
Sums over a row are taken in another order than torch's, so codes may differ from the separate operations' by one step.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from diffuse_compress_kernels.triton_kernels.launch import INTERPRETED, on_device_of
from diffuse_compress_kernels.triton_kernels.rows import largest_of, row_scale, store_codes, warps_for

__all__ = ["ACTIVATIONS", "MAX_COLUMNS", "act_quantize_rows", "norm_quantize_rows"]

ACTIVATIONS = ("gelu", "gelu_tanh", "silu", "geglu", "geglu_tanh", "swiglu")
MAX_COLUMNS = 16384
FLOAT8_MAX = 448


@triton.jit
def _quantize(values, codes_ptr, scale_ptr, row, k, mask, QMAX: tl.constexpr, FMA: tl.constexpr):
    """QMAX 0 writes the values themselves."""
    if QMAX == 0:
        tl.store(codes_ptr + k, values.to(codes_ptr.dtype.element_ty), mask=mask)
    else:
        scale = row_scale(largest_of(tl.where(mask, values, 0.0)), QMAX)
        tl.store(scale_ptr + row, scale)
        store_codes(codes_ptr + k, values, scale, 0.0, mask, -QMAX, QMAX, False, FMA)


@triton.jit
def norm_quantize_kernel(
    x_ptr,
    codes_ptr,
    scale_ptr,
    weight_ptr,
    bias_ptr,
    mod_scale_ptr,
    mod_shift_ptr,
    K,
    stride_xm,
    stride_cm,
    stride_mb,
    rows_per_sample,
    eps,
    RMS: tl.constexpr,
    ROUND_FIRST: tl.constexpr,
    QMAX: tl.constexpr,
    BLOCK: tl.constexpr,
    FMA: tl.constexpr,
):
    """ROUND_FIRST: the normalized row is rounded before its weight multiplies it, as RMSNorm in Llama does."""
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK)
    mask = k < K
    dtype = x_ptr.dtype.element_ty
    values = tl.load(x_ptr + row * stride_xm + k, mask=mask, other=0.0).to(tl.float32)
    if not RMS:
        mean = tl.sum(values, axis=0) / K
        values = tl.where(mask, values - mean, 0.0)
    values *= 1.0 / tl.sqrt(tl.sum(values * values, axis=0) / K + eps)
    if ROUND_FIRST:
        values = values.to(dtype).to(tl.float32)
    if weight_ptr is not None:
        values *= tl.load(weight_ptr + k, mask=mask, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        values += tl.load(bias_ptr + k, mask=mask, other=0.0).to(tl.float32)
    values = values.to(dtype).to(tl.float32)
    sample = (row // rows_per_sample) * stride_mb
    if mod_scale_ptr is not None:
        factor = tl.load(mod_scale_ptr + sample + k, mask=mask, other=0.0).to(tl.float32) + 1.0
        values = (values * factor.to(dtype).to(tl.float32)).to(dtype).to(tl.float32)
    if mod_shift_ptr is not None:
        shift = tl.load(mod_shift_ptr + sample + k, mask=mask, other=0.0).to(tl.float32)
        values = (values + shift).to(dtype).to(tl.float32)
    _quantize(values, codes_ptr + row * stride_cm, scale_ptr, row, k, mask, QMAX, FMA)


@triton.jit
def _activate(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == "gelu" or ACTIVATION == "geglu":
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh" or ACTIVATION == "geglu_tanh":
        inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        # x * (1 + tanh(inner)) / 2, without overflow for large |inner|.
        y = x / (1.0 + tl.exp(-2.0 * inner))
    else:
        y = x / (1.0 + tl.exp(-x))
    return y


@triton.jit
def act_quantize_kernel(
    x_ptr,
    codes_ptr,
    scale_ptr,
    K,
    stride_xm,
    stride_cm,
    ACTIVATION: tl.constexpr,
    GATE_FIRST: tl.constexpr,
    QMAX: tl.constexpr,
    BLOCK: tl.constexpr,
    FMA: tl.constexpr,
):
    """With a gate, x has 2 * K columns: gate and up, or up and gate."""
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK)
    mask = k < K
    dtype = x_ptr.dtype.element_ty
    x_ptr += row * stride_xm
    GATED: tl.constexpr = ACTIVATION == "geglu" or ACTIVATION == "geglu_tanh" or ACTIVATION == "swiglu"
    gate_ptr = x_ptr
    if GATED:
        if not GATE_FIRST:
            gate_ptr = x_ptr + K
    values = _activate(tl.load(gate_ptr + k, mask=mask, other=0.0).to(tl.float32), ACTIVATION)
    values = values.to(dtype).to(tl.float32)
    if GATED:
        up_ptr = x_ptr + K if GATE_FIRST else x_ptr
        values *= tl.load(up_ptr + k, mask=mask, other=0.0).to(tl.float32)
        values = values.to(dtype).to(tl.float32)
    _quantize(values, codes_ptr + row * stride_cm, scale_ptr, row, k, mask, QMAX, FMA)


def _outputs(x: torch.Tensor, columns: int, qmax: int) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = {0: x.dtype, FLOAT8_MAX: torch.float8_e4m3fn}.get(qmax, torch.int8)
    codes = torch.empty(x.shape[0], columns, dtype=dtype, device=x.device)
    return codes, torch.empty(x.shape[0], 1, dtype=torch.float32, device=x.device)


def norm_quantize_rows(
    x: torch.Tensor,
    qmax: int,
    eps: float,
    *,
    rms: bool = False,
    round_first: bool = False,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    mod_scale: torch.Tensor | None = None,
    mod_shift: torch.Tensor | None = None,
    fma: bool = not INTERPRETED,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [M, K] and scale [M, 1] of the normalized, modulated rows of x [M, K].

    Args:
        x: bf16, fp16 or fp32, contiguous rows of at most ``MAX_COLUMNS``.
        qmax: 127, 7, or 448 for float8_e4m3fn codes; 0 returns the rows in the dtype of x, and no scale.
        eps: added to the variance.
        rms: RMSNorm instead of LayerNorm.
        round_first: round before ``weight`` multiplies.
        weight: [K].
        bias: [K].
        mod_scale: [B, K], equal strides with ``mod_shift``; M / B consecutive rows share a row of it.
        mod_shift: [B, K].
        fma: as in ``quantize_rows``.
    """
    rows, columns = x.shape
    codes, scale = _outputs(x, columns, qmax)
    if rows == 0:
        return codes, scale
    modulation = mod_scale if mod_scale is not None else mod_shift
    block = triton.next_power_of_2(columns)
    with on_device_of(x):
        norm_quantize_kernel[(rows,)](
            x,
            codes,
            scale,
            weight,
            bias,
            mod_scale,
            mod_shift,
            columns,
            x.stride(0),
            codes.stride(0),
            0 if modulation is None else modulation.stride(0),
            rows if modulation is None else rows // modulation.shape[0],
            eps,
            RMS=rms,
            ROUND_FIRST=round_first,
            QMAX=qmax,
            BLOCK=block,
            FMA=fma,
            num_warps=warps_for(block),
            enable_fp_fusion=False,
        )
    return codes, scale


def act_quantize_rows(
    x: torch.Tensor, qmax: int, activation: str, *, gate_first: bool = True, fma: bool = not INTERPRETED
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [M, K] and scale [M, 1] of activated rows: x is [M, K], or [M, 2 * K] for the gated activations.

    Args:
        x: bf16, fp16 or fp32, contiguous rows.
        qmax: 127, 7, or 448 for float8_e4m3fn codes; 0 returns the rows in the dtype of x, and no scale.
        activation: one of ``ACTIVATIONS``.
        gate_first: x is [gate | up] (Llama); False: [up | gate] (diffusers' GEGLU).
        fma: as in ``quantize_rows``.
    """
    gated = activation in ("geglu", "geglu_tanh", "swiglu")
    columns = x.shape[1] // 2 if gated else x.shape[1]
    codes, scale = _outputs(x, columns, qmax)
    if x.shape[0] == 0:
        return codes, scale
    block = triton.next_power_of_2(columns)
    with on_device_of(x):
        act_quantize_kernel[(x.shape[0],)](
            x,
            codes,
            scale,
            columns,
            x.stride(0),
            codes.stride(0),
            ACTIVATION=activation,
            GATE_FIRST=gate_first,
            QMAX=qmax,
            BLOCK=block,
            FMA=fma,
            num_warps=warps_for(block),
            enable_fp_fusion=False,
        )
    return codes, scale

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
from diffuse_compress_kernels.triton_kernels.rows import largest_of, row_blocks, row_scale, store_codes, warps_for

__all__ = ["ACTIVATIONS", "MAX_COLUMNS", "act_quantize_rows", "norm_quantize_rows"]

ACTIVATIONS = ("gelu", "gelu_tanh", "silu", "geglu", "geglu_tanh", "swiglu")
MAX_COLUMNS = 16384
FLOAT8_MAX = 448
# Rows that one program normalizes, where there are enough to fill a device so.
ROWS_TOGETHER = 4
MANY_ROWS = 4096


@triton.jit
def _load(ptr, k, mask):
    return tl.load(ptr + k, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _finish(
    values, weight_ptr, bias_ptr, mod_scale_ptr, mod_shift_ptr, k, mask, dtype: tl.constexpr, ROUND_FIRST: tl.constexpr
):
    """Weight, bias and modulation of normalized values, rounded to ``dtype`` after each, as separate operations do."""
    if ROUND_FIRST:
        values = values.to(dtype).to(tl.float32)
    if weight_ptr is not None:
        values *= _load(weight_ptr, k, mask)
    if bias_ptr is not None:
        values += _load(bias_ptr, k, mask)
    values = values.to(dtype).to(tl.float32)
    if mod_scale_ptr is not None:
        factor = (_load(mod_scale_ptr, k, mask) + 1.0).to(dtype).to(tl.float32)
        values = (values * factor).to(dtype).to(tl.float32)
    if mod_shift_ptr is not None:
        values = (values + _load(mod_shift_ptr, k, mask)).to(dtype).to(tl.float32)
    return tl.where(mask, values, 0.0)


@triton.jit
def _store(values, places, scale, mask, QMAX: tl.constexpr, FMA: tl.constexpr):
    """Codes, or with QMAX 0 the values themselves."""
    if QMAX == 0:
        tl.store(places, values.to(places.dtype.element_ty), mask=mask)
    else:
        store_codes(places, values, scale, 0.0, mask, -QMAX, QMAX, False, FMA)


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
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    ROWS: tl.constexpr,
    FMA: tl.constexpr,
):
    """ROWS rows of one sample, one after the other: weights and modulation are read once for them.

    ROUND_FIRST: the normalized row is rounded before its weight multiplies it, as RMSNorm in Llama does.
    """
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    first_row = tl.program_id(0).to(tl.int64) * ROWS
    sample = (first_row // rows_per_sample) * stride_mb
    if mod_scale_ptr is not None:
        mod_scale_ptr += sample
    if mod_shift_ptr is not None:
        mod_shift_ptr += sample
    k = tl.arange(0, FIRST)
    mask = k < K
    if SECOND > 0:
        k_rest = FIRST + tl.arange(0, SECOND)
        mask_rest = k_rest < K
    for row in tl.range(first_row, first_row + ROWS):
        values = _load(x_ptr + row * stride_xm, k, mask)
        total = tl.sum(values, axis=0)
        if SECOND > 0:
            rest = _load(x_ptr + row * stride_xm, k_rest, mask_rest)
            total += tl.sum(rest, axis=0)
        if not RMS:
            values = tl.where(mask, values - total / K, 0.0)
            if SECOND > 0:
                rest = tl.where(mask_rest, rest - total / K, 0.0)
        squares = tl.sum(values * values, axis=0)
        if SECOND > 0:
            squares += tl.sum(rest * rest, axis=0)
        inverse = 1.0 / tl.sqrt(squares / K + eps)
        values = _finish(
            values * inverse, weight_ptr, bias_ptr, mod_scale_ptr, mod_shift_ptr, k, mask, dtype, ROUND_FIRST
        )
        largest = largest_of(values)
        if SECOND > 0:
            rest = _finish(
                rest * inverse,
                weight_ptr,
                bias_ptr,
                mod_scale_ptr,
                mod_shift_ptr,
                k_rest,
                mask_rest,
                dtype,
                ROUND_FIRST,
            )
            largest = tl.maximum(largest, largest_of(rest))
        scale = 1.0
        if QMAX > 0:
            scale = row_scale(largest, QMAX)
            tl.store(scale_ptr + row, scale)
        _store(values, codes_ptr + row * stride_cm + k, scale, mask, QMAX, FMA)
        if SECOND > 0:
            _store(rest, codes_ptr + row * stride_cm + k_rest, scale, mask_rest, QMAX, FMA)


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
    values = tl.where(mask, values, 0.0)
    scale = 1.0
    if QMAX > 0:
        scale = row_scale(largest_of(values), QMAX)
        tl.store(scale_ptr + row, scale)
    _store(values, codes_ptr + row * stride_cm + k, scale, mask, QMAX, FMA)


def _outputs(x: torch.Tensor, columns: int, qmax: int) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = {0: x.dtype, FLOAT8_MAX: torch.float8_e4m3fn}.get(qmax, torch.int8)
    codes = torch.empty(x.shape[0], columns, dtype=dtype, device=x.device)
    return codes, torch.empty(x.shape[0], 1, dtype=torch.float32, device=x.device)


def _division(x: torch.Tensor, modulation: torch.Tensor | None, two_blocks: bool) -> tuple[int, int, int, int]:
    """(first and second block of a row, rows of a program, rows of a sample)."""
    rows, columns = x.shape
    per_sample = rows if modulation is None else rows // modulation.shape[0]
    first, second, _ = row_blocks(columns) if two_blocks else (triton.next_power_of_2(columns), 0, True)
    together = ROWS_TOGETHER if per_sample % ROWS_TOGETHER == 0 and rows >= MANY_ROWS else 1
    return first, second, together, per_sample


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
    two_blocks: bool = True,
    fma: bool = not INTERPRETED,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [M, K] and scale [M, 1] of the normalized, modulated rows of x.

    Args:
        x: any float dtype, contiguous rows of at most ``MAX_COLUMNS``.
        qmax: 127, 7, or 448 for float8_e4m3fn codes; 0 returns the rows in the dtype of x, and no scale.
        eps: added to the variance.
        rms: RMSNorm instead of LayerNorm.
        round_first: round before ``weight`` multiplies.
        weight: [K].
        bias: [K].
        mod_scale: [B, K], strides as ``mod_shift``, [B, K]; M / B consecutive rows share a row of both.
        mod_shift: see there.
        two_blocks: hold a row as two blocks, with fewer idle lanes and more reductions than one.
        fma: as in ``quantize_rows``.
    """
    rows, columns = x.shape
    codes, scale = _outputs(x, columns, qmax)
    if rows == 0:
        return codes, scale
    modulation = mod_scale if mod_scale is not None else mod_shift
    first, second, together, per_sample = _division(x, modulation, two_blocks)
    with on_device_of(x):
        norm_quantize_kernel[(rows // together,)](
            *(x, codes, scale, weight, bias, mod_scale, mod_shift),
            columns,
            x.stride(0),
            codes.stride(0),
            modulation.stride(0) if modulation is not None else 0,
            per_sample,
            eps,
            RMS=rms,
            ROUND_FIRST=round_first,
            QMAX=qmax,
            FIRST=first,
            SECOND=second,
            ROWS=together,
            FMA=fma,
            num_warps=warps_for(first),
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

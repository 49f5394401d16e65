"""What stands before a quantized product, with the quantization of its rows in the same launch: one program per row.

    norm:        v = norm(x) [* weight + bias] [* (1 + scale[sample]) + shift[sample]]
    activation:  v = act(x) [* other]
    then         s[m] = max_k |v[m, k] * pre[k]| / qmax        q[m, k] = round(v[m, k] * pre[k] / s[m])

Arithmetic is fp32 and follows the order of the stock operations; where those write their result in 16 bits, it is
rounded to 16 bits here too, so that the codes are those of the stock computation. Not bit for bit: a mean is summed in
another order, and a function of the device's library may differ in its last bit.

A row is held in two blocks of a power of two, the second as small as it can be: 1152 columns are 1024 and 128, where
one block would leave 900 of its 2048 places empty.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from diffuse_compress_kernels.triton_kernels.divide import largest_magnitude, quotient
from diffuse_compress_kernels.triton_kernels.rows import row_scale
from diffuse_compress_kernels.triton_kernels.start import INTERPRETED, variant

__all__ = ["MAX_COLUMNS", "Quantization", "activation_kernel", "activation_rows", "norm_kernel", "norm_rows"]

FLOAT8_MAX = 448
MAX_COLUMNS = 32768
# 1.5 * 2**23: adding it to |v| <= 2**22 rounds v half to even and leaves the integer in the low bits of the float.
ROUNDING_MAGIC = tl.constexpr(12582912.0)
LOG2_E = tl.constexpr(1.4426950408889634)
SQRT_HALF = tl.constexpr(0.7071067811865476)
# sqrt(2 / pi) as torch multiplies it together.
GELU_BETA = tl.constexpr(0.7978845608028654)
GELU_KAPPA = tl.constexpr(0.044715)


@triton.jit
def _rounded(values, DTYPE: tl.constexpr):
    """fp32 ``values`` rounded to DTYPE, for the interpreter, which truncates where bf16 should be rounded."""
    if DTYPE == tl.bfloat16:
        bits = values.to(tl.int32, bitcast=True)
        values = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
    else:
        values = values.to(DTYPE).to(tl.float32)
    return values


@triton.jit
def _settled(values, DTYPE: tl.constexpr, COMPILED: tl.constexpr):
    """The result of an operation that writes DTYPE: in DTYPE, or, interpreted, as fp32 of the same value.

    16-bit operands are multiplied and added in 16 bits: fp32 has more than twice their digits, so rounding its result
    gives the same number, and two of them take one instruction.
    """
    return values.to(DTYPE) if COMPILED else _rounded(values, DTYPE)


@triton.jit
def _operand(values, DTYPE: tl.constexpr, COMPILED: tl.constexpr):
    """What was loaded as DTYPE, for such operations."""
    return values.to(DTYPE) if COMPILED else values.to(tl.float32)


@triton.jit
def _normed(
    centred, factor, k, mask, weight_ptr, bias_ptr, RMS: tl.constexpr, WORK: tl.constexpr, COMPILED: tl.constexpr
):  # fmt: skip
    """In WORK."""
    values = centred * factor
    if RMS:
        values = _settled(values, WORK, COMPILED)
        if weight_ptr is not None:
            values = _settled(values * _operand(tl.load(weight_ptr + k, mask=mask), WORK, COMPILED), WORK, COMPILED)
    else:
        if weight_ptr is not None:
            values *= tl.load(weight_ptr + k, mask=mask).to(tl.float32)
        if bias_ptr is not None:
            values += tl.load(bias_ptr + k, mask=mask).to(tl.float32)
        values = _settled(values, WORK, COMPILED)
    return values


@triton.jit
def _modulated(values, k, mask, scale_ptr, shift_ptr, WORK: tl.constexpr, COMPILED: tl.constexpr):
    """In WORK."""
    if scale_ptr is not None:
        factor = _settled(_operand(tl.load(scale_ptr + k, mask=mask), WORK, COMPILED) + 1.0, WORK, COMPILED)
        values = _settled(values * factor, WORK, COMPILED)
    if shift_ptr is not None:
        values = _settled(values + _operand(tl.load(shift_ptr + k, mask=mask), WORK, COMPILED), WORK, COMPILED)
    return values


@triton.jit
def _kept(values, k, mask, kept_ptr, pre_ptr, OUT: tl.constexpr, COMPILED: tl.constexpr):
    """fp32 of what the stock computation hands on, times the smoothing scale; 0 where the mask is."""
    values = _settled(values, OUT, COMPILED)
    if kept_ptr is not None:
        tl.store(kept_ptr + k, values.to(OUT), mask=mask)
    values = values.to(tl.float32)
    if pre_ptr is not None:
        values *= tl.load(pre_ptr + k, mask=mask)
    if mask is not None:
        values = tl.where(mask, values, 0.0)
    return values


@triton.jit
def _store_codes(
    places, values, scale, zero, mask, QMIN: tl.constexpr, QMAX: tl.constexpr, GIVEN: tl.constexpr,
    COMPILED: tl.constexpr,
):  # fmt: skip
    """Codes of fp32 ``values``; float8 if QMAX is 448. GIVEN: the scale was not measured, so they clip."""
    if GIVEN:
        # Beyond this bound every code is a limit of their range; within it the division's corrections do not overflow.
        bound = scale * 1048576.0
        values = tl.clamp(values, -bound, bound)
    steps = quotient(values, scale, COMPILED)
    if QMAX == 448:
        codes = tl.clamp(steps, -448.0, 448.0).to(tl.float8e4nv)
    else:
        if GIVEN:
            steps = (steps + ROUNDING_MAGIC) - ROUNDING_MAGIC
            steps = tl.clamp(steps + zero, QMIN, QMAX)
        codes = (steps + ROUNDING_MAGIC).to(tl.int32, bitcast=True).to(tl.int8)
    tl.store(places, codes, mask=mask)


@triton.jit
def _write_codes(
    row, head, head_k, tail, tail_k, tail_mask, codes_ptr, scale_out_ptr, given_ptr, zero_ptr,
    QMIN: tl.constexpr, QMAX: tl.constexpr, TAIL: tl.constexpr, COMPILED: tl.constexpr,
):  # fmt: skip
    """Scale and codes of a row in two blocks."""
    zero = 0.0
    if zero_ptr is not None:
        zero = tl.load(zero_ptr).to(tl.float32)
    if given_ptr is None:
        largest = largest_magnitude(head)
        if TAIL > 0:
            largest = tl.maximum(largest, largest_magnitude(tail))
        scale = row_scale(largest, QMAX)
        tl.store(scale_out_ptr + row, scale)
    else:
        scale = tl.load(given_ptr)
    GIVEN: tl.constexpr = given_ptr is not None
    _store_codes(codes_ptr + head_k, head, scale, zero, None, QMIN, QMAX, GIVEN, COMPILED)
    if TAIL > 0:
        _store_codes(codes_ptr + tail_k, tail, scale, zero, tail_mask, QMIN, QMAX, GIVEN, COMPILED)


@triton.jit(do_not_specialize=["tokens"])
def norm_kernel(
    x_ptr, weight_ptr, bias_ptr, scale_ptr, shift_ptr, kept_ptr, codes_ptr, scale_out_ptr, given_ptr, zero_ptr,
    pre_ptr, K, eps, tokens, stride_xm, stride_scale, stride_shift,
    RMS: tl.constexpr, WORK: tl.constexpr, OUT: tl.constexpr, QMIN: tl.constexpr, QMAX: tl.constexpr,
    HEAD: tl.constexpr, TAIL: tl.constexpr, EXACT: tl.constexpr, COMPILED: tl.constexpr,
):  # fmt: skip
    """WORK: dtype of the norm's and the modulation's results; OUT: of what the product would be given.

    The row is HEAD columns and the rest, up to TAIL of them, or as many if EXACT.
    """
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * stride_xm
    codes_ptr += row * K
    if kept_ptr is not None:
        kept_ptr += row * K
    sample = row // tokens
    if scale_ptr is not None:
        scale_ptr += sample * stride_scale
    if shift_ptr is not None:
        shift_ptr += sample * stride_shift
    head_k = tl.arange(0, HEAD)
    head = tl.load(x_ptr + head_k).to(tl.float32)
    tail, tail_k, tail_mask = head, head_k, None
    if TAIL > 0:
        tail_k = HEAD + tl.arange(0, TAIL)
        if not EXACT:
            tail_mask = tail_k < K
        tail = tl.load(x_ptr + tail_k, mask=tail_mask, other=None if EXACT else 0.0).to(tl.float32)
    if not RMS:
        total = tl.sum(head, axis=0)
        if TAIL > 0:
            total += tl.sum(tail, axis=0)
        mean = total / K
        head -= mean
        if TAIL > 0:
            tail -= mean
            if not EXACT:
                tail = tl.where(tail_mask, tail, 0.0)
    square = tl.sum(head * head, axis=0)
    if TAIL > 0:
        square += tl.sum(tail * tail, axis=0)
    factor = tl.rsqrt(square / K + eps)
    head = _normed(head, factor, head_k, None, weight_ptr, bias_ptr, RMS, WORK, COMPILED)
    head = _modulated(head, head_k, None, scale_ptr, shift_ptr, WORK, COMPILED)
    head = _kept(head, head_k, None, kept_ptr, pre_ptr, OUT, COMPILED)
    if TAIL > 0:
        tail = _normed(tail, factor, tail_k, tail_mask, weight_ptr, bias_ptr, RMS, WORK, COMPILED)
        tail = _modulated(tail, tail_k, tail_mask, scale_ptr, shift_ptr, WORK, COMPILED)
        tail = _kept(tail, tail_k, tail_mask, kept_ptr, pre_ptr, OUT, COMPILED)
    _write_codes(
        row, head, head_k, tail, tail_k, tail_mask, codes_ptr, scale_out_ptr, given_ptr, zero_ptr,
        QMIN, QMAX, TAIL, COMPILED,
    )  # fmt: skip


@triton.jit
def _logistic(x, COMPILED: tl.constexpr):
    """1 / (1 + exp(-x)), by the hardware's approximations, which are good to about 22 bits."""
    if COMPILED:
        result = tl.inline_asm_elementwise(
            """{
            .reg .f32 t;
            ex2.approx.ftz.f32 t, $1;
            add.f32 t, t, 0f3F800000;
            rcp.approx.ftz.f32 $0, t;
            }""",
            "=f,f", [x * -LOG2_E], dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        result = 1.0 / (1.0 + tl.exp(-x))
    return result


@triton.jit
def _activated(x, KIND: tl.constexpr, COMPILED: tl.constexpr):
    """GELU, its tanh form, or SiLU of fp32 x, in torch's order of operations."""
    if KIND == "gelu":
        result = x * 0.5 * (1.0 + tl.erf(x * SQRT_HALF))
    elif KIND == "gelu_tanh":
        inner = GELU_BETA * (x + GELU_KAPPA * (x * x * x))
        # (1 + tanh(u)) / 2 is the logistic function of 2 u; no library call, and no cancellation for negative u.
        result = x * _logistic(2.0 * inner, COMPILED)
    else:
        result = x * _logistic(x, COMPILED)
    return result


@triton.jit
def _product(x_ptr, other_ptr, k, mask, KIND: tl.constexpr, OUT: tl.constexpr, COMPILED: tl.constexpr):
    """In OUT."""
    values = _settled(_activated(tl.load(x_ptr + k, mask=mask).to(tl.float32), KIND, COMPILED), OUT, COMPILED)
    if other_ptr is not None:
        values = _settled(values * _operand(tl.load(other_ptr + k, mask=mask), OUT, COMPILED), OUT, COMPILED)
    return values


@triton.jit
def activation_kernel(
    x_ptr, other_ptr, kept_ptr, codes_ptr, scale_out_ptr, given_ptr, zero_ptr, pre_ptr,
    K, stride_xm, stride_om, KIND: tl.constexpr, OUT: tl.constexpr, QMIN: tl.constexpr, QMAX: tl.constexpr,
    HEAD: tl.constexpr, TAIL: tl.constexpr, EXACT: tl.constexpr, COMPILED: tl.constexpr,
):  # fmt: skip
    """KIND: "gelu", "gelu_tanh" or "silu"; OUT: dtype of x and of the result."""
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * stride_xm
    codes_ptr += row * K
    if other_ptr is not None:
        other_ptr += row * stride_om
    if kept_ptr is not None:
        kept_ptr += row * K
    head_k = tl.arange(0, HEAD)
    head = _product(x_ptr, other_ptr, head_k, None, KIND, OUT, COMPILED)
    head = _kept(head, head_k, None, kept_ptr, pre_ptr, OUT, COMPILED)
    tail, tail_k, tail_mask = head, head_k, None
    if TAIL > 0:
        tail_k = HEAD + tl.arange(0, TAIL)
        if not EXACT:
            tail_mask = tail_k < K
        tail = _product(x_ptr, other_ptr, tail_k, tail_mask, KIND, OUT, COMPILED)
        tail = _kept(tail, tail_k, tail_mask, kept_ptr, pre_ptr, OUT, COMPILED)
    _write_codes(
        row, head, head_k, tail, tail_k, tail_mask, codes_ptr, scale_out_ptr, given_ptr, zero_ptr,
        QMIN, QMAX, TAIL, COMPILED,
    )  # fmt: skip


@dataclass(frozen=True)
class Quantization:
    """How the rows that a producer makes are quantized.

    Attributes:
        qmin: lowest code, used with a given scale.
        qmax: highest code: 127, 7, or 448 for float8_e4m3fn codes.
        scale: one fp32 number; None measures one per row.
        zero_point: one int8 number, with ``scale`` only.
        pre_scale: fp32 [K] that multiplies the rows before they are quantized.
        keep: return the rows before quantization too.
    """

    qmin: int = -127
    qmax: int = 127
    scale: torch.Tensor | None = None
    zero_point: torch.Tensor | None = None
    pre_scale: torch.Tensor | None = None
    keep: bool = False


def blocks_for(columns: int) -> tuple[int, int]:
    """(head, tail): powers of two that hold a row; no tail if the head holds it."""
    head = 1 << (columns.bit_length() - 1)
    rest = columns - head
    return head, triton.next_power_of_2(rest) if rest else 0


def warps_for(columns: int) -> int:
    """Warps of a program that holds a row: 24 to 48 elements per thread were the fastest on an H200."""
    return max(1, min(16, triton.next_power_of_2(columns // 1536)))


_TRITON = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def _outputs(
    rows: int, columns: int, x: torch.Tensor, how: Quantization
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """(codes, scale, kept rows or None), not written yet."""
    dtype = torch.float8_e4m3fn if how.qmax == FLOAT8_MAX else torch.int8
    codes = torch.empty(rows, columns, dtype=dtype, device=x.device)
    if how.scale is None:
        scale = torch.empty(rows, 1, dtype=torch.float32, device=x.device)
    else:
        scale = how.scale.reshape(1, 1)
    return codes, scale, torch.empty(rows, columns, dtype=x.dtype, device=x.device) if how.keep else None


def norm_rows(
    x: torch.Tensor,
    how: Quantization,
    *,
    rms: bool,
    eps: float,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    work_dtype: torch.dtype | None = None,
    num_warps: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """(codes [M, K], scale [M, 1] or [1, 1], rows [M, K] or None) of normalised and modulated rows.

    Args:
        x: [M, K] fp32, bf16 or fp16, K-contiguous.
        how: quantization.
        rms: RMSNorm, whose result is rounded before the weight; else LayerNorm.
        eps: added to the variance.
        weight: [K].
        bias: [K].
        scale: [S, K] where S divides M: M / S consecutive rows share one of its rows.
        shift: as ``scale``.
        work_dtype: of norm and modulation; default that of x. float32 rounds once, at the end.
        num_warps: default by K.
    """
    rows, columns = x.shape
    codes, row_scale, kept = _outputs(rows, columns, x, how)
    if codes.numel() == 0:
        return codes, row_scale, kept
    head, tail = blocks_for(columns)
    samples = next((part.shape[0] for part in (scale, shift) if part is not None), 1)
    chosen = variant(
        norm_kernel, RMS=rms, WORK=_TRITON[work_dtype or x.dtype], OUT=_TRITON[x.dtype], QMIN=how.qmin, QMAX=how.qmax,
        HEAD=head, TAIL=tail, EXACT=head + tail == columns, COMPILED=not INTERPRETED,
        num_warps=num_warps or warps_for(columns), enable_fp_fusion=False,
    )  # fmt: skip
    chosen.start(
        x.device, (rows, 1, 1),
        (x, weight, bias, scale, shift, kept, codes, row_scale, how.scale, how.zero_point, how.pre_scale),
        (columns, float(eps), rows // samples, x.stride(0),
         0 if scale is None else scale.stride(0), 0 if shift is None else shift.stride(0)),
    )  # fmt: skip
    return codes, row_scale, kept


def activation_rows(
    x: torch.Tensor,
    how: Quantization,
    *,
    kind: str,
    other: torch.Tensor | None = None,
    num_warps: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """(codes [M, K], scale [M, 1] or [1, 1], rows [M, K] or None) of ``act(x)``, or of ``act(x) * other``.

    Args:
        x: [M, K] fp32, bf16 or fp16, K-contiguous; half of the columns of a wider tensor is welcome.
        how: quantization.
        kind: "gelu", "gelu_tanh" or "silu".
        other: as x.
        num_warps: default by K.
    """
    rows, columns = x.shape
    codes, row_scale, kept = _outputs(rows, columns, x, how)
    if codes.numel() == 0:
        return codes, row_scale, kept
    head, tail = blocks_for(columns)
    chosen = variant(
        activation_kernel, KIND=kind, OUT=_TRITON[x.dtype], QMIN=how.qmin, QMAX=how.qmax,
        HEAD=head, TAIL=tail, EXACT=head + tail == columns, COMPILED=not INTERPRETED,
        num_warps=num_warps or warps_for(columns), enable_fp_fusion=False,
    )  # fmt: skip
    chosen.start(
        x.device, (rows, 1, 1), (x, other, kept, codes, row_scale, how.scale, how.zero_point, how.pre_scale),
        (columns, x.stride(0), 0 if other is None else other.stride(0)),
    )  # fmt: skip
    return codes, row_scale, kept

"""Torch operators of the producers: what stands before a quantized product, with the quantization of its rows.

    norm:        v = norm(x) [* weight + bias] [* (1 + scale) + shift]
    activation:  v = act(x) [* other]
    then         s[m] = max_k |v[m, k] * pre[k]| / qmax        codes = round(v * pre / s)

One launch reads x once and writes a byte per element. Values are rounded where the stock operations write theirs. On
the CPU, and on GPUs without triton, the stock operations run one after the other.
"""

from __future__ import annotations

from typing import Any, cast

import torch

from diffuse_compress_kernels import triton_kernels
from diffuse_compress_kernels._ops import add_op_namespace_prefix
from diffuse_compress_kernels.fp8_linear.op import FLOAT8_MAX
from diffuse_compress_kernels.int8_linear.op import contiguous_rows, is_plain
from diffuse_compress_kernels.producers import stock

__all__ = ["activation_quantize", "norm_quantize"]

ACTIVATIONS = ("gelu", "gelu_tanh", "silu")
MAX_COLUMNS = 32768
LEAST_FLOAT8_CAPABILITY = (8, 9)

Rows = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]
_Outputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def _kernels(x: torch.Tensor, qmax: int) -> Any:
    """The module of the fused kernels, or None where they cannot run."""
    if x.shape[1] > MAX_COLUMNS or not triton_kernels.usable(x.device):
        return None
    if qmax == FLOAT8_MAX and triton_kernels.capability(x.device) < LEAST_FLOAT8_CAPABILITY:
        return None
    return triton_kernels.module("fused_rows")


def _empty(x: torch.Tensor, qmax: int, scale: torch.Tensor | None, keep: bool) -> _Outputs:
    codes = x.new_empty(x.shape, dtype=torch.float8_e4m3fn if qmax == FLOAT8_MAX else torch.int8)
    row_scale = x.new_empty((x.shape[0] if scale is None else 1, 1), dtype=torch.float32)
    return codes, row_scale, x.new_empty(x.shape if keep else (0, x.shape[1]))


def _owned(rows: Rows, x: torch.Tensor, given: torch.Tensor | None) -> _Outputs:
    """An operator returns tensors only, and none of its inputs."""
    codes, scale, kept = rows
    return codes, scale if given is None else scale.clone(), x.new_empty(0, x.shape[1]) if kept is None else kept


# --- norms ------------------------------------------------------------------------------------------------------


def _norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    rms: bool,
    eps: float,
    work_dtype: torch.dtype,
    qmin: int,
    qmax: int,
    input_scale: torch.Tensor | None,
    zero_point: torch.Tensor | None,
    pre_scale: torch.Tensor | None,
    keep: bool,
) -> Rows:
    kernels = _kernels(x, qmax)
    if kernels is not None:
        how = kernels.Quantization(qmin, qmax, input_scale, zero_point, pre_scale, keep)
        vectors = [None if part is None else contiguous_rows(part) for part in (weight, bias, scale, shift)]
        options = dict(zip(("weight", "bias", "scale", "shift"), vectors, strict=True), rms=rms, eps=eps)
        return cast(Rows, kernels.norm_rows(contiguous_rows(x), how, work_dtype=work_dtype, **options))
    rows = stock.normed(x, weight, bias, scale, shift, rms, eps, work_dtype)
    codes, row_scale = stock.quantized(rows, qmin, qmax, input_scale, zero_point, pre_scale)
    return codes, row_scale, rows if keep else None


@torch.library.custom_op(add_op_namespace_prefix("norm_quantize"), mutates_args=())
def _norm_quantize(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    rms: bool,
    eps: float,
    work_dtype: torch.dtype,
    qmin: int,
    qmax: int,
    input_scale: torch.Tensor | None,
    zero_point: torch.Tensor | None,
    pre_scale: torch.Tensor | None,
    keep: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    vectors = (weight, bias, scale, shift)
    rows = _norm(x, *vectors, rms, eps, work_dtype, qmin, qmax, input_scale, zero_point, pre_scale, keep)
    return _owned(rows, x, input_scale)


@_norm_quantize.register_fake
def _(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    rms: bool,
    eps: float,
    work_dtype: torch.dtype,
    qmin: int,
    qmax: int,
    input_scale: torch.Tensor | None,
    zero_point: torch.Tensor | None,
    pre_scale: torch.Tensor | None,
    keep: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return _empty(x, qmax, input_scale, keep)


def norm_quantize(
    x: torch.Tensor,
    *,
    rms: bool = False,
    eps: float = 1e-5,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    work_dtype: torch.dtype | None = None,
    qmin: int = -127,
    qmax: int = 127,
    input_scale: torch.Tensor | None = None,
    zero_point: torch.Tensor | None = None,
    pre_scale: torch.Tensor | None = None,
    keep: bool = False,
) -> Rows:
    """(codes [M, K], scale, rows) of normalised and modulated rows; equation in the module docstring.

    Args:
        x: [M, K] fp32, bf16 or fp16.
        rms: RMSNorm, rounded to ``work_dtype`` before the weight as in Llama and diffusers; else LayerNorm.
        eps: added to the variance.
        weight: [K].
        bias: [K], LayerNorm only.
        scale: [S, K] in ``work_dtype``, where S divides M: M / S consecutive rows share a row of it.
        shift: as ``scale``.
        work_dtype: of norm and modulation, as the model computes them: that of x (default), or float32 where the
            model converts x first and the result back.
        qmin: lowest code, used with a given scale.
        qmax: highest code: 127, 7, or 448 for float8_e4m3fn codes.
        input_scale: one fp32 number (static); None measures one per row.
        zero_point: one int8 number, with ``input_scale`` only.
        pre_scale: fp32 [K] that multiplies the rows before they are quantized.
        keep: return the rows before quantization too, in the dtype of x.

    Returns:
        int8 or float8_e4m3fn [M, K]; fp32 [M, 1] measured or [1, 1] given; [M, K], or None without ``keep``.

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    work_dtype = work_dtype or x.dtype
    _check_norm(x, scale, shift, work_dtype)
    if rms and (bias is not None or (weight is not None and work_dtype not in (torch.float32, weight.dtype))):
        raise ValueError(
            f"norm_quantize: RMSNorm takes no bias and a weight in {work_dtype}, got "
            f"{None if weight is None else weight.dtype} and {'no bias' if bias is None else 'a bias'}."
        )
    arguments = (weight, bias, scale, shift, rms, eps, work_dtype, qmin, qmax, input_scale, zero_point, pre_scale, keep)
    if is_plain(x) and not torch.is_grad_enabled():
        return _norm(x, *arguments)
    codes, row_scale, rows = _norm_quantize(x, *arguments)
    return codes, row_scale, rows if keep else None


def _check_norm(
    x: torch.Tensor,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    work_dtype: torch.dtype,
) -> None:
    if x.dim() != 2 or work_dtype not in (x.dtype, torch.float32):
        raise ValueError(
            f"norm_quantize: need x [M, K] and work_dtype that of x or float32, got {x.dtype} {list(x.shape)} and "
            f"{work_dtype}."
        )
    for name, part in (("scale", scale), ("shift", shift)):
        if part is None:
            continue
        fits = part.dim() == 2 and part.shape[1] == x.shape[1] and part.shape[0] > 0
        if not fits or x.shape[0] % part.shape[0] or part.dtype != work_dtype:
            raise ValueError(
                f"norm_quantize: need {name} [S, {x.shape[1]}] in {work_dtype} where S divides {x.shape[0]}, got "
                f"{part.dtype} {list(part.shape)}."
            )
    if scale is not None and shift is not None and scale.shape != shift.shape:
        raise ValueError(
            f"norm_quantize: need scale and shift of one shape, got {list(scale.shape)} and {list(shift.shape)}."
        )


# --- activations ------------------------------------------------------------------------------------------------


def _activation(
    x: torch.Tensor,
    other: torch.Tensor | None,
    kind: str,
    qmin: int,
    qmax: int,
    input_scale: torch.Tensor | None,
    zero_point: torch.Tensor | None,
    pre_scale: torch.Tensor | None,
    keep: bool,
) -> Rows:
    kernels = _kernels(x, qmax)
    if kernels is not None:
        how = kernels.Quantization(qmin, qmax, input_scale, zero_point, pre_scale, keep)
        other = None if other is None else contiguous_rows(other)
        return cast(Rows, kernels.activation_rows(contiguous_rows(x), how, kind=kind, other=other))
    rows = stock.activated(x, other, kind)
    codes, row_scale = stock.quantized(rows, qmin, qmax, input_scale, zero_point, pre_scale)
    return codes, row_scale, rows if keep else None


@torch.library.custom_op(add_op_namespace_prefix("activation_quantize"), mutates_args=())
def _activation_quantize(
    x: torch.Tensor,
    other: torch.Tensor | None,
    kind: str,
    qmin: int,
    qmax: int,
    input_scale: torch.Tensor | None,
    zero_point: torch.Tensor | None,
    pre_scale: torch.Tensor | None,
    keep: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rows = _activation(x, other, kind, qmin, qmax, input_scale, zero_point, pre_scale, keep)
    return _owned(rows, x, input_scale)


@_activation_quantize.register_fake
def _(
    x: torch.Tensor,
    other: torch.Tensor | None,
    kind: str,
    qmin: int,
    qmax: int,
    input_scale: torch.Tensor | None,
    zero_point: torch.Tensor | None,
    pre_scale: torch.Tensor | None,
    keep: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return _empty(x, qmax, input_scale, keep)


def activation_quantize(
    x: torch.Tensor,
    other: torch.Tensor | None = None,
    *,
    kind: str,
    qmin: int = -127,
    qmax: int = 127,
    input_scale: torch.Tensor | None = None,
    zero_point: torch.Tensor | None = None,
    pre_scale: torch.Tensor | None = None,
    keep: bool = False,
) -> Rows:
    """(codes [M, K], scale, rows) of ``act(x)``, or of ``act(x) * other``; results as :func:`norm_quantize`.

    Args:
        x: [M, K] fp32, bf16 or fp16; half of the columns of a wider tensor is read in place.
        other: [M, K] in the dtype of x: the other half of GEGLU or SwiGLU.
        kind: "gelu", "gelu_tanh" or "silu".
        qmin: lowest code, used with a given scale.
        qmax: highest code: 127, 7, or 448 for float8_e4m3fn codes.
        input_scale: one fp32 number (static); None measures one per row.
        zero_point: one int8 number, with ``input_scale`` only.
        pre_scale: fp32 [K] that multiplies the rows before they are quantized.
        keep: return the rows before quantization too, in the dtype of x.

    Raises:
        ValueError: shapes, dtypes or a kind that do not fit.
    """
    if x.dim() != 2 or kind not in ACTIVATIONS:
        raise ValueError(
            f"activation_quantize: need x [M, K] and a kind of {ACTIVATIONS}, got {list(x.shape)} and {kind!r}."
        )
    if other is not None and (other.shape != x.shape or other.dtype != x.dtype):
        raise ValueError(
            f"activation_quantize: need other like x, {x.dtype} {list(x.shape)}, got {other.dtype} {list(other.shape)}."
        )
    arguments = (other, kind, qmin, qmax, input_scale, zero_point, pre_scale, keep)
    if is_plain(x) and not torch.is_grad_enabled():
        return _activation(x, *arguments)
    codes, row_scale, rows = _activation_quantize(x, *arguments)
    return codes, row_scale, rows if keep else None

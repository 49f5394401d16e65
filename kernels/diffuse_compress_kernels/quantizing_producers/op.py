"""Torch operators that normalize or activate rows and quantize the result, in one pass where there are Triton kernels.

    norm:        y = LayerNorm(x) or RMSNorm(x), then y * (1 + mod_scale[b]) + mod_shift[b] where a block modulates
    activation:  y = act(x), or act(gate) * up with [gate | up] = x
    codes, scale = quantize_rows(y)

The result feeds ``int8_linear_codes`` and ``w4a8_linear_codes``, of as many layers as read y. Elsewhere, and under a
compiler for CUDA, these are the separate operations. They sum over a row in another order than the kernels, so codes of
the two may differ by one step, rarely.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F

from diffuse_compress_kernels import triton_kernels
from diffuse_compress_kernels.int8_linear import cpu, cuda
from diffuse_compress_kernels.int8_linear.op import is_plain, is_traced_for_cuda

__all__ = ["act_quantize_rows", "norm_quantize_rows"]

ACTIVATIONS = ("gelu", "gelu_tanh", "silu", "geglu", "geglu_tanh", "swiglu")
GATED = ("geglu", "geglu_tanh", "swiglu")
MAX_COLUMNS = 16384
Quantized = tuple[torch.Tensor, torch.Tensor]


def _quantize(y: torch.Tensor, qmax: int) -> Quantized:
    run = cuda.quantize_rows_in_torch if y.device.type == "cuda" else cpu.quantize_rows
    return run(y, -qmax, qmax)


def _fits(x: torch.Tensor, columns: int) -> bool:
    return triton_kernels.usable(x.device) and columns <= MAX_COLUMNS


# --- normalization ----------------------------------------------------------------------------------------------


def _separate_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    mod_scale: torch.Tensor | None,
    mod_shift: torch.Tensor | None,
    eps: float,
    rms: bool,
    round_first: bool,
    qmax: int,
) -> Quantized:
    width = (x.shape[1],)
    if not rms:
        y = F.layer_norm(x, width, weight, bias, eps)
    elif round_first and weight is not None:
        y = F.rms_norm(x, width, None, eps) * weight
    else:
        y = F.rms_norm(x, width, weight, eps)
    if rms and bias is not None:
        y = y + bias
    if mod_scale is not None:
        y = y * (1 + mod_scale.repeat_interleave(x.shape[0] // mod_scale.shape[0], dim=0))
    if mod_shift is not None:
        y = y + mod_shift.repeat_interleave(x.shape[0] // mod_shift.shape[0], dim=0)
    return _quantize(y, qmax)


def _run_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    mod_scale: torch.Tensor | None,
    mod_shift: torch.Tensor | None,
    eps: float,
    rms: bool,
    round_first: bool,
    qmax: int,
) -> Quantized:
    if not _fits(x, x.shape[1]):
        return _separate_norm(x, weight, bias, mod_scale, mod_shift, eps, rms, round_first, qmax)
    run = triton_kernels.module("producers").norm_quantize_rows
    if mod_scale is not None and mod_shift is not None and mod_scale.stride() != mod_shift.stride():
        mod_scale, mod_shift = mod_scale.contiguous(), mod_shift.contiguous()
    given = {"weight": weight, "bias": bias, "mod_scale": mod_scale, "mod_shift": mod_shift}
    x = x if x.stride(1) == 1 else x.contiguous()
    return cast(Quantized, run(x, qmax, eps, rms=rms, round_first=round_first, **given))


@torch.library.custom_op("diffuse_compress::norm_quantize_rows", mutates_args=())
def _norm_quantize_rows(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    mod_scale: torch.Tensor | None,
    mod_shift: torch.Tensor | None,
    eps: float,
    rms: bool,
    round_first: bool,
    qmax: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    return _run_norm(x, weight, bias, mod_scale, mod_shift, eps, rms, round_first, qmax)


@_norm_quantize_rows.register_fake
def _(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    mod_scale: torch.Tensor | None,
    mod_shift: torch.Tensor | None,
    eps: float,
    rms: bool,
    round_first: bool,
    qmax: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty((x.shape[0], 1), dtype=torch.float32)


def norm_quantize_rows(
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    eps: float,
    mod_scale: torch.Tensor | None = None,
    mod_shift: torch.Tensor | None = None,
    rms: bool = False,
    round_first: bool = False,
    qmax: int = 127,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes int8 [M, K] and scale fp32 [M, 1] of the normalized, modulated rows of x.

    Args:
        x: [M, K] bf16, fp16 or fp32.
        weight: [K] of the norm.
        bias: [K] of the norm.
        eps: added to the variance.
        mod_scale: [B, K], B a divisor of M; M / B consecutive rows share a row.
        mod_shift: [B, K].
        rms: RMSNorm instead of LayerNorm.
        round_first: round to the dtype of x before ``weight`` multiplies, as Llama's RMSNorm does.
        qmax: highest code: 127, or 7 for int4 activations.

    Raises:
        ValueError: shapes that do not fit.
    """
    samples = {tensor.shape[0] for tensor in (mod_scale, mod_shift) if tensor is not None}
    if x.dim() != 2 or len(samples) > 1 or any(count < 1 or x.shape[0] % count for count in samples):
        raise ValueError(
            f"norm_quantize_rows: need x [M, K] and modulation [B, K] with M divisible by B, got {list(x.shape)} and "
            f"B in {sorted(samples)}."
        )
    arguments = (weight, bias, mod_scale, mod_shift, eps, rms, round_first, qmax)
    if is_plain(x):
        return _run_norm(x.detach(), *arguments)
    if is_traced_for_cuda(x):
        return _separate_norm(x.detach(), *arguments)
    codes, scale = _norm_quantize_rows(x, *arguments)
    return codes, scale


# --- activations ------------------------------------------------------------------------------------------------


def _separate_act(x: torch.Tensor, activation: str, gate_first: bool, qmax: int) -> Quantized:
    gate, up = x, None
    if activation in GATED:
        gate, up = x.chunk(2, dim=1) if gate_first else reversed(x.chunk(2, dim=1))
    if activation.endswith("_tanh"):
        y = F.gelu(gate, approximate="tanh")
    else:
        y = F.gelu(gate) if activation in ("gelu", "geglu") else F.silu(gate)
    return _quantize(y if up is None else y * up, qmax)


def _run_act(x: torch.Tensor, activation: str, gate_first: bool, qmax: int) -> Quantized:
    columns = x.shape[1] // 2 if activation in GATED else x.shape[1]
    if not _fits(x, columns):
        return _separate_act(x, activation, gate_first, qmax)
    run = triton_kernels.module("producers").act_quantize_rows
    x = x if x.stride(1) == 1 else x.contiguous()
    return cast(Quantized, run(x, qmax, activation, gate_first=gate_first))


@torch.library.custom_op("diffuse_compress::act_quantize_rows", mutates_args=())
def _act_quantize_rows(
    x: torch.Tensor, activation: str, gate_first: bool, qmax: int
) -> tuple[torch.Tensor, torch.Tensor]:
    return _run_act(x, activation, gate_first, qmax)


@_act_quantize_rows.register_fake
def _(x: torch.Tensor, activation: str, gate_first: bool, qmax: int) -> tuple[torch.Tensor, torch.Tensor]:
    columns = x.shape[1] // 2 if activation in GATED else x.shape[1]
    shape = (x.shape[0], columns)
    return x.new_empty(shape, dtype=torch.int8), x.new_empty((x.shape[0], 1), dtype=torch.float32)


def act_quantize_rows(
    x: torch.Tensor, activation: str, *, gate_first: bool = True, qmax: int = 127
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes int8 [M, K] and scale fp32 [M, 1] of the activated rows of x.

    Args:
        x: [M, K], or [M, 2 * K] for the gated activations; bf16, fp16 or fp32.
        activation: "gelu", "gelu_tanh", "silu", or gated: "geglu", "geglu_tanh", "swiglu".
        gate_first: x is [gate | up], as in Llama; False: [up | gate], as in diffusers' GEGLU.
        qmax: highest code: 127, or 7 for int4 activations.

    Raises:
        ValueError: an unknown activation, or an x that does not fit it.
    """
    if activation not in ACTIVATIONS or x.dim() != 2 or (activation in GATED and x.shape[1] % 2):
        raise ValueError(
            f"act_quantize_rows: need x [M, K] and an activation of {ACTIVATIONS}, got {list(x.shape)} and "
            f"{activation!r}."
        )
    if is_plain(x):
        return _run_act(x.detach(), activation, gate_first, qmax)
    if is_traced_for_cuda(x):
        return _separate_act(x.detach(), activation, gate_first, qmax)
    codes, scale = _act_quantize_rows(x, activation, gate_first, qmax)
    return codes, scale

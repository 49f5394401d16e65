"""Norm, modulation and activation from stock torch operations, each rounded where the models round, then quantized.

What the fused kernels must return, and what runs where they cannot.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from diffuse_compress_kernels.fp8_linear.op import FLOAT8_MAX, quantize_rows_in_torch
from diffuse_compress_kernels.int8_linear import cpu, cuda

__all__ = ["activated", "normed", "quantized"]


def normed(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    rms: bool,
    eps: float,
    work_dtype: torch.dtype,
) -> torch.Tensor:
    """[M, K] in the dtype of x; arguments as :func:`diffuse_compress_kernels.producers.op.norm_quantize`."""
    rows, columns = x.shape
    if rms:
        values = x.float()
        values = (values * torch.rsqrt(values.square().mean(-1, keepdim=True) + eps)).to(work_dtype)
        values = values if weight is None else values * weight
    else:
        weight, bias = (None if part is None else part.to(work_dtype) for part in (weight, bias))
        values = F.layer_norm(x.to(work_dtype), (columns,), weight, bias, eps)
    for part, add in ((scale, False), (shift, True)):
        if part is not None:
            grouped = values.view(part.shape[0], rows // part.shape[0], columns)
            grouped = grouped + part[:, None] if add else grouped * (1 + part[:, None])
            values = grouped.view(rows, columns)
    return values.to(x.dtype)


def activated(x: torch.Tensor, other: torch.Tensor | None, kind: str) -> torch.Tensor:
    """act(x), or act(x) * other, in the dtype of x."""
    values = F.silu(x) if kind == "silu" else F.gelu(x, approximate="tanh" if kind == "gelu_tanh" else "none")
    return values if other is None else values * other


def quantized(
    rows: torch.Tensor,
    qmin: int,
    qmax: int,
    scale: torch.Tensor | None,
    zero_point: torch.Tensor | None,
    pre_scale: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [M, K] and fp32 scale, [M, 1] measured or [1, 1] given."""
    if qmax == FLOAT8_MAX:
        return quantize_rows_in_torch(rows, scale, pre_scale)
    implementation = cuda if rows.device.type == "cuda" else cpu
    return implementation.quantize_rows(rows, qmin, qmax, scale, zero_point, pre_scale)

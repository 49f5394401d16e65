"""Norm, modulation and activation from stock torch operations, each rounded where the models round, then quantized.

What the fused kernels must return, and what runs where they cannot.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from diffuse_compress_kernels.int8_linear import cpu, cuda

__all__ = ["activated", "normed", "quantized"]

FLOAT8 = torch.float8_e4m3fn
FLOAT8_MAX = 448
MIN_SCALE = torch.finfo(torch.float32).tiny


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
    if qmax != FLOAT8_MAX:
        implementation = cuda if rows.device.type == "cuda" else cpu
        return implementation.quantize_rows(rows, qmin, qmax, scale, zero_point, pre_scale)
    values = rows.float() if pre_scale is None else rows.float() * pre_scale
    if scale is None:
        amax = values.abs().amax(dim=1, keepdim=True) if values.shape[1] else values.new_zeros(len(values), 1)
        # By a tensor: CUDA divides by a Python number through its reciprocal, which is not the quotient.
        scale = amax.div_(torch.full_like(amax, FLOAT8_MAX)).clamp_(min=MIN_SCALE)
    scale = scale.reshape(-1, 1)
    return torch.div(values, scale).clamp_(-FLOAT8_MAX, FLOAT8_MAX).to(FLOAT8), scale

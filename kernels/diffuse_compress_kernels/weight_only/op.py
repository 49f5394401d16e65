"""Torch operator of the product with 8-bit weight-only layers, and the expansion of weights that other layers need.

    y[m, n] = sum_k x[m, k] * scale[n, g] * (q[n, k] - z[n, g]) + bias[n]

With few tokens the cost of such a layer is reading its weight: codes are converted on their way into the tensor core.
With many, the weight is written out once, at the speed of memory, and multiplied by the vendor's dense product.
"""

from __future__ import annotations

from typing import cast

import torch

from diffuse_compress_kernels import triton_kernels
from diffuse_compress_kernels.int8_linear.op import contiguous_rows, is_plain
from diffuse_compress_kernels.registration import linear_flops, operator

__all__ = ["can_expand", "expand_weight", "w8a16_linear"]

FLOAT8 = torch.float8_e4m3fn
LEAST_FLOAT8_CAPABILITY = (8, 9)
PACKED_GROUP_SIZES = (0, 32, 64, 128)


def _has_kernels(device: torch.device, codes: torch.dtype) -> bool:
    if not triton_kernels.usable(device):
        return False
    return codes != FLOAT8 or triton_kernels.capability(device) >= LEAST_FLOAT8_CAPABILITY


def can_expand(qweight: torch.Tensor) -> bool:
    """True if :func:`expand_weight` runs for this tensor, outside of any tracing."""
    return qweight.is_cuda and is_plain(qweight) and _has_kernels(qweight.device, qweight.dtype)


def expand_weight(
    qweight: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    group_size: int,
    out: torch.Tensor,
    *,
    packed: bool,
) -> torch.Tensor:
    """``out`` [N, K] = scale * (codes - zero_point), fp32 arithmetic, rounded once; one launch, no temporary.

    Args:
        qweight: int8 or float8_e4m3fn [N, K], or int4 codes packed as int8 [N, ceil(K / 128) * 64].
        scale: fp32 [N, ceil(K / group_size)]; with ``group_size`` 0 [N, 1] or [1, 1].
        zero_point: int8 or fp32 of ``scale``'s shape; None is 0.
        group_size: columns that share a scale, 0 for a whole row; 32, 64, 128 or 0 for packed codes.
        out: any float dtype, contiguous rows.
        packed: two codes are in a byte.

    Raises:
        ValueError: a group size that packed codes do not take.
    """
    if packed and group_size not in PACKED_GROUP_SIZES:
        raise ValueError(f"expand_weight: packed codes need group_size in {PACKED_GROUP_SIZES}, got {group_size}.")
    kernels = triton_kernels.module("expand")
    run = kernels.expand_to_float if packed else kernels.expand_codes
    return cast(torch.Tensor, run(qweight, scale, zero_point, group_size, out))


def _run(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    group_size: int,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    if x.dtype in (torch.bfloat16, torch.float16) and _has_kernels(x.device, weight.dtype):
        run = triton_kernels.module("products").w8a16_linear
        return cast(torch.Tensor, run(contiguous_rows(x), weight, scale, zero_point, group_size, bias))
    values = weight.float()
    spread = group_size or weight.shape[1]
    if zero_point is not None:
        values -= zero_point.float().repeat_interleave(spread, dim=1)[:, : weight.shape[1]]
    values *= scale.repeat_interleave(spread, dim=1)[:, : weight.shape[1]]
    return torch.nn.functional.linear(x, values.to(x.dtype), None if bias is None else bias.to(x.dtype))


def _fake(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    group_size: int,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


_w8a16_linear = operator("w8a16_linear", _run, _fake, flops=linear_flops)


def w8a16_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None = None,
    group_size: int = 0,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """y [M, N] in the dtype of x; equation in the module docstring, summed in fp32.

    Args:
        x: [M, K] bf16, fp16 or fp32.
        weight: int8 or float8_e4m3fn [N, K].
        scale: fp32 [N, ceil(K / group_size)]; with ``group_size`` 0 [N, 1] or [1, 1].
        zero_point: int8 or fp32 of ``scale``'s shape; None is 0.
        group_size: columns that share a scale; 0: a whole row.
        bias: [N], any float dtype.

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    fits = weight.dtype in (torch.int8, FLOAT8) and weight.dim() == 2 and x.dim() == 2 and x.shape[1] == weight.shape[1]
    if not fits:
        raise ValueError(
            f"w8a16_linear: need x [M, K] and int8 or float8_e4m3fn weight [N, K], got {list(x.shape)} and "
            f"{weight.dtype} {list(weight.shape)}."
        )
    run = _run if is_plain(x) else _w8a16_linear
    return cast(
        torch.Tensor, run(x.detach(), weight, scale, zero_point, group_size, None if bias is None else bias.detach())
    )

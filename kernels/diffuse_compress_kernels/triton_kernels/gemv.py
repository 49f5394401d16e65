"""One to a few tokens times packed int4 weights: no tensor cores, the weight is read once at memory speed.

    y[m, n] = sum_k x[m, k] * s[n, g] * (q[n, k] - z[n, g]) + bias[n],   g = k // group size

A program owns some rows of the weight over all of K, so no partial sums leave it. fp32 arithmetic throughout.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from diffuse_compress_kernels.triton_kernels.tiles import GemvConfig

__all__ = ["w4a16_gemv", "w4a16_gemv_kernel"]

HALF = tl.constexpr(64)
GROUP = tl.constexpr(128)


@triton.jit(do_not_specialize=["stride_sn"])
def w4a16_gemv_kernel(
    x_ptr,
    w_ptr,
    scale_ptr,
    zero_ptr,
    bias_ptr,
    y_ptr,
    N,
    K,
    stride_xm,
    stride_wn,
    stride_sn,
    stride_ym,
    GROUP_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUPS: tl.constexpr,
    EVEN_K: tl.constexpr,
):
    """Program (rows of BLOCK_N outputs, token). GROUPS groups of 128 columns per step; tiles [BLOCK_N, GROUPS, 64]."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    token = tl.program_id(1)
    rows = tl.minimum(n, N - 1).to(tl.int64)
    j = tl.arange(0, HALF)[None, None, :]
    g = tl.arange(0, GROUPS)
    w_places = w_ptr + (rows * stride_wn)[:, None, None] + g[None, :, None] * HALF + j
    x_places = x_ptr + token.to(tl.int64) * stride_xm + g[None, :, None] * GROUP + j
    scale_rows = (rows * stride_sn)[:, None]
    per_group: tl.constexpr = GROUP // GROUP_SIZE
    steps = tl.cdiv(K, GROUP)
    acc = tl.zeros((BLOCK_N, GROUPS), dtype=tl.float32)
    for step in tl.range(0, steps, GROUPS):
        inside = step + g < steps
        packed = tl.load(w_places + step * HALF, mask=inside[None, :, None], other=0, eviction_policy="evict_first")
        left = K - step * GROUP - g[None, :, None] * GROUP
        if EVEN_K:
            x_low = tl.load(x_places + step * GROUP, mask=inside[None, :, None], other=0.0)
            x_high = tl.load(x_places + step * GROUP + HALF, mask=inside[None, :, None], other=0.0)
        else:
            x_low = tl.load(x_places + step * GROUP, mask=j < left, other=0.0)
            x_high = tl.load(x_places + step * GROUP + HALF, mask=j < left - HALF, other=0.0)
        # Two's complement nibbles as signed integers.
        low = ((packed & 0x0F).to(tl.int32) ^ 8) - 8
        high = ((packed >> 4).to(tl.int32) ^ 8) - 8
        group = scale_rows + (step + g)[None, :] * per_group
        if per_group == 1:
            if zero_ptr is not None:
                zero = tl.load(zero_ptr + group, mask=inside[None, :], other=0).to(tl.int32)[:, :, None]
                low -= zero
                high -= zero
            products = low.to(tl.float32) * x_low.to(tl.float32) + high.to(tl.float32) * x_high.to(tl.float32)
            scale = tl.load(scale_ptr + group, mask=inside[None, :], other=0.0)
            acc += tl.sum(products, axis=2) * scale
        else:
            which = tl.arange(0, HALF)[None, None, :] // GROUP_SIZE
            last = tl.cdiv(K, GROUP_SIZE) - 1 - (step + g) * per_group
            g_low = tl.minimum(which, tl.maximum(last, 0)[None, :, None])
            g_high = tl.minimum(which + HALF // GROUP_SIZE, tl.maximum(last, 0)[None, :, None])
            inside3 = inside[None, :, None]
            if zero_ptr is not None:
                low -= tl.load(zero_ptr + group[:, :, None] + g_low, mask=inside3, other=0).to(tl.int32)
                high -= tl.load(zero_ptr + group[:, :, None] + g_high, mask=inside3, other=0).to(tl.int32)
            low_values = low.to(tl.float32) * tl.load(scale_ptr + group[:, :, None] + g_low, mask=inside3, other=0.0)
            high_values = high.to(tl.float32) * tl.load(scale_ptr + group[:, :, None] + g_high, mask=inside3, other=0.0)
            acc += tl.sum(low_values * x_low.to(tl.float32) + high_values * x_high.to(tl.float32), axis=2)
    y = tl.sum(acc, axis=1)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)
    tl.store(y_ptr + token.to(tl.int64) * stride_ym + n, y.to(y_ptr.dtype.element_ty), mask=n < N)


def w4a16_gemv(
    x: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    group_size: int,
    config: GemvConfig,
    *,
    bias: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """y [M, N] in the dtype of x, any float dtype; arguments as ``w4a16``. Each token reads the weight again."""
    rows, outputs = x.shape[0], packed.shape[0]
    if out is None:
        out = torch.empty(rows, outputs, dtype=x.dtype, device=x.device)
    if rows == 0 or outputs == 0:
        return out
    w4a16_gemv_kernel[(triton.cdiv(outputs, config.block_n), rows)](
        x,
        packed.view(torch.uint8),
        scale,
        zero_point,
        bias,
        out,
        outputs,
        x.shape[1],
        x.stride(0),
        packed.stride(0),
        scale.stride(0),
        out.stride(0),
        GROUP_SIZE=group_size,
        BLOCK_N=config.block_n,
        GROUPS=config.groups,
        EVEN_K=x.shape[1] % 128 == 0,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return out

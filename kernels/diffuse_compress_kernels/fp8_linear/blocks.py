"""float8 products with scales per block over ``torch._scaled_mm``: 1x128 of the input, 128x128 of the weight.

    x_scale[m, g] = max_{k in g} |x[m, k]| / 448
    y = sum_g x_scale[m, g] * weight_scale[n / 128, g] * (sum_{k in g} code[m, k] * weight[n, k]) + bias

torch has this product on Hopper, with CUDA 12.9 or newer, and its demands on the scales' memory differ between
releases: whether it is there is found out by a small product whose result is known.
"""

from __future__ import annotations

import warnings
from functools import cache

import torch

from diffuse_compress_kernels.fp8_linear.op import FLOAT8, FLOAT8_MAX, MIN_SCALE, has_fp8_matmul

__all__ = ["BLOCK", "fp8_block_linear_codes", "has_fp8_block_matmul", "quantize_groups_fp8"]

BLOCK = 128
# Of the rows of a weight's scales in memory, and of the rows of inputs: cuBLASLt reads both in fours.
_SCALE_ALIGNMENT = 4
_ROW_ALIGNMENT = 16
_HOPPER = (9, 0)
# Codes are exact, sums of the tensor cores have about 14 bits, and the result is rounded to bf16.
_TOLERANCE = 1e-2


def has_fp8_block_matmul(device: torch.device) -> bool:
    """True if ``torch._scaled_mm`` multiplies blocks there, and rightly; tried once a device, with a warning if not."""
    if not has_fp8_matmul(device):
        return False
    return _has_fp8_block_matmul(torch.cuda.current_device() if device.index is None else device.index)


@cache
def _has_fp8_block_matmul(index: int) -> bool:
    if torch.version.hip is not None or torch.cuda.get_device_capability(index) != _HOPPER:
        return False
    reason = _trial(torch.device("cuda", index))
    if reason is not None:
        warnings.warn(
            f"float8 blocks: torch._scaled_mm of torch {torch.__version__} does not multiply them on cuda:{index} "
            f"({reason}); weights are dequantized in front of a dense product instead.",
            stacklevel=2,
        )
    return reason is None


def _trial(device: torch.device) -> str | None:
    """Why the product of a few blocks, the last ones not full, is not what it should be; None if it is."""
    generator = torch.Generator().manual_seed(0)
    rows, outputs, columns = 5, 144, 5 * BLOCK - 48
    x = torch.randn(rows, columns, generator=generator).to(device)
    codes, scale = quantize_groups_fp8(x)
    weight = torch.randn(outputs, columns, generator=generator).to(device, FLOAT8)
    weight_scale = (0.5 + torch.rand(-(-outputs // BLOCK), -(-columns // BLOCK), generator=generator)).to(device)
    wide = weight_scale.repeat_interleave(BLOCK, 0)[:outputs].repeat_interleave(BLOCK, 1)[:, :columns]
    values = codes.double() * scale.repeat_interleave(BLOCK, 1)[:, :columns].double()
    expected = values @ (weight.double() * wide.double()).t()
    for dtype in (torch.bfloat16, torch.float32):
        try:
            found = fp8_block_linear_codes(codes, scale, weight, weight_scale, None, dtype)
        except RuntimeError as error:
            return str(error).splitlines()[0]
        if not bool((found.double() - expected).norm() <= _TOLERANCE * expected.norm()):
            return "its result is wrong"
    return None


def fp8_block_linear_codes(
    codes: torch.Tensor,
    scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """y [M, N] in ``dtype``; equation in the module docstring.

    Args:
        codes: float8_e4m3fn [M, K], on a device with :func:`has_fp8_block_matmul`.
        scale: fp32 [M, ceil(K / 128)]; [M, 1] and [1, 1] stand for all groups.
        weight: float8_e4m3fn [N, K].
        weight_scale: fp32 [ceil(N / 128), ceil(K / 128)].
        bias: [N], any float dtype.
        dtype: of the result.
    """
    (rows, columns), outputs = codes.shape, weight.shape[0]
    if rows == 0 or outputs == 0:
        return torch.zeros(rows, outputs, dtype=dtype, device=codes.device)
    groups = weight_scale.shape[1]
    a = _padded(codes, -rows % _ROW_ALIGNMENT, groups * BLOCK - columns)
    b = _padded(weight, -outputs % _ROW_ALIGNMENT, groups * BLOCK - columns)
    # Scales of inputs lie column by column; those of the weight row by row, each row aligned.
    scale_a = torch.zeros(groups, a.shape[0], dtype=torch.float32, device=codes.device)
    scale_a[:, :rows] = scale.expand(rows, groups).t()
    aligned = -(-groups // _SCALE_ALIGNMENT) * _SCALE_ALIGNMENT
    scale_b = torch.zeros(weight_scale.shape[0], aligned, dtype=torch.float32, device=codes.device)
    scale_b[:, :groups] = weight_scale
    y = torch._scaled_mm(
        a,
        b.t(),
        scale_a=scale_a.t(),
        scale_b=scale_b[:, :groups].t(),
        out_dtype=torch.bfloat16 if dtype == torch.bfloat16 else torch.float32,
    )[:rows, :outputs]
    return (y if bias is None else y + bias.to(y.dtype)).to(dtype)


def quantize_groups_fp8(x: torch.Tensor, pre_scale: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """float8_e4m3fn codes [M, K] and fp32 scale [M, ceil(K / 128)]; ``pre_scale`` [K] multiplies x first, in fp32."""
    values = x.detach().float() if pre_scale is None else x.detach().float() * pre_scale
    rows, columns = values.shape
    groups = -(-columns // BLOCK)
    wide = torch.nn.functional.pad(values, (0, groups * BLOCK - columns)).view(rows, groups, BLOCK)
    amax = wide.abs().amax(dim=-1) if wide.numel() else wide.new_zeros(rows, groups)
    # By a tensor: CUDA divides by a Python number through its reciprocal, which is not the CPU's quotient.
    scale = amax.div_(torch.full_like(amax, FLOAT8_MAX)).clamp_(min=MIN_SCALE)
    steps = torch.div(wide, scale.unsqueeze(-1)).clamp_(-FLOAT8_MAX, FLOAT8_MAX)
    return steps.to(FLOAT8).view(rows, groups * BLOCK)[:, :columns].contiguous(), scale


def _padded(codes: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Zeros below and on the right; the byte 0 is the float8 zero."""
    if not rows and not columns:
        return codes
    return torch.nn.functional.pad(codes.view(torch.uint8), (0, columns, 0, rows)).view(FLOAT8)

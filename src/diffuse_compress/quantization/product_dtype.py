"""Dtype of dense products on CPUs that have no instructions for the input's."""

from __future__ import annotations

import platform

import torch

__all__ = ["product_dtype"]


def _multiplies_natively(dtype: torch.dtype) -> bool:
    """True if this CPU has instructions for products in ``dtype``; without them float32 is several times faster."""
    if dtype == torch.bfloat16:
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return dtype == torch.float32 or (dtype == torch.float16 and torch.cpu._is_amx_fp16_supported())


_multiplies_natively = torch.compiler.assume_constant_result(_multiplies_natively)


def product_dtype(x: torch.Tensor) -> torch.dtype:
    """Dtype of the dense product: that of x, or float32 on a CPU that would only emulate it."""
    if x.device.type == "cpu" and platform.machine() in ("x86_64", "AMD64") and not _multiplies_natively(x.dtype):
        return torch.float32
    return x.dtype

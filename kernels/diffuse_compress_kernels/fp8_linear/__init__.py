"""float8 linear layers over ``torch._scaled_mm``."""

from diffuse_compress_kernels.fp8_linear.blocks import (
    fp8_block_linear_codes,
    has_fp8_block_matmul,
    quantize_groups_fp8,
)
from diffuse_compress_kernels.fp8_linear.op import fp8_linear, fp8_linear_codes, has_fp8_matmul, quantize_rows_fp8

__all__ = [
    "fp8_block_linear_codes",
    "fp8_linear",
    "fp8_linear_codes",
    "has_fp8_block_matmul",
    "has_fp8_matmul",
    "quantize_groups_fp8",
    "quantize_rows_fp8",
]

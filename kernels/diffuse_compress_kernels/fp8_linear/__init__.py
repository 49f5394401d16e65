"""float8 linear layers over ``torch._scaled_mm``."""

from diffuse_compress_kernels.fp8_linear.op import fp8_linear, fp8_linear_codes, has_fp8_matmul, quantize_rows_fp8

__all__ = ["fp8_linear", "fp8_linear_codes", "has_fp8_matmul", "quantize_rows_fp8"]

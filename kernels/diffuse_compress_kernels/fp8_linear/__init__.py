"""float8 linear layers over ``torch._scaled_mm``."""

from diffuse_compress_kernels.fp8_linear.op import fp8_linear, has_fp8_matmul

__all__ = ["fp8_linear", "has_fp8_matmul"]

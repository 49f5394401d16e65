"""Linear layers with packed int4 weights: int8 activations (exact int32 sums), or 16-bit ones."""

from diffuse_compress_kernels.int4_linear.op import (
    has_fast_int4,
    w4a8_linear,
    w4a8_linear_codes,
    w4a16_linear,
)

__all__ = ["has_fast_int4", "w4a8_linear", "w4a8_linear_codes", "w4a16_linear"]

"""Integer linear layers: exact int32 sums of int8 codes."""

from diffuse_compress_kernels.int8_linear.cpu import has_fast_int8
from diffuse_compress_kernels.int8_linear.op import int8_linear, int8_linear_codes, int_matmul, quantize_rows
from diffuse_compress_kernels.int8_linear.shared import quantized_once

__all__ = ["has_fast_int8", "int8_linear", "int8_linear_codes", "int_matmul", "quantize_rows", "quantized_once"]

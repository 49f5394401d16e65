"""Low-bit products for CPU and CUDA behind torch operators (namespace ``diffuse_compress``).

Needs torch alone; with triton installed, CUDA devices of compute capability 8.0 or more run the kernels of
``triton_kernels``.

Importing registers the operators and initialises no device.
"""

from diffuse_compress_kernels.attention import attention_is_measured, attention_obstacle, int8_attention
from diffuse_compress_kernels.fp8_linear import (
    fp8_block_linear_codes,
    fp8_linear,
    fp8_linear_codes,
    has_fp8_block_matmul,
    has_fp8_matmul,
    quantize_groups_fp8,
    quantize_rows_fp8,
)
from diffuse_compress_kernels.int4_linear import has_fast_int4, w4a8_linear, w4a8_linear_codes, w4a16_linear
from diffuse_compress_kernels.int8_conv2d import int8_conv2d
from diffuse_compress_kernels.int8_linear import (
    has_fast_int8,
    int8_linear,
    int8_linear_codes,
    int_matmul,
    quantize_rows,
    quantized_once,
)
from diffuse_compress_kernels.producers import activation_quantize, norm_quantize
from diffuse_compress_kernels.weight_only import can_expand, expand_weight, w8a16_linear

__all__ = [
    "activation_quantize",
    "attention_is_measured",
    "attention_obstacle",
    "can_expand",
    "expand_weight",
    "fp8_block_linear_codes",
    "fp8_linear",
    "fp8_linear_codes",
    "has_fast_int4",
    "has_fast_int8",
    "has_fp8_block_matmul",
    "has_fp8_matmul",
    "int8_attention",
    "int8_conv2d",
    "int8_linear",
    "int8_linear_codes",
    "int_matmul",
    "norm_quantize",
    "quantize_groups_fp8",
    "quantize_rows",
    "quantize_rows_fp8",
    "quantized_once",
    "w4a8_linear",
    "w4a8_linear_codes",
    "w4a16_linear",
    "w8a16_linear",
]

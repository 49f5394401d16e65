"""Integer 2-d convolutions: exact int32 sums of int8 codes."""

from diffuse_compress_kernels.int8_conv2d.op import int8_conv2d

__all__ = ["int8_conv2d"]

"""Attention whose products are of 8-bit numbers."""

from diffuse_compress_kernels.attention.op import attention_is_measured, attention_obstacle, int8_attention

__all__ = ["attention_is_measured", "attention_obstacle", "int8_attention"]

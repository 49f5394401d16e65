"""Norms and activations that hand quantized rows to an integer or float8 product."""

from diffuse_compress_kernels.producers.op import activation_quantize, norm_quantize

__all__ = ["activation_quantize", "norm_quantize"]

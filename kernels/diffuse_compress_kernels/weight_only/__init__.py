"""Products of 16-bit inputs with 8-bit weights, and quantized weights written out."""

from diffuse_compress_kernels.weight_only.op import can_expand, expand_weight, w8a16_linear

__all__ = ["can_expand", "expand_weight", "w8a16_linear"]

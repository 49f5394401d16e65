"""What makes a layer's input, fused with its quantization: normalization with modulation, activations with gates."""

from diffuse_compress_kernels.quantizing_producers.op import act_quantize_rows, norm_quantize_rows

__all__ = ["act_quantize_rows", "norm_quantize_rows"]

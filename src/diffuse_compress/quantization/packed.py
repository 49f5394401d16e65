"""The one container of a quantized weight, as it stands in memory and on disk."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from diffuse_compress.quantization.scheme import WeightScheme

__all__ = ["QuantizedWeight"]


@dataclass
class QuantizedWeight:
    """A weight [N, K] as codes and quantization parameters; convolutions are flattened to K = C*kh*kw.

    Attributes:
        qweight: int8 [N, K] (int8), float8_e4m3fn [N, K] (fp8), or int8 bytes [N, ceil(K/128) * 16 * bits]
            (int4, int3, int2; layouts in ``packing.py``).
        scale: fp32: [1, 1] per tensor, [N, 1] per channel and two-level, [N, G] per group,
            [ceil(N / 128), ceil(K / 128)] per block. > 0 where we chose it; one
            that was imported may be negative or 0 (GGUF's Q4_0).
        zero_point: None if symmetric, else int8 (fp32 with ``float_zero_point``) of ``scale``'s shape, in the
            domain of the signed codes: ``w = scale * (q - zero_point)``; with ``additive_zero_point`` fp32 in the
            domain of the weight: ``w = scale * q + zero_point``.
        group_scale: int8 [N, G] in 1..16 for two-level scales, else None.
        in_features: K before padding.
        scheme: how all of this is to be read.
    """

    qweight: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor | None
    group_scale: torch.Tensor | None
    in_features: int
    scheme: WeightScheme

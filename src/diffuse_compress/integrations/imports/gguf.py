"""GGUF layers of a model that diffusers loaded by ``from_single_file`` with a GGUFQuantizationConfig.

Every 32 consecutive weights of a row are one block of bytes, scales in fp16 first (block formats of ggml, as diffusers
0.42 and the gguf package read them)::

    Q8_0   d, 32 x int8                    w = d * q
    Q4_0   d, 16 bytes of two codes        w = d * (q - 8)      d may be negative
    Q4_1   d, m, 16 bytes of two codes     w = d * q + m

Byte j of the 4-bit types holds weight j in its low half and weight j + 16 in its high one. Equality is that of the gguf
package, in float32; diffusers' own layer rounds the product to fp16 first.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from diffuse_compress.integrations.imports.base import ForeignLayer, NotImportableError, require_equal
from diffuse_compress.quantization.packed import QuantizedWeight
from diffuse_compress.quantization.packing import pack
from diffuse_compress.quantization.scheme import NumberFormat, PerGroup, ScaleRule, Scheme, WeightScheme

__all__ = ["dense_values", "holds", "read", "type_name"]

_BLOCK = 32
_SCHEMES = {
    "Q8_0": WeightScheme(NumberFormat.INT8, PerGroup(_BLOCK)),
    "Q4_0": WeightScheme(NumberFormat.INT4, PerGroup(_BLOCK), scale_rule=ScaleRule.AMAX_OVER_HALF_RANGE),
    "Q4_1": WeightScheme(NumberFormat.INT4, PerGroup(_BLOCK), symmetric=False, additive_zero_point=True),
}


def holds(tensor: Any) -> bool:
    """True for a parameter that is a GGUFParameter of diffusers'."""
    return type(tensor).__name__ == "GGUFParameter"


def type_name(tensor: Any) -> str:
    """ "Q8_0", "Q4_K", "BF16", ..."""
    return str(getattr(tensor.quant_type, "name", tensor.quant_type))


def dense_values(tensor: Any) -> torch.Tensor | None:
    """Values of a GGUFParameter that only carries bfloat16 numbers; None for a quantized one."""
    if type_name(tensor) != "BF16":
        return None
    return tensor.as_tensor().view(torch.bfloat16)  # type: ignore[no-any-return]


def read(module: nn.Module) -> ForeignLayer:
    """The GGUFLinear ``module``.

    Raises:
        NotImportableError: a type other than Q8_0, Q4_0 and Q4_1.
    """
    tensor: Any = module.weight
    kind = type_name(tensor)
    scheme = _SCHEMES.get(kind)
    if scheme is None:
        raise NotImportableError(
            f"GGUF {kind} (only {', '.join(_SCHEMES)} can be): take the file of such a type, or call dequantize() on "
            "the model, then compress()"
        )
    columns = int(module.in_features)  # type: ignore[arg-type]
    blocks = tensor.as_tensor().view(torch.uint8).reshape(tensor.shape[0], columns // _BLOCK, -1)
    scale = _halves(blocks[..., :2])
    zero_point = None
    if kind == "Q8_0":
        codes = blocks[..., 2:].view(torch.int8)
    else:
        start = 2 if kind == "Q4_0" else 4
        codes = torch.cat([blocks[..., start:] & 0x0F, blocks[..., start:] >> 4], dim=-1).to(torch.int8) - 8
        if kind == "Q4_1":
            zero_point = _halves(blocks[..., 2:4]) + 8 * scale
    codes = codes.reshape(tensor.shape[0], columns)
    qweight = codes.contiguous() if scheme.format.bits == 8 else pack(codes, 4)
    weight = QuantizedWeight(qweight, scale, zero_point, None, columns, scheme)
    require_equal(weight, _values(tensor, columns))
    return ForeignLayer(weight, Scheme(scheme), module.compute_dtype, f"GGUF {kind}")  # type: ignore[arg-type]


def _halves(data: torch.Tensor) -> torch.Tensor:
    """fp32 of two-byte floats: [N, G, 2] bytes to [N, G]."""
    return data.contiguous().view(torch.float16).squeeze(-1).float()


def _values(tensor: Any, columns: int) -> torch.Tensor:
    """What diffusers' own functions make of the blocks, computed in float32 as the gguf package does."""
    from diffusers.quantizers.gguf.utils import GGML_QUANT_SIZES, dequantize_functions

    block_size, type_size = GGML_QUANT_SIZES[tensor.quant_type]
    blocks = tensor.as_tensor().view(torch.uint8).reshape(-1, type_size)
    values = dequantize_functions[tensor.quant_type](blocks, block_size, type_size, torch.float32)
    return values.reshape(-1, columns)  # type: ignore[no-any-return]

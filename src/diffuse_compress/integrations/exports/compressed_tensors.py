"""compressed-tensors: what transformers, vLLM and SGLang read.

Source: github.com/vllm-project/compressed-tensors, release 0.20, whose formats these are, for a linear layer [N, K]:

* ``pack-quantized``, integers of 2, 4 and 8 bits, inputs left alone: ``weight_packed`` int32 [N, ceil(K * bits / 32)],
  ``weight_scale`` [N, G], ``weight_shape`` int64 [2], and for asymmetric ones ``weight_zero_point``, packed alike along
  the rows: int32 [ceil(N * bits / 32), G];
* ``int-quantized``, int8 with int8 inputs: ``weight`` int8 [N, K], ``weight_scale`` [N, G] or [1],
  ``weight_zero_point`` int8 of its shape, and for static inputs ``input_scale`` [1] and ``input_zero_point`` int8 [1];
* ``float-quantized``, float8 with float8 inputs: the same with float8_e4m3fn; ``naive-quantized`` without such inputs.
  Per block of 128 by 128 ``weight_scale`` is [N / 128, K / 128], rounded up; inputs are then in groups of 128.

Scales are defined in the model's dtype. Ours are fp32 and written so where rounding would change one: a reader that
holds them in bfloat16 rounds them as it loads.
"""

from __future__ import annotations

from typing import Any

import torch

from diffuse_compress.integrations.exports.base import LanguageFormat, LayerFacts, Layout, stored_scale
from diffuse_compress.quantization.layers import QuantizedLinear
from diffuse_compress.quantization.scheme import (
    BLOCK_SIZE,
    ActivationScheme,
    Granularity,
    NumberFormat,
    PerBlock,
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
    Scheme,
)
from diffuse_compress.quantization.word_packing import pack_words, unsigned_codes

__all__ = ["CompressedTensors"]

_MIXED = "mixed-precision"
_STRATEGIES: dict[type, str] = {
    PerTensor: "tensor",
    PerChannel: "channel",
    PerGroup: "group",
    PerBlock: "block",
    PerToken: "token",
}


class CompressedTensors(LanguageFormat):
    """Every layer may have a scheme of its own, and any layer may stay dense."""

    name = "compressed-tensors"
    title = "compressed-tensors"
    package = "compressed-tensors"

    def _own_reason(self, facts: LayerFacts) -> str | None:
        scheme = facts.scheme
        weight, act = scheme.weight, scheme.activation
        if weight.format is NumberFormat.INT3:
            return f"{scheme.name}, whose packing differs between releases of compressed-tensors"
        if act is not None and act.format is NumberFormat.INT4:
            return f"{scheme.name}; compressed-tensors' readers quantize no inputs to int4"
        if act is not None and weight.format.is_integer and weight.format is not NumberFormat.INT8:
            return f"{scheme.name}; compressed-tensors packs weights below eight bits for inputs in 16 bits"
        if act is None and weight.format.is_integer and isinstance(weight.granularity, PerTensor):
            return f"{scheme.name} with one scale for the tensor, which its packed format does not have"
        if isinstance(weight.granularity, PerBlock) and facts.shape[1] % weight.granularity.block_size:
            return f"{scheme.name} with a last block of columns that is not full, which its readers refuse"
        return None

    def whole_reason(self, layout: Layout) -> str | None:
        """None: names tell it all."""
        return None

    def config(self, layout: Layout) -> dict[str, Any]:
        """One group of all linear layers but the ``ignore``d ones, or a group of names for each scheme."""
        by_scheme: dict[Scheme, list[str]] = {}
        for name, scheme in layout.schemes.items():
            by_scheme.setdefault(scheme, []).append(name)
        # Two schemes may differ in what only we record, such as the rule of the scale.
        groups: list[tuple[dict[str, Any], list[str]]] = []
        for scheme, names in by_scheme.items():
            described = _group(scheme)
            known = next((members for other, members in groups if other == described), None)
            if known is None:
                groups.append((described, list(names)))
            else:
                known.extend(names)
        formats = {described["format"] for described, _ in groups}
        return {
            "quant_method": self.name,
            "format": formats.pop() if len(formats) == 1 else _MIXED,
            "quantization_status": "compressed",
            "global_compression_ratio": None,
            "kv_cache_scheme": None,
            "config_groups": {
                f"group_{i}": {"targets": ["Linear"] if len(groups) == 1 else names, **described}
                for i, (described, names) in enumerate(groups)
            },
            "ignore": list(layout.dense),
        }

    def tensors(self, layer: QuantizedLinear) -> dict[str, torch.Tensor]:
        """By the format of the layer's scheme."""
        weight, scheme = layer.quantized_weight(), layer.scheme
        scale = weight.scale.detach()
        if isinstance(scheme.weight.granularity, PerTensor):
            scale = scale.reshape(1)
        found = {"weight_scale": stored_scale(scale, layer.compute_dtype)}
        if _format(scheme) == "pack-quantized":
            bits = scheme.weight.format.bits
            codes, zeros = unsigned_codes(weight)
            found["weight_packed"] = pack_words(codes, bits)
            found["weight_shape"] = torch.tensor(codes.shape)
            if weight.zero_point is not None:
                found["weight_zero_point"] = pack_words(zeros.to(torch.uint8).T, bits).T.contiguous()
        else:
            found["weight"] = weight.qweight.detach()
            if weight.zero_point is not None:
                found["weight_zero_point"] = weight.zero_point.detach().reshape(scale.shape)
        if layer.input_scale is not None:
            found["input_scale"] = stored_scale(layer.input_scale, layer.compute_dtype)
        if layer.input_zero_point is not None:
            found["input_zero_point"] = layer.input_zero_point.detach()
        return found


def _format(scheme: Scheme) -> str:
    if scheme.weight.format.is_integer:
        return "pack-quantized" if scheme.activation is None else "int-quantized"
    return "naive-quantized" if scheme.activation is None else "float-quantized"


def _group(scheme: Scheme) -> dict[str, Any]:
    weight, act = scheme.weight, scheme.activation
    return {
        "format": _format(scheme),
        "weights": _arguments(weight.format, weight.granularity, weight.symmetric, dynamic=False),
        "input_activations": None if act is None else _of_inputs(act),
        "output_activations": None,
    }


def _of_inputs(act: ActivationScheme) -> dict[str, Any]:
    return _arguments(act.format, act.granularity, act.symmetric, dynamic=act.dynamic)


def _arguments(fmt: NumberFormat, granularity: Granularity, symmetric: bool, *, dynamic: bool) -> dict[str, Any]:
    is_block = isinstance(granularity, PerBlock)
    found: dict[str, Any] = {
        "num_bits": fmt.bits,
        "type": "int" if fmt.is_integer else "float",
        "symmetric": symmetric,
        "strategy": _STRATEGIES[type(granularity)],
        "group_size": None if is_block else getattr(granularity, "group_size", None),
        "dynamic": dynamic,
    }
    return found | ({"block_structure": [BLOCK_SIZE, BLOCK_SIZE]} if is_block else {})

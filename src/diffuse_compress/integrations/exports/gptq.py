"""GPTQ's files: what GPTQModel, transformers with it, vLLM and SGLang read.

Source: github.com/ModelCloud/GPTQModel 7.4. For a linear layer [N, K] with b bits and groups of g columns:
``qweight`` int32 [K * b / 32, N], words along K; ``qzeros`` int32 [K / g, N * b / 32], words along N; ``scales``
[K / g, N]; ``g_idx`` int32 [K], the group of each column. ``checkpoint_format`` "gptq" stores zero points less one, and
is written for symmetric weights (every zero point is 2**(b - 1)); "gptq_v2" stores them as they are, and is written for
asymmetric ones, since a zero point of 0 has no code in the older one.

Scales are defined in float16, and written so where every one of a layer's is such a number (those of an imported
checkpoint are). Others stay fp32: readers cast to the dtype that they compute in.
"""

from __future__ import annotations

import re
from typing import Any

import torch

from diffuse_compress.integrations.exports.base import LanguageFormat, LayerFacts, Layout, stored_scale
from diffuse_compress.quantization.layers import QuantizedLinear
from diffuse_compress.quantization.scheme import PerTensor, Scheme
from diffuse_compress.quantization.word_packing import pack_words, unsigned_codes

__all__ = ["GPTQ", "V1", "V2"]

V1, V2 = "gptq", "gptq_v2"
_IN_BLOCK = re.compile(r"(.*?)\.(\d+)\.(.+)")


class GPTQ(LanguageFormat):
    """Integer weights of one kind, in the blocks of one list; the same layers of every block."""

    name = "gptq"
    title = "GPTQ's format"
    package = "gptqmodel optimum"

    def _own_reason(self, facts: LayerFacts) -> str | None:
        return weight_only_reason(self.title, facts) or _shape_reason(facts)

    def whole_reason(self, layout: Layout) -> str | None:
        """One bits, group size and symmetry in the file; layers named by their place in a block."""
        kinds = {_kind(scheme) for scheme in layout.schemes.values()}
        if len(kinds) > 1:
            names = sorted(f"{bits} bits, group size {size}, sym={sym}" for bits, size, sym in kinds)
            return f"{self.title} has one kind of weight in a file, found {len(names)}: {'; '.join(names)}"
        places: dict[str, set[str]] = {}
        for name in layout.schemes:
            block, place = _place(name)
            places.setdefault(block, set()).add(place)
        if len(places) > 1 or "" in places:
            outside = sorted(name for name in layout.schemes if not _place(name)[0]) or sorted(places)
            return f"{self.title} quantizes layers in the blocks of one list, found others: {', '.join(outside[:3])}"
        block, quantized = next(iter(places.items()))
        some = sorted(name for name in layout.dense if _place(name)[0] == block and _place(name)[1] in quantized)
        if some:
            return f"{self.title} names layers by their place in every block, and some of these stay dense: {some[0]}"
        return None

    def config(self, layout: Layout) -> dict[str, Any]:
        """As GPTQModel writes it; ``dynamic`` and ``modules_in_block_to_quantize`` tell what in a block stays dense."""
        bits, group_size, symmetric = _kind(next(iter(layout.schemes.values())))
        block = _place(next(iter(layout.schemes)))[0]
        places = dict.fromkeys(_place(name)[1] for name in layout.schemes)
        config: dict[str, Any] = {
            "quant_method": self.name,
            "bits": bits,
            "group_size": group_size,
            "sym": symmetric,
            "desc_act": False,
            "lm_head": False,
            "checkpoint_format": V1 if symmetric else V2,
            "pack_dtype": "int32",
            "block_name_to_quantize": block,
        }
        dense = dict.fromkeys(place for prefix, place in map(_place, layout.dense) if prefix == block)
        if dense:
            config["modules_in_block_to_quantize"] = [[place] for place in places]
            config["dynamic"] = {rf"-:{re.escape(block)}\.\d+\.{re.escape(place)}$": {} for place in dense}
        return config

    def tensors(self, layer: QuantizedLinear) -> dict[str, torch.Tensor]:
        """Module docstring."""
        weight = layer.quantized_weight()
        bits, columns = layer.scheme.weight.format.bits, weight.in_features
        codes, zeros = unsigned_codes(weight)
        stored = zeros - 1 if layer.scheme.weight.symmetric else zeros
        return {
            "qweight": pack_words(codes, bits).T.contiguous(),
            "qzeros": pack_words(stored.to(torch.uint8).T.contiguous(), bits),
            "scales": stored_scale(weight.scale.detach().T.contiguous(), torch.float16),
            "g_idx": group_index(columns, layer.scheme.weight.group_size, codes.device),
        }


def group_index(columns: int, group_size: int | None, device: torch.device) -> torch.Tensor:
    """Group of each column, int32 [K]."""
    return torch.arange(columns, dtype=torch.int32, device=device) // (group_size or columns)


def weight_only_reason(title: str, facts: LayerFacts) -> str | None:
    """Why a format of integer weights per group or row does not hold a layer; None if it may."""
    scheme = facts.scheme
    if scheme.activation is not None:
        return f"{scheme.name} with quantized inputs, which {title} does not have"
    if not scheme.weight.format.is_integer:
        return f"{scheme.name}; {title} holds integers only"
    if isinstance(scheme.weight.granularity, PerTensor):
        return f"{scheme.name} with one scale for the tensor; {title} has one per row or group"
    return None


def _shape_reason(facts: LayerFacts) -> str | None:
    bits = facts.scheme.weight.format.bits
    if any(side * bits % 32 for side in facts.shape):
        return f"{facts.scheme.name} of sides {list(facts.shape)}, which do not fill words of 32 bits"
    return None


def _kind(scheme: Scheme) -> tuple[int, int, bool]:
    """(bits, group size or -1, symmetric)."""
    weight = scheme.weight
    return weight.format.bits, weight.group_size or -1, weight.symmetric


def _place(name: str) -> tuple[str, str]:
    """("model.layers", "mlp.up_proj") of "model.layers.3.mlp.up_proj"; ("", name) outside of blocks."""
    found = _IN_BLOCK.fullmatch(name)
    return (found[1], found[3]) if found else ("", name)

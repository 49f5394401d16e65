"""AWQ's files in the layout of its GEMM kernel: what AutoAWQ, GPTQModel, transformers with it, vLLM and SGLang read.

Source: AutoAWQ's WQLinear_GEMM, as GPTQModel 7.4 keeps it. For a linear layer [N, K] in four bits and groups of g
columns: ``qweight`` int32 [K, N / 8], words along N with their eight columns interleaved (``AWQ_ORDER``); ``qzeros``
int32 [K / g, N / 8] alike; ``scales`` [K / g, N]. Zero points are stored as they are: symmetric weights have 8.

Scales: as in ``gptq.py``.
"""

from __future__ import annotations

from typing import Any

import torch

from diffuse_compress.integrations.exports.base import LanguageFormat, LayerFacts, Layout, stored_scale
from diffuse_compress.integrations.exports.gptq import weight_only_reason
from diffuse_compress.quantization.layers import QuantizedLinear
from diffuse_compress.quantization.scheme import NumberFormat
from diffuse_compress.quantization.word_packing import AWQ_ORDER, pack_words, unsigned_codes

__all__ = ["AWQ", "interleaved"]

_PER_WORD = len(AWQ_ORDER)


class AWQ(LanguageFormat):
    """int4 weights of one group size, in every linear layer that is not listed as dense."""

    name = "awq"
    title = "AWQ's format"
    package = "gptqmodel"

    def _own_reason(self, facts: LayerFacts) -> str | None:
        reason = weight_only_reason(self.title, facts)
        if reason is None and facts.scheme.weight.format is not NumberFormat.INT4:
            return f"{facts.scheme.name}; {self.title} holds int4 only"
        if reason is None and facts.shape[0] % _PER_WORD:
            return f"{facts.scheme.name} of {facts.shape[0]} rows; {self.title} packs eight into a word"
        return reason

    def whole_reason(self, layout: Layout) -> str | None:
        """One group size in the file; names of dense layers are taken as pieces of text."""
        sizes = {scheme.weight.group_size or -1 for scheme in layout.schemes.values()}
        if len(sizes) > 1:
            return f"{self.title} has one group size in a file, found {', '.join(map(str, sorted(sizes)))}"
        if layout.head in layout.schemes:
            return f"{self.title}'s readers leave the output layer dense, and {layout.head} is quantized"
        for dense in layout.dense:
            caught = next((name for name in layout.schemes if dense in name), None)
            if caught is not None:
                return f"{self.title}'s readers would leave {caught} dense beside {dense}, whose name it contains"
        return None

    def config(self, layout: Layout) -> dict[str, Any]:
        """As AutoAWQ writes it."""
        return {
            "quant_method": self.name,
            "bits": 4,
            "group_size": next(iter(layout.schemes.values())).weight.group_size or -1,
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": list(layout.dense) or None,
        }

    def tensors(self, layer: QuantizedLinear) -> dict[str, torch.Tensor]:
        """Module docstring."""
        weight = layer.quantized_weight()
        codes, zeros = unsigned_codes(weight)
        return {
            "qweight": pack_words(interleaved(codes.T), 4),
            "qzeros": pack_words(interleaved(zeros.to(torch.uint8).T), 4),
            "scales": stored_scale(weight.scale.detach().T.contiguous(), torch.float16),
        }


def interleaved(codes: torch.Tensor, *, back: bool = False) -> torch.Tensor:
    """Columns of [R, N] in the order in which AWQ's words hold them; ``back`` is the inverse."""
    order = torch.tensor(AWQ_ORDER, device=codes.device)
    if back:
        order = order.argsort()
    return codes.reshape(len(codes), -1, _PER_WORD)[..., order].reshape(len(codes), -1)

"""transformers' ``fp8`` (FineGrainedFP8Config): the files of DeepSeek-V3, for vLLM and SGLang, too.

Source: transformers 5.24, ``integrations/finegrained_fp8.py``. For a linear layer [N, K]: ``weight`` float8_e4m3fn
[N, K]; ``weight_scale_inv`` fp32, what codes are multiplied by: [N / 128, K / 128], rounded up, with
``weight_block_size`` [128, 128], one number without; ``activation_scale``, one fp32 number, for static inputs. Dynamic
inputs have a scale per row and 128 columns beside blocks, and per row without.
"""

from __future__ import annotations

import re
from typing import Any

import torch

from diffuse_compress.integrations.exports.base import LanguageFormat, LayerFacts, Layout
from diffuse_compress.quantization.layers import QuantizedLinear
from diffuse_compress.quantization.scheme import BLOCK_SIZE, PerBlock, PerGroup, PerTensor, PerToken, Scheme

__all__ = ["FP8"]


class FP8(LanguageFormat):
    """float8 weights and inputs of one form, in every linear layer that is not listed as dense."""

    name = "fp8"
    title = "transformers' fp8"
    package = "kernels"

    def _own_reason(self, facts: LayerFacts) -> str | None:
        scheme, granularity = facts.scheme, facts.scheme.weight.granularity
        act = scheme.activation
        if scheme.weight.format.is_integer:
            return f"{scheme.name}; {self.title} holds float8 only"
        if not isinstance(granularity, PerBlock | PerTensor):
            return f'{scheme.name} with a scale per row; {self.title} has one per block ("fp8_block") or per tensor'
        if act is None:
            return f"{scheme.name}; {self.title}'s readers quantize the inputs, too"
        if act.dynamic and not isinstance(act.granularity, PerGroup if isinstance(granularity, PerBlock) else PerToken):
            how = "per row and 128 columns" if isinstance(granularity, PerBlock) else "per row"
            return f"{scheme.name} whose dynamic inputs have other scales than {self.title}'s, {how}"
        if isinstance(granularity, PerBlock) and any(_is_misread(side) for side in facts.shape):
            return (
                f"{scheme.name} of sides {list(facts.shape)}: where transformers dequantizes (on a CPU), it takes "
                f"blocks to be of equal size, which they are in multiples of {BLOCK_SIZE}. "
                'format="compressed-tensors" has no such limit for rows'
            )
        return None

    def whole_reason(self, layout: Layout) -> str | None:
        """One form in the file; names of dense layers are taken as patterns and as endings."""
        kinds = {_kind(scheme) for scheme in layout.schemes.values()}
        if len(kinds) > 1:
            names = ", ".join(sorted({scheme.name for scheme in layout.schemes.values()}))
            return f"{self.title} has one form of weights and inputs in a file, found {names}"
        for dense in layout.dense:
            begins = re.compile(rf"(?:{dense})(?:(?<=\.)|(?=\.|$))")
            caught = next((name for name in layout.schemes if begins.match(name) or name.endswith(dense)), None)
            if caught is not None:
                return f"{self.title}'s readers would leave {caught} dense, whose name {dense} fits as well"
        return None

    def config(self, layout: Layout) -> dict[str, Any]:
        """As FineGrainedFP8Config writes it."""
        is_block, static = _kind(next(iter(layout.schemes.values())))
        return {
            "quant_method": self.name,
            "activation_scheme": "static" if static else "dynamic",
            "fmt": "e4m3",
            "weight_block_size": [BLOCK_SIZE, BLOCK_SIZE] if is_block else None,
            # Even an empty list: without one, readers keep the output layer dense.
            "modules_to_not_convert": list(layout.dense),
        }

    def tensors(self, layer: QuantizedLinear) -> dict[str, torch.Tensor]:
        """Module docstring; scales stay fp32 whatever the model's dtype."""
        scale = layer.scale.detach()
        found = {
            "weight": layer.qweight.detach(),
            "weight_scale_inv": scale if isinstance(layer.scheme.weight.granularity, PerBlock) else scale.reshape(()),
        }
        if layer.input_scale is not None:
            found["activation_scale"] = layer.input_scale.detach().reshape(())
        return found


def _is_misread(side: int) -> bool:
    return side > BLOCK_SIZE and side % BLOCK_SIZE != 0


def _kind(scheme: Scheme) -> tuple[bool, bool]:
    """(per block, static inputs)."""
    return isinstance(scheme.weight.granularity, PerBlock), scheme.has_static_inputs

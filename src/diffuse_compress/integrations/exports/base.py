"""What a format of others for language models is to us: what it can hold, its configuration, and a layer's tensors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from diffuse_compress.quantization.layers import QuantizedConv2d, QuantizedLinear
from diffuse_compress.quantization.packed import QuantizedWeight
from diffuse_compress.quantization.scheme import Bilevel, PerGroup, PerInputGroup, Scheme, TwoLevel
from diffuse_compress.quantization.word_packing import unsigned_codes

__all__ = ["LanguageFormat", "LayerFacts", "Layout", "layout_of", "stored_scale"]


@dataclass(frozen=True)
class LayerFacts:
    """What decides whether a format can hold a layer.

    Attributes:
        scheme: the layer's.
        shape: (N, K) of its weight.
        is_convolution: it is no linear layer.
        is_smoothed: it has an ``act_pre_scale``.
        is_low_rank: it has a low-rank branch.
        is_shifted: a shift of its input is with it, or has given it a bias.
        has_dense_columns: some of its input columns have no codes.
        weight: codes and scales; None for a layer that is not quantized yet.
    """

    scheme: Scheme
    shape: tuple[int, int]
    is_convolution: bool = False
    is_smoothed: bool = False
    is_low_rank: bool = False
    has_dense_columns: bool = False
    weight: QuantizedWeight | None = None
    is_shifted: bool = False

    @classmethod
    def of(cls, layer: QuantizedLinear | QuantizedConv2d) -> LayerFacts:
        """Those of a live layer."""
        weight = layer.quantized_weight()
        return cls(
            layer.scheme,
            (layer.qweight.shape[0], weight.in_features),
            isinstance(layer, QuantizedConv2d),
            layer.act_pre_scale is not None,
            layer.low_rank_down is not None,
            layer.dense_columns is not None,
            weight,
            layer.act_pre_shift is not None or layer.gained_bias,
        )


@dataclass(frozen=True)
class Layout:
    """Which linear layers of a model are quantized, and how.

    Attributes:
        schemes: {qualified name: scheme} of those that are.
        dense: qualified names of those that are not.
        head: name of the output layer, "" if there is none.
    """

    schemes: Mapping[str, Scheme]
    dense: tuple[str, ...]
    head: str = ""


class LanguageFormat(ABC):
    """One format. Subclasses are stateless.

    Attributes:
        name: what users write.
        title: for messages.
        package: what a reader in transformers needs beside it, for the model card.
    """

    name: str
    title: str
    package: str

    def reason(self, facts: LayerFacts) -> str | None:
        """Why this format does not hold such a layer exactly; None if it does."""
        scheme, granularity = facts.scheme, facts.scheme.weight.granularity
        if facts.is_convolution:
            return f"a convolution; {self.title} knows linear layers only"
        if facts.is_low_rank:
            return f"{scheme.name} with a low-rank branch, which {self.title} does not have"
        if facts.has_dense_columns:
            return f"{scheme.name} with dense input columns beside the codes, which {self.title} does not have"
        if scheme.activation is not None and scheme.activation.outlier_threshold is not None:
            return f"{scheme.name} with columns chosen at run time (LLM.int8), which {self.title} does not have"
        if isinstance(granularity, Bilevel):
            return (
                f"{scheme.name} with scales that are codes themselves and sparse outliers (SpQR), which {self.title} "
                "does not have: use PerGroup(128)"
            )
        if scheme.input_rotation is not None:
            return f"{scheme.name} of inputs that are rotated at run time, which {self.title}'s readers do not do"
        if facts.is_shifted:
            return (
                f"{scheme.name} with a shift of its inputs, or a bias that came of one, for which {self.title} has no "
                "place: use shift=False"
            )
        if facts.is_smoothed:
            return (
                f"{scheme.name} with a smoothing scale of its inputs, which {self.title} does not have: use fold=True, "
                "which moves it into the layer before where that can be"
            )
        if isinstance(granularity, TwoLevel):
            return f"{scheme.name} with two levels of scales, which {self.title} does not have: use PerGroup(128)"
        if isinstance(granularity, PerInputGroup):
            return f"{scheme.name} with groups of rows, which {self.title} does not have: use PerGroup(128)"
        if scheme.weight.stores_float_zero_point:
            return f"{scheme.name} with zero points that are no integers, which {self.title} does not have"
        if isinstance(granularity, PerGroup) and facts.shape[1] % granularity.group_size:
            return f"{scheme.name} with a last group that is not full, which {self.title} does not have"
        return self._own_reason(facts) or _zero_point_reason(facts)

    @abstractmethod
    def _own_reason(self, facts: LayerFacts) -> str | None:
        """As :meth:`reason`, for what only this format cannot do."""

    @abstractmethod
    def whole_reason(self, layout: Layout) -> str | None:
        """Why the format cannot say which layers are quantized how; None if it can."""

    @abstractmethod
    def config(self, layout: Layout) -> dict[str, Any]:
        """``quantization_config`` of config.json."""

    @abstractmethod
    def tensors(self, layer: QuantizedLinear) -> dict[str, torch.Tensor]:
        """What stands in the file for the layer, by leaf name; its bias is written as it is."""


def stored_scale(scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``scale`` in ``dtype`` where that holds every one of them exactly, in fp32 where not: none is rounded."""
    scale = scale.detach()
    cast = scale.to(dtype)
    return cast if torch.equal(cast.float(), scale) else scale.clone()


def _zero_point_reason(facts: LayerFacts) -> str | None:
    if facts.weight is None or facts.weight.zero_point is None:
        return None
    _, zeros = unsigned_codes(facts.weight)
    if int(zeros.min()) < 0 or int(zeros.max()) >= 1 << facts.scheme.weight.format.bits:
        return f"{facts.scheme.name} with zero points outside the range of its codes"
    return None


def layout_of(model: nn.Module, schemes: Mapping[str, Scheme]) -> Layout:
    """The layout of a model whose layers of these names are, or will be, quantized."""
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if callable(get_head) else None
    named = next((name for name, module in linears.items() if module is head), "")
    return Layout(dict(schemes), tuple(name for name in linears if name not in schemes), named)

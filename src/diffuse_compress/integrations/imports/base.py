"""What reading a foreign layer gives, and the check that it means the same weight."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from diffuse_compress.errors import ConfigError, reasons_text
from diffuse_compress.quantization.layers import QuantizedLinear
from diffuse_compress.quantization.numerics import dequantize
from diffuse_compress.quantization.packed import QuantizedWeight
from diffuse_compress.quantization.scheme import Scheme

__all__ = ["ForeignLayer", "NotImportableError", "as_linear", "config_error", "require_equal"]


class NotImportableError(Exception):
    """A layer that our formats cannot hold exactly; the message is a reason, ``what it is, and what to do``."""


@dataclass(frozen=True)
class ForeignLayer:
    """A linear layer as its source stores it, in our containers.

    Attributes:
        weight: codes and scales, none of them computed anew.
        scheme: the layer's; ``scheme.weight`` is ``weight.scheme``.
        compute_dtype: dtype that the source computes in.
        source: what it was, e.g. "GGUF Q8_0".
        extra: ``act_pre_scale``, ``input_scale`` and ``low_rank`` of :meth:`QuantizedLinear.from_dense`.
        bias: [N], where it is not the module's own.
    """

    weight: QuantizedWeight
    scheme: Scheme
    compute_dtype: torch.dtype
    source: str
    extra: dict[str, Any] = field(default_factory=dict)
    bias: torch.Tensor | None = None


def as_linear(module: nn.Linear, found: ForeignLayer) -> QuantizedLinear:
    """Our layer in place of ``module``, whose sizes, bias and training mode are taken."""
    if found.bias is not None:
        module = _with_bias(module, found.bias)
    return QuantizedLinear.from_dense(
        module, found.weight, found.scheme, compute_dtype=found.compute_dtype, **found.extra
    )


def _with_bias(module: nn.Linear, bias: torch.Tensor) -> nn.Linear:
    like = nn.Linear(module.in_features, module.out_features, device="meta")
    like.bias = nn.Parameter(bias, requires_grad=False)
    return like.train(module.training)


def require_equal(weight: QuantizedWeight, theirs: torch.Tensor) -> None:
    """Raise NotImportableError unless ``weight`` dequantizes to ``theirs`` [N, K] (fp32), bit for bit; -0 equals 0."""
    if not bool(weight.scale.isfinite().all()):
        raise NotImportableError("a scale is inf or nan; the file is damaged: download it again")
    ours = dequantize(weight)
    if ours.shape != theirs.shape or not torch.equal(ours, theirs):
        off = "another shape" if ours.shape != theirs.shape else f"up to {float((ours - theirs).abs().max()):.3g} off"
        raise NotImportableError(
            f"its weights would not be equal bit for bit ({off}): call dequantize() on the model, then compress()"
        )


def config_error(where: str, reasons: dict[str, str]) -> ConfigError:
    """One error for all layers that cannot be imported: {layer: reason}."""
    return ConfigError(
        f"{where}: import_quantized needs layers that our formats hold exactly, got {len(reasons)} that they do not. "
        f"{reasons_text(reasons)}. Nothing was changed."
    )

"""Attention by the fused low-bit kernel, where it runs and pays; by the stock product elsewhere, and counted.

``AttentionFormat.INT8_QK`` computes logits on int8 codes, ``FP8_PV`` also multiplies probabilities by values in float8.
The CPU computes the same numbers without a kernel, so that quality can be measured there.
"""

from __future__ import annotations

import warnings
from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F

from diffuse_compress.errors import DiffuseCompressWarning
from diffuse_compress.quantization.attention import AttentionFormat
from diffuse_compress_kernels import attention_is_measured, attention_obstacle, int8_attention

__all__ = ["AttentionStats", "attention_stats", "fused_attention", "reset_attention_stats"]

# Fewer keys than this are read and multiplied in less time than it takes to make codes of them.
LEAST_KEYS = 256
# Decoding: one product reads all keys once, and codes of them would be made for it alone.
LEAST_QUERIES = 16
_FEW_KEYS = f"fewer than {LEAST_KEYS} keys"
_FEW_QUERIES = f"fewer than {LEAST_QUERIES} queries"
_NOT_WORTH_IT = (_FEW_KEYS, _FEW_QUERIES)


@dataclass
class AttentionStats:
    """Calls of attention by format; those inside of a compiled graph are not seen.

    Attributes:
        fused: calls that low-bit products computed.
        stock: calls that the stock product computed, by format and reason.
        unmeasured: devices on which low-bit products ran, and nobody has timed them.
    """

    fused: Counter[str] = field(default_factory=Counter)
    stock: Counter[tuple[str, str]] = field(default_factory=Counter)
    unmeasured: set[str] = field(default_factory=set)

    def __str__(self) -> str:
        lines = [f"{name}: {count} calls" for name, count in self.fused.most_common()]
        lines += [f"{name}: stock product {count} times: {why}" for (name, why), count in self.stock.most_common()]
        lines += [f"speed of low-bit products: unmeasured on {name}" for name in sorted(self.unmeasured)]
        return "\n".join(lines) or "No attention ran on low-bit products."

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable."""
        stock: dict[str, dict[str, int]] = {}
        for (name, why), count in self.stock.items():
            stock.setdefault(name, {})[why] = count
        return {"fused": dict(self.fused), "stock": stock, "unmeasured": sorted(self.unmeasured)}


_STATS = AttentionStats()


def attention_stats() -> AttentionStats:
    """Attention calls on low-bit products since the start, or :func:`reset_attention_stats`."""
    return AttentionStats(Counter(_STATS.fused), Counter(_STATS.stock), set(_STATS.unmeasured))


def reset_attention_stats() -> None:
    """Count from 0, and warn of stock products again."""
    _STATS.fused.clear()
    _STATS.stock.clear()
    _STATS.unmeasured.clear()


def fused_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    form: AttentionFormat,
) -> torch.Tensor:
    """What ``torch.nn.functional.scaled_dot_product_attention`` returns, in ``form`` where that can be.

    Args:
        query: [B, H, L, D], any strides.
        key: [B, Hkv, S, D].
        value: [B, Hkv, S, D].
        attn_mask: broadcastable to [B, H, L, S]: boolean, True takes part; or added to the logits.
        dropout_p: the stock product computes what has any.
        is_causal: a query sees the keys up to its own place.
        scale: of the logits; 1 / sqrt(D) by default.
        enable_gqa: keys and values have fewer heads, each for several queries' heads.
        form: INT8_QK or FP8_PV.

    Gradients are those of the stock product. A format that a device, dtype, mask or shape does not allow is replaced by
    the stock product, with one warning for each reason; so are few keys or queries, without.
    """
    obstacle = _obstacle(query, key, value, attn_mask, dropout_p, scale, enable_gqa, form)
    if not torch.compiler.is_compiling():
        _count(form, obstacle, query.device)
    if obstacle is not None:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    fast = form is AttentionFormat.FP8_PV
    return int8_attention(query, key, value, attn_mask, scale=scale, causal=is_causal, fp8_values=fast)


def _obstacle(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    dropout: float,
    scale: float | None,
    enable_gqa: bool,
    form: AttentionFormat,
) -> str | None:
    """Why the stock product is to compute it, or None."""
    if query.dim() != 4 or key.dim() != 4:
        return f"tensors of {query.dim()} dimensions"
    if dropout:
        return "dropout"
    if scale is not None and scale <= 0:
        return f"a scale of {scale}"
    if query.shape[1] != key.shape[1] and not enable_gqa:
        return "heads that do not match"
    if not query.dtype == key.dtype == value.dtype:
        return "tensors of several dtypes"
    if mask is not None and mask.requires_grad and torch.is_grad_enabled():
        return "a mask with gradients"
    if mask is not None and mask.dtype != torch.bool and not mask.dtype.is_floating_point:
        return f"a mask of {str(mask.dtype).removeprefix('torch.')}"
    if key.shape[2] < LEAST_KEYS:
        return _FEW_KEYS
    if query.shape[2] < LEAST_QUERIES:
        return _FEW_QUERIES
    if query.device.type == "cpu" and query.dtype.itemsize <= 4 and key.shape == value.shape:
        return None
    return attention_obstacle(query, key, value, fp8_values=form is AttentionFormat.FP8_PV)


def _count(form: AttentionFormat, obstacle: str | None, device: torch.device) -> None:
    if obstacle is None:
        _STATS.fused[form.value] += 1
        if not attention_is_measured(device):
            _STATS.unmeasured.add(_name_of(device))
        return
    _STATS.stock[form.value, obstacle] += 1
    if obstacle not in _NOT_WORTH_IT and _STATS.stock[form.value, obstacle] == 1:
        warnings.warn(
            f'attention: "{form.value}" is computed by the stock product: {obstacle}. attention_stats() counts such '
            'calls; set_attention_backend("native") or attention=None ends this.',
            DiffuseCompressWarning,
            stacklevel=3,
        )


@cache
def _name_of(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type

"""Attention with its two products on int8 codes: queries by keys, and probabilities by values.

With integer codes q_i, k_j, p_ij, v_jd and their scales,

    logits_ij = s_i t_j sum_d q_id k_jd * scale,    output_id = r_i u_d sum_j p_ij v_jd,

where s, t are of a token, u of a channel, and r of a query: each stands outside of the sum it belongs to. Queries, keys
and values are symmetric int8. Probabilities are never negative, so their codes are 0 to 255 with no zero point; their
scale is the query's largest over 255, since a scale for all of them (TFMQ-DM's code, arXiv 2311.16503, has one) rounds
to 0 what is spread over thousands of keys. All scales are measured on every call.

Sums are exact, as in int32: products of codes are summed in float32 where they stay under 2^24 (518 keys, heads of
1,040 channels), in parts otherwise, which are added in float64. There is no fused kernel: probabilities are written out
for a block of queries at a time, so this costs time where the stock product would not.
"""

from __future__ import annotations

import math
from enum import Enum

import torch
import torch.nn.functional as F

from diffuse_compress.errors import ConfigError, nearest

__all__ = ["AttentionFormat", "attention_format", "quantized_attention"]

_SIGNED, _UNSIGNED = 127, 255
_EXACT = 1 << 24
# Elements of the probabilities that stand in memory at a time.
_BLOCK = 1 << 24
_SMALLEST = torch.finfo(torch.float32).tiny


class AttentionFormat(str, Enum):
    """What attention's two products are computed in.

    INT8: both on int8 codes, as TFMQ-DM evaluates it (this module); slower than the stock product.
    INT8_QK: queries by keys on int8 codes, probabilities by values in the model's dtype (``fused_attention.py``).
    FP8_PV: the same, and probabilities by values in float8.
    """

    INT8 = "int8"
    INT8_QK = "int8_qk"
    FP8_PV = "fp8_pv"


def attention_format(value: str | None) -> AttentionFormat | None:
    """The format of attention's products that ``value`` names. Raises ConfigError for what is none."""
    if value is None:
        return None
    name = value.value if isinstance(value, Enum) else value
    names = [form.value for form in AttentionFormat]
    if name not in names:
        raise ConfigError(f"attention: {nearest(str(name), names)}, or None; got {name!r}.")
    return AttentionFormat(name)


def quantized_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """What ``torch.nn.functional.scaled_dot_product_attention`` returns, by the equations above.

    Args:
        query: [..., L, D], any float dtype.
        key: [..., S, D].
        value: [..., S, E].
        attn_mask: broadcastable to [..., L, S]: boolean, True takes part; or added to the logits.
        dropout_p: must be 0.
        is_causal: a query sees the keys up to its own place.
        scale: of the logits; 1 / sqrt(D) by default.
        enable_gqa: keys and values have fewer heads, each for several queries' heads.

    Gradients are those of the stock product.

    Raises:
        ConfigError: dropout.
    """
    if dropout_p:
        raise ConfigError(f"attention: int8 products know no dropout, got dropout_p={dropout_p}. Call eval().")
    if enable_gqa:
        repeats = query.shape[-3] // key.shape[-3]
        key, value = (x.repeat_interleave(repeats, dim=-3) for x in (key, value))
    if torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value)):
        plain = F.scaled_dot_product_attention(query, key, value, attn_mask, 0.0, is_causal, scale=scale)
        with torch.no_grad():
            exact = quantized_attention(query, key, value, attn_mask, 0.0, is_causal, scale)
        return plain + (exact - plain).detach()
    factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    q, q_scale = _codes(query, -1)
    k, k_scale = _codes(key, -1)
    v, v_scale = _codes(value, -2)
    keys, queries = key.shape[-2], query.shape[-2]
    k_scale = k_scale.transpose(-1, -2) * factor
    step = max(1, _BLOCK // max(1, query.shape[:-2].numel() * keys))
    parts = []
    for start in range(0, queries, step):
        rows = slice(start, start + step)
        logits = _product(q[..., rows, :], k.transpose(-1, -2), _SIGNED) * q_scale[..., rows, :] * k_scale
        logits = _masked(logits, attn_mask, is_causal, start)
        shares = torch.softmax(logits, dim=-1)
        largest = shares.amax(dim=-1, keepdim=True).clamp(min=_SMALLEST)
        codes = (shares * (_UNSIGNED / largest)).round_()
        parts.append(_product(codes, v, _UNSIGNED) * (largest / _UNSIGNED) * v_scale)
    return torch.cat(parts, dim=-2).to(query.dtype)


def _codes(x: torch.Tensor, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes as float32, scale) of symmetric int8, one scale for what varies along ``dim``."""
    values = x.detach().float()
    scale = values.abs().amax(dim=dim, keepdim=True).clamp(min=_SMALLEST) / _SIGNED
    return (values / scale).round_().clamp_(-_SIGNED, _SIGNED), scale


def _product(one: torch.Tensor, other: torch.Tensor, largest: int) -> torch.Tensor:
    """fp32 ``one @ other`` of codes up to ``largest`` and 127, summed exactly; operands of eight bits are exact in
    every product dtype that float32 may be lowered to."""
    depth, most = one.shape[-1], _EXACT // (largest * _SIGNED)
    if depth <= most:
        return one @ other
    total = torch.zeros((), dtype=torch.float64, device=one.device)
    for start in range(0, depth, most):
        total = total + (one[..., start : start + most] @ other[..., start : start + most, :]).double()
    return total.float()


def _masked(logits: torch.Tensor, mask: torch.Tensor | None, is_causal: bool, start: int) -> torch.Tensor:
    queries, keys = logits.shape[-2:]
    if is_causal:
        places = torch.arange(start, start + queries, device=logits.device).unsqueeze(1)
        logits = logits.masked_fill(torch.arange(keys, device=logits.device) > places, -torch.inf)
    if mask is None:
        return logits
    part = mask if mask.shape[-2] == 1 else mask[..., start : start + queries, :]
    return logits.masked_fill(~part, -torch.inf) if part.dtype == torch.bool else logits + part

"""Attention on codes in plain torch, for the CPU and for what the Triton kernels do not run.

    codes of keys      round((k - mean_n k) / t), t the largest of 128 keys and all channels / 127
    codes of queries   round(q / s), s the largest of a query / 127
    p                  exp(s t (codes . codes) * scale + mask - its largest), rounded to the dtype of v
    fast               p = e4m3(256 p) / 256, v = u e4m3(v / u), u the largest of a channel / 448

Sums of products of codes are exact: up to 1,040 channels they stay below 2^24, as float32 holds them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from diffuse_compress_kernels.attention.reference import keep_mask
from diffuse_compress_kernels.fp8_linear.op import FLOAT8_MAX, MIN_SCALE
from diffuse_compress_kernels.triton_kernels.attention_tables import KEY_BLOCK

__all__ = ["attend_plain", "key_codes", "query_codes", "value_codes"]

INT8_MAX = 127
FLOAT8_SHARE = 256.0
# Logits that stand in memory at a time.
_BLOCK_ELEMENTS = 1 << 22


def query_codes(query: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 [B, H, S, D], and fp32 [B, H, S, 1]."""
    values = query.float()
    scale = (values.abs().amax(dim=-1, keepdim=True) / INT8_MAX).clamp(min=MIN_SCALE)
    return (values / scale).round_().to(torch.int8), scale


def key_codes(key: torch.Tensor, lengths: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 [B, H, S, D] of keys without their mean, and fp32 [B, H, ceil(S / 128)]; beyond a length codes are 0."""
    values = _counted(key.float(), lengths)
    keys = key.shape[2]
    if lengths is None:
        mean = values.sum(dim=2, keepdim=True) / keys
    else:
        mean = values.sum(dim=2, keepdim=True) / lengths.clamp(1, keys).view(-1, 1, 1, 1)
    values = _counted(values - mean, lengths)
    padded = F.pad(values, (0, 0, 0, -keys % KEY_BLOCK)).unflatten(2, (-1, KEY_BLOCK))
    scale = (padded.abs().amax(dim=(-1, -2)) / INT8_MAX).clamp(min=MIN_SCALE)
    codes = (padded / scale[..., None, None]).round_().to(torch.int8)
    return codes.flatten(2, 3)[:, :, :keys], scale


def value_codes(value: torch.Tensor, lengths: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """float8_e4m3fn [B, H, S, D], and fp32 [B, H, 1, D]."""
    values = _counted(value.float(), lengths)
    scale = (values.abs().amax(dim=2, keepdim=True) / FLOAT8_MAX).clamp(min=MIN_SCALE)
    return (values / scale).clamp_(-FLOAT8_MAX, FLOAT8_MAX).to(torch.float8_e4m3fn), scale


def _counted(values: torch.Tensor, lengths: torch.Tensor | None) -> torch.Tensor:
    if lengths is None:
        return values
    outside = torch.arange(values.shape[2], device=values.device).view(-1, 1) >= lengths.view(-1, 1, 1, 1)
    return values.masked_fill(outside, 0.0)


def attend_plain(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    lengths: torch.Tensor | None,
    scale: float,
    causal: bool,
    fp8_values: bool,
    out: torch.Tensor,
) -> None:
    """Write attention into ``out``; arguments as the operator takes them."""
    group = query.shape[1] // key.shape[1]
    q, q_scale = query_codes(query)
    k, k_scale = key_codes(key, lengths)
    k_scale = k_scale.repeat_interleave(KEY_BLOCK, dim=2)[:, :, None, : key.shape[2]] * scale
    shares_scale = torch.ones((), device=query.device)
    if fp8_values:
        codes, v_scale = value_codes(value, lengths)
        v, shares_scale = codes.float(), v_scale / FLOAT8_SHARE
    else:
        v = _counted(value.float(), lengths)
    k, k_scale, v = (x.repeat_interleave(group, dim=1) if group > 1 else x for x in (k.float(), k_scale, v))
    if fp8_values and group > 1:
        shares_scale = shares_scale.repeat_interleave(group, dim=1)
    keep = keep_mask(query.shape[2], key.shape[2], lengths, causal, query.device)
    step = max(1, _BLOCK_ELEMENTS // (query.shape[0] * query.shape[1] * key.shape[2]))
    for start in range(0, query.shape[2], step):
        rows = slice(start, start + step)
        logits = (q[:, :, rows].float() @ k.transpose(-1, -2)) * q_scale[:, :, rows] * k_scale
        if mask is not None:
            part = mask[:, :, rows]
            logits = logits.masked_fill(~part, -torch.inf) if part.dtype == torch.bool else logits + part.float()
        if keep is not None:
            part = keep if keep.shape[-2] == 1 else keep[..., rows, :]
            logits = logits.masked_fill(~part, -torch.inf)
        largest = logits.amax(dim=-1, keepdim=True)
        shares = torch.exp(logits - largest.masked_fill(largest == -torch.inf, 0.0))
        total = shares.sum(dim=-1, keepdim=True)
        if fp8_values:
            shares = (shares * FLOAT8_SHARE).to(torch.float8_e4m3fn).float()
        else:
            shares = shares.to(value.dtype).float()
        out[:, :, rows] = (shares @ v * shares_scale / total).masked_fill(total == 0, 0.0)

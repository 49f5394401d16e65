"""What attention must return, in float64, slow and obvious."""

from __future__ import annotations

import torch

__all__ = ["attention_reference", "keep_mask"]


def keep_mask(
    queries: int, keys: int, lengths: torch.Tensor | None, causal: bool, device: torch.device
) -> torch.Tensor | None:
    """Boolean, broadcastable to [B, H, Sq, Sk]: the keys that lengths and causality leave; None for all."""
    n = torch.arange(keys, device=device)
    keep = None
    if causal:
        keep = n <= torch.arange(queries, device=device).unsqueeze(1)
    if lengths is not None:
        counted = n < lengths.view(-1, 1, 1, 1)
        keep = counted if keep is None else keep & counted
    return keep


def attention_reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None = None,
    *,
    lengths: torch.Tensor | None = None,
    scale: float | None = None,
    causal: bool = False,
) -> torch.Tensor:
    """float64 softmax(scale * q k^T + mask) v of what ``int8_attention`` takes; 0 where no key takes part."""
    group = query.shape[1] // key.shape[1]
    q, k, v = query.double(), *(x.double().repeat_interleave(group, dim=1) for x in (key, value))
    logits = q @ k.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask.double()
    keep = keep_mask(query.shape[2], key.shape[2], lengths, causal, query.device)
    if keep is not None:
        logits = logits.masked_fill(~keep, -torch.inf)
    return torch.softmax(logits, dim=-1).nan_to_num(0.0) @ v

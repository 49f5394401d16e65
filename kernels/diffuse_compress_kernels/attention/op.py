"""Torch operator of attention whose first product is of int8 codes, and whose second is of 16-bit or float8 numbers.

    out = softmax(scale * q (k - mean_n k)^T + mask) v

Subtracting the mean over tokens changes no probability, and removes what channels of keys have in common, which would
take most of the codes' range (SageAttention, Zhang et al. 2024, arXiv 2410.02367); scales of float8 values by channel
and sums of short runs in fp32 are those of SageAttention2 (arXiv 2411.10958). Queries have a scale each, keys one for
128. NVIDIA GPUs with triton run one fused kernel after two launches that make the codes; elsewhere, plain torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from diffuse_compress_kernels import triton_kernels
from diffuse_compress_kernels.attention.plain import attend_plain
from diffuse_compress_kernels.attention.reference import keep_mask
from diffuse_compress_kernels.int8_linear.op import is_plain
from diffuse_compress_kernels.registration import operator
from diffuse_compress_kernels.triton_kernels.attention_tables import MAX_HEAD_DIM, choose_attention, is_measured

__all__ = ["attention_is_measured", "attention_obstacle", "int8_attention"]

HALF_DTYPES = (torch.bfloat16, torch.float16)
LEAST_FLOAT8_CAPABILITY = (8, 9)
# The kernels' offsets within a head are int32.
MAX_OFFSET = 1 << 31
GRID_LIMIT = 65535


def attention_obstacle(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, fp8_values: bool = False
) -> str | None:
    """Why the fused kernel cannot compute an attention, in a few words; None if it can. Arguments as its own."""
    if not triton_kernels.usable(query.device):
        return f"no kernel for {query.device.type} devices like this one"
    if fp8_values and triton_kernels.capability(query.device) < LEAST_FLOAT8_CAPABILITY:
        return "float8 products need compute capability 8.9"
    if query.dtype not in HALF_DTYPES:
        return f"dtype {str(query.dtype).removeprefix('torch.')}"
    if value.shape[-1] != query.shape[-1]:
        return f"values of {value.shape[-1]} channels for keys of {query.shape[-1]}"
    if query.shape[-1] > MAX_HEAD_DIM or query.shape[-1] % 8:
        return f"heads of {query.shape[-1]} channels"
    if query.shape[0] > GRID_LIMIT or query.shape[1] > GRID_LIMIT // 2:
        return "too many heads or samples"
    return None


def attention_is_measured(device: torch.device) -> bool:
    """True where somebody has timed the fused kernel against the stock product; see the tables."""
    return triton_kernels.usable(device) and is_measured(triton_kernels.capability(device))


def _attention_now(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    lengths: torch.Tensor | None,
    scale: float,
    causal: bool,
    fp8_values: bool,
) -> torch.Tensor:
    out = torch.empty_like(query)
    if out.numel() == 0 or key.shape[2] == 0:
        return out.zero_()
    if mask is not None:
        mask = mask.expand(*query.shape[:3], key.shape[2])
    if attention_obstacle(query, key, value, fp8_values=fp8_values) is not None:
        attend_plain(query, key, value, mask, lengths, scale, causal, fp8_values, out)
        return out
    query, key, value = (_readable(x) for x in (query, key, value))
    tile = choose_attention(
        query.shape[2], query.shape[3], triton_kernels.capability(query.device), fp8_values=fp8_values
    )
    codes = triton_kernels.module("attention_codes").quantize_keys_values(key, value, lengths, fp8_values=fp8_values)
    to = out if _readable(out) is out else torch.empty(query.shape, dtype=query.dtype, device=query.device)
    triton_kernels.module("attention").attend(query, value, codes, mask, lengths, scale, causal, tile, to)
    return out if to is out else out.copy_(to)


def _readable(x: torch.Tensor) -> torch.Tensor:
    """x itself if the kernels can address it."""
    fits = x.stride(-1) == 1 and x.shape[2] * x.stride(2) < MAX_OFFSET
    return x if fits else x.contiguous()


def _attention_fake(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    lengths: torch.Tensor | None,
    scale: float,
    causal: bool,
    fp8_values: bool,
) -> torch.Tensor:
    return torch.empty_like(query)


def _attention_flops(query: Sequence[int], key: Sequence[int], *_: Any, **__: Any) -> int:
    """Of two products, masked or not, as torch counts its own."""
    return 4 * math.prod(query) * key[2]


_attention = operator("attention", _attention_now, _attention_fake, flops=_attention_flops)


class _Differentiable(torch.autograd.Function):
    """The operator forward; gradients are those of the stock product at the same inputs, computed again."""

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        lengths: torch.Tensor | None,
        scale: float,
        causal: bool,
        fp8_values: bool,
    ) -> torch.Tensor:
        ctx.save_for_backward(query, key, value, mask, lengths)
        ctx.scale, ctx.causal = scale, causal
        result: torch.Tensor = _attention(query, key, value, mask, lengths, scale, causal, fp8_values)
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        query, key, value, mask, lengths = ctx.saved_tensors
        causal = ctx.causal
        if lengths is not None:
            keep = keep_mask(query.shape[2], key.shape[2], lengths, causal, query.device)
            assert keep is not None
            causal = False
            if mask is None:
                mask = keep
            else:
                mask = mask & keep if mask.dtype == torch.bool else mask.masked_fill(~keep, torch.finfo(mask.dtype).min)
        with torch.enable_grad():
            q, k, v = (x.detach().requires_grad_() for x in (query, key, value))
            shared = query.shape[1] != key.shape[1]
            output = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=ctx.scale, enable_gqa=shared)
            found = torch.autograd.grad(output, (q, k, v), gradients[0])
        return (*found, None, None, None, None, None)


def int8_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None = None,
    *,
    lengths: torch.Tensor | None = None,
    scale: float | None = None,
    causal: bool = False,
    fp8_values: bool = False,
) -> torch.Tensor:
    """Attention [B, H, Sq, D] with the strides of the query's; equation in the module docstring.

    Args:
        query: [B, H, Sq, D], any strides: a transposed [B, S, H, D] is read and written as it is.
        key: [B, Hkv, Sk, D] where Hkv divides H: each head serves H / Hkv consecutive ones of queries.
        value: like key.
        mask: broadcastable to [B, H, Sq, Sk]: boolean, True takes part; or floats that are added to the logits.
        lengths: int32 [B]: only the first keys of a sample count, whatever stands behind them.
        scale: positive factor of the logits; 1 / sqrt(D) by default.
        causal: query m sees keys 0 to m; not together with a mask.
        fp8_values: the fast variant: probabilities and values in float8_e4m3fn, else in the dtype of value.

    Queries without any key give 0. Gradients are those of ``scaled_dot_product_attention``; a mask gets none.

    Raises:
        ValueError: shapes, dtypes or a scale that do not fit.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    _check(query, key, value, mask, lengths, scale, causal)
    arguments = (query, key, value, mask, lengths, scale, causal, fp8_values)
    if torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value)):
        result: torch.Tensor = _Differentiable.apply(*arguments)
        return result
    if is_plain(query):
        return _attention_now(*arguments)
    result = _attention(*arguments)
    return result


def _check(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    lengths: torch.Tensor | None,
    scale: float,
    causal: bool,
) -> None:
    fits = query.dim() == key.dim() == value.dim() == 4 and key.shape == value.shape
    fits = fits and query.shape[0] == key.shape[0] and query.shape[3] == key.shape[3]
    if not fits or query.shape[1] % max(key.shape[1], 1) or not query.dtype == key.dtype == value.dtype:
        raise ValueError(
            "int8_attention: need query [B, H, Sq, D], key and value [B, Hkv, Sk, D] of one dtype where Hkv divides "
            f"H, got {', '.join(f'{x.dtype} {list(x.shape)}' for x in (query, key, value))}."
        )
    if not query.dtype.is_floating_point or query.element_size() > 4:
        raise ValueError(f"int8_attention: need fp32, bf16 or fp16, got {query.dtype}.")
    if not 0 < scale < math.inf:
        raise ValueError(f"int8_attention: need a positive scale, got {scale}.")
    if mask is not None and (causal or not (mask.dtype == torch.bool or mask.dtype.is_floating_point)):
        raise ValueError(
            f"int8_attention: need a boolean or floating mask without causal=True, got {mask.dtype} and {causal=}."
        )
    if mask is not None and mask.requires_grad and torch.is_grad_enabled():
        raise ValueError("int8_attention: a mask gets no gradient, and this one requires it. Detach it.")
    if lengths is not None and (lengths.dtype != torch.int32 or lengths.shape != query.shape[:1]):
        raise ValueError(
            f"int8_attention: need int32 lengths [{query.shape[0]}], got {lengths.dtype} {list(lengths.shape)}."
        )

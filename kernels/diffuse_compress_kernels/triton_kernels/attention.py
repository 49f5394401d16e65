"""Flash attention whose first product is of int8 codes and whose second is of 16-bit or float8 numbers.

    x[m, n] = s[m] t[n / 128] sum_d q[m, d] k[n, d]   (+ mask)       int32 sums, exact; x in powers of two
    p[m, n] = 2 ** (x[m, n] - max_n x[m, n])                         online: of the keys seen so far
    out[m, d] = u[d] sum_n p[m, n] v[n, d] / sum_n p[m, n]           fp32

q are codes of a query with a scale of its own, made when a program begins and kept for all its steps; its factor, the
logits' scale times log2(e), is in s. Codes of keys, and of values for the fast variant, come from
``attention_codes.py``; the mean that it takes from keys adds the same number to all logits of a query, which drops out.
p is rounded to the dtype of v, or, times 256, to float8_e4m3fn. Tensor cores of compute capability 9.0 keep 14 bits of
sums of float8 products, so those of each step begin at 0 and are added in fp32, which costs nothing: the old sums have
to be multiplied by 2 ** (old maximum - new) there anyway.

A head's channels are two blocks, as 72 of 128 would waste almost half. A row whose keys are all masked gives 0.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl

from diffuse_compress_kernels.triton_kernels.attention_codes import (
    KeyValueCodes,
    floored,
    largest_along,
    quotients,
    to_float8,
)
from diffuse_compress_kernels.triton_kernels.attention_tables import KEY_BLOCK, AttentionTile, columns_of
from diffuse_compress_kernels.triton_kernels.divide import larger
from diffuse_compress_kernels.triton_kernels.plans import plan_for, start_and_keep
from diffuse_compress_kernels.triton_kernels.rows import ROUNDING_MAGIC
from diffuse_compress_kernels.triton_kernels.start import INTERPRETED, variant

__all__ = ["attend", "attention_kernel"]

KEYS_PER_SCALE = tl.constexpr(KEY_BLOCK)
LOG2_E = tl.constexpr(math.log2(math.e))
# log2 of the largest float8 that stands for a probability.
FLOAT8_SHIFT = tl.constexpr(8.0)


@triton.jit
def _float8_operand(p, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, COMPILED: tl.constexpr):
    """Columns of every 16 in the order of ``key_at``: no data moves, every thread keeps what it holds."""
    p = tl.reshape(to_float8(p, COMPILED), (BLOCK_M, BLOCK_N // 16, 2, 4, 2))
    return tl.reshape(tl.permute(p, (0, 1, 3, 2, 4)), (BLOCK_M, BLOCK_N))


@triton.jit
def _masked_logits(s, scale, mask_ptr, m, n, length, stride_mm, stride_mn, MASK: tl.constexpr, CAUSAL: tl.constexpr):
    """x, with -inf where a key does not take part."""
    x = s * scale[:, None]
    keep = (n < length)[None, :]
    if MASK == "keys":
        given = tl.load(mask_ptr + n * stride_mn, mask=n < length, other=0)[None, :]
    elif MASK == "rows":
        places = mask_ptr + m.to(tl.int64)[:, None] * stride_mm + n[None, :] * stride_mn
        given = tl.load(places, mask=keep, other=0)
    if MASK != "none":
        if given.dtype == tl.int8:
            keep = keep & (given != 0)
        else:
            x += given.to(tl.float32) * LOG2_E
    if CAUSAL:
        keep = keep & (n[None, :] <= m[:, None])
    return tl.where(keep, x, float("-inf"))


@triton.jit
def _step(
    acc, acc_more, total, largest, q, q_more, q_scale, k_ptr, v_ptr, k_scale_ptr, mask_ptr, start, m, length, D,
    stride_ks, stride_vs, stride_mm, stride_mn,
    HEAD: tl.constexpr, MORE: tl.constexpr, V_MORE: tl.constexpr, EVEN: tl.constexpr, FLOAT8: tl.constexpr,
    MASKED: tl.constexpr, MASK: tl.constexpr, CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    COMPILED: tl.constexpr,
):  # fmt: skip
    """Keys start to start + BLOCK_N."""
    n = start + tl.arange(0, BLOCK_N)
    d = tl.arange(0, HEAD)
    k_places = k_ptr + n[:, None] * stride_ks
    s = tl.dot(q, tl.trans(tl.load(k_places + d[None, :])), out_dtype=tl.int32)
    if MORE:
        k = tl.load(k_places + HEAD + tl.arange(0, MORE)[None, :])
        s = tl.dot(q_more, tl.trans(k), s, out_dtype=tl.int32)
    s = s.to(tl.float32)
    scale = q_scale * tl.load(k_scale_ptr + start // KEYS_PER_SCALE)
    if MASKED:
        x = _masked_logits(s, scale, mask_ptr, m, n, length, stride_mm, stride_mn, MASK, CAUSAL)
        new = larger(largest, tl.max(x, 1))
        shift = tl.where(new == float("-inf"), 0.0, new)
    else:
        # A scale is positive, so the largest sum has the largest logit, and one fused operation makes the exponent.
        new = larger(largest, tl.max(s, 1) * scale)
        shift = new
    alpha = tl.exp2(largest - shift)
    # Changes nothing (a NaN stays one), but as a value of the loop the scales are kept in the layout of the products:
    # otherwise every step moves them there through shared memory.
    q_scale = tl.where(alpha == alpha, q_scale, alpha)
    if FLOAT8:
        shift -= FLOAT8_SHIFT
    if MASKED:
        p = tl.exp2(x - shift[:, None])
    else:
        p = tl.exp2(s * scale[:, None] - shift[:, None])
    total = total * alpha + tl.sum(p, 1)
    e = HEAD + tl.arange(0, V_MORE if V_MORE else 16)
    if FLOAT8:
        p = _float8_operand(p, BLOCK_M, BLOCK_N, COMPILED)
        v = tl.load(v_ptr + d[:, None] * stride_vs + n[None, :])
        acc = acc * alpha[:, None] + tl.dot(p, tl.trans(v))
        if V_MORE:
            v = tl.load(v_ptr + e[:, None] * stride_vs + n[None, :])
            acc_more = acc_more * alpha[:, None] + tl.dot(p, tl.trans(v))
    else:
        p = p.to(v_ptr.dtype.element_ty)
        # The interpreter multiplies bits of bf16.
        p = p.to(tl.float32) if not COMPILED else p
        v_places = v_ptr + n[:, None] * stride_vs
        v = _load_values(v_places + d[None, :], (n < length)[:, None], (d < D)[None, :], MASKED, EVEN or MORE > 0)
        v = v.to(tl.float32) if not COMPILED else v
        acc = tl.dot(p, v, acc * alpha[:, None])
        if V_MORE:
            v = _load_values(v_places + e[None, :], (n < length)[:, None], (e < D)[None, :], MASKED, EVEN)
            v = v.to(tl.float32) if not COMPILED else v
            acc_more = tl.dot(p, v, acc_more * alpha[:, None])
    return acc, acc_more, total, new, q_scale


@triton.jit
def _load_values(places, rows, columns, MASKED: tl.constexpr, EVEN: tl.constexpr):
    """Values, 0 beyond the last key and channel; unmasked loads where neither can be."""
    if MASKED and EVEN:
        return tl.load(places, mask=rows, other=0.0)
    elif MASKED:
        return tl.load(places, mask=rows & columns, other=0.0)
    elif EVEN:
        return tl.load(places)
    else:
        return tl.load(places, mask=columns, other=0.0)


@triton.jit
def _code_queries(values, scale, COMPILED: tl.constexpr):
    steps = quotients(values, scale[:, None], COMPILED)
    return (steps + ROUNDING_MAGIC).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit(do_not_specialize=["SQ", "SK"])
def attention_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, k_scale_ptr, v_scale_ptr, mask_ptr, lengths_ptr,
    SQ, SK, eighths, group,
    stride_qb, stride_qh, stride_qs, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    stride_ob, stride_oh, stride_os, stride_mb, stride_mh, stride_mm, stride_mn, k_blocks, logit_scale,
    HEAD: tl.constexpr, MORE: tl.constexpr, V_MORE: tl.constexpr, EVEN: tl.constexpr, FLOAT8: tl.constexpr,
    MASK: tl.constexpr, CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, COMPILED: tl.constexpr,
):  # fmt: skip
    """A program per block of queries, head and batch; ``group`` heads of queries share one of keys and values.

    EVEN: D is all of the blocks of channels of values. MASK: "none", "keys" (the same for all queries) or "rows".
    """
    block, head, batch = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    if CAUSAL:
        # Those with most keys begin first.
        block = tl.num_programs(0) - 1 - block
    kv_head = head // group
    # A multiple of 8, or loads would go by single elements.
    D = eighths * 8
    m = block * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, HEAD)
    rows = (m < SQ)[:, None]
    q_places = q_ptr + batch * stride_qb + head * stride_qh + m[:, None] * stride_qs
    q_mask = rows if MORE or (EVEN and not V_MORE) else rows & (d < D)[None, :]
    q = tl.load(q_places + d[None, :], mask=q_mask, other=0.0).to(tl.float32)
    largest = largest_along(q, 1)
    q_more = q
    if MORE:
        d_more = HEAD + tl.arange(0, MORE)
        q_more = tl.load(q_places + d_more[None, :], mask=rows & (d_more < D)[None, :], other=0.0).to(tl.float32)
        largest = larger(largest, largest_along(q_more, 1))
    q_scale = floored(largest / 127.0)
    q = _code_queries(q, q_scale, COMPILED)
    if MORE:
        q_more = _code_queries(q_more, q_scale, COMPILED)
    q_scale *= logit_scale * LOG2_E

    length = SK
    if lengths_ptr is not None:
        length = tl.minimum(SK, tl.load(lengths_ptr + batch).to(tl.int32))
    end = length
    if CAUSAL:
        end = tl.minimum(length, (block + 1) * BLOCK_M)
    # Steps where every key takes part.
    whole = 0
    if MASK == "none":
        whole = (tl.minimum(length, block * BLOCK_M) if CAUSAL else length) // BLOCK_N * BLOCK_N
    k_ptr += batch * stride_kb + kv_head * stride_kh
    v_ptr += batch * stride_vb + kv_head * stride_vh
    k_scale_ptr += (batch * (tl.num_programs(1) // group) + kv_head) * k_blocks
    if MASK != "none":
        mask_ptr += batch * stride_mb + head * stride_mh

    acc = tl.zeros((BLOCK_M, HEAD), tl.float32)
    acc_more = tl.zeros((BLOCK_M, V_MORE if V_MORE else 16), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    largest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    if MASK == "none":
        for start in range(0, whole, BLOCK_N):
            acc, acc_more, total, largest, q_scale = _step(
                acc, acc_more, total, largest, q, q_more, q_scale, k_ptr, v_ptr, k_scale_ptr, mask_ptr, start, m,
                length, D, stride_ks, stride_vs, stride_mm, stride_mn,
                HEAD, MORE, V_MORE, EVEN, FLOAT8, False, MASK, CAUSAL, BLOCK_M, BLOCK_N, COMPILED,
            )  # fmt: skip
    for start in tl.range(whole, end, BLOCK_N, num_stages=1 if MASK == "none" else None):
        acc, acc_more, total, largest, q_scale = _step(
            acc, acc_more, total, largest, q, q_more, q_scale, k_ptr, v_ptr, k_scale_ptr, mask_ptr, start, m,
            length, D, stride_ks, stride_vs, stride_mm, stride_mn,
            HEAD, MORE, V_MORE, EVEN, FLOAT8, True, MASK, CAUSAL, BLOCK_M, BLOCK_N, COMPILED,
        )  # fmt: skip

    inverse = tl.where(total == 0.0, 0.0, 1.0 / total)[:, None]
    out_places = out_ptr + batch * stride_ob + head * stride_oh + m[:, None] * stride_os
    if FLOAT8:
        v_scale_ptr += (batch * (tl.num_programs(1) // group) + kv_head) * (HEAD + V_MORE)
    _store(out_places, acc * inverse, v_scale_ptr, d, rows, D, FLOAT8, EVEN or V_MORE > 0)
    if V_MORE:
        _store(out_places, acc_more * inverse, v_scale_ptr, HEAD + tl.arange(0, V_MORE), rows, D, FLOAT8, EVEN)


@triton.jit
def _store(places, out, v_scale_ptr, d, rows, D, FLOAT8: tl.constexpr, EVEN: tl.constexpr):
    if FLOAT8:
        out *= tl.load(v_scale_ptr + d)[None, :]
    mask = rows if EVEN else rows & (d < D)[None, :]
    tl.store(places + d[None, :], out.to(places.dtype.element_ty), mask=mask)


def attend(
    query: torch.Tensor,
    value: torch.Tensor,
    codes: KeyValueCodes,
    mask: torch.Tensor | None,
    lengths: torch.Tensor | None,
    scale: float,
    causal: bool,
    tile: AttentionTile,
    out: torch.Tensor,
) -> None:
    """Write attention into ``out``.

    Args:
        query: fp16 or bf16 [B, H, Sq, D], the last dimension contiguous.
        value: in the same dtype [B, Hkv, Sk, D], likewise; read unless ``codes`` has values.
        codes: of keys, and of values for the fast variant.
        mask: expanded to [B, H, Sq, Sk], boolean or added to the logits.
        lengths: int32 [B], keys of each sample that count.
        scale: of the logits, positive.
        causal: query m sees keys up to m.
        tile: of the table.
        out: like query.
    """
    batch, heads, queries, depth = query.shape
    float8 = codes.values is not None
    values = value if codes.values is None else codes.values
    kind = "none" if mask is None else "keys" if mask.stride(-2) == 0 or queries == 1 else "rows"
    if mask is not None and mask.dtype == torch.bool:
        mask = mask.view(torch.int8)
    mask_strides = (0, 0, 0, 0) if mask is None else mask.stride()
    group, keys = heads // codes.keys.shape[1], value.shape[2]
    pointers = (query, codes.keys, values, out, codes.key_scale, codes.value_scale, mask, lengths)
    strides = (*query.stride()[:3], *codes.keys.stride()[:3], *values.stride()[:3], *out.stride()[:3])
    numbers = (queries, keys, depth // 8, group, *strides, *mask_strides, codes.key_scale.shape[2], float(scale))
    absent = (mask is None or mask.dtype, lengths is None, query.dtype, values.dtype)
    key = ("attention", batch, heads, numbers, absent, causal, tile, query.device.index)
    plan = plan_for(key, query.device)
    if plan is not None and plan.run(query.device.index, pointers):
        return
    first, second, v_second = columns_of(depth)
    constants: dict[str, Any] = {
        "HEAD": first,
        "MORE": second,
        "V_MORE": v_second,
        "EVEN": depth == first + v_second,
        "FLOAT8": float8,
        "MASK": kind,
        "CAUSAL": causal,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "COMPILED": not INTERPRETED,
    }
    chosen = variant(
        attention_kernel, num_warps=tile.num_warps, num_stages=tile.num_stages, enable_fp_fusion=True, **constants
    )
    grid = (-(-queries // tile.block_m), heads, batch)
    start_and_keep(key, chosen, query.device, grid, pointers, numbers)

"""The attention kernels in Triton's interpreter, which test_triton_attention.py runs in a process of its own."""

from __future__ import annotations

import pytest
import torch

from diffuse_compress_kernels.attention import plain
from diffuse_compress_kernels.attention.plain import attend_plain
from diffuse_compress_kernels.triton_kernels.attention import attend
from diffuse_compress_kernels.triton_kernels.attention_codes import quantize_keys_values
from diffuse_compress_kernels.triton_kernels.attention_tables import KEY_BLOCK, AttentionTile, columns_of
from tolerance import Tolerance, assert_close

TILE = AttentionTile(32, 64, 4, 1)
# Besides rounding, exp2 of the online maximum moves a probability to the other side of a rounding border.
ACCURATE, FAST = Tolerance(rms=1.5e-3, maximum=1.5e-2), Tolerance(rms=2e-2, maximum=0.2)


def tensors(queries, keys, depth, heads=2, kv_heads=2, dtype=torch.float16, batch=1):
    """Dyadic numbers, whose sums are exact in any order; a channel of keys far from 0."""
    shapes = ((heads, queries), (kv_heads, keys), (kv_heads, keys))
    query, key, value = (torch.randn(batch, h, s, depth).mul(64).round().div(64) for h, s in shapes)
    key[..., 1] += 20
    return query.to(dtype), key.to(dtype), value.to(dtype)


def run(query, key, value, mask=None, lengths=None, causal=False, fast=False, tile=TILE):
    codes = quantize_keys_values(key, value, lengths, fp8_values=fast)
    if mask is not None:
        mask = mask.expand(*query.shape[:3], key.shape[2])
    out, expected = torch.empty_like(query), torch.empty_like(query)
    attend(query, value, codes, mask, lengths, 0.2, causal, tile, out)
    attend_plain(query, key, value, mask, lengths, 0.2, causal, fast, expected)
    assert_close(out, expected, FAST if fast else ACCURATE)
    return out


@pytest.mark.parametrize(("keys", "depth", "lengths"), [(150, 72, None), (150, 40, [70, 0])], ids=str)
def test_codes_are_those_of_plain_torch(keys, depth, lengths):
    _, key, value = tensors(1, keys, depth, batch=1 if lengths is None else 2)
    counts = None if lengths is None else torch.tensor(lengths, dtype=torch.int32)
    codes = quantize_keys_values(key.transpose(1, 2).contiguous().transpose(1, 2), value, counts, fp8_values=True)
    expected, scale = plain.key_codes(key, counts)
    assert torch.equal(codes.keys[:, :, :keys, :depth], expected)
    assert not codes.keys[:, :, keys:].any()
    assert not codes.keys[..., depth:].any()
    assert torch.equal(codes.key_scale, scale)
    expected, scale = plain.value_codes(value, counts)
    assert torch.equal(codes.value_scale[..., :depth], scale[:, :, 0])
    order = key_order(codes.values.shape[-1])
    stored = torch.empty_like(codes.values.float())
    stored[..., order] = codes.values.float()
    assert torch.equal(stored[:, :, :depth, :keys].transpose(-1, -2), expected.float())
    assert not stored[..., keys:].any()


def key_order(places):
    """What stands where: of 16 keys, thread c of a tensor core holds 2c, 2c + 1, 2c + 8, 2c + 9."""
    sixteen = [key for c in range(4) for key in (2 * c, 2 * c + 1, 2 * c + 8, 2 * c + 9)]
    return torch.tensor([16 * group + key for group in range(places // 16) for key in sixteen])


@pytest.mark.parametrize(
    ("depth", "fast"), [(64, False), (72, False), (80, True), (96, False), (96, True), (128, True)], ids=str
)
def test_heads(depth, fast):
    run(*tensors(32, 70, depth), fast=fast)


@pytest.mark.parametrize("fast", [False, True], ids=["accurate", "fast"])
def test_tokens_first_several_heads_of_queries_and_whole_blocks(fast):
    query, key, value = tensors(32, 128, 64, heads=4)
    plain_out = run(query, key, value, fast=fast)
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (query, key, value)]
    out = run(*turned, fast=fast)
    assert out.stride() == turned[0].stride()
    assert torch.equal(out, plain_out)


def masks(queries, keys):
    keep = torch.rand(1, 1, queries, keys) > 0.4
    keep[..., 3, :] = False
    few = torch.rand(1, 1, 1, keys) > 0.5
    return {
        "rows": keep,
        "keys": few,
        "bias of keys": few.to(torch.float16).sub(1).mul(100),
        "bias of heads": torch.randn(1, 2, queries, keys),
    }


@pytest.mark.parametrize("fast", [False, True], ids=["accurate", "fast"])
@pytest.mark.parametrize("kind", ["rows", "keys", "bias of keys", "bias of heads"])
def test_masks(kind, fast):
    out = run(*tensors(33, 100, 32), mask=masks(33, 100)[kind], fast=fast)
    assert bool((out[:, :, 3] == 0).all()) == (kind == "rows"), "without keys the output is 0"


@pytest.mark.parametrize("fast", [False, True], ids=["accurate", "fast"])
def test_lengths_and_causality(fast):
    query, key, value = tensors(40, 130, 32, heads=1, kv_heads=1, batch=3)
    lengths = torch.tensor([130, 65, 0], dtype=torch.int32)
    key[1, :, 65:], value[1, :, 65:], value[2] = float("nan"), float("nan"), float("nan")
    out = run(query, key, value, lengths=lengths, fast=fast)
    assert not out[2].any()
    run(query, key, value, lengths=lengths, causal=True, fast=fast)
    run(query[:1], key[:1], value[:1], causal=True, fast=fast)


def test_results_do_not_depend_on_steps():
    given = tensors(64, 200, 32, heads=1, kv_heads=1)
    one, other = run(*given), run(*given, tile=AttentionTile(64, KEY_BLOCK, 8, 1))
    assert_close(one, other.double(), ACCURATE)


def test_bfloat16_and_a_nan_that_shows():
    query, key, value = tensors(20, 70, 64, dtype=torch.bfloat16)
    query[0, 0, 3, 5] = float("nan")
    out = torch.empty_like(query)
    attend(query, value, quantize_keys_values(key, value, None, fp8_values=False), None, None, 0.2, False, TILE, out)
    broken = out.isnan()
    assert broken[0, 0, 3].all()
    assert broken.sum() == 64
    key[0, 1, 7, 2] = float("nan")
    attend(query, value, quantize_keys_values(key, value, None, fp8_values=False), None, None, 0.2, False, TILE, out)
    assert out[0, 1].isnan().all()


def test_columns_hold_every_head():
    for depth in range(8, 129, 8):
        first, second, third = columns_of(depth)
        assert first + second >= depth
        assert first + third >= depth

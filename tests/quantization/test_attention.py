"""Attention on int8 codes, against a naive float64 loop over the same equations and against the stock product."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from diffuse_compress.errors import ConfigError
from diffuse_compress.quantization import attention
from diffuse_compress.quantization.attention import quantized_attention
from tolerance import KERNEL, SNR_MARGIN_DB, assert_close, snr_db


def tensors(batch=2, heads=3, queries=5, keys=7, depth=16, dtype=torch.float32):
    query, key, value = (torch.randn(batch, heads, size, depth) for size in (queries, keys, keys))
    value[..., 3] *= 40  # a channel of its own range
    key[..., 2, :] *= 20  # and a token
    return query.to(dtype), key.to(dtype), value.to(dtype)


def codes(row: torch.Tensor) -> tuple[list[int], float]:
    """Symmetric int8 codes of a vector and their scale."""
    scale = float(row.abs().max()) / 127
    return [round(float(x) / scale) for x in row], scale


def naive(query, key, value, mask=None, scale=None):
    """Python integers and float64, one query at a time."""
    output = torch.zeros(*query.shape[:-1], value.shape[-1], dtype=torch.float64)
    factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    for b, h in ((b, h) for b in range(query.shape[0]) for h in range(query.shape[1])):
        keys = [codes(k) for k in key[b, h].float()]
        values = [codes(v) for v in value[b, h].float().T]
        for i, row in enumerate(query[b, h].float()):
            q, q_scale = codes(row)
            logits = [sum(x * y for x, y in zip(q, k, strict=True)) * q_scale * s * factor for k, s in keys]
            logits = torch.tensor(logits, dtype=torch.float64)
            if mask is not None:
                logits += mask[b, 0, i].double()
            shares = torch.softmax(logits, dim=0)
            largest = float(shares.max())
            p = [round(float(share) * 255 / largest) for share in shares]
            for d, (v, v_scale) in enumerate(values):
                output[b, h, i, d] = sum(x * y for x, y in zip(p, v, strict=True)) * largest / 255 * v_scale
    return output


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("masked", [False, True], ids=["plain", "mask"])
def test_quantized_attention_is_the_loop_over_its_equations(dtype, masked):
    query, key, value = tensors(dtype=dtype)
    mask = torch.randn(2, 1, 5, 7) if masked else None
    found = quantized_attention(query, key, value, mask)
    assert found.dtype == dtype
    assert_close(found, naive(query, key, value, mask), KERNEL[dtype])


def test_sums_are_exact_over_more_keys_than_float32_holds():
    keys = 3000
    codes = torch.randint(200, 256, (1, keys)).float()
    values = torch.randint(100, 128, (keys, 4)).float()
    exact = codes.long() @ values.long()
    assert int(exact.max()) > 1 << 24
    assert torch.equal(attention._product(codes, values, 255), exact.float())


@pytest.mark.parametrize(
    ("given", "measured"),
    [
        ({}, 42.8),
        ({"is_causal": True}, 48.4),
        ({"scale": 0.05}, 48.6),
        ({"attn_mask": torch.tensor([[True] * 6 + [False]])}, 43.7),
    ],
    ids=["plain", "causal", "scale", "boolean mask"],
)
def test_quantized_attention_is_near_the_stock_product(given, measured, monkeypatch):
    monkeypatch.setattr(attention, "_BLOCK", 2 * 3 * 7 * 2)  # two queries at a time
    query, key, value = tensors()
    key[..., 2, :] /= 20
    found = quantized_attention(query, key, value, **given)
    expected = F.scaled_dot_product_attention(query, key, value, **given)
    assert snr_db(expected, found) > measured - SNR_MARGIN_DB


def test_a_head_of_keys_serves_several_of_queries():
    query, key, value = tensors(heads=4)
    few = quantized_attention(query, key[:, :2], value[:, :2], enable_gqa=True)
    repeated = [x[:, [0, 0, 1, 1]] for x in (key, value)]
    assert torch.equal(few, quantized_attention(query, *repeated))


def test_gradients_are_those_of_the_stock_product():
    given = [x.requires_grad_() for x in tensors()]
    found = quantized_attention(*given)
    mine = torch.autograd.grad(found.sum(), given)
    theirs = torch.autograd.grad(F.scaled_dot_product_attention(*given).sum(), given)
    assert all(torch.equal(one, other) for one, other in zip(mine, theirs, strict=True))
    with torch.no_grad():
        assert_close(found, quantized_attention(*given).double(), KERNEL[torch.float32])


def test_dropout_and_other_formats_are_refused():
    with pytest.raises(ConfigError, match="know no dropout"):
        quantized_attention(*tensors(), dropout_p=0.1)
    with pytest.raises(ConfigError, match=r"attention: .*int8"):
        attention.attention_format("fp8")

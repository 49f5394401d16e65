"""The operator of low-bit attention: quality against float64, exact integers, masks, gradients, tracing."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from diffuse_compress_kernels import attention_obstacle, int8_attention
from diffuse_compress_kernels.attention import plain
from diffuse_compress_kernels.attention.reference import attention_reference
from tolerance import KERNEL, assert_close, relative_rms

# The goals for the two variants, Frobenius error on N(0, 1); measured: 0.0116 and 0.0376 (128 channels).
ACCURATE, FAST = 0.02, 0.05
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def tensors(queries=512, keys=512, depth=64, heads=2, kv_heads=2, batch=1, dtype=torch.bfloat16, device="cpu"):
    shapes = ((heads, queries), (kv_heads, keys), (kv_heads, keys))
    return tuple(torch.randn(batch, h, s, depth).to(device, dtype) for h, s in shapes)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("fast", [False, True], ids=["accurate", "fast"])
@pytest.mark.parametrize("depth", [64, 72, 128])
def test_error_against_float64_is_within_the_goal(depth, fast, device):
    if fast and device == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("float8 tensor cores begin with 8.9")
    query, key, value = tensors(depth=depth, device=device)
    expected = attention_reference(query, key, value)
    found = int8_attention(query, key, value, fp8_values=fast)
    assert found.dtype == query.dtype
    error = relative_rms(expected, found)
    assert error <= (FAST if fast else ACCURATE)
    assert fast == (error > ACCURATE), "the fast variant is another one"


@pytest.mark.parametrize("device", DEVICES)
def test_subtracting_the_mean_saves_keys_with_channels_far_from_zero(device, monkeypatch):
    query, key, value = tensors(dtype=torch.float16, device=device)
    key[..., ::16] += 30
    expected = attention_reference(query, key, value)
    assert relative_rms(expected, int8_attention(query, key, value)) <= ACCURATE
    codes, scale = plain.key_codes(key, None)
    rough = (key.float() / (key.abs().amax().float() / 127)).round()
    assert codes.float().abs().mean() > 8 * rough[..., 1:16].abs().mean(), "codes span their range"
    assert scale.shape == (1, 2, 4)


@pytest.mark.parametrize("fast", [False, True], ids=["accurate", "fast"])
def test_equations_with_whole_numbers_are_exact(fast):
    """Codes of these are the numbers themselves, so that logits are exact; one key takes all of the softmax."""
    query = torch.randint(-127, 128, (1, 1, 40, 32)).float()
    key = torch.randint(-63, 64, (1, 1, 64, 32)).float()
    key = torch.cat([key, -key], dim=2)  # of mean 0
    query[..., 0], key[0, 0, 0, 0], key[0, 0, 64, 0] = 127.0, 127.0, -127.0
    value = torch.randint(-7, 8, (1, 1, 128, 32)).float() * 64
    value[:, :, 0] = 448.0  # as float8 and its scale of 1 hold them
    q, q_scale = plain.query_codes(query)
    k, k_scale = plain.key_codes(key, None)
    assert torch.equal(q.float(), query)
    assert torch.equal(k.float(), key)
    assert (q_scale == 1).all()
    assert (k_scale == 1).all()
    found = int8_attention(query, key, value, scale=1.0, fp8_values=fast)
    assert_close(found, attention_reference(query, key, value, scale=1.0), KERNEL[torch.float32])


def variants(queries, keys):
    keep = torch.rand(2, 1, queries, keys) > 0.3
    keep[:, :, 5] = False
    lengths = torch.tensor([keys, keys // 3], dtype=torch.int32)
    return {
        "cross": {},
        "boolean rows": {"mask": keep},
        "boolean keys": {"mask": torch.rand(2, 1, 1, keys) > 0.5},
        "bias": {"mask": torch.randn(2, 4, queries, keys)},
        "lengths": {"lengths": lengths},
        "lengths and bias": {"lengths": lengths, "mask": torch.randn(1, 1, 1, keys)},
        "causal": {"causal": True},
        "scale": {"scale": 0.3},
    }


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", variants(8, 8))
def test_masks_lengths_and_shared_heads(kind, device):
    query, key, value = tensors(70, 300, 72, heads=4, batch=2, device=device)
    given = {name: x.to(device) if torch.is_tensor(x) else x for name, x in variants(70, 300)[kind].items()}
    found = int8_attention(query, key, value, **given)
    assert relative_rms(attention_reference(query, key, value, **given), found) <= ACCURATE
    if kind == "boolean rows":
        assert not found[:, :, 5].any()
    if kind == "lengths":
        key[1, :, 100:], value[1, :, 100:] = 1e4, float("nan")
        assert torch.equal(int8_attention(query, key, value, **given), found)


@pytest.mark.parametrize("device", DEVICES)
def test_tokens_first_are_read_and_written_as_they_are(device):
    query, key, value = tensors(device=device)
    first = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (query, key, value)]
    found = int8_attention(*first)
    assert found.transpose(1, 2).is_contiguous()
    assert torch.equal(found, int8_attention(query, key, value))
    packed = torch.stack([x.transpose(1, 2) for x in (query, key, value)], dim=2)
    sliced = [packed[:, :, i].transpose(1, 2) for i in range(3)]
    assert torch.equal(found, int8_attention(*sliced))


def test_gradients_are_those_of_the_stock_product():
    given = [x.requires_grad_() for x in tensors(40, 50, 32, dtype=torch.float32)]
    mask = torch.rand(40, 50) > 0.2
    found = int8_attention(*given, mask)
    mine = torch.autograd.grad(found.square().sum(), given)
    with torch.no_grad():
        assert torch.equal(found, int8_attention(*given, mask))
    stock = F.scaled_dot_product_attention(*given, mask)
    theirs = torch.autograd.grad(stock, given, 2 * found.detach())
    assert all(torch.allclose(one, other, atol=1e-6) for one, other in zip(mine, theirs, strict=True))
    lengths = torch.tensor([30], dtype=torch.int32)
    mine = torch.autograd.grad(int8_attention(*given, lengths=lengths).sum(), given[2])
    assert not mine[0][:, :, 30:].any()


@pytest.mark.parametrize("fast", [False, True], ids=["accurate", "fast"])
def test_operator_is_traceable(fast):
    query, key, value = tensors(20, 30, 40, heads=4)
    lengths = torch.tensor([25], dtype=torch.int32)
    arguments = (query.transpose(1, 2).contiguous().transpose(1, 2), key, value, None, lengths, 0.2, False, fast)
    torch.library.opcheck(torch.ops.diffuse_compress.attention.default, arguments)
    compiled = torch.compile(int8_attention, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(query, key, value, fp8_values=fast), int8_attention(query, key, value, fp8_values=fast))
    with FlopCounterMode(display=False) as mine:
        int8_attention(query, key, value)
    assert mine.get_total_flops() == 4 * 4 * 20 * 30 * 40


@pytest.mark.parametrize("keys", [0, 3])
def test_nothing_to_attend_to(keys):
    query, key, value = tensors(4, keys, 16)
    lengths = torch.tensor([0], dtype=torch.int32)
    assert not int8_attention(query, key, value, lengths=lengths).any()
    assert int8_attention(query[:, :, :0], key, value).shape == (1, 2, 0, 16)


def test_what_does_not_fit_is_refused():
    query, key, value = tensors(4, 6, 16, heads=3)
    with pytest.raises(ValueError, match="Hkv divides H"):
        int8_attention(query, key, value)
    with pytest.raises(ValueError, match="of one dtype"):
        int8_attention(query[:, :2], key.float(), value)
    with pytest.raises(ValueError, match="positive scale, got 0"):
        int8_attention(query[:, :2], key, value, scale=0.0)
    with pytest.raises(ValueError, match="without causal=True"):
        int8_attention(query[:, :2], key, value, torch.ones(4, 6), causal=True)
    with pytest.raises(ValueError, match="gets no gradient"):
        int8_attention(query[:, :2], key, value, torch.ones(4, 6, requires_grad=True))
    with pytest.raises(ValueError, match="int32 lengths"):
        int8_attention(query[:, :2], key, value, lengths=torch.tensor([3]))
    assert "cpu" in attention_obstacle(query, key, value)


@pytest.mark.sm90
@pytest.mark.parametrize("fast", [False, True], ids=["accurate", "fast"])
@pytest.mark.parametrize("depth", [64, 72, 80, 96, 128])
def test_kernel_is_the_plain_computation(depth, fast):
    from diffuse_compress_kernels.attention.plain import attend_plain

    query, key, value = tensors(333, 1000, depth, heads=4, device="cuda", dtype=torch.float16)
    expected = torch.empty_like(query)
    attend_plain(query, key, value, None, None, depth**-0.5, False, fast, expected)
    found = int8_attention(query, key, value, fp8_values=fast)
    assert relative_rms(expected, found) <= (0.02 if fast else 2e-3)
    assert torch.equal(found, int8_attention(query, key, value, fp8_values=fast)), "deterministic"


@pytest.mark.gpu
def test_cuda_graph_repeats_it():
    query, key, value = tensors(device="cuda")
    expected = int8_attention(query, key, value)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = int8_attention(query, key, value)
    query.normal_()
    graph.replay()
    assert torch.equal(found, int8_attention(query, key, value))
    assert not torch.equal(found, expected)

"""Operators of packed int4 weights: exact sums with int8 activations, float64 with 16-bit ones; on a GPU the same."""

from __future__ import annotations

import pytest
import torch

from diffuse_compress.quantization.packing import pack, unpack
from diffuse_compress_kernels import has_fast_int4, quantize_rows, w4a8_linear, w4a8_linear_codes, w4a16_linear
from diffuse_compress_kernels.int4_linear import fallback
from diffuse_compress_kernels.int8_linear.reference import linear_codes_reference
from diffuse_compress_kernels.triton_kernels.reference import (
    int8_weight_reference,
    unpack_int4_reference,
    w4a16_reference,
)
from tolerance import Tolerance, assert_close

SHAPES = [(1, 33, 128), (5, 70, 200), (40, 64, 1152)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# The dequantized weight is rounded to the dtype, and on a GPU its scale before that.
W4A16 = {
    torch.float32: Tolerance(rms=1e-5, maximum=1e-4),
    torch.float16: Tolerance(rms=1e-3, maximum=1e-2),
    torch.bfloat16: Tolerance(rms=6e-3, maximum=6e-2),
}
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def packed_weight(outputs: int, depth: int, low: int = -8) -> torch.Tensor:
    codes = torch.randint(low, 8, (outputs, depth), dtype=torch.int8)
    codes.view(-1)[:16] = torch.arange(-8, 8).clamp(min=low)
    return pack(codes, 4)


def group_scales(outputs: int, depth: int) -> torch.Tensor:
    return torch.randint(1, 17, (outputs, -(-depth // 128)), dtype=torch.int8)


@pytest.mark.parametrize(("rows", "outputs", "depth"), SHAPES)
def test_unpack_int4_is_the_inverse_of_pack(rows: int, outputs: int, depth: int) -> None:
    packed = packed_weight(outputs, depth)
    assert torch.equal(fallback.unpack_int4(packed, depth), unpack(packed, 4, depth))
    assert torch.equal(unpack_int4_reference(packed, depth), unpack(packed, 4, depth).long())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("two_level", [False, True])
@pytest.mark.parametrize(("rows", "outputs", "depth"), [*SHAPES, (2100, 72, 256), (17, 4096, 512)])
def test_w4a8_sums_are_exact(
    rows: int, outputs: int, depth: int, two_level: bool, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With unit scales and a float32 result below 2**24, the output is the sum itself."""
    monkeypatch.setattr(fallback, "BLOCK_ELEMENTS", 16 * depth)
    packed = packed_weight(outputs, depth, -7 if two_level else -8)
    group_scale = group_scales(outputs, depth) if two_level else None
    codes = torch.randint(-127, 128, (rows, depth), dtype=torch.int8)
    one = torch.ones(1, 1)
    moved = [None if t is None else t.to(device) for t in (codes, one, None, packed, one, group_scale, None)]
    y = w4a8_linear_codes(*moved, torch.float32)
    expected = codes.double() @ int8_weight_reference(packed, group_scale, depth).double().t()
    assert expected.abs().max() < 1 << 24
    assert torch.equal(y.cpu().double(), expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("two_level", [False, True])
def test_w4a8_linear_matches_reference(two_level: bool, static: bool, dtype: torch.dtype, device: str) -> None:
    rows, outputs, depth = 21, 70, 272
    x = torch.randn(rows, depth)
    x[:, ::60] *= 20
    x, bias, weight_scale = x.to(dtype), torch.randn(outputs), torch.rand(outputs, 1) * 0.01
    packed, group_scale = packed_weight(outputs, depth, -7), group_scales(outputs, depth) if two_level else None
    scale = torch.tensor([0.05]) if static else None
    zero_point = torch.tensor([-31], dtype=torch.int8) if static else None
    pre_scale = torch.rand(depth) + 0.5
    qmin = -128 if static else -127
    given = {"input_scale": scale, "input_zero_point": zero_point, "pre_scale": pre_scale}
    given = {name: None if tensor is None else tensor.to(device) for name, tensor in given.items()}
    moved = [None if t is None else t.to(device) for t in (x, packed, weight_scale, group_scale, bias)]
    y = w4a8_linear(*moved, qmin=qmin, **given)
    codes, code_scale = quantize_rows(x, qmin, 127, scale, zero_point, pre_scale)
    weight = int8_weight_reference(packed, group_scale, depth)
    assert y.dtype == dtype
    assert_close(y, linear_codes_reference(codes, code_scale, zero_point, weight, weight_scale, bias))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group_size", [0, 32, 64, 128])
@pytest.mark.parametrize("zero", ["none", "int8", "float"])
@pytest.mark.parametrize("rows", [1, 3, 40, 100, 300])
def test_w4a16_linear_matches_reference(
    rows: int, zero: str, group_size: int, dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    outputs, depth = 70, 272
    monkeypatch.setattr(fallback, "BLOCK_ELEMENTS", 32 * depth)
    x, packed, bias = torch.randn(rows, depth).to(dtype), packed_weight(outputs, depth), torch.randn(outputs)
    scale = torch.rand(outputs, 1 if group_size == 0 else -(-depth // group_size)) * 0.1 + 0.01
    # Imported scales (GGUF's Q4_0) have either sign, and are 0 for blocks of zeros.
    scale[::3] *= -1
    scale[4] = 0
    zero_point = None
    if zero != "none":
        zero_point = torch.randint(-8, 8, scale.shape, dtype=torch.int8)
        zero_point = zero_point.float() + 0.25 if zero == "float" else zero_point
    moved = [None if t is None else t.to(device) for t in (x, packed, scale, zero_point)]
    y = w4a16_linear(*moved, group_size, bias.to(device))
    expected = w4a16_reference(x, packed, scale, zero_point, group_size or depth) + bias.double()
    assert y.dtype == dtype
    assert_close(y, expected, W4A16[dtype])


@pytest.mark.parametrize("device", DEVICES)
def test_one_scale_for_the_whole_weight(device: str) -> None:
    x, packed, scale = torch.randn(9, 160).bfloat16(), packed_weight(24, 160), torch.tensor([[0.03]])
    y = w4a16_linear(x.to(device), packed.to(device), scale.to(device), None, 0)
    assert_close(y, w4a16_reference(x, packed, scale.expand(24, 1), None, 160), W4A16[torch.bfloat16])


@pytest.mark.parametrize("device", DEVICES)
def test_no_rows(device: str) -> None:
    packed, scale = packed_weight(24, 160).to(device), torch.rand(24, 2, device=device)
    x = torch.randn(0, 160, device=device).bfloat16()
    assert w4a16_linear(x, packed, scale, None, 128).shape == (0, 24)
    assert w4a8_linear(x, packed, scale[:, :1]).shape == (0, 24)


def test_refusals_name_what_is_needed() -> None:
    x, packed = torch.randn(3, 200), packed_weight(5, 200)
    with pytest.raises(ValueError, match=r"w4a8_linear: need x \[M, K\] and packed int8 \[N, ceil\(K / 128\) \* 64\]"):
        w4a8_linear(x[:, :100], packed, torch.ones(5, 1))
    with pytest.raises(ValueError, match=r"need group_size in \(0, 32, 64, 128\) and scale \[N, 2\]"):
        w4a16_linear(x, packed, torch.ones(5, 3), None, 128)


def _samples(device: str = "cpu") -> dict[str, tuple[torch._ops.OpOverload, tuple[object, ...]]]:
    ops = torch.ops.diffuse_compress
    x, packed, bias = (
        torch.randn(5, 160, device=device),
        packed_weight(6, 160).to(device),
        torch.randn(6, device=device),
    )
    codes, scale = quantize_rows(x, -127, 127)
    row_scale, group_scale = torch.rand(6, 1, device=device), torch.rand(6, 2, device=device)
    int_scale, zero_point = group_scales(6, 160).to(device), torch.zeros(6, 2, dtype=torch.int8, device=device)
    bf16 = torch.bfloat16
    return {
        "w4a8": (ops.w4a8_linear_codes.default, (codes, scale, None, packed, row_scale, int_scale, bias, bf16)),
        "w4a16": (ops.w4a16_linear.default, (x.bfloat16(), packed, group_scale, zero_point, 128, bias)),
    }


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["w4a8", "w4a16"])
def test_operators_pass_opcheck(name: str, device: str) -> None:
    operator, arguments = _samples(device)[name]
    torch.library.opcheck(operator, arguments)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dynamic", [False, True])
def test_operators_compile_without_graph_breaks(dynamic: bool, device: str) -> None:
    packed, row_scale = packed_weight(6, 256).to(device), torch.rand(6, 1, device=device)
    group_scale = torch.rand(6, 2, device=device)

    def run(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return w4a8_linear(x, packed, row_scale), w4a16_linear(x, packed, group_scale, None, 128)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for rows in (5, 9):
        x = torch.randn(rows, 256, device=device).bfloat16()
        assert all(torch.equal(a, b) for a, b in zip(compiled(x), run(x), strict=True))


def test_operators_work_on_meta_tensors() -> None:
    x, packed = torch.randn(5, 160, device="meta").half(), packed_weight(6, 160).to("meta")
    assert w4a8_linear(x, packed, torch.ones(6, 1, device="meta")).shape == (5, 6)
    y = w4a16_linear(x, packed, torch.ones(6, 2, device="meta"))
    assert (y.shape, y.dtype) == ((5, 6), torch.float16)


def test_cpu_has_no_int4_kernel() -> None:
    assert not has_fast_int4(torch.device("cpu"))
    assert not has_fast_int4(torch.device("meta"))


@pytest.mark.gpu
def test_cuda_graph_replays_give_what_eager_calls_give() -> None:
    """Counters and partial sums of programs that share a tile survive replays; the result does not depend on order."""
    x, packed = torch.randn(16, 4096, device="cuda").bfloat16(), packed_weight(256, 4096).cuda()
    row_scale, group_scale = torch.rand(256, 1, device="cuda"), torch.rand(256, 32, device="cuda")

    def run() -> tuple[torch.Tensor, ...]:
        return w4a8_linear(x, packed, row_scale), w4a16_linear(x, packed, group_scale, None, 128)

    expected = run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()
    for _ in range(3):
        graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(run(), expected, strict=True))


@pytest.mark.gpu
def test_parts_of_k_always_arrive() -> None:
    """Many programs share each tile; a sum that missed a part, once in many runs, would differ."""
    x, packed = torch.randn(48, 8192, device="cuda").bfloat16(), packed_weight(1024, 8192).cuda()
    row_scale, group_scale = torch.rand(1024, 1, device="cuda"), torch.rand(1024, 64, device="cuda")
    first = w4a8_linear(x, packed, row_scale), w4a16_linear(x, packed, group_scale, None, 128)
    for _ in range(300):
        assert torch.equal(w4a8_linear(x, packed, row_scale), first[0])
        assert torch.equal(w4a16_linear(x, packed, group_scale, None, 128), first[1])

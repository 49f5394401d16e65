"""The Triton kernels in the interpreter, on the CPU: run by test_triton_interpreter.py with TRITON_INTERPRET=1.

One case of each kind is unmarked, the others are slow.

Codes, scales and int32 sums equal the CPU implementation bit for bit. The interpreter has no bf16 products, no fused
multiply-add and no inline assembly: fp16, plain division, the plain variant of unpacking.
"""

from __future__ import annotations

import pytest
import torch

from diffuse_compress.quantization.packing import pack
from diffuse_compress_kernels import int_matmul
from diffuse_compress_kernels.int8_linear import cpu
from diffuse_compress_kernels.int8_linear.reference import linear_codes_reference
from diffuse_compress_kernels.triton_kernels.expand import expand_codes, expand_to_float, expand_to_int8
from diffuse_compress_kernels.triton_kernels.gemv import w4a16_gemv
from diffuse_compress_kernels.triton_kernels.reference import int8_weight_reference, w4a16_reference
from diffuse_compress_kernels.triton_kernels.rows import quantize_rows
from diffuse_compress_kernels.triton_kernels.tiles import GemvConfig, TileConfig
from diffuse_compress_kernels.triton_kernels.w4a8 import w4a8
from diffuse_compress_kernels.triton_kernels.w4a16 import w4a16
from diffuse_compress_kernels.triton_kernels.w8a8 import w8a8
from tolerance import Tolerance, assert_close

# No row, output or column count is a multiple of a tile; 272 is one of 16, as descriptors need.
SHAPES = [(1, 33, 128), (20, 70, 200), (37, 65, 272)]
CONFIGS = {
    "tile per program": TileConfig(32, 64),
    "parts of K": TileConfig(32, 64, split_k=3),
    "persistent": TileConfig(16, 32, programs_per_sm=1),
    "descriptors": TileConfig(32, 64, tma=True),
    "descriptors, persistent": TileConfig(32, 64, tma=True, programs_per_sm=1),
    "weight on the right": TileConfig(32, 64, weight_left=False),
}
SLOW = pytest.mark.slow
CASES = [
    pytest.param(shape, config, id=f"{'x'.join(map(str, shape))} {name}", marks=() if shape == SHAPES[2] else SLOW)
    for shape in SHAPES
    for name, config in CONFIGS.items()
    if not (config.tma and shape[2] % 16)
]
PACKED_CASES = [case for case in CASES if case.values[1].weight_left]
# The weight and its scale are rounded to fp16 before they are multiplied.
W4A16 = Tolerance(rms=1e-3, maximum=1e-2)


def codes(*shape: int, low: int = -127, high: int = 127) -> torch.Tensor:
    return torch.randint(low, high + 1, shape, dtype=torch.int8)


def sums(rows: int, outputs: int) -> torch.Tensor:
    return torch.full((rows, outputs), 7777777, dtype=torch.int32)


def packed_weight(outputs: int, depth: int, low: int = -8) -> torch.Tensor:
    weight = codes(outputs, depth, low=low, high=7)
    weight.view(-1)[:16] = torch.arange(-8, 8).clamp(min=low)
    return pack(weight, 4)


@pytest.mark.parametrize(("shape", "config"), CASES)
def test_w8a8_sums_equal_the_cpu(shape: tuple[int, int, int], config: TileConfig) -> None:
    rows, outputs, depth = shape
    x, weight, out = codes(rows, depth), codes(outputs, depth, low=-128), sums(rows, outputs)
    for _ in range(2):  # a second time: counters must be as they were
        w8a8(x, None, weight, None, config, out=out.fill_(7777777))
        assert torch.equal(out, int_matmul(x, weight))


@pytest.mark.parametrize("one_scale", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_w8a8_epilogue(dtype: torch.dtype, one_scale: bool) -> None:
    rows, outputs, depth = 37, 65, 272
    x, weight, bias = codes(rows, depth, low=-128), codes(outputs, depth), torch.randn(outputs)
    x_scale, w_scale = torch.rand(1 if one_scale else rows, 1) * 0.1, torch.rand(1 if one_scale else outputs, 1) * 0.01
    zero_point = torch.tensor([-31], dtype=torch.int8)
    offset = weight.sum(dim=1, dtype=torch.int32) * zero_point.int()
    for config in (CONFIGS["tile per program"], CONFIGS["weight on the right"], CONFIGS["parts of K"]):
        y = w8a8(x, x_scale, weight, w_scale, config, offset=offset, bias=bias, dtype=dtype)
        assert_close(y, linear_codes_reference(x, x_scale, zero_point, weight, w_scale, bias), dtype)


@pytest.mark.parametrize("name", ["tile per program", pytest.param("parts of K", marks=SLOW)])
def test_w8a8_takes_inputs_of_16_bits(name: str) -> None:
    rows, outputs, depth = 20, 70, 200
    x, weight = torch.randn(rows, depth).half(), codes(outputs, depth, low=-128)
    scale, bias = torch.rand(outputs, 1) * 0.01, torch.randn(outputs)
    y = w8a8(x, None, weight, scale, CONFIGS[name], bias=bias, dtype=x.dtype)
    assert_close(y, x.double() @ (weight.double() * scale.double()).t() + bias.double(), torch.float16)


@pytest.mark.parametrize("two_level", [False, True])
@pytest.mark.parametrize(("shape", "config"), PACKED_CASES)
def test_w4a8_sums_equal_the_cpu(shape: tuple[int, int, int], config: TileConfig, two_level: bool) -> None:
    rows, outputs, depth = shape
    x, packed, out = codes(rows, depth), packed_weight(outputs, depth, -7 if two_level else -8), sums(rows, outputs)
    group_scale = codes(outputs, -(-depth // 128), low=1, high=16) if two_level else None
    w4a8(x, None, packed, None, config, group_scale=group_scale, out=out, asm=False)
    assert torch.equal(out, int_matmul(x, int8_weight_reference(packed, group_scale, depth).to(torch.int8)))


@pytest.mark.parametrize("group_size", [pytest.param(0, marks=SLOW), 32, pytest.param(64, marks=SLOW), 128])
@pytest.mark.parametrize("zero", [pytest.param(False, marks=SLOW), True])
@pytest.mark.parametrize("name", ["tile per program", "parts of K", "descriptors"])
def test_w4a16_matches_reference(name: str, zero: bool, group_size: int) -> None:
    rows, outputs, depth = 20, 70, 272
    x, packed, bias = torch.randn(rows, depth).half(), packed_weight(outputs, depth), torch.randn(outputs)
    groups = 1 if group_size == 0 else -(-depth // group_size)
    scale = torch.rand(outputs, groups) * 0.1 + 0.01
    zero_point = codes(outputs, groups, low=-8, high=7) if zero else None
    y = w4a16(x, packed, scale, zero_point, group_size, CONFIGS[name], bias=bias, asm=False)
    expected = w4a16_reference(x, packed, scale, zero_point, group_size or depth) + bias.double()
    assert_close(y, expected, W4A16)


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize(("depth", "threads"), [(1024, 32), (272, 32), (1100, 64)])
def test_w4a16_gemv_is_more_exact_than_16_bit_weights(depth: int, threads: int, zero: bool) -> None:
    x, packed, bias = torch.randn(2, depth), packed_weight(21, depth), torch.randn(21)
    x[:, 7] *= 100
    scale = torch.rand(21, -(-depth // 128)) * 0.1 + 0.01
    zero_point = codes(*scale.shape, low=-8, high=7) if zero else None
    y = w4a16_gemv(x, packed, scale, zero_point, GemvConfig(8, threads), bias=bias)
    expected = w4a16_reference(x, packed, scale, zero_point, 128) + bias.double()
    assert_close(y, expected, Tolerance(rms=2e-4, maximum=2e-3))


@pytest.mark.parametrize("max_block", [16384, 128])
@pytest.mark.parametrize("given", ["measured", "pre_scale", "static", "zero point"])
@pytest.mark.parametrize(
    "dtype", [pytest.param(torch.float32, marks=SLOW), pytest.param(torch.float16, marks=SLOW), torch.bfloat16]
)
def test_quantize_rows_equals_the_cpu(dtype: torch.dtype, given: str, max_block: int) -> None:
    for depth in (300, 384, 512, 5) if max_block > 512 else (300,):
        x = torch.randn(9, depth) * torch.logspace(-3, 3, 9)[:, None]
        x[3] = 0
        x[5] = torch.linspace(-127, 127, depth).round() + 0.5
        x = x.to(dtype)
        arguments = {
            "measured": {},
            "pre_scale": {"pre_scale": torch.rand(depth) + 0.1},
            "static": {"scale": torch.tensor([0.1])},
            "zero point": {"scale": torch.tensor([0.1]), "zero_point": torch.tensor([-31], dtype=torch.int8)},
        }[given]
        qmin = -128 if given == "zero point" else -127
        got, got_scale = quantize_rows(x, qmin, 127, **arguments, max_block=max_block)
        expected, expected_scale = cpu.quantize_rows(x, qmin, 127, **arguments)
        assert torch.equal(got, expected)
        assert torch.equal(got_scale, expected_scale)


def test_quantize_rows_shows_nan() -> None:
    x = torch.randn(3, 100)
    x[1, 7] = float("nan")
    for max_block in (16384, 32):
        _, scale = quantize_rows(x, -127, 127, max_block=max_block)
        assert scale.isnan().flatten().tolist() == [False, True, False]


@pytest.mark.parametrize(("outputs", "depth"), [(40, 300), (7, 384)])
def test_expanded_weights_are_exact(outputs: int, depth: int) -> None:
    packed = packed_weight(outputs, depth)
    for group_scale in (None, codes(outputs, -(-depth // 128), low=1, high=16)):
        if group_scale is not None:
            packed = packed_weight(outputs, depth, -7)
        got = expand_to_int8(packed, group_scale, torch.empty(outputs, depth, dtype=torch.int8))
        assert torch.equal(got.long(), int8_weight_reference(packed, group_scale, depth))
    for group_size in (0, 32, 64, 128):
        scale = torch.rand(outputs, 1 if group_size == 0 else -(-depth // group_size))
        for zero_point in (None, codes(*scale.shape, low=-8, high=7), torch.randn(scale.shape)):
            got = expand_to_float(packed, scale, zero_point, group_size, torch.empty(outputs, depth))
            values = int8_weight_reference(packed, None, depth).float()
            repeats = group_size or depth
            if zero_point is not None:
                values -= zero_point.float().repeat_interleave(repeats, dim=1)[:, :depth]
            assert torch.equal(got, values * scale.repeat_interleave(repeats, dim=1)[:, :depth])


@pytest.mark.parametrize("group_size", [0, 32])
def test_expanded_codes_are_exact(group_size: int) -> None:
    weight = codes(33, 272, low=-128)
    groups = -(-272 // group_size) if group_size else 1
    scale, zero_point = torch.rand(33, groups), codes(33, groups)
    out = torch.full((33, 272), float("nan"), dtype=torch.float16)
    spread = group_size or 272
    values = weight.float() - zero_point.float().repeat_interleave(spread, dim=1)[:, :272]
    values *= scale.repeat_interleave(spread, dim=1)[:, :272]
    assert torch.equal(expand_codes(weight, scale, zero_point, group_size, out), values.half())


def test_descriptors_refuse_parts_of_k_and_unaligned_rows() -> None:
    x, weight = codes(4, 160), codes(8, 160)
    with pytest.raises(ValueError, match="descriptors and split_k=2 do not go together"):
        w8a8(x, None, weight, None, TileConfig(32, 64, tma=True, split_k=2), out=sums(4, 8))
    with pytest.raises(ValueError, match="descriptors need rows of a multiple of 16 bytes"):
        w8a8(x[:, :100].contiguous(), None, weight[:, :100], None, TileConfig(32, 64, tma=True), out=sums(4, 8))

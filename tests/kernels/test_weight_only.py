"""Products with 8-bit weight-only layers and expanded weights, against float64 and the plain dequantization."""

from __future__ import annotations

import pytest
import torch

from diffuse_compress.quantization.packing import pack
from diffuse_compress_kernels import expand_weight, w8a16_linear
from tolerance import Tolerance, assert_close

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
# Rows where the kernel takes over, and where the weight is written out first.
SHAPES = [(1, 72, 160), (7, 33, 272), (64, 130, 1000), (65, 48, 128), (300, 200, 264)]
W8A16 = {
    torch.bfloat16: Tolerance(rms=6e-3, maximum=4e-2),
    torch.float16: Tolerance(rms=1e-3, maximum=8e-3),
    torch.float32: Tolerance(rms=1e-5, maximum=1e-4),
}


def make_weight(outputs: int, depth: int, dtype: torch.dtype) -> torch.Tensor:
    weight = torch.randint(-128, 128, (outputs, depth), dtype=torch.int8)
    return weight if dtype == torch.int8 else (torch.randn(outputs, depth) * 60).to(dtype)


def qparams(outputs: int, depth: int, group_size: int, zero: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    groups = 1 if group_size == 0 else -(-depth // group_size)
    scale = torch.rand(outputs, groups) * 0.01 + 1e-3
    return scale, torch.randint(-20, 20, (outputs, groups), dtype=torch.int8) if zero else None


def dense(
    weight: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None, group_size: int, dtype: torch.dtype
) -> torch.Tensor:
    """fp32 arithmetic, rounded once."""
    depth = weight.shape[1]
    spread = group_size or depth
    values = weight.float()
    if zero_point is not None:
        values = values - zero_point.float().repeat_interleave(spread, dim=1)[:, :depth]
    return (values * scale.repeat_interleave(spread, dim=1)[:, :depth]).to(dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", W8A16)
@pytest.mark.parametrize("codes", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_w8a16_equals_float64(shape: tuple[int, int, int], codes: torch.dtype, dtype: torch.dtype, device: str) -> None:
    rows, outputs, depth = shape
    weight, (scale, _) = make_weight(outputs, depth, codes), qparams(outputs, depth, 0, False)
    x, bias = torch.randn(rows, depth).to(dtype), torch.randn(outputs).to(dtype)
    y = w8a16_linear(x.to(device), weight.to(device), scale.to(device), bias=bias.to(device))
    expected = x.double() @ (weight.double() * scale.double()).t() + bias.double()
    assert (y.dtype, y.device.type) == (dtype, device)
    assert_close(y.cpu(), expected, W8A16[dtype])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rows", [3, 80])
@pytest.mark.parametrize(("group_size", "zero"), [(0, True), (64, False), (64, True)])
def test_w8a16_takes_groups_and_zero_points(group_size: int, zero: bool, rows: int, device: str) -> None:
    weight, (scale, zero_point) = make_weight(40, 200, torch.int8), qparams(40, 200, group_size, zero)
    x = torch.randn(rows, 200).bfloat16()
    moved = None if zero_point is None else zero_point.to(device)
    y = w8a16_linear(x.to(device), weight.to(device), scale.to(device), moved, group_size)
    expected = x.double() @ dense(weight, scale, zero_point, group_size, torch.float64).t()
    assert_close(y.cpu(), expected, W8A16[torch.bfloat16])


def test_w8a16_shapes_are_checked() -> None:
    with pytest.raises(ValueError, match=r"w8a16_linear: need x \[M, K\] and int8 or float8_e4m3fn weight \[N, K\]"):
        w8a16_linear(torch.randn(3, 8), torch.zeros(4, 9, dtype=torch.int8), torch.ones(4, 1))
    packed = torch.zeros(4, 64, dtype=torch.int8)
    with pytest.raises(ValueError, match="packed codes need group_size"):
        expand_weight(packed, torch.ones(4, 8), None, 16, torch.empty(4, 128), packed=True)


@pytest.mark.parametrize("device", DEVICES)
def test_w8a16_passes_opcheck_and_compiles(device: str) -> None:
    weight, (scale, _) = make_weight(24, 160, torch.int8).to(device), qparams(24, 160, 0, False)
    scale, x = scale.to(device), torch.randn(5, 160, device=device).bfloat16()
    torch.library.opcheck(torch.ops.diffuse_compress.w8a16_linear.default, (x, weight, scale, None, 0, None))
    compiled = torch.compile(w8a16_linear, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, weight, scale), w8a16_linear(x, weight, scale))


@pytest.mark.gpu
@pytest.mark.parametrize("out", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize(("codes", "group_size"), [("int8", 0), ("int8", 64), ("float8", 0), ("int4", 0), ("int4", 32)])
def test_expanded_weights_are_the_dequantized_ones(codes: str, group_size: int, zero: bool, out: torch.dtype) -> None:
    outputs, depth = 70, 200
    kind = torch.float8_e4m3fn if codes == "float8" else torch.int8
    weight = make_weight(outputs, depth, kind)
    if codes == "int4":
        weight = weight >> 4
    scale, zero_point = qparams(outputs, depth, group_size, zero)
    stored = (pack(weight, 4) if codes == "int4" else weight).cuda()
    moved = None if zero_point is None else zero_point.cuda()
    target = torch.full((outputs, depth), float("nan"), dtype=out, device="cuda")
    expand_weight(stored, scale.cuda(), moved, group_size, target, packed=codes == "int4")
    assert torch.equal(target.cpu(), dense(weight, scale, zero_point, group_size, out))

"""float8 linear kernel: shapes everywhere, numbers on a device that has the matmul."""

from __future__ import annotations

import pytest
import torch

from diffuse_compress.quantization.numerics import quantize_activation
from diffuse_compress.quantization.scheme import ActivationScheme, NumberFormat
from diffuse_compress_kernels import fp8_linear, has_fp8_matmul
from diffuse_compress_kernels.fp8_linear.op import quantize_rows_fp8
from tolerance import Tolerance, assert_close

FLOAT8 = torch.float8_e4m3fn
# Before Blackwell, tensor cores sum float8 products with about 14 bits.
ACCUMULATOR = Tolerance(rms=4e-3, maximum=2e-2)


def operands(rows: int, outputs: int, depth: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    x = torch.randn(rows, depth)
    x[:, ::7] *= 20
    weight = (torch.randn(outputs, depth) * 100).clamp(-448, 448).to(FLOAT8)
    return x.to(dtype), weight, torch.rand(outputs, 1) * 1e-3, torch.randn(outputs)


def test_cpu_has_no_float8_matmul() -> None:
    assert not has_fp8_matmul(torch.device("cpu"))
    assert not has_fp8_matmul(torch.device("meta"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codes_are_those_of_numerics(dtype: torch.dtype) -> None:
    x = operands(9, 4, 50, dtype)[0]
    expected, scale, _ = quantize_activation(x, ActivationScheme(NumberFormat.FLOAT8_E4M3))
    codes, got_scale = quantize_rows_fp8(x, None, None)
    assert torch.equal(codes.view(torch.uint8), expected.view(torch.uint8))
    assert torch.equal(got_scale, scale)


def test_fp8_linear_on_meta_and_refusals() -> None:
    x, weight, scale, _ = operands(3, 5, 16, torch.bfloat16)
    y = fp8_linear(x.to("meta"), weight.to("meta"), scale.to("meta"))
    assert (y.shape, y.dtype) == ((3, 5), torch.bfloat16)
    with pytest.raises(ValueError, match=r"need x \[M, K\] and float8_e4m3fn weight \[N, K\]"):
        fp8_linear(x, weight[:, :8], scale)


@pytest.mark.sm90
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize(("rows", "outputs", "depth"), [(1, 16, 16), (5, 70, 131), (64, 128, 256), (0, 16, 16)])
def test_fp8_linear_matches_reference(rows: int, outputs: int, depth: int, static: bool, dtype: torch.dtype) -> None:
    x, weight, weight_scale, bias = (tensor.cuda() for tensor in operands(rows, outputs, depth, dtype))
    pre_scale = torch.rand(depth, device="cuda") + 0.5
    given = torch.tensor([0.1], device="cuda") if static else None
    y = fp8_linear(x, weight, weight_scale, bias, input_scale=given, pre_scale=pre_scale)
    codes, scale = quantize_rows_fp8(x, given, pre_scale)
    expected = (codes.double() * scale) @ (weight.double() * weight_scale).t() + bias
    assert y.dtype == dtype
    assert_close(y, expected, ACCUMULATOR)
    torch._dynamo.reset()
    compiled = torch.compile(fp8_linear, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, weight, weight_scale, bias, input_scale=given, pre_scale=pre_scale), y)

"""Integer linear kernels: int32 sums bit for bit, codes bit for bit those of numerics, epilogue against float64."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from diffuse_compress.quantization.numerics import quantize_activation
from diffuse_compress.quantization.scheme import ActivationScheme, NumberFormat, PerTensor
from diffuse_compress_kernels import int8_linear, int8_linear_codes, int_matmul, quantize_rows
from diffuse_compress_kernels.int8_linear import cpu
from diffuse_compress_kernels.int8_linear.reference import int_matmul_reference, linear_codes_reference
from tolerance import assert_close

SHAPES = [(1, 8, 16), (3, 5, 7), (17, 33, 130), (64, 96, 128), (300, 70, 1152), (2, 3, 2500), (3, 32, 1)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=["int_mm", "float32"])
def gemm(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both integer GEMMs of the CPU, whatever this CPU would choose."""
    monkeypatch.setattr(cpu, "has_fast_int8", lambda: request.param == "int_mm")
    monkeypatch.setattr(cpu, "ROWS_PER_BLOCK", 32)
    monkeypatch.setattr(cpu, "COLUMNS_PER_BLOCK", 48)
    return str(request.param)


def codes(*shape: int, low: int = -128, high: int = 127) -> torch.Tensor:
    return torch.randint(low, high + 1, shape, dtype=torch.int8)


def inputs(rows: int, depth: int, dtype: torch.dtype) -> torch.Tensor:
    x = torch.randn(rows, depth)
    x[:, :: max(1, depth // 5)] *= 30
    x[0] = 0
    return x.to(dtype)


@pytest.mark.parametrize(("rows", "outputs", "depth"), SHAPES)
def test_int_matmul_equals_int64(gemm: str, rows: int, outputs: int, depth: int) -> None:
    a, b = codes(rows, depth), codes(outputs, depth)
    acc = int_matmul(a, b)
    assert acc.dtype == torch.int32
    assert torch.equal(acc.long(), int_matmul_reference(a, b))


@pytest.mark.parametrize(("rows", "depth", "columns"), [(5, 1, 7), (1, 1, 32), (1, 3, 7), (1, 8, 1), (4, 8, 1)])
def test_int_matmul_reads_sides_of_one_whatever_their_strides(gemm: str, rows: int, depth: int, columns: int) -> None:
    for a in (codes(rows, depth), codes(depth, rows).t()):
        for b in (codes(depth, columns), codes(columns, depth).t()):
            assert torch.equal(cpu.int_matmul(a, b).long(), a.long() @ b.long())


@pytest.mark.parametrize("depth", [1023, 1024, 1025, 4608, 20000])
@pytest.mark.parametrize("value", [-128, 127])
def test_int_matmul_extreme_codes_stay_exact(gemm: str, depth: int, value: int) -> None:
    """Sums far over 2**24, which one float32 product could not hold."""
    a = torch.full((3, depth), value, dtype=torch.int8)
    b = torch.full((5, depth), -128, dtype=torch.int8)
    b[1] = torch.arange(depth) % 2
    assert torch.equal(int_matmul(a, b).long(), int_matmul_reference(a, b))


def test_int_matmul_bound_decides_and_both_sides_are_exact(gemm: str) -> None:
    """Depth over 1024 with small codes takes one product, with large ones several: same sums."""
    for scale in (3, 20, 127):
        a, b = codes(9, 3000, low=-scale, high=scale), codes(11, 3000, low=-scale, high=scale)
        assert torch.equal(int_matmul(a, b).long(), int_matmul_reference(a, b))


@pytest.mark.parametrize(("rows", "outputs", "depth"), [(0, 8, 16), (4, 0, 16), (4, 8, 0)])
def test_int_matmul_without_elements(gemm: str, rows: int, outputs: int, depth: int) -> None:
    assert torch.equal(int_matmul(codes(rows, depth), codes(outputs, depth)), torch.zeros(rows, outputs).int())


def test_int_matmul_accepts_strided_operands(gemm: str) -> None:
    a, b = codes(40, 24)[::2], codes(64, 30).t()[::2][:, :24]
    assert torch.equal(int_matmul(a, b).long(), int_matmul_reference(a, b))


def test_int_matmul_refuses_other_operands() -> None:
    with pytest.raises(ValueError, match=r"need int8 \[M, K\] and int8 \[N, K\], got torch.int8 \[2, 3\]"):
        int_matmul(codes(2, 3), codes(2, 4))
    with pytest.raises(ValueError, match="K must be at most 131072"):
        int_matmul(codes(1, 131073), codes(1, 131073))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [8, 4])
def test_quantize_rows_gives_the_codes_of_numerics(dtype: torch.dtype, bits: int) -> None:
    x = inputs(37, 259, dtype)
    x[5] *= 1e-30 if dtype != torch.float16 else 1e-4
    fmt = NumberFormat(f"int{bits}")
    expected, scale, _ = quantize_activation(x, ActivationScheme(fmt))
    got, got_scale = quantize_rows(x, -fmt.qmax, fmt.qmax)
    assert torch.equal(got, expected)
    assert torch.equal(got_scale, scale)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("symmetric", [True, False])
def test_quantize_rows_static_gives_the_codes_of_numerics(dtype: torch.dtype, symmetric: bool) -> None:
    act = ActivationScheme(NumberFormat.INT8, PerTensor(), dynamic=False, symmetric=symmetric)
    x = inputs(37, 259, dtype)
    scale = torch.tensor([0.037])
    zero_point = None if symmetric else torch.tensor([-45], dtype=torch.int8)
    expected, _, _ = quantize_activation(x, act, scale, zero_point)
    got, got_scale = quantize_rows(x, -127 if symmetric else -128, 127, scale, zero_point)
    assert torch.equal(got, expected)
    assert torch.equal(got_scale, scale.view(1, 1))
    assert (got.amin(), got.amax()) == (expected.amin(), 127), "the data must reach the clamp"


def test_quantize_rows_multiplies_by_pre_scale_in_float32() -> None:
    x, pre_scale = inputs(9, 64, torch.bfloat16), torch.rand(64) + 0.1
    got, scale = quantize_rows(x, -127, 127, pre_scale=pre_scale)
    expected, expected_scale = quantize_rows(x.float() * pre_scale, -127, 127)
    assert torch.equal(got, expected)
    assert torch.equal(scale, expected_scale)


def test_quantize_rows_in_blocks_equals_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    x = inputs(37, 64, torch.float32)
    whole = quantize_rows(x, -127, 127)
    monkeypatch.setattr(cpu, "QUANTIZE_BLOCK_ELEMENTS", 300)
    parts = quantize_rows(x, -127, 127)
    assert torch.equal(whole[0], parts[0])
    assert torch.equal(whole[1], parts[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("rows", "outputs", "depth"), SHAPES)
def test_int8_linear_matches_reference(
    gemm: str, rows: int, outputs: int, depth: int, bias: bool, dtype: torch.dtype
) -> None:
    x, weight, weight_scale = inputs(rows, depth, dtype), codes(outputs, depth), torch.rand(outputs, 1) * 1e-3
    b = torch.randn(outputs).to(dtype) if bias else None
    y = int8_linear(x, weight, weight_scale, b)
    x_codes, scale = quantize_rows(x, -127, 127)
    assert y.dtype == dtype
    assert_close(y, linear_codes_reference(x_codes, scale, None, weight, weight_scale, b), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_linear_static_asymmetric_per_tensor_weight(gemm: str, dtype: torch.dtype) -> None:
    x, weight, weight_scale, bias = inputs(50, 131, dtype), codes(70, 131), torch.tensor([[2e-3]]), torch.randn(70)
    scale, zero_point = torch.tensor([0.05]), torch.tensor([37], dtype=torch.int8)
    y = int8_linear(x, weight, weight_scale, bias, qmin=-128, input_scale=scale, input_zero_point=zero_point)
    x_codes, _ = quantize_rows(x, -128, 127, scale, zero_point)
    assert_close(y, linear_codes_reference(x_codes, scale, zero_point, weight, weight_scale, bias), dtype)


@pytest.mark.parametrize("static", [False, True])
def test_int8_linear_codes_equals_int8_linear(gemm: str, static: bool) -> None:
    x, weight, weight_scale, bias = (
        inputs(90, 128, torch.bfloat16),
        codes(100, 128),
        torch.rand(100, 1),
        torch.randn(100),
    )
    given = {"scale": torch.tensor([0.1]), "zero_point": torch.tensor([3], dtype=torch.int8)} if static else {}
    x_codes, scale = quantize_rows(x, -128, 127, **given)
    zero_point = given.get("zero_point")
    y = int8_linear(
        x, weight, weight_scale, bias, qmin=-128, input_scale=given.get("scale"), input_zero_point=zero_point
    )
    assert torch.equal(y, int8_linear_codes(x_codes, scale, zero_point, weight, weight_scale, bias, x.dtype))


def test_int8_linear_rows_do_not_depend_on_their_batch(gemm: str) -> None:
    x, weight, weight_scale = inputs(90, 300, torch.float32), codes(100, 300), torch.rand(100, 1)
    whole = int8_linear(x, weight, weight_scale)
    for rows in (slice(0, 1), slice(40, 41), slice(20, 77)):
        assert torch.equal(int8_linear(x[rows], weight, weight_scale), whole[rows])


def test_both_gemms_give_equal_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, weight_scale, bias = (
        inputs(90, 1300, torch.float32),
        codes(100, 1300),
        torch.rand(100, 1),
        torch.randn(100),
    )
    results = []
    for fast in (True, False):
        monkeypatch.setattr(cpu, "has_fast_int8", lambda fast=fast: fast)
        results.append(int8_linear(x, weight, weight_scale, bias))
    assert torch.equal(*results)


def test_int8_linear_shows_nan_and_survives_zero_rows(gemm: str) -> None:
    x, weight, weight_scale = inputs(4, 32, torch.float32), codes(8, 32), torch.rand(8, 1)
    x[2, 3] = float("nan")
    y = int8_linear(x, weight, weight_scale)
    assert y[2].isnan().all()
    assert y[[0, 1, 3]].isfinite().all()
    assert int8_linear(x[:0], weight, weight_scale).shape == (0, 8)


def test_scratch_made_in_inference_mode_serves_outside(gemm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_SCRATCH", cpu._Scratch())
    x, weight, weight_scale = inputs(4, 51, torch.float32), codes(8, 51), torch.rand(8, 1)
    bias = torch.randn(8, requires_grad=True)
    with torch.inference_mode():
        first = int8_linear(x, weight, weight_scale, bias)
    assert torch.equal(int8_linear(x, weight, weight_scale, bias), first)


def test_int8_linear_non_contiguous_input(gemm: str) -> None:
    x, weight, weight_scale = inputs(64, 200, torch.float32), codes(8, 100), torch.rand(8, 1)
    assert torch.equal(
        int8_linear(x[::2, ::2], weight, weight_scale), int8_linear(x[::2, ::2].contiguous(), weight, weight_scale)
    )


def test_int8_linear_refuses_other_operands() -> None:
    with pytest.raises(ValueError, match=r"int8 weight \[N, K\], got \[2, 3\] and torch.int8 \[4, 5\]"):
        int8_linear(torch.randn(2, 3), codes(4, 5), torch.ones(4, 1))


def _samples() -> dict[str, tuple[torch._ops.OpOverload, tuple[object, ...]]]:
    ops = torch.ops.diffuse_compress
    x, weight, weight_scale, bias = torch.randn(5, 16), codes(6, 16), torch.rand(6, 1), torch.randn(6)
    x_codes, scale = quantize_rows(x, -127, 127)
    one, zero_point = torch.tensor([0.1]), torch.tensor([2], dtype=torch.int8)
    return {
        "int_matmul": (ops.int_matmul.default, (x_codes, weight)),
        "quantize_rows": (ops.quantize_rows.default, (x, -127, 127, None, None, None)),
        "quantize_rows static": (ops.quantize_rows.default, (x, -128, 127, one, zero_point, torch.rand(16))),
        "int8_linear": (
            ops.int8_linear.default,
            (x.bfloat16(), weight, weight_scale, bias, -127, 127, None, None, None),
        ),
        "int8_linear static": (
            ops.int8_linear.default,
            (x, weight, weight_scale, None, -128, 127, one, zero_point, torch.rand(16)),
        ),
        "int8_linear_codes": (
            ops.int8_linear_codes.default,
            (x_codes, scale, None, weight, weight_scale, bias, torch.float16),
        ),
    }


@pytest.mark.parametrize("name", list(_samples()))
def test_operators_pass_opcheck(name: str) -> None:
    operator, arguments = _samples()[name]
    torch.library.opcheck(operator, arguments)


@pytest.mark.parametrize("dynamic", [False, True])
def test_operators_compile_without_graph_breaks(dynamic: bool) -> None:
    weight, weight_scale, bias = codes(6, 16), torch.rand(6, 1), torch.randn(6)

    def run(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x_codes, scale = quantize_rows(x, -127, 127)
        return (
            int8_linear(x, weight, weight_scale, bias),
            int8_linear_codes(x_codes, scale, None, weight, weight_scale, bias, x.dtype),
            int_matmul(x_codes, weight),
        )

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for rows in (5, 9):
        x = torch.randn(rows, 16)
        assert all(torch.equal(a, b) for a, b in zip(compiled(x), run(x), strict=True))


def test_operators_work_on_meta_tensors() -> None:
    x, weight = torch.randn(5, 16, device="meta"), codes(6, 16).to("meta")
    scale = torch.empty(6, 1, device="meta")
    y = int8_linear(x.to(torch.bfloat16), weight, scale)
    assert (y.shape, y.dtype, y.device.type) == ((5, 6), torch.bfloat16, "meta")


def test_import_needs_torch_alone_and_initialises_no_device() -> None:
    code = (
        "import sys, torch, diffuse_compress_kernels\n"
        "assert not torch.cuda.is_initialized()\n"
        "bad = [m for m in ('diffusers', 'transformers', 'accelerate', 'diffuse_compress') if m in sys.modules]\n"
        "assert not bad, bad\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.gpu
@pytest.mark.parametrize(("rows", "outputs", "depth"), [*SHAPES, (4096, 1152, 1152)])
def test_cuda_sums_equal_cpu_sums(rows: int, outputs: int, depth: int) -> None:
    a, b = codes(rows, depth), codes(outputs, depth)
    assert torch.equal(int_matmul(a.cuda(), b.cuda()).cpu(), int_matmul(a, b))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_cuda_linear_matches_reference(dtype: torch.dtype) -> None:
    x, weight, weight_scale, bias = inputs(90, 131, dtype), codes(70, 131), torch.rand(70, 1) * 1e-3, torch.randn(70)
    expected, expected_scale, _ = quantize_activation(x.cuda(), ActivationScheme(NumberFormat.INT8))
    x_codes, scale = quantize_rows(x.cuda(), -127, 127)
    assert torch.equal(x_codes, expected)
    assert torch.equal(scale, expected_scale)
    y = int8_linear(x.cuda(), weight.cuda(), weight_scale.cuda(), bias.cuda())
    assert_close(y, linear_codes_reference(x_codes, scale, None, weight, weight_scale, bias), dtype)

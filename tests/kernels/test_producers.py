"""Operators of the producers: values against float64, codes against the quantization of the rows they keep."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from diffuse_compress_kernels import quantize_rows
from diffuse_compress_kernels.producers import activation_quantize, norm_quantize
from tolerance import assert_close

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
}


def rows(count: int = 12, columns: int = 100, dtype: torch.dtype = torch.float32, device: str = "cpu") -> torch.Tensor:
    x = torch.randn(count, columns) * (torch.rand(columns) * 3 + 0.2) + 0.5
    x[1] *= 30
    return x.to(device, dtype)


def assert_quantized(result, expected: torch.Tensor, dtype: torch.dtype, **how) -> None:
    codes, scale, kept = result
    assert kept.dtype == dtype
    assert_close(kept, expected, dtype)
    again, again_scale = quantize_rows(kept.cpu(), how.get("qmin", -127), how.get("qmax", 127), *how.get("given", ()))
    assert torch.equal(codes.cpu(), again)
    assert torch.equal(scale.cpu(), again_scale)


def check_norms(dtype: torch.dtype, device: str) -> None:
    x = rows(dtype=dtype, device=device)
    scale, shift = (rows(3, dtype=dtype, device=device) / 4 for _ in range(2))
    wide = x.double().view(3, 4, 100)
    expected = F.layer_norm(wide, (100,), eps=1e-6) * (1 + scale.double()[:, None]) + shift.double()[:, None]
    # Each of three results is rounded.
    result = norm_quantize(x, eps=1e-6, scale=scale, shift=shift, keep=True)
    assert_close(result[2].float(), expected.flatten(0, 1), dtype)
    precise = norm_quantize(x, eps=1e-6, scale=scale.float(), shift=shift.float(), work_dtype=torch.float32, keep=True)
    assert_quantized(precise, expected.flatten(0, 1), dtype)
    weight, bias = rows(2, dtype=dtype, device=device)
    affine = F.layer_norm(x.double(), (100,), weight.double(), bias.double(), 1e-5)
    assert_quantized(norm_quantize(x, weight=weight, bias=bias, keep=True), affine, dtype)
    root = x.double() * torch.rsqrt(x.double().square().mean(-1, keepdim=True) + 1e-5)
    assert_quantized(norm_quantize(x, rms=True, keep=True), root, dtype)
    result = norm_quantize(x, rms=True, weight=weight, keep=True, qmax=7)
    assert_quantized(result, root * weight.double(), dtype, qmin=-7, qmax=7)


def check_activations(dtype: torch.dtype, device: str) -> None:
    wide = rows(columns=200, dtype=dtype, device=device)
    x, other = wide[:, 100:], wide[:, :100]
    for kind, function in ACTIVATIONS.items():
        assert_quantized(activation_quantize(x, kind=kind, keep=True), function(x.double()), dtype)
        expected = function(x.double()) * other.double()
        assert_quantized(activation_quantize(x, other, kind=kind, keep=True), expected, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_quantize_matches_reference(dtype) -> None:
    check_norms(dtype, "cpu")


@pytest.mark.parametrize("dtype", DTYPES)
def test_activation_quantize_matches_reference(dtype) -> None:
    check_activations(dtype, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_cuda_matches_reference(dtype) -> None:
    check_norms(dtype, "cuda")
    check_activations(dtype, "cuda")


def check_static(device: str) -> None:
    x, pre = rows(dtype=torch.bfloat16, device=device), torch.rand(100).to(device) + 0.1
    scale, zero = torch.tensor([0.04], device=device), torch.tensor([-30], dtype=torch.int8, device=device)
    how = {"qmin": -128, "input_scale": scale, "zero_point": zero, "pre_scale": pre}
    host = [part.cpu() for part in (scale, zero, pre)]
    for codes, code_scale, kept in (
        norm_quantize(x, **how, keep=True),
        activation_quantize(x, kind="silu", **how, keep=True),
    ):
        assert torch.equal(codes.cpu(), quantize_rows(kept.cpu(), -128, 127, *host)[0])
        assert code_scale.shape == (1, 1)
    assert norm_quantize(x, **how)[2] is None


def test_static_asymmetric_smoothed() -> None:
    check_static("cpu")


@pytest.mark.gpu
def test_cuda_static_asymmetric_smoothed() -> None:
    check_static("cuda")


def check_float8(device: str) -> None:
    codes, scale, kept = norm_quantize(rows(device=device), qmin=-448, qmax=448, keep=True)
    assert codes.dtype == torch.float8_e4m3fn
    assert torch.equal(scale, kept.abs().amax(1, keepdim=True) / torch.full_like(scale, 448))
    assert torch.equal(codes.float(), (kept / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float())


def test_float8_codes() -> None:
    check_float8("cpu")


@pytest.mark.sm90
def test_cuda_float8_codes() -> None:
    check_float8("cuda")


def check_compiled(device: str) -> None:
    x, scale = rows(dtype=torch.bfloat16, device=device), rows(3, dtype=torch.bfloat16, device=device)
    vectors = (None, None, scale, None)
    torch.library.opcheck(
        torch.ops.diffuse_compress.norm_quantize.default,
        (x, *vectors, False, 1e-6, torch.bfloat16, -127, 127, None, None, None, True),
    )
    static = torch.tensor([0.1], device=device)
    torch.library.opcheck(
        torch.ops.diffuse_compress.activation_quantize.default,
        (x, x, "gelu", -127, 127, static, None, None, False),
    )

    def run(x: torch.Tensor) -> list[torch.Tensor | None]:
        return [*norm_quantize(x, scale=scale, keep=True), *activation_quantize(x, kind="gelu_tanh")[:2]]

    for one, other in zip(torch.compile(run, fullgraph=True, backend="aot_eager")(x), run(x), strict=True):
        assert torch.equal(one, other)


def test_opcheck_and_compile() -> None:
    check_compiled("cpu")
    meta = norm_quantize(rows().to("meta"), keep=True)
    assert [part.shape for part in meta] == [(12, 100), (12, 1), (12, 100)]


@pytest.mark.gpu
def test_cuda_opcheck_compile_and_graph() -> None:
    check_compiled("cuda")
    x = rows(dtype=torch.bfloat16, device="cuda")
    expected = norm_quantize(x)[:2]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        codes, scale, _ = norm_quantize(x)
    codes.zero_()
    graph.replay()
    assert torch.equal(codes, expected[0])
    assert torch.equal(scale, expected[1])


def test_gradients_are_not_asked_for() -> None:
    x = rows().requires_grad_()
    assert norm_quantize(x)[0].dtype == torch.int8
    assert norm_quantize(x.detach()[:0])[0].shape == (0, 100)


def test_norm_quantize_refuses_what_does_not_fit() -> None:
    x = rows(dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"need x \[M, K\] and work_dtype"):
        norm_quantize(x, work_dtype=torch.float16)
    with pytest.raises(ValueError, match=r"need scale \[S, 100\] in torch.bfloat16 where S divides 12"):
        norm_quantize(x, scale=rows(5, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match=r"need shift \[S, 100\] in torch.bfloat16"):
        norm_quantize(x, shift=rows(3))
    with pytest.raises(ValueError, match="scale and shift of one shape"):
        norm_quantize(x, scale=x[:3], shift=x[:2])
    with pytest.raises(ValueError, match="RMSNorm takes no bias"):
        norm_quantize(x, rms=True, bias=x[0])


def test_activation_quantize_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="a kind of"):
        activation_quantize(rows(), kind="relu")
    with pytest.raises(ValueError, match="need other like x"):
        activation_quantize(rows(), rows(3), kind="silu")

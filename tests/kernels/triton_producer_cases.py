"""Cases of the fused producers for Triton's interpreter: ``test_triton_producers.py`` runs them."""

from __future__ import annotations

import pytest
import torch

from diffuse_compress_kernels.int8_linear import cpu
from diffuse_compress_kernels.producers import stock
from diffuse_compress_kernels.triton_kernels.fused_rows import Quantization, activation_rows, norm_rows

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
# No second block; one that is exact; ones that are not.
COLUMNS = [64, 96, 100, 17]
# One step of the 16-bit dtype on values near a tie; measured 2e-4 on 4e5 values, all from the order of sums.
MOST_FLIPS = 2e-3


def operands(columns: int, dtype: torch.dtype, samples: int = 3) -> torch.Tensor:
    x = torch.randn(samples * 5, columns) * (torch.rand(columns) * 3 + 0.2) + torch.randn(columns) * 0.5
    x[4] = 0
    return x.to(dtype)


def assert_rows(rows, expected, how: Quantization) -> None:
    """Codes are exactly those of the kept rows; the kept rows are the stock ones but for the last bit."""
    codes, scale, kept = rows
    again, again_scale = cpu.quantize_rows(kept, how.qmin, how.qmax, how.scale, how.zero_point, how.pre_scale)
    assert torch.equal(scale, again_scale)
    assert torch.equal(codes, again)
    theirs, their_scale = cpu.quantize_rows(expected, how.qmin, how.qmax, how.scale, how.zero_point, how.pre_scale)
    steps = (codes.int() - theirs.int()).abs()
    assert steps.max() <= 1
    assert (steps > 0).double().mean() <= MOST_FLIPS
    torch.testing.assert_close(kept.float(), expected.float(), rtol=1.6e-2, atol=1e-4 * float(their_scale.max()))


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("work", ["x", "float32"])
def test_layer_norm_modulated(columns, dtype, work) -> None:
    x, work_dtype = operands(columns, dtype), dtype if work == "x" else torch.float32
    scale, shift = torch.randn(3, columns).to(work_dtype), torch.randn(3, columns).to(work_dtype)
    weight, bias = torch.randn(columns).to(dtype), torch.randn(columns).to(dtype)
    how = Quantization(keep=True)
    rows = norm_rows(x, how, rms=False, eps=1e-6, scale=scale, shift=shift, work_dtype=work_dtype)
    assert_rows(rows, stock.normed(x, None, None, scale, shift, False, 1e-6, work_dtype), how)
    rows = norm_rows(x, how, rms=False, eps=1e-5, weight=weight, bias=bias, work_dtype=work_dtype)
    assert_rows(rows, stock.normed(x, weight, bias, None, None, False, 1e-5, work_dtype), how)


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm(columns, dtype) -> None:
    x, weight, scale = operands(columns, dtype), torch.randn(columns).to(dtype), torch.randn(5, columns).to(dtype)
    how = Quantization(keep=True)
    rows = norm_rows(x, how, rms=True, eps=1e-6, weight=weight)
    assert_rows(rows, stock.normed(x, weight, None, None, None, True, 1e-6, dtype), how)
    rows = norm_rows(x, how, rms=True, eps=1e-6, scale=scale)
    assert_rows(rows, stock.normed(x, None, None, scale, None, True, 1e-6, dtype), how)


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["gelu", "gelu_tanh", "silu"])
def test_activations(columns, dtype, kind) -> None:
    wide = operands(2 * columns, dtype)
    x, other = wide[:, columns:], wide[:, :columns]
    how = Quantization(keep=True)
    assert_rows(activation_rows(x, how, kind=kind), stock.activated(x, None, kind), how)
    assert_rows(activation_rows(x, how, kind=kind, other=other), stock.activated(x, other, kind), how)


def test_static_asymmetric_small_codes_and_smoothing() -> None:
    x, pre = operands(100, torch.bfloat16), torch.rand(100) + 0.1
    for how in (
        Quantization(-128, 127, torch.tensor([0.04]), torch.tensor([-30], dtype=torch.int8), pre, True),
        Quantization(-7, 7, pre_scale=pre, keep=True),
    ):
        rows = norm_rows(x, how, rms=False, eps=1e-6)
        assert_rows(rows, stock.normed(x, None, None, None, None, False, 1e-6, x.dtype), how)
        rows = activation_rows(x, how, kind="gelu")
        assert_rows(rows, stock.activated(x, None, "gelu"), how)


def test_rows_are_not_kept_unless_asked_and_nan_shows() -> None:
    x = operands(96, torch.float32)
    x[2, 95] = float("nan")
    codes, scale, kept = norm_rows(x, Quantization(), rms=False, eps=1e-6)
    assert kept is None
    assert scale.isnan().flatten().nonzero().flatten().tolist() == [2]
    assert codes[4].count_nonzero() == 0
    assert activation_rows(x[:0], Quantization(), kind="silu")[0].shape == (0, 96)

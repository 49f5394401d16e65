"""Operators that normalize or activate rows and quantize them: the separate operations, then ``quantize_rows``."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from diffuse_compress_kernels import act_quantize_rows, norm_quantize_rows, quantize_rows
from diffuse_compress_kernels.quantizing_producers.op import ACTIVATIONS, GATED
from tolerance import KERNEL, assert_close

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = [torch.float32, torch.bfloat16]


def assert_codes_close(got: tuple[torch.Tensor, torch.Tensor], y: torch.Tensor) -> None:
    """Sums over a row in another order round a value differently, rarely, and then by one step."""
    expected, scale = quantize_rows(y, -127, 127)
    difference = (got[0].int() - expected.int()).abs()
    assert int(difference.max()) <= 1
    # A row whose largest value is rounded the other way has another scale, and one in some of its codes follows.
    assert float((difference > 0).float().mean()) < (0.05 if y.is_cuda else 1e-6)
    assert_close(got[1], scale, KERNEL[torch.bfloat16])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize("modulated", [False, True])
@pytest.mark.parametrize("rows", [12, 8192])
def test_norm_quantize_rows(rows: int, modulated: bool, rms: bool, dtype: torch.dtype, device: str) -> None:
    if rows > 4096 and device == "cpu":
        rows = 24
    x = (torch.randn(rows, 320, device=device) * 3 + 1).to(dtype)
    weight, bias = torch.randn(320, device=device).to(dtype), torch.randn(320, device=device).to(dtype)
    scale, shift = torch.randn(2, 640, device=device).to(dtype).chunk(2, dim=1)
    y = F.rms_norm(x, (320,), weight, 1e-6) if rms else F.layer_norm(x, (320,), weight, bias, 1e-6)
    given = {}
    if modulated:
        y = y * (1 + scale.repeat_interleave(rows // 2, 0)) + shift.repeat_interleave(rows // 2, 0)
        given = {"mod_scale": scale, "mod_shift": shift}
    assert_codes_close(norm_quantize_rows(x, weight, None if rms else bias, eps=1e-6, rms=rms, **given), y)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gate_first", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_act_quantize_rows(activation: str, gate_first: bool, dtype: torch.dtype, device: str) -> None:
    x = (torch.randn(20, 640, device=device) * 3).to(dtype)
    gate, up = x.chunk(2, dim=1) if gate_first else reversed(x.chunk(2, dim=1))
    if activation not in GATED:
        gate, up = x, torch.ones((), dtype=dtype, device=device)
    act = {"gelu": F.gelu, "geglu": F.gelu, "silu": F.silu, "swiglu": F.silu}.get(activation)
    y = (F.gelu(gate, approximate="tanh") if act is None else act(gate)) * up
    assert_codes_close(act_quantize_rows(x, activation, gate_first=gate_first), y)


def test_round_first_is_llamas_order() -> None:
    x, weight = torch.randn(9, 64).bfloat16(), torch.randn(64).bfloat16()
    codes, _ = norm_quantize_rows(x, weight, eps=1e-6, rms=True, round_first=True)
    assert torch.equal(codes, quantize_rows(F.rms_norm(x, (64,), None, 1e-6) * weight, -127, 127)[0])


def test_refusals_name_what_is_needed() -> None:
    with pytest.raises(ValueError, match=r"modulation \[B, K\] with M divisible by B, got \[9, 64\] and B in \[2\]"):
        norm_quantize_rows(torch.randn(9, 64), eps=1e-6, mod_scale=torch.randn(2, 64))
    with pytest.raises(ValueError, match=r"an activation of .*got .* and 'relu'"):
        act_quantize_rows(torch.randn(9, 64), "relu")


@pytest.mark.parametrize("device", DEVICES)
def test_operators_pass_opcheck_and_compile(device: str) -> None:
    ops, x, mod = torch.ops.diffuse_compress, torch.randn(8, 64, device=device), torch.randn(2, 64, device=device)
    torch.library.opcheck(ops.norm_quantize_rows.default, (x, None, None, mod, mod, 1e-6, False, False, 127))
    torch.library.opcheck(ops.act_quantize_rows.default, (x, "swiglu", True, 127))

    def run(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (*norm_quantize_rows(x, eps=1e-6, mod_scale=mod, mod_shift=mod), *act_quantize_rows(x, "gelu"))

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")(x)
    for got, expected in zip(compiled, run(x), strict=True):
        assert (got.shape, got.dtype) == (expected.shape, expected.dtype)
        assert float((got.float() - expected.float()).abs().max()) <= (1 if got.dtype == torch.int8 else 1e-3)
    assert norm_quantize_rows(x.to("meta"), eps=1e-6)[0].shape == (8, 64)

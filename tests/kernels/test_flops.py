"""torch's FLOP counter on our operators: the count of the dense product, however operands are packed."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import diffuse_compress_kernels as kernels
from diffuse_compress_kernels.fp8_linear import fp8_linear

M, K, N = 5, 96, 24
CODES = torch.randint(-7, 8, (N, K), dtype=torch.int8)
PACKED = torch.zeros(N, 64, dtype=torch.int8)
SCALE = torch.full((N, 1), 0.01)
GROUPED = torch.full((N, K // 32), 0.01)


def counted(run) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return int(counter.get_total_flops())


LINEARS = {
    "int_matmul": lambda x: kernels.int_matmul(x.to(torch.int8), CODES),
    "int8_linear": lambda x: kernels.int8_linear(x, CODES, SCALE, torch.zeros(N)),
    "int8_linear_codes": lambda x: kernels.int8_linear_codes(
        x.to(torch.int8), torch.ones(M, 1), None, CODES, SCALE, None, x.dtype
    ),
    "w8a16_linear": lambda x: kernels.w8a16_linear(x, CODES, GROUPED, None, 32),
    "w4a16_linear": lambda x: kernels.w4a16_linear(x, PACKED, GROUPED, None, 32),
    "w4a8_linear": lambda x: kernels.w4a8_linear(x, PACKED, SCALE),
}


@pytest.mark.parametrize("run", LINEARS.values(), ids=LINEARS)
def test_a_packed_linear_counts_as_the_dense_one(run) -> None:
    x = torch.randn(M, K)
    assert counted(lambda: run(x)) == counted(lambda: F.linear(x, torch.randn(N, K), torch.randn(N))) == 2 * M * N * K


def test_float8_counts_as_the_dense_one_without_a_device_that_multiplies_it() -> None:
    x, weight = torch.empty(M, K, device="meta"), torch.empty(N, K, device="meta", dtype=torch.float8_e4m3fn)
    assert counted(lambda: fp8_linear(x, weight, torch.empty(N, 1, device="meta"))) == 2 * M * N * K


@pytest.mark.parametrize("flat", [True, False], ids=["weight flattened", "weight as stored"])
def test_an_integer_convolution_counts_as_the_dense_one(flat) -> None:
    x, dense = torch.randn(2, 6, 9, 7), torch.randn(4, 6, 3, 2)
    codes = dense.to(torch.int8).flatten(1) if flat else dense.to(torch.int8)
    geometry = {"stride": (2, 1), "dilation": (1, 2)}
    ours = counted(
        lambda: kernels.int8_conv2d(x, codes, torch.ones(4, 1), kernel=(3, 2), padding=(1, 1, 2, 2), **geometry)
    )
    assert ours == counted(lambda: F.conv2d(x, dense, padding=(2, 1), **geometry)) > 0


def test_quantizing_rows_counts_nothing() -> None:
    assert counted(lambda: kernels.quantize_rows(torch.randn(M, K), -127, 127)) == 0

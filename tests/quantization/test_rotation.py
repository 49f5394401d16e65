"""Hadamard rotations against explicit matrices in float64."""

from __future__ import annotations

import pytest
import torch

from diffuse_compress.errors import ConfigError
from diffuse_compress.quantization.rotation import (
    hadamard,
    is_rotation_size,
    rotate,
    rotate_back,
    rotation_signs,
    rotation_size,
)
from diffuse_compress.quantization.scheme import NumberFormat, Scheme, WeightScheme
from tolerance import KERNEL, assert_close


@pytest.mark.parametrize("order", [1, 2, 4, 12, 20, 28, 36, 44, 60, 108, 140, 148, 96, 256, 1152])
def test_hadamard_matrices_are_orthogonal_and_of_ones(order: int) -> None:
    matrix = hadamard(order)
    assert torch.equal(matrix @ matrix.t(), order * torch.eye(order, dtype=torch.float64))
    assert torch.equal(matrix.abs(), torch.ones_like(matrix))


def test_orders_without_a_construction_are_refused() -> None:
    assert not is_rotation_size(52)
    assert not is_rotation_size(6)
    with pytest.raises(ConfigError, match="no matrix of order 52"):
        hadamard(52)
    with pytest.raises(ConfigError, match="input_rotation must be the order"):
        Scheme(WeightScheme(NumberFormat.INT8), input_rotation=52)


@pytest.mark.parametrize(
    ("channels", "size"),
    [(128, 128), (1152, 1152), (3072, 3072), (4096, 4096), (11008, 256), (13 * 64, 64), (39 * 64, 3 * 64), (50, None)],
)
def test_rotation_size_is_the_largest_that_divides(channels: int, size: int | None) -> None:
    assert rotation_size(channels) == size


@pytest.mark.parametrize("size", [16, 128, 96, 288])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_rotate_is_the_product_with_signs_and_kronecker_product(size: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(size)
    x = torch.randn(3, 5, 2 * size, generator=generator).to(dtype)
    scale = torch.rand(2 * size, generator=generator) + 0.5
    outer, inner = {16: (4, 4), 128: (16, 8), 96: (12, 8), 288: (36, 8)}[size]
    matrix = rotation_signs(size).unsqueeze(1) * torch.kron(hadamard(outer), hadamard(inner)) / size**0.5
    expected = torch.einsum("...bi,ij->...bj", (x.double() * scale).unflatten(-1, (2, size)), matrix).flatten(-2)
    # Two products, each rounded once.
    assert_close(rotate(x, size, scale), expected.to(dtype), KERNEL[dtype] * 2)
    assert_close(rotate_back(expected.to(dtype), size), (x.double() * scale).to(dtype), KERNEL[dtype] * 3)


@pytest.mark.parametrize(("size", "largest"), [(256, 1.0), (64, 1.0), (128, 2**0.5), (1152, 2.4)])
def test_a_constant_and_a_single_outlier_are_shared_out(size: int, largest: float) -> None:
    constant = rotate(torch.ones(size, dtype=torch.float64), size)
    assert constant.abs().max() <= largest + 1e-9
    spike = torch.zeros(size, dtype=torch.float64)
    spike[size // 3] = size**0.5
    assert torch.allclose(rotate(spike, size).abs(), torch.ones(size, dtype=torch.float64))


def test_rotations_compile_without_a_break() -> None:
    x = torch.randn(4, 192)
    compiled = torch.compile(lambda value: rotate(value, 192), fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), rotate(x, 192))


def test_schemes_are_written_and_read_with_their_rotation() -> None:
    scheme = Scheme(WeightScheme(NumberFormat.INT4), input_rotation=1152)
    data = scheme.to_dict()
    assert data["input_rotation"] == "hadamard:1152"
    assert Scheme.from_dict(data) == scheme
    assert "input_rotation" not in Scheme(WeightScheme(NumberFormat.INT4)).to_dict()
    with pytest.raises(ConfigError, match="must read 'hadamard:<size>', got 128"):
        Scheme.from_dict({**data, "input_rotation": 128})

"""Hadamard rotations of a layer's input: every outlier is shared out over the channels of its block.

A rotation of size n multiplies each run of n channels by the orthogonal matrix ``R = diag(s) H / sqrt(n)``. H is the
Kronecker product of two Hadamard matrices of orders as near to each other as can be: applying it costs n times the sum
of the orders. Sylvester's matrices give the powers of two, Paley's (1933) orders such as 12, 20, 28, 36 and 44. The
signs ``s`` are a bent function of the channel's index, so that a constant input is shared out too, exactly so where n
is a power of four; with H alone it would end up in one channel. Nothing of this is stored but n.
"""

from __future__ import annotations

import math

import torch

from diffuse_compress.errors import ConfigError

__all__ = ["MIN_ROTATION", "hadamard", "is_rotation_size", "rotate", "rotate_back", "rotation_signs", "rotation_size"]

MIN_ROTATION = 16


def rotation_size(channels: int) -> int | None:
    """The largest size that divides ``channels``; None if that is below :data:`MIN_ROTATION`.

    1152 = 4 * 36 * 8 is one itself; of 13 * 64 channels, runs of 64 are rotated.
    """
    power = channels & -channels
    odd = channels // power
    sizes = (power * factor for factor in range(odd, 0, -1) if odd % factor == 0)
    size = next((size for size in sizes if is_rotation_size(size)), 0)
    return size if size >= MIN_ROTATION else None


def is_rotation_size(size: int) -> bool:
    """True if a Hadamard matrix of this order can be made."""
    return size > 0 and _base_order(size) is not None


def rotate(x: torch.Tensor, size: int, scale: torch.Tensor | None = None) -> torch.Tensor:
    """``(x * scale) R`` in the dtype of x.

    Args:
        x: [..., K] floating point, K a multiple of ``size``.
        size: of the rotation.
        scale: fp32 [K], or None.

    Signs, scale and the root of n are multiplied in fp32 first; both products accumulate in fp32 at least.
    """
    outer, inner, signs = _matrices(size, x.dtype, x.device)
    values = x.unflatten(-1, (-1, size)) * signs
    if scale is not None:
        values = values * scale.unflatten(-1, (-1, size))
    values = values.to(x.dtype).unflatten(-1, (outer.shape[0], inner.shape[0]))
    rotated: torch.Tensor = torch.matmul(outer.t(), torch.matmul(values, inner)).flatten(-3)
    return rotated


def rotate_back(y: torch.Tensor, size: int) -> torch.Tensor:
    """``y R^T``, the inverse of :func:`rotate` without a scale."""
    outer, inner, signs = _matrices(size, y.dtype, y.device)
    values = y.unflatten(-1, (-1, outer.shape[0], inner.shape[0]))
    values = torch.matmul(outer, torch.matmul(values, inner.t())).flatten(-2)
    back: torch.Tensor = (values * signs).to(y.dtype).flatten(-2)
    return back


def hadamard(order: int) -> torch.Tensor:
    """A Hadamard matrix, float64 [n, n] of 1 and -1 with ``H H^T = n I``; of products, Sylvester's factor comes last.

    Raises:
        ConfigError: no construction here has this order.
    """
    base = _base_order(order)
    if base is None:
        raise ConfigError(f"hadamard: no matrix of order {order} can be made here. Use a power of two.")
    matrix = _paley(base) if base > 1 else torch.ones(1, 1, dtype=torch.float64)
    two = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    for _ in range((order // base).bit_length() - 1):
        matrix = torch.kron(matrix, two)
    return matrix


def rotation_signs(size: int) -> torch.Tensor:
    """float64 [n]: ``(-1) ** (b0 b1 + b2 b3 + ...)`` for the bits b of the channel's index."""
    index = torch.arange(size)
    product = index & (index >> 1) & int("01" * 16, 2)
    parity = sum((product >> bit) & 1 for bit in range(0, 32, 2)) % 2
    return 1.0 - 2.0 * torch.as_tensor(parity).double()


# --- construction -----------------------------------------------------------------------------------------------


def _base_order(size: int) -> int | None:
    """Order of the matrix that Sylvester's doubling starts from: 1, or 4m for the odd part m; None if there is none."""
    odd = size // (size & -size)
    if odd == 1:
        return 1
    base = 4 * odd
    if size % base or not (_is_prime(base - 1) or (_is_prime(base // 2 - 1) and (base // 2 - 1) % 4 == 1)):
        return None
    return base


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % factor for factor in range(2, math.isqrt(number) + 1))


def _paley(order: int) -> torch.Tensor:
    """Paley's first construction for a prime order - 1, else his second."""
    first = _is_prime(order - 1)
    prime = order - 1 if first else order // 2 - 1
    squares = {value * value % prime for value in range(1, prime)}
    residue = torch.tensor([0.0] + [1.0 if value in squares else -1.0 for value in range(1, prime)])
    index = torch.arange(prime)
    core = torch.zeros(prime + 1, prime + 1, dtype=torch.float64)
    core[0, 1:] = 1.0
    core[1:, 0] = -1.0 if first else 1.0
    core[1:, 1:] = residue[(index.unsqueeze(1) - index) % prime]
    if first:
        return core + torch.eye(order, dtype=torch.float64)
    plus = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    diagonal = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
    return torch.kron(core, plus) + torch.kron(torch.eye(prime + 1, dtype=torch.float64), diagonal)


def _split(size: int) -> tuple[int, int]:
    """Orders (outer, inner) of the Kronecker product that is H: of the smallest sum, the inner one Sylvester's."""
    base = _base_order(size)
    if base is None:
        raise ConfigError(f"rotation: no Hadamard matrix of order {size} can be made here. Use a power of two.")
    doublings = (size // base).bit_length() - 1
    inner = min((1 << power for power in range(doublings + 1)), key=lambda inner: size // inner + inner)
    return size // inner, inner


_MADE: dict[tuple[int, torch.dtype, torch.device], tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}
"""A model uses a few sizes on a device: a few kilobytes each, made once."""


# torch.compile takes them as constants.
@torch.compiler.assume_constant_result
def _matrices(size: int, dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(outer, inner) in ``dtype``, and the signs over the root of n in fp32 or wider."""
    found = _MADE.get((size, dtype, device))
    if found is None:
        with torch.inference_mode(False), torch.no_grad():
            outer, inner = _split(size)
            signs = (rotation_signs(size) / math.sqrt(size)).to(device, torch.promote_types(dtype, torch.float32))
            found = hadamard(outer).to(device, dtype), hadamard(inner).to(device, dtype), signs
        # While a program is exported, tensors stand for others and must not be kept.
        if type(signs) is torch.Tensor:
            _MADE[size, dtype, device] = found
    return found

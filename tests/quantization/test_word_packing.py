"""Codes in 32-bit words against a slow loop over bits."""

from __future__ import annotations

import pytest
import torch

from diffuse_compress.errors import ConfigError, IncompatibleShapeError
from diffuse_compress.quantization.word_packing import from_unsigned, pack_words, unpack_words


def slow_words(codes: list[int], bits: int) -> list[int]:
    """One number whose lowest bits are the first code, cut into words."""
    number = sum(code << bits * i for i, code in enumerate(codes))
    words = [(number >> 32 * i) & 0xFFFFFFFF for i in range(-(-len(codes) * bits // 32))]
    return [word - (1 << 32) if word >> 31 else word for word in words]


@pytest.mark.parametrize("columns", [1, 8, 33, 64])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_words_are_the_bits_one_after_the_other(bits: int, columns: int) -> None:
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 1 << bits, (3, columns), generator=generator, dtype=torch.uint8)
    codes[0] = (1 << bits) - 1
    words = pack_words(codes, bits)
    assert words.tolist() == [slow_words(row, bits) for row in codes.tolist()]
    assert torch.equal(unpack_words(words, bits, columns), codes)
    assert torch.equal(pack_words(codes.T.contiguous().T, bits), words)


def test_our_containers_hold_the_same_codes() -> None:
    codes = torch.arange(16, dtype=torch.uint8).repeat(2, 16)
    signed = from_unsigned(codes, 8)
    assert signed.dtype == torch.int8
    assert torch.equal(signed.to(torch.int16), codes.to(torch.int16) - 128)
    assert from_unsigned(codes, 4).shape == (2, 128)


def test_other_tensors_are_refused() -> None:
    with pytest.raises(ConfigError, match="got 5"):
        pack_words(torch.zeros(1, 8, dtype=torch.uint8), 5)
    with pytest.raises(IncompatibleShapeError, match=r"got torch\.int8"):
        pack_words(torch.zeros(1, 8, dtype=torch.int8), 4)
    with pytest.raises(IncompatibleShapeError, match="rows of 2 words"):
        unpack_words(torch.zeros(1, 1, dtype=torch.int32), 4, 16)

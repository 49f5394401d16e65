"""Packing: bit-exact against a loop over bits that follows the documented diagrams and nothing else."""

from __future__ import annotations

import pytest
import torch

from diffuse_compress.errors import ConfigError, IncompatibleShapeError
from diffuse_compress.quantization.packing import pack, packed_columns, unpack

BITS = (4, 3, 2)
COLUMNS = (1, 63, 64, 100, 127, 128, 129, 320, 1152)


def _bit_place(bits: int, element: int, bit: int) -> tuple[int, int]:
    """(byte, bit in byte) that holds bit `bit` of element 0..127 of a group."""
    if bits == 4:
        return element % 64, 4 * (element // 64) + bit
    if bits == 3 and bit == 2:
        return 32 + element % 16, element // 16
    return element % 32, 2 * (element // 32) + bit


def _pack_slow(codes: list[list[int]], bits: int) -> list[list[int]]:
    rows = []
    for row in codes:
        groups = -(-len(row) // 128)
        data = [0] * (groups * 16 * bits)
        for k, code in enumerate(row):
            for bit in range(bits):
                byte, place = _bit_place(bits, k % 128, bit)
                data[k // 128 * 16 * bits + byte] |= (code >> bit & 1) << place
        rows.append([value - 256 if value > 127 else value for value in data])
    return rows


def _codes(rows: int, cols: int, bits: int) -> torch.Tensor:
    return torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (rows, cols), dtype=torch.int8)


def test_bit_places_cover_every_bit_of_a_group_once() -> None:
    for bits in BITS:
        places = [_bit_place(bits, element, bit) for element in range(128) for bit in range(bits)]
        assert sorted(places) == [(byte, bit) for byte in range(16 * bits) for bit in range(8)]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("cols", COLUMNS)
def test_pack_random_codes_equals_bit_loop(bits: int, cols: int) -> None:
    codes = _codes(5, cols, bits)
    packed = pack(codes, bits)
    assert packed.dtype == torch.int8
    assert packed.shape == (5, -(-cols // 128) * 16 * bits) == (5, packed_columns(cols, bits))
    assert packed.tolist() == _pack_slow(codes.tolist(), bits)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("cols", COLUMNS)
def test_unpack_of_bit_loop_gives_codes(bits: int, cols: int) -> None:
    codes = _codes(5, cols, bits)
    packed = torch.tensor(_pack_slow(codes.tolist(), bits), dtype=torch.int8)
    unpacked = unpack(packed, bits, cols)
    assert torch.equal(unpacked, codes)
    assert unpacked.is_contiguous()


@pytest.mark.parametrize("bits", BITS)
def test_unpack_every_byte_value_round_trips(bits: int) -> None:
    packed = torch.arange(256)[:, None] + 37 * torch.arange(16 * bits)
    packed = (packed % 256 - 128).to(torch.int8)
    codes = unpack(packed, bits, 128)
    assert set(codes.unique().tolist()) == set(range(-(2 ** (bits - 1)), 2 ** (bits - 1)))
    assert torch.equal(pack(codes, bits), packed)


def test_int4_layout_is_split_half_with_low_nibble_first() -> None:
    codes = torch.zeros(1, 256, dtype=torch.int8)
    codes[0, 128 + 5], codes[0, 128 + 64 + 5], codes[0, 0] = -3, 6, -8
    expected = torch.zeros(1, 128, dtype=torch.int8)
    expected[0, 64 + 5], expected[0, 0] = 0x6D, 0x08
    assert torch.equal(pack(codes, 4), expected)


@pytest.mark.parametrize("bits", BITS)
def test_padding_is_zero_codes(bits: int) -> None:
    packed = pack(_codes(3, 130, bits), bits)
    assert not unpack(packed, bits, 256)[:, 130:].any()


@pytest.mark.parametrize("bits", BITS)
def test_pack_and_unpack_non_contiguous_inputs_equal_contiguous(bits: int) -> None:
    codes = _codes(300, 7, bits).t()
    packed = pack(codes, bits)
    assert torch.equal(packed, pack(codes.contiguous(), bits))
    strided = torch.stack([packed, packed.flip(0)], dim=-1)[..., 0]
    assert not strided.is_contiguous()
    assert torch.equal(unpack(strided, bits, 300), codes)
    assert torch.equal(unpack(packed[2:5], bits, 300), codes[2:5])
    assert torch.equal(unpack(packed[::2], bits, 300), codes[::2])


@pytest.mark.parametrize("bits", BITS)
def test_pack_leaves_its_input_alone(bits: int) -> None:
    codes = _codes(4, 128, bits)
    before = codes.clone()
    packed = pack(codes, bits)
    kept = packed.clone()
    unpack(packed, bits, 128).zero_()
    assert torch.equal(codes, before)
    assert torch.equal(packed, kept)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", [(0, 200), (3, 0)])
def test_empty_codes_round_trip(bits: int, shape: tuple[int, int]) -> None:
    packed = pack(torch.zeros(shape, dtype=torch.int8), bits)
    assert packed.shape == (shape[0], packed_columns(shape[1], bits))
    assert unpack(packed, bits, shape[1]).shape == shape


@pytest.mark.parametrize("bits", BITS)
def test_meta_tensors_have_the_real_shapes(bits: int) -> None:
    packed = pack(torch.zeros(3, 129, dtype=torch.int8, device="meta"), bits)
    assert packed.is_meta
    assert packed.shape == (3, 32 * bits)
    assert unpack(packed, bits, 129).shape == (3, 129)


@pytest.mark.slow
@pytest.mark.parametrize("bits", BITS)
def test_unpack_compiled_equals_eager(bits: int) -> None:
    codes = _codes(3, 200, bits)
    assert torch.equal(torch.compile(unpack, fullgraph=True)(pack(codes, bits), bits, 200), codes)


def test_pack_wrong_inputs_are_refused() -> None:
    codes = torch.zeros(2, 128, dtype=torch.int8)
    with pytest.raises(ConfigError, match=r"bits must be one of \(2, 3, 4\), got 8"):
        pack(codes, 8)
    with pytest.raises(ConfigError, match="got 5"):
        packed_columns(128, 5)
    with pytest.raises(IncompatibleShapeError, match=r"int8 codes \[N, K\], got torch.int32"):
        pack(codes.int(), 4)
    with pytest.raises(IncompatibleShapeError, match=r"got torch.int8 \[128\]"):
        pack(codes[0], 4)
    with pytest.raises(IncompatibleShapeError, match=r"129 codes of 4 bits need int8 rows of 128 bytes, .*\[2, 64\]"):
        unpack(pack(codes, 4), 4, 129)

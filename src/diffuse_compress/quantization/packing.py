"""Packing of 4-, 3- and 2-bit codes into real bytes, in rows of 128-column groups.

Codes are signed two's complement. A row of K codes is padded with zero codes to G = ceil(K / 128) groups of 128
columns, and each group becomes ``16 * bits`` consecutive bytes: packed [N, G * 16 * bits]. Every code is rebuilt
from bytes of its own group alone, with masks and shifts of one or two bytes. ``e`` counts the columns in a group
from 0 to 127, bit 7 is the left one:

int4, 64 bytes: split half, byte j holds e = j and e = j + 64::

    bit     7 6 5 4   3 2 1 0
    byte j  [j + 64]  [  j  ]        j = 0..63

int2, 32 bytes: split in quarters::

    bit     7 6       5 4       3 2       1 0
    byte j  [j + 96]  [j + 64]  [j + 32]  [ j ]        j = 0..31

int3, 48 bytes: the two low bits of every code as an int2 group, then 16 bytes of sign bits::

    byte j       as int2, holding code & 3                               j = 0..31
    byte 32 + j  bit i is the sign (code < 0) of e = j + 16 * i          j = 0..15, i = 0..7

    code = low - 4 * sign

Schema versions freeze these layouts: they are what checkpoints hold. The int4 layout is also what the Triton
kernels read.
"""

from __future__ import annotations

import torch

from diffuse_compress.errors import ConfigError, IncompatibleShapeError

__all__ = ["GROUP_COLUMNS", "PACKED_BITS", "pack", "packed_columns", "unpack"]

GROUP_COLUMNS = 128
PACKED_BITS = (2, 3, 4)


def packed_columns(in_features: int, bits: int) -> int:
    """Bytes of one packed row of ``in_features`` codes."""
    _check_bits(bits)
    return -(-in_features // GROUP_COLUMNS) * (GROUP_COLUMNS // 8) * bits


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack codes [N, K] into bytes [N, ceil(K / 128) * 16 * bits]; layouts in the module docstring.

    Args:
        codes: int8 [N, K], each in [-2**(bits-1), 2**(bits-1) - 1]; the bits above are dropped. Any device
            (meta included) and strides, not modified.
        bits: 4, 3 or 2.

    Returns:
        int8, contiguous, on the device of ``codes``.

    Raises:
        ConfigError: another number of bits.
        IncompatibleShapeError: ``codes`` is not int8 [N, K].
    """
    _check_bits(bits)
    if codes.dim() != 2 or codes.dtype != torch.int8:
        raise IncompatibleShapeError(f"pack: need int8 codes [N, K], got {codes.dtype} {list(codes.shape)}.")
    rows, cols = codes.shape
    groups = -(-cols // GROUP_COLUMNS)
    padding = groups * GROUP_COLUMNS - cols
    if padding:
        codes = torch.nn.functional.pad(codes, (0, padding))
    grouped = codes.reshape(rows, groups, GROUP_COLUMNS)
    if bits == 4:
        packed = (grouped[..., 64:] << 4) | (grouped[..., :64] & 0x0F)
    elif bits == 2:
        packed = _pack_int2(grouped)
    else:
        sign = (grouped < 0).view(torch.int8).reshape(rows, groups, 8, 16)
        signs = sign[..., 0, :].clone()
        for i in range(1, 8):
            signs |= sign[..., i, :] << i
        packed = torch.cat([_pack_int2(grouped), signs], dim=-1)
    return packed.reshape(rows, groups * (GROUP_COLUMNS // 8) * bits)


def unpack(packed: torch.Tensor, bits: int, in_features: int) -> torch.Tensor:
    """Codes [N, in_features] of packed rows: the inverse of :func:`pack`.

    Rows are independent, so ``unpack(packed[n0:n1], bits, in_features)`` is rows n0..n1 of the whole.

    Args:
        packed: int8 [N, ceil(in_features / 128) * 16 * bits], any device (meta included) and strides.
        bits: 4, 3 or 2.
        in_features: K, the codes per row without padding.

    Returns:
        int8 [N, in_features], contiguous, sign-extended.

    Raises:
        ConfigError: another number of bits.
        IncompatibleShapeError: ``packed`` is not int8 or has another number of columns.

    Cost:
        Three passes and no temporary for int4; for int3 and int2 also temporaries of the result's size.
    """
    columns = packed_columns(in_features, bits)
    if packed.dim() != 2 or packed.dtype != torch.int8 or packed.shape[1] != columns:
        raise IncompatibleShapeError(
            f"unpack: {in_features} codes of {bits} bits need int8 rows of {columns} bytes, "
            f"got {packed.dtype} {list(packed.shape)}."
        )
    rows, groups, planes = packed.shape[0], -(-in_features // GROUP_COLUMNS), _num_planes(bits)
    grouped = packed.reshape(rows, groups, (GROUP_COLUMNS // 8) * bits)
    if torch.compiler.is_compiling():
        codes = torch.stack(_planes(grouped, bits), dim=2).reshape(rows, groups * GROUP_COLUMNS)
        return codes[:, :in_features].contiguous()
    out = torch.empty(rows, in_features, dtype=torch.int8, device=packed.device)
    whole = in_features // GROUP_COLUMNS
    end = whole * GROUP_COLUMNS
    if whole:
        view = out[:, :end].view(rows, whole, planes, GROUP_COLUMNS // planes)
        if bits == 4:
            # Arithmetic: int8 shifts to the right copy the sign bit.
            torch.bitwise_left_shift(grouped[:, :whole], 4, out=view[:, :, 0]).bitwise_right_shift_(4)
            torch.bitwise_right_shift(grouped[:, :whole], 4, out=view[:, :, 1])
        else:
            for i, plane in enumerate(_planes(grouped[:, :whole], bits)):
                view[:, :, i] = plane
    if whole < groups:
        tail = torch.stack(_planes(grouped[:, whole:], bits), dim=2).reshape(rows, GROUP_COLUMNS)
        out[:, end:] = tail[:, : in_features - end]
    return out


def _check_bits(bits: int) -> None:
    if bits not in PACKED_BITS:
        raise ConfigError(f"packing: bits must be one of {PACKED_BITS}, got {bits}.")


def _num_planes(bits: int) -> int:
    """Codes that share a byte, each taking one run of consecutive columns."""
    return 2 if bits == 4 else 4


def _pack_int2(grouped: torch.Tensor) -> torch.Tensor:
    quarters = (grouped & 3).reshape(*grouped.shape[:-1], 4, 32)
    packed = quarters[..., 0, :].clone()
    for i in range(1, 4):
        packed |= quarters[..., i, :] << 2 * i
    return packed


def _planes(grouped: torch.Tensor, bits: int) -> list[torch.Tensor]:
    """Codes of the groups [N, G, 16 * bits] as runs of consecutive columns: 2 of [N, G, 64] or 4 of [N, G, 32]."""
    if bits != 3:
        return [(grouped << (8 - bits * (i + 1))).bitwise_right_shift_(8 - bits) for i in range(8 // bits)]
    # Shifts of contiguous tensors are several times faster than those of slices of 32 bytes.
    low, signs = grouped[..., :32].contiguous(), grouped[..., 32:]
    # Run i holds columns 32 * i + j, whose signs are bit 2 * i of byte j and then bit 2 * i + 1 of byte j - 16.
    signs = torch.cat([signs, signs >> 1], dim=-1)
    return [
        (low >> 2 * i)
        .bitwise_and_(3)
        .bitwise_or_((signs << (7 - 2 * i)).bitwise_right_shift_(7).bitwise_left_shift_(2))
        for i in range(4)
    ]

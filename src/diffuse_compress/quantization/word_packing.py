"""Packing of codes into 32-bit words, as checkpoints of compressed-tensors, GPTQ and AWQ hold them.

Codes here are unsigned: ``q + 2**(bits - 1)`` of the signed code q. Word w of a row holds bits 32 * w to 32 * w + 31 of
the row's codes written one after the other, lowest bit first; of 3 bits some codes lie across two words::

    bit of the row  0 ... b-1   b ... 2b-1   ...
    code               [0]         [1]       ...

AWQ interleaves the eight columns of a word: bits 4i to 4i + 3 hold column ``AWQ_ORDER[i]``.
"""

from __future__ import annotations

import torch
from torch.nn.functional import pad

from diffuse_compress.errors import ConfigError, IncompatibleShapeError
from diffuse_compress.quantization.packed import QuantizedWeight
from diffuse_compress.quantization.packing import pack, unpack

__all__ = ["AWQ_ORDER", "from_unsigned", "pack_words", "unpack_words", "unsigned_codes"]

WORD_BITS = (2, 3, 4, 8)
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_WORD = 32


def pack_words(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Words [R, ceil(C * bits / 32)] of codes [R, C]; layout in the module docstring, the last word filled with zeros.

    Args:
        codes: uint8 [R, C], each below 2**bits. Any device and strides, not modified.
        bits: 2, 3, 4 or 8.

    Returns:
        int32, contiguous.

    Raises:
        ConfigError: another number of bits.
        IncompatibleShapeError: ``codes`` is not uint8 [R, C].

    Cost:
        Temporaries of twice the size of ``codes``; of 16 times for 3 bits.
    """
    _check(bits)
    if codes.dim() != 2 or codes.dtype != torch.uint8:
        raise IncompatibleShapeError(f"pack_words: need uint8 codes [R, C], got {codes.dtype} {list(codes.shape)}.")
    rows, columns = codes.shape
    # Eight codes of 3 bits end with a byte, as do one, two and four of the others.
    per_step = 8 if bits == 3 else 8 // bits
    words = -(-columns * bits // _WORD)
    steps = max(-(-words * _WORD // (bits * per_step)), -(-columns // per_step))
    grouped = pad(codes, (0, steps * per_step - columns)).reshape(rows, steps, per_step)
    if bits == 3:
        flat = torch.stack([(grouped >> i) & 1 for i in range(bits)], dim=-1).reshape(rows, -1, 8)
    else:
        flat = grouped
    packed = flat[..., 0].clone()
    for i in range(1, flat.shape[-1]):
        packed |= flat[..., i] << (i if bits == 3 else bits * i)
    return packed[:, : 4 * words].contiguous().view(torch.int32)


def unpack_words(words: torch.Tensor, bits: int, columns: int) -> torch.Tensor:
    """Codes uint8 [R, columns] of ``words``: the inverse of :func:`pack_words`.

    Args:
        words: int32 [R, ceil(columns * bits / 32)]. Any device and strides, not modified.
        bits: 2, 3, 4 or 8.
        columns: codes per row.

    Raises:
        ConfigError: another number of bits.
        IncompatibleShapeError: ``words`` is not int32 or has another number of columns.
    """
    _check(bits)
    expected = -(-columns * bits // _WORD)
    if words.dim() != 2 or words.dtype != torch.int32 or words.shape[1] != expected:
        raise IncompatibleShapeError(
            f"unpack_words: {columns} codes of {bits} bits need int32 rows of {expected} words, "
            f"got {words.dtype} {list(words.shape)}."
        )
    octets = words.contiguous().view(torch.uint8)
    if bits == 3:
        flat = torch.stack([(octets >> i) & 1 for i in range(8)], dim=-1).reshape(len(words), -1)
        flat = flat[:, : columns * bits].reshape(len(words), columns, bits)
        return flat[..., 0] | flat[..., 1] << 1 | flat[..., 2] << 2
    mask = (1 << bits) - 1
    codes = torch.stack([(octets >> bits * i) & mask for i in range(8 // bits)], dim=-1)
    return codes.reshape(len(words), -1)[:, :columns].contiguous()


def unsigned_codes(weight: QuantizedWeight) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes [N, K], zero points of the scale's shape) of an integer weight, both raised to begin at 0.

    Zero points of a symmetric weight are 2**(bits - 1). They are int16: out of range for those that no code has.
    """
    bits = weight.scheme.format.bits
    offset = 1 << (bits - 1)
    signed = weight.qweight.detach() if bits == 8 else unpack(weight.qweight.detach(), bits, weight.in_features)
    zero = weight.zero_point
    zeros = torch.zeros_like(weight.scale, dtype=torch.int16) if zero is None else zero.detach().to(torch.int16)
    return (signed.to(torch.int16) + offset).to(torch.uint8), zeros + offset


def from_unsigned(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Signed codes in our container, from unsigned ones [N, K]: int8 [N, K], packed below 8 bits."""
    signed = (codes.to(torch.int16) - (1 << (bits - 1))).to(torch.int8)
    return signed if bits == 8 else pack(signed, bits)


def _check(bits: int) -> None:
    if bits not in WORD_BITS:
        raise ConfigError(f"word_packing: bits must be one of {WORD_BITS}, got {bits}.")

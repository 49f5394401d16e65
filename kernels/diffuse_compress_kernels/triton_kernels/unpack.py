"""int4 weights in registers: from packed bytes to operands of a dot.

A byte holds the code of column j in its low and of column j + 64 in its high nibble (two's complement), so both
results of a function here are contiguous runs of 64 columns. Each function exists twice: with packed 32-bit
instructions (ASM), and in plain Triton, which compiles to up to three times the instructions but runs everywhere, the
interpreter included. Both give the same bits.

Which elements share an invocation of inline assembly is not specified, so the instructions work on each byte alone.
Only :func:`to_int8_scaled` needs the four bytes of a word to belong to one row: the dot's left operand holds four
consecutive columns in each register.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["codes_to_float", "to_float", "to_int8_scaled", "to_int8_times_16"]


@triton.jit
def to_int8_times_16(packed, ASM: tl.constexpr):
    """(low, high) int8 codes times 16: one mask each, and the factor is exact to undo in the int32 sum."""
    if ASM:
        low, high = tl.inline_asm_elementwise(
            """{
            .reg .b32 t;
            shl.b32 t, $2, 4;
            and.b32 $0, t, 0xF0F0F0F0;
            and.b32 $1, $2, 0xF0F0F0F0;
            }""",
            "=r,=r,r",
            [packed],
            dtype=(tl.int8, tl.int8),
            is_pure=True,
            pack=4,
        )
    else:
        low = ((packed & 0x0F) << 4).to(tl.int8, bitcast=True)
        high = (packed & 0xF0).to(tl.int8, bitcast=True)
    return low, high


@triton.jit
def to_int8_scaled(packed, scale, ASM: tl.constexpr):
    """(low, high) int8 of code * scale; ``scale`` int32 [rows, 1] in 1..16, at most 112 in magnitude.

    With u = code + 8, u * scale + (128 - 8 * scale) stays in a byte (0..248), so one 32-bit multiplication serves
    four codes without a carry; flipping bit 7 subtracts the 128.
    """
    if ASM:
        rows = tl.broadcast_to(scale, packed.shape)
        offsets = tl.broadcast_to((128 - 8 * scale) * 0x01010101, packed.shape)
        low, high = tl.inline_asm_elementwise(
            """{
            .reg .b32 t, u;
            xor.b32 t, $2, 0x88888888;
            and.b32 u, t, 0x0F0F0F0F;
            mad.lo.u32 u, u, $3, $7;
            xor.b32 $0, u, 0x80808080;
            shr.u32 t, t, 4;
            and.b32 t, t, 0x0F0F0F0F;
            mad.lo.u32 t, t, $3, $7;
            xor.b32 $1, t, 0x80808080;
            }""",
            "=r,=r,r,r,r,r,r,r,r,r,r",
            [packed, rows, offsets],
            dtype=(tl.int8, tl.int8),
            is_pure=True,
            pack=4,
        )
    else:
        low, high = to_int8_times_16(packed, False)
        factor = scale.to(tl.int8)
        low = (low >> 4) * factor
        high = (high >> 4) * factor
    return low, high


@triton.jit
def to_float(packed, BFLOAT16: tl.constexpr, ASM: tl.constexpr):
    """(low, high) codes plus 136 (bf16) or 1032 (fp16), exact: the nibble becomes the end of a mantissa.

    128 + u in bf16 is 0x4300 | u and 1024 + u in fp16 is 0x6400 | u, with u = code + 8 = nibble ^ 8.
    """
    if ASM:
        # Two bytes at a time: the operand's layout loads pairs, and four would first have to be put together.
        if BFLOAT16:
            low, high = tl.inline_asm_elementwise(
                """{
                .reg .b32 a, b;
                cvt.u32.u16 a, $2;
                prmt.b32 a, a, 0, 0x4140;
                shr.u32 b, a, 4;
                lop3.b32 $0, a, 0x000F000F, 0x43084308, 0x6A;
                lop3.b32 $1, b, 0x000F000F, 0x43084308, 0x6A;
                }""",
                "=r,=r,h",
                [packed],
                dtype=(tl.bfloat16, tl.bfloat16),
                is_pure=True,
                pack=2,
            )
        else:
            low, high = tl.inline_asm_elementwise(
                """{
                .reg .b32 a, b;
                cvt.u32.u16 a, $2;
                prmt.b32 a, a, 0, 0x4140;
                shr.u32 b, a, 4;
                lop3.b32 $0, a, 0x000F000F, 0x64086408, 0x6A;
                lop3.b32 $1, b, 0x000F000F, 0x64086408, 0x6A;
                }""",
                "=r,=r,h",
                [packed],
                dtype=(tl.float16, tl.float16),
                is_pure=True,
                pack=2,
            )
    else:
        magic: tl.constexpr = 0x4308 if BFLOAT16 else 0x6408
        dtype: tl.constexpr = tl.bfloat16 if BFLOAT16 else tl.float16
        low = ((packed & 0x0F).to(tl.uint16) ^ magic).to(dtype, bitcast=True)
        high = ((packed >> 4).to(tl.uint16) ^ magic).to(dtype, bitcast=True)
    return low, high


@triton.jit
def codes_to_float(codes, DTYPE: tl.constexpr, ASM: tl.constexpr):
    """8-bit codes as bf16 or fp16, exact. int8: seven bits end the mantissa of 128 (fp16: 1024), the sign bit that of
    what is subtracted: 0x4300 | 0x80 is 256 in bf16, 0x6400 | 0x80 is 1152 in fp16."""
    if ASM and codes.dtype == tl.int8:
        if DTYPE == tl.bfloat16:
            values = tl.inline_asm_elementwise(
                """{
                .reg .b32 a, c;
                cvt.u32.u16 a, $1;
                prmt.b32 a, a, 0, 0x4140;
                lop3.b32 c, a, 0x00800080, 0x43004300, 0xEA;
                lop3.b32 a, a, 0x007F007F, 0x43004300, 0xEA;
                fma.rn.bf16x2 $0, c, $2, a;
                }""",
                "=r,h,r",
                [codes, tl.full(codes.shape, -1.0, tl.bfloat16)],
                dtype=tl.bfloat16,
                is_pure=True,
                pack=2,
            )
        else:
            values = tl.inline_asm_elementwise(
                """{
                .reg .b32 a, c;
                cvt.u32.u16 a, $1;
                prmt.b32 a, a, 0, 0x4140;
                lop3.b32 c, a, 0x00800080, 0x64006400, 0xEA;
                lop3.b32 a, a, 0x007F007F, 0x64006400, 0xEA;
                sub.rn.f16x2 $0, a, c;
                }""",
                "=r,h",
                [codes],
                dtype=tl.float16,
                is_pure=True,
                pack=2,
            )
    else:
        values = codes.to(DTYPE)
    return values

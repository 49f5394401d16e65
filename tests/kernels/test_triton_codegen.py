"""Machine code of the kernels for GPUs that are not here: which tensor-core instruction, from where it takes the
unpacked weight, no spills, shared memory within each architecture's limit, and on Hopper a budget of instructions."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the kernels need triton")

from diffuse_compress_kernels.triton_kernels.gemv import w4a16_gemv_kernel
from diffuse_compress_kernels.triton_kernels.rows import quantize_rows_kernel, row_blocks, warps_for
from diffuse_compress_kernels.triton_kernels.tables import DEFAULT, MANY, TABLES, for_groups, table_for
from diffuse_compress_kernels.triton_kernels.tiles import TileConfig
from triton_codegen import SHARED_MEMORY, Code, compile_kernel, compile_product

INT8 = r"mma\.sync\.aligned\.m16n8k32\S*s32\.s8\.s8\.s32"
HALF = r"mma\.sync\.aligned\.m16n8k16\S*bf16"
TENSOR_CORE = {
    ("w8a8-int8", 80): INT8,
    ("w4a8", 86): INT8,
    ("w4a8", 89): INT8,
    ("w4a8-two-level", 120): INT8,
    ("w8a8-fp8", 89): r"mma\.sync\.aligned\.m16n8k32\S*e4m3\.e4m3",
    ("w4a16", 80): HALF,
    ("w4a16", 100): r"tcgen05\.mma",
    ("w8a8-fp8", 100): r"tcgen05\.mma",
}
# Left operand in registers: a list of registers, where a shared-memory operand is one descriptor.
REGISTER_OPERAND = r"wgmma\.mma_async\S+\s*\{[^}]*\},\s*\{"
# Kernel, tile, instruction, instructions per step of 128 columns (10 % over what Triton 3.6 and 3.9 emit).
INT8_WGMMA = r"m64n128k32\.s32\.s8\.s8"
HOPPER = {
    "w8a8 int8": ("w8a8-int8", TileConfig(128, 128, 128, 4, 3, tma=True), INT8_WGMMA, 105),
    "w8a8 fp8": (
        "w8a8-fp8",
        TileConfig(128, 256, 128, 8, 3, tma=True, weight_left=False),
        r"m64n256k32\.f32\.e4m3\.e4m3",
        105,
    ),
    "w4a8": ("w4a8", TileConfig(128, 128, 128, 4, 3), INT8_WGMMA, 170),
    "w4a8 two-level": ("w4a8-two-level", TileConfig(128, 128, 128, 4, 3), INT8_WGMMA, 275),
    "w4a8 few tokens": ("w4a8", TileConfig(16, 64, 128, 4, 5, split_k=4), r"m64n16k32\.s32\.s8\.s8", 105),
    "w8a16 few tokens": ("w8a16", TileConfig(16, 64, 128, 4, 5, split_k=4), r"m64n16k16\.f32\.bf16\.bf16", 320),
    "w4a16": ("w4a16", TileConfig(256, 128, 128, 8, 3, tma=True), r"m64n256k16\.f32\.bf16\.bf16", 370),
}


def largest(kind: str, capability: int) -> TileConfig:
    table = table_for((capability // 10, capability % 10))
    return next(choice.config for choice in table[kind.removesuffix("-two-level")] if choice.tokens == MANY)


def assert_fits(code: Code, capability: int) -> None:
    assert code.shared <= SHARED_MEMORY[capability]
    assert code.spills == 0


@pytest.mark.parametrize(("kind", "capability"), TENSOR_CORE)
def test_default_tiles_use_tensor_cores_and_fit(kind: str, capability: int, tmp_path: Path) -> None:
    code = compile_product(kind, largest(kind, capability), capability, tmp_path)
    assert re.search(TENSOR_CORE[kind, capability], code.ptx)
    assert_fits(code, capability)


@pytest.mark.parametrize(("kind", "config", "instruction", "budget"), HOPPER.values(), ids=HOPPER)
def test_hopper_code(kind: str, config: TileConfig, instruction: str, budget: int, tmp_path: Path) -> None:
    code = compile_product(kind, config, 90, tmp_path)
    assert re.search(r"wgmma\.mma_async\S*" + instruction, code.ptx)
    assert "mma.sync" not in code.ptx
    assert bool(re.search(REGISTER_OPERAND, code.ptx)) == (kind not in ("w8a8-int8", "w8a8-fp8")), (
        "where the left operand comes from"
    )
    assert "STS.U8" not in code.sass, "8-bit operands are stored byte by byte"
    assert 0 < code.loop <= budget
    assert_fits(code, 90)


@pytest.mark.slow
@pytest.mark.parametrize("capability", SHARED_MEMORY)
@pytest.mark.parametrize("kind", [*DEFAULT, "w4a8-two-level"])
def test_every_default_tile_fits(kind: str, capability: int, tmp_path: Path) -> None:
    if kind == "w8a8-fp8" and capability < 89:
        pytest.skip("float8 tensor cores begin with 8.9")
    table = table_for((capability // 10, capability % 10))
    for choice in table[kind.removesuffix("-two-level")]:
        group_sizes = (32, 64, 128, 0) if kind == "w4a16" else (128,)
        for group_size in group_sizes:
            config = for_groups(choice.config, group_size)
            assert_fits(compile_product(kind, config, capability, tmp_path, group_size=group_size), capability)


def test_row_quantization_moves_16_bytes_a_thread(tmp_path: Path) -> None:
    first, second, whole = row_blocks(3072)
    assert (first, second, whole) == (2048, 1024, True)
    sizes = dict.fromkeys(("K", "stride_xm", "stride_cm"), "i32")
    signature = {"x_ptr": "*bf16", "codes_ptr": "*i8", "scale_ptr": "*fp32", **sizes}
    constants = {"QMIN": -127, "QMAX": 127, "FIRST": first, "SECOND": second, "WHOLE": whole, "FMA": True}
    code = compile_kernel(quantize_rows_kernel, signature, constants, 90, warps_for(first), 1, tmp_path)
    assert "ld.global.v4.b32" in code.ptx
    assert "st.global.v4.b32" in code.ptx
    assert code.spills == 0
    assert code.registers <= 64


def test_gemv_multiplies_four_codes_at_a_time(tmp_path: Path) -> None:
    sizes = dict.fromkeys(("N", "K", "stride_xm", "stride_wn", "stride_sn", "stride_ym"), "i32")
    pointers = {"x_ptr": "*bf16", "w_ptr": "*i32", "scale_ptr": "*fp32", "zero_ptr": "*i8", "y_ptr": "*bf16"}
    constants = {"BLOCK_N": 8, "THREADS": 128, "EVEN_K": True, "ASM": True}
    code = compile_kernel(w4a16_gemv_kernel, {**pointers, **sizes}, constants, 90, 4, 1, tmp_path)
    assert len(re.findall(r"\bIDP\.4A", code.sass)) == 8 * 16, (
        "each thread converts and multiplies only its own columns"
    )
    assert code.spills == 0


def test_tables_name_the_architectures_they_were_measured_on() -> None:
    assert set(TABLES) == {(9, 0)}
    for table in (DEFAULT, *TABLES.values()):
        assert set(table) == {"w8a8-int8", "w8a8-fp8", "w4a8", "w4a16"}
        assert all(any(choice.tokens == MANY for choice in choices) for choices in table.values())

"""The attention kernels: their cases in the interpreter, and their machine code for GPUs that are not here."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="the kernels need triton")

from diffuse_compress_kernels.triton_kernels.attention import attention_kernel
from diffuse_compress_kernels.triton_kernels.attention_codes import codes_kernel, statistics_kernel
from diffuse_compress_kernels.triton_kernels.attention_tables import (
    ATTENTION_TABLES,
    DEFAULT_TILES,
    KEY_BLOCK,
    MEASURED,
    AttentionTile,
    attention_candidates,
    choose_attention,
    columns_of,
    is_measured,
)
from triton_codegen import SHARED_MEMORY, Code, compile_kernel

CASES = Path(__file__).with_name("triton_attention_cases.py")
INT8_WGMMA = r"wgmma\.mma_async\S*m64n128k32\.s32\.s8\.s8"
# The left operand of the second product, the probabilities, stays in registers.
IN_REGISTERS = r"\s*\{[^}]*\},\s*\{"


def test_kernels_in_the_interpreter() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(CASES)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-6000:]
    assert re.search(r"\b2\d passed", run.stdout), "cases were skipped"


def compile_attention(
    depth: int,
    tile: AttentionTile,
    capability: int,
    folder: Path,
    *,
    fast: bool,
    mask: str = "none",
    causal: bool = False,
) -> Code:
    first, second, third = columns_of(depth)
    kind = {"q_ptr": "*bf16", "k_ptr": "*i8", "v_ptr": "*fp8e4nv" if fast else "*bf16", "out_ptr": "*bf16"}
    kind |= {"k_scale_ptr": "*fp32", "logit_scale": "fp32"}
    kind |= {"v_scale_ptr": "*fp32"} if fast else {}
    kind |= {"mask_ptr": "*bf16"} if mask != "none" else {}
    sizes = [name for name in attention_kernel.arg_names if name.startswith("stride")]
    kind |= dict.fromkeys(("SQ", "SK", "eighths", "group", "k_blocks", *sizes), "i32")
    signature = {name: kind[name] for name in attention_kernel.arg_names if name in kind}
    constants: dict[str, Any] = {
        "HEAD": first, "MORE": second, "V_MORE": third, "EVEN": depth == first + third, "FLOAT8": fast, "MASK": mask,
        "CAUSAL": causal, "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "COMPILED": True,
    }  # fmt: skip
    return compile_kernel(attention_kernel, signature, constants, capability, tile.num_warps, tile.num_stages, folder)


def chosen(depth: int, capability: int, *, fast: bool, queries: int = 4096) -> AttentionTile:
    return choose_attention(queries, depth, (capability // 10, capability % 10), fp8_values=fast)


def assert_fits(code: Code, capability: int) -> None:
    assert code.shared <= SHARED_MEMORY[capability]
    # A register put aside before the loop and taken back after it costs nothing.
    assert code.spills <= 4
    steps = code.sass[code.sass.index("MMA") : code.sass.rindex("MMA")]
    assert code.spills == 0 or "STL" not in steps


# Instructions per step of 128 keys: 10 % over what Triton 3.9 emits for 64 logits a thread.
@pytest.mark.parametrize(
    ("depth", "fast", "second", "budget"),
    [
        (128, False, r"m64n128k16\.f32\.bf16\.bf16", 670),
        (128, True, r"m64n128k32\.f32\.e4m3\.e4m3", 630),
        pytest.param(72, True, r"m64n64k32\.f32\.e4m3\.e4m3", 640, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_hopper_code(depth: int, fast: bool, second: str, budget: int, tmp_path: Path) -> None:
    code = compile_attention(depth, chosen(depth, 90, fast=fast), 90, tmp_path, fast=fast)
    assert re.search(INT8_WGMMA, code.ptx)
    assert re.search(r"wgmma\.mma_async\S*" + second + IN_REGISTERS, code.ptx)
    assert "mma.sync" not in code.ptx
    assert "STS.U8" not in code.sass, "8-bit operands are stored byte by byte"
    assert not re.search(r"\bI2F(?!P|\.RP)", code.sass), "sums become floats at a quarter of the rate of I2FP"
    assert 0 < code.loop <= budget
    assert_fits(code, 90)


def test_probabilities_become_an_8_bit_operand_where_they_are(tmp_path: Path) -> None:
    """The order of keys saves the exchange between threads: shuffles are those of a row's maximum and sum alone."""
    code = compile_attention(64, chosen(64, 90, fast=True), 90, tmp_path, fast=True)
    loop = code.sass[: code.sass.index("QGMMA")]
    loop = loop[loop.rindex("IGMMA") :]
    assert len(re.findall(r"\bSHFL", loop)) <= 8
    assert not re.search(r"\bSTS\b", loop)


@pytest.mark.parametrize(("depth", "fast", "capability"), [(128, False, 80), (72, True, 89), (128, True, 120)], ids=str)
def test_other_architectures_use_tensor_cores_and_fit(depth: int, fast: bool, capability: int, tmp_path: Path) -> None:
    code = compile_attention(depth, chosen(depth, capability, fast=fast), capability, tmp_path, fast=fast)
    assert re.search(r"mma\.sync\.aligned\.m16n8k32\S*s32\.s8\.s8", code.ptx)
    assert not fast or re.search(r"mma\.sync\.aligned\.m16n8k32\S*e4m3\.e4m3", code.ptx)
    assert_fits(code, capability)


@pytest.mark.slow
@pytest.mark.parametrize("capability", SHARED_MEMORY)
@pytest.mark.parametrize("fast", [False, True], ids=["accurate", "fast"])
@pytest.mark.parametrize("depth", [64, 72, 80, 96, 128])
def test_every_tile_fits(depth: int, fast: bool, capability: int, tmp_path: Path) -> None:
    if fast and capability < 89:
        pytest.skip("float8 tensor cores begin with 8.9")
    for queries in (64, 4096):
        tile = chosen(depth, capability, fast=fast, queries=queries)
        for how in ({}, {"mask": "rows"}, {"causal": True}):
            assert_fits(compile_attention(depth, tile, capability, tmp_path, fast=fast, **how), capability)


def test_codes_move_16_bytes_a_thread(tmp_path: Path) -> None:
    def compiled(kernel: Any, kind: dict[str, str], warps: int, **constants: Any) -> Code:
        sizes = [
            name for name in kernel.arg_names if name.startswith("stride") or name in ("S", "eighths", "chunk", "heads")
        ]
        kind |= dict.fromkeys((*sizes, "chunks", "v_columns"), "i32")
        signature = {name: kind[name] for name in kernel.arg_names if name in kind}
        return compile_kernel(kernel, signature, {"BLOCK_D": 128, **constants}, 90, warps, 1, tmp_path)

    pointers = {"k_ptr": "*bf16", "v_ptr": "*bf16", "sums_ptr": "*fp32", "maxima_ptr": "*fp32"}
    code = compiled(statistics_kernel, dict(pointers), 4, BLOCK_S=64)
    assert code.spills == 0
    codes = {"k_codes_ptr": "*i8", "k_scale_ptr": "*fp32", "v_codes_ptr": "*fp8e4nv", "v_scale_ptr": "*fp32"}
    code = compiled(codes_kernel, pointers | codes, 8, BLOCK_S=KEY_BLOCK, COMPILED=True)
    assert code.spills == 0
    assert "st.global.v4.b32" in code.ptx


def test_tiles_are_chosen_by_device_and_number_of_queries() -> None:
    hopper = chosen(128, 90, fast=False)
    assert hopper == ATTENTION_TABLES[9, 0][True, False] != DEFAULT_TILES[True, False]
    assert chosen(128, 80, fast=False) == DEFAULT_TILES[True, False]
    assert chosen(128, 90, fast=False, queries=50).block_m == 64
    for tile in (*attention_candidates(), *DEFAULT_TILES.values(), *ATTENTION_TABLES[9, 0].values()):
        assert KEY_BLOCK % tile.block_n == 0
        assert AttentionTile(**tile.to_dict()) == tile
    assert len({tile.name for tile in attention_candidates()}) == len(attention_candidates())


def test_a_device_is_measured_when_the_table_says_so() -> None:
    assert not is_measured((8, 0))
    assert set(ATTENTION_TABLES) >= MEASURED
    assert replace(DEFAULT_TILES[False, False], num_stages=1).name == "128x64-w4s1"

"""The Triton convolution: its cases in the interpreter, its machine code for GPUs that are not here, its table."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="the kernels need triton")

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from diffuse_compress_kernels.triton_kernels.conv2d import conv2d_kernel
from diffuse_compress_kernels.triton_kernels.conv_candidates import conv_candidates
from diffuse_compress_kernels.triton_kernels.conv_geometry import ConvConfig, ConvShape, box_width, tiles_of_pixels
from diffuse_compress_kernels.triton_kernels.conv_quantize import pictures_kernel, runs_kernel
from diffuse_compress_kernels.triton_kernels.conv_tables import _DEFAULT, _HOPPER, choose_conv
from triton_codegen import SHARED_MEMORY, Code, inspect_code

CASES = Path(__file__).with_name("triton_conv_cases.py")
INT8 = r"mma\.sync\.aligned\.m16n8k32\S*s32\.s8\.s8\.s32"
BOX = ConvConfig("box", 128, 128, 128, 4, 3, weight_left=True)
SHIFT = ConvConfig("shift", 128, 128, 128, 4, 3, weight_left=True)
GATHER = ConvConfig("gather", 128, 128, 128, 4, 3, weight_left=True)


@pytest.mark.slow
def test_kernels_in_the_interpreter() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(CASES)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-6000:]
    assert re.search(r"\b4\d passed", run.stdout), "cases were skipped"


# --- machine code -----------------------------------------------------------------------------------------------


def compile_for(
    kernel: Any,
    types: dict[str, str],
    constants: dict[str, Any],
    aligned: set[str],
    capability: int,
    warps: int,
    stages: int,
    folder: Path,
) -> Code:
    """``types`` of pointers and descriptors; the rest are sizes, those in ``aligned`` multiples of 16."""
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    pointers = {name for name in types if types[name].startswith("*")}
    hints = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name in aligned | pointers}
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": False}
    source = ASTSource(kernel, signature, constants, hints)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return inspect_code(compiled, folder)


def compile_conv(config: ConvConfig, capability: int, folder: Path, *, even: bool = True) -> Code:
    """A 3x3 convolution of aligned sizes, channels-last result."""
    m, n, k, box = config.block_m, config.block_n, config.block_k, min(32, config.block_m)
    constants = {
        "TAPS": 9, "KW": 3, "SH": 1, "SW": 1, "DH": 1, "DW": 1, "X_SCALES": "samples", "W_SCALES": "rows",
        "MODE": config.mode, "BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "BLOCK_W": box, "GROUP_M": config.group_m,
        "SPLIT_K": config.split_k, "WEIGHT_LEFT": config.weight_left, "EVEN_C": even, "offset_ptr": None,
        "stride_yn": 1,
    }  # fmt: skip
    if config.split_k == 1:
        constants |= {"parts_ptr": None, "counters_ptr": None}
    x = {"box": f"tensordesc<i8[1, {m // box}, {box}, {k}]>", "shift": f"tensordesc<i8[{m}, {k}]>"}
    types = {"x": x.get(config.mode, "*i8"), "w": "*i8" if config.mode == "gather" else f"tensordesc<i8[{n}, {k}]>"}
    types |= {"y_ptr": "*bf16", "bias_ptr": "*bf16", "x_scale_ptr": "*fp32", "w_scale_ptr": "*fp32"}
    types |= {"parts_ptr": "*i32", "counters_ptr": "*i32"}
    types = {name: kind for name, kind in types.items() if name not in constants}
    aligned = {"N", "C", "HWO", "stride_wn", "stride_yb", "stride_yp"}
    return compile_for(
        conv2d_kernel, types, constants, aligned, capability, config.num_warps, config.num_stages, folder
    )


@pytest.mark.parametrize(
    ("config", "budget"), [(BOX, 130), (SHIFT, 130), (GATHER, 190)], ids=["box", "shift", "gather"]
)
def test_hopper_multiplies_out_of_shared_memory(config: ConvConfig, budget: int, tmp_path: Path) -> None:
    code = compile_conv(config, 90, tmp_path)
    assert re.search(r"wgmma\.mma_async\S*m64n128k32\.s32\.s8\.s8", code.ptx)
    assert "mma.sync" not in code.ptx
    # A register operand would be a list; both of these are descriptors of shared memory.
    assert not re.search(r"wgmma\.mma_async\S+\s*\{[^}]*\},\s*\{", code.ptx)
    assert "cp.async.bulk.tensor" in code.ptx or config.mode == "gather"
    assert "STS.U8" not in code.sass
    assert code.spills == 0
    # Two programs on a multiprocessor.
    assert code.shared <= SHARED_MEMORY[90] // 2
    assert code.registers <= 255
    assert 0 < code.loop <= budget


@pytest.mark.parametrize(
    ("capability", "instruction"),
    [(80, INT8), (86, INT8), (89, INT8), (100, r"tcgen05\.mma\S*kind::i8|" + INT8), (120, INT8)],
)
def test_default_configuration_uses_tensor_cores_and_fits(capability: int, instruction: str, tmp_path: Path) -> None:
    code = compile_conv(_DEFAULT[0][1][0][0], capability, tmp_path)
    assert re.search(instruction, code.ptx)
    assert code.spills == 0
    assert code.shared <= SHARED_MEMORY[capability]


@pytest.mark.slow
def test_every_measured_configuration_fits(tmp_path: Path) -> None:
    for config in {config.name: config for _, configs in _HOPPER for config, _ in configs}.values():
        for even in (True, False):
            code = compile_conv(config, 90, tmp_path, even=even)
            assert code.spills == 0, config.name
            assert code.shared <= SHARED_MEMORY[90], config.name


@pytest.mark.parametrize("last", [True, False], ids=["channels last", "contiguous"])
def test_quantization_moves_16_bytes_a_thread(last: bool, tmp_path: Path) -> None:
    constants: dict[str, Any] = {
        "given_ptr": None, "zero_ptr": None, "pre_ptr": None, "QMIN": -127, "QMAX": 127, "PARTS": 256, "COMPILED": True,
    }  # fmt: skip
    types = {"x_ptr": "*bf16", "codes_ptr": "*i8", "scale_ptr": "*fp32", "maxima_ptr": "*i32"}
    if last:
        constants |= {"EXACT": True, "BLOCK": 4096, "BLOCK_P": 16, "BLOCK_C": 256}
        aligned = {"C", "size", "length", "distance"}
    else:
        constants |= {"BLOCK_P": 64, "BLOCK_C": 64, "stride_xp": 1}
        aligned = {"C", "HW", "CS", "stride_xb", "stride_xc"}
    code = compile_for(runs_kernel if last else pictures_kernel, types, constants, aligned, 90, 4, 1, tmp_path)
    assert "ld.global.L1::evict_first" in code.ptx or "evict_first" in code.ptx
    assert re.search(r"ld\.global\S*\.v4\.b32", code.ptx)
    assert re.search(r"st\.global\S*\.v4\.b32", code.ptx)
    assert code.spills == 0


# --- shapes and table -------------------------------------------------------------------------------------------


def test_box_width_wastes_least() -> None:
    assert box_width((128, 128), 128) == 128
    assert box_width((64, 64), 128) == 64
    assert box_width((32, 32), 256) == 32
    height, width = 26, 38
    best = box_width((height, width), 128)
    tiles = {w: -(-height // (128 // w)) * -(-width // w) for w in (1, 2, 4, 8, 16, 32, 64, 128)}
    assert tiles[best] == min(tiles.values())


def test_layout_reaches_every_border() -> None:
    shape = ConvShape(3, 11, 9, 20, (3, 5), padding=(2, 1, 0, 1))
    assert shape.out == (10, 8)
    assert shape.stored_channels == 32
    assert shape.gap == (1, 2)
    assert shape.first >= 0
    rows, columns = shape.pitch
    last = shape.first + ((3 - 1) * rows + shape.out[0] - 1 + 2) * columns + shape.out[1] - 1 + 4
    assert last < shape.pixels


@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (12, 0)])
def test_choose_conv_can_run_what_it_chooses(capability: tuple[int, int]) -> None:
    for samples, channels, height, width, outputs, kernel, stride in (
        (2, 320, 128, 128, 320, 3, 1), (2, 640, 64, 64, 640, 3, 2), (1, 4, 13, 7, 8, 3, 1),
        (8, 2560, 26, 38, 1280, 1, 1), (1, 1280, 8, 8, 1280, 3, 1),
        (2, 512, 512, 512, 512, 3, 1), (1, 12, 3, 3, 5, 5, 3),
    ):  # fmt: skip
        border = kernel // 2
        shape = ConvShape(samples, height, width, channels, (kernel,) * 2, (stride,) * 2, (border,) * 4)
        for zero_point in (False, True):
            config = choose_conv(shape, outputs, capability, zero_point=zero_point)
            assert shape.fits(config.mode)
            assert not (zero_point and border and config.mode == "box")
            assert tiles_of_pixels(shape, config) * config.block_m >= samples * shape.out[0] * shape.out[1]


def test_choose_conv_finds_the_measured_shape() -> None:
    shape = ConvShape(2, 32, 32, 2560, (3, 3), padding=(1, 1, 1, 1))
    measured = next(configs for sizes, configs in _HOPPER if sizes == (2048, 1280, 2560, 9, 1))
    assert choose_conv(shape, 1280, (9, 0), zero_point=False) == measured[0][0]
    assert any(config.split_k > 1 for config in conv_candidates(shape))

"""The fused producers: their cases in the interpreter, and their machine code for GPUs that are not here."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="the kernels need triton")

import triton.language as tl

from diffuse_compress_kernels.triton_kernels.fused_rows import activation_kernel, blocks_for, norm_kernel, warps_for
from triton_codegen import Code, compile_kernel

CASES = Path(__file__).with_name("triton_producer_cases.py")


def test_kernels_in_the_interpreter() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(CASES)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-6000:]
    assert re.search(r"\b7\d passed", run.stdout), "cases were skipped"


def compile_norm(columns: int, capability: int, folder: Path, qmax: int = 127, work: Any = tl.bfloat16) -> Code:
    head, tail = blocks_for(columns)
    constants = {
        "RMS": False, "WORK": work, "OUT": tl.bfloat16, "QMIN": -qmax, "QMAX": qmax, "HEAD": head, "TAIL": tail,
        "EXACT": head + tail == columns, "COMPILED": True,
    }  # fmt: skip
    vector = "*bf16" if work == tl.bfloat16 else "*fp32"
    signature = {"x_ptr": "*bf16", "scale_ptr": vector, "shift_ptr": vector, "scale_out_ptr": "*fp32", "eps": "fp32"}
    signature |= {"codes_ptr": "*i8" if qmax == 127 else "*fp8e4nv"}
    signature |= dict.fromkeys(("K", "tokens", "stride_xm", "stride_scale", "stride_shift"), "i32")
    return compile_kernel(norm_kernel, signature, constants, capability, warps_for(columns), 1, folder)


def compile_activation(columns: int, kind: str, folder: Path, *, gated: bool) -> Code:
    head, tail = blocks_for(columns)
    constants = {
        "KIND": kind, "OUT": tl.bfloat16, "QMIN": -127, "QMAX": 127, "HEAD": head, "TAIL": tail,
        "EXACT": head + tail == columns, "COMPILED": True,
    }  # fmt: skip
    signature = {"x_ptr": "*bf16", "codes_ptr": "*i8", "scale_out_ptr": "*fp32"}
    signature |= {"other_ptr": "*bf16"} if gated else {}
    signature |= dict.fromkeys(("K", "stride_xm", "stride_om"), "i32")
    return compile_kernel(activation_kernel, signature, constants, 90, warps_for(columns), 1, folder)


def assert_row_program(code: Code) -> None:
    assert "ld.global.v4.b32" in code.ptx
    assert re.search(r"st\.global\.v[24]\.b32", code.ptx)
    assert code.spills == 0
    # Four warps or more on each quarter of a multiprocessor.
    assert code.registers <= 128


@pytest.mark.parametrize("columns", [1152, 3072, 5120, 1900])
def test_norm_on_hopper(columns: int, tmp_path: Path) -> None:
    code = compile_norm(columns, 90, tmp_path)
    assert_row_program(code)
    assert re.search(r"H(MUL2|FMA2)\S*BF16", code.sass), "16-bit results are computed two at a time"


@pytest.mark.parametrize("capability", [80, 86, 89, 100, 120])
def test_norm_on_other_devices(capability: int, tmp_path: Path) -> None:
    assert_row_program(compile_norm(1536, capability, tmp_path, work=tl.float32))


def test_norm_with_float8_codes(tmp_path: Path) -> None:
    code = compile_norm(3072, 90, tmp_path, qmax=448)
    assert_row_program(code)
    assert re.search(r"cvt\.rn\.satfinite\.e4m3x2", code.ptx)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("kind", ["gelu", "gelu_tanh", "silu"])
def test_activations_on_hopper(kind: str, gated: bool, tmp_path: Path) -> None:
    assert_row_program(compile_activation(4608, kind, tmp_path, gated=gated))
